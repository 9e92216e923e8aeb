"""The user's files that a stage trains on, compared on a resume with those that it began with.

A position counts rows, so in other files it would go on at another place, and nobody would notice.
"""

import hashlib
import os
from itertools import zip_longest
from pathlib import Path

from llm.config.stages import CHAT_KINDS
from llm.errors import UserError
from llm.stages.data_check import read_tasks
from llm.stages.job import Job
from llm.stages.parents import holds_work

END_BYTES = 1 << 16  # read at the beginning and at the end of a file: terabytes of text must not delay a start


def check_same_files(job: Job) -> None:
    """Note the stage's own files in run.json; UserError where an unfinished stage was begun with others.

    Files of stores and of the hub are not looked at, nor is a run.json of an older release, which names none.
    """
    cfg, row = job.cfg, job.row
    if row.reads_text:
        what, files = "text", _text_files(cfg)
    elif row.kind in CHAT_KINDS and not cfg.dry_run:
        from tasks.registry import all_specs, local_files

        what, files = "rows", local_files(all_specs(cfg.data), read_tasks(cfg, row)[0], "train")
    else:
        return
    paths = dict.fromkeys(getattr(file, "archive", file) for file in files)
    now = [[path.name, content_sum(path)] for path in paths if isinstance(path, Path)]
    if now:
        job.manifest["texts"] = now
    record = job.run.manifest(row.name) or {}
    if cfg.overwrite or cfg.dry_run or not holds_work(job.stage_dir) or record.get("texts") is None:
        return
    for begun, present in zip_longest(record["texts"], now):
        if begun != present:
            raise UserError(
                f"{job.stage_dir}: this stage was begun with other {what}: {_change(begun, present)}. Put the files "
                "back, or overwrite=true starts the stage again"
            )


def _text_files(cfg) -> list:
    """Return the files of text, or of token ids of other programs, on this machine that `data` names."""
    from llm.data.documents import LocalDocuments
    from llm.data.sources import build_source, is_remote
    from llm.data.token_documents import ForeignTokens

    if cfg.data.name not in ("local", "tokens", "mixture") or (cfg.dry_run and is_remote(cfg.data)):
        return []
    source = build_source(cfg.data, cfg.paths.data)
    if isinstance(source, ForeignTokens):
        return [file.path for split in ("train", "val") for file in source.shards(split)]
    parts = getattr(source, "sources", {"": source}).values()
    return [file for part in parts if isinstance(part, LocalDocuments) for file in part.files]


def _change(begun: list[str] | None, present: list[str] | None) -> str:
    """Say in words what became of a file [name, sum]; None: there is no further file."""
    if begun is None:
        return f"{present[0]} is new"
    if present is None:
        return f"{begun[0]} is missing"
    return f"{begun[0]} has changed" if begun[0] == present[0] else f"{present[0]} is in the place of {begun[0]}"


def content_sum(path: Path) -> str:
    """Return the bytes of a file and a hash of its first and last END_BYTES, `<bytes>-<hash>`."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256()
        for start in (0, max(0, size - END_BYTES)):
            file.seek(start)
            digest.update(file.read(END_BYTES))
    return f"{size}-{digest.hexdigest()[:16]}"
