"""Write the tokens of a text ahead of training: stage=write_tokens, by one job or by many at once.

Every job writes the token files of its part of the text's files, and the same tokens.json. What is written and up to
date is left as it is, so that a job may be run again; what a killed one left behind is never read.
"""

import time
from pathlib import Path

from llm.data.hub_documents import HubDocuments
from llm.data.shuffle import fits
from llm.data.sources import document_source
from llm.data.token_documents import VERSION, write_index
from llm.data.tokens import CachedDocuments
from llm.errors import UserError
from llm.run.stage_folder import find_parent
from llm.tokenizer.bpe import Tokenizer


def run(cfg) -> None:
    """Write the token files of stage.part. Raises UserError for settings that cannot be kept."""
    part, parts, folder = cfg.stage.part, cfg.stage.parts, cfg.data.token_cache
    if part >= parts:
        raise UserError(f"stage.part={part}: with stage.parts={parts} the parts are 0 to {parts - 1}")
    if not folder:
        raise UserError("data.token_cache is not set: name the folder, or the address, that the tokens go to")
    folder = Path(cfg.paths.runs) / "token_cache" if folder is True else folder
    name = cfg.run or f"d{cfg.model.depth}"
    tokenizer = Tokenizer.load(find_parent(cfg.paths.runs, name, "pretrain", cfg.init_from, asking=cfg.stage.name))
    cached = CachedDocuments(document_source(cfg.data, cfg.paths.data), tokenizer, folder, is_final=True)
    shards = {split: list(cached.text.shards(split)) for split in ("train", "val")}
    mine = [shard for number, shard in enumerate([*shards["train"], *shards["val"]]) if number % parts == part]
    print(f"part {part} of {parts}: {len(mine)} of {sum(map(len, shards.values()))} token files", flush=True)
    if cfg.dry_run:
        return
    begin = time.perf_counter()
    index = {split: [cached.name_of(shard) for shard in of] for split, of in shards.items()}
    write_index(cached.folder, facts(cached, tokenizer) | index)
    written = sum(map(cached.make, mine))
    seconds = time.perf_counter() - begin
    print(
        f"{written} token files written, {len(mine) - written} were up to date, {seconds:.1f} s: {folder}", flush=True
    )
    shuffle = "" if cfg.data.shuffle is None else f" data.shuffle={cfg.data.shuffle}"  # data=own has one of its own
    print(f"train on them, once all parts are written: data=tokens data.path={folder}{shuffle}", flush=True)


def facts(cached: CachedDocuments, tokenizer: Tokenizer) -> dict:
    """Return what tokens.json says of the tokens; whole: whether `data.shuffle` shuffles the text as one list."""
    return {
        "version": VERSION,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "whole": not isinstance(cached.text, HubDocuments) and fits(cached.text.files),
    }
