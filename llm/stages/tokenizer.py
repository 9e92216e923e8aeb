"""The tokenizer stage: byte-level BPE on the training text, with a table of how well it compresses."""

import time
from pathlib import Path

from llm.data.documents import DocumentSource, texts
from llm.data.sources import document_source
from llm.run.content import write_content
from llm.stages.job import Job, show_config
from llm.stages.start import change_lines
from llm.tokenizer.bpe import Tokenizer, checked_pattern, split_pattern, train_tokenizer
from llm.tokenizer.compression import SAMPLE_TEXTS, compression_table, format_compression_table, named_encoders
from llm.tokenizer.pretrained import load_pretrained
from llm.utils.files import replaced_folder, write_atomic
from llm.utils.format import amount

TABLE_CHARS = 200_000  # of the training and of the validation text


def prepared(stage) -> Tokenizer | str:
    """Validate the settings; return a pretrained tokenizer or the split pattern to train with."""
    if stage.pretrained is not None:
        return load_pretrained(stage.pretrained)
    return split_pattern(stage.digits, stage.marks) if stage.pattern is None else checked_pattern(stage.pattern)


def run(job: Job) -> dict | None:
    """Train or take over the tokenizer and save it to model/; returns the values of run.json, None after a dry run."""
    cfg, stage = job.cfg, job.cfg.stage
    ready = prepared(stage)
    size = f"{stage.vocab_size:,} tokens, from at most {amount(stage.max_chars)} characters of text"
    print(
        "\n".join([size if isinstance(ready, str) else f"{ready.vocab_size:,} tokens", *change_lines(cfg)]), flush=True
    )
    if cfg.verbose:
        show_config(cfg)
    if cfg.dry_run:
        return None
    source = document_source(cfg.data, cfg.paths.data)
    others = named_encoders(stage.compare)
    job.begin()
    start = time.perf_counter()
    tokenizer = ready
    if isinstance(ready, str):
        limits = (stage.vocab_size, stage.max_chars, stage.doc_cap)
        tokenizer = train_tokenizer(texts(source, "train"), *limits, ready)
    seconds, done = time.perf_counter() - start, "trained" if isinstance(ready, str) else f"took {stage.pretrained}'s"
    print(f"{done} {tokenizer.vocab_size:,} tokens in {seconds:.1f} s", flush=True)
    compression = write_compression(tokenizer, source, others, job.stage_dir)
    with replaced_folder(job.stage_dir / "model") as folder:
        tokenizer.save(folder)
        write_content(folder)
    sizes = tokenizer.token_bytes()
    sizes = sizes[sizes > 0]
    derived = {
        "vocab_size": tokenizer.vocab_size,
        "token_bytes_mean": sizes.mean(),
        "token_bytes_max": sizes.max(),
    }
    return {"derived": derived, "metrics": compression | {"train_seconds": seconds}}


def write_compression(tokenizer: Tokenizer, source: DocumentSource, others: dict, stage_dir: Path) -> dict[str, float]:
    """Print the table of compression and write it to compression.md; returns bytes per token by kind of text."""
    samples = SAMPLE_TEXTS | {split: head(texts(source, split), TABLE_CHARS) for split in ("train", "val")}
    table = compression_table(tokenizer, samples, others)
    text = format_compression_table(table)
    print(text, flush=True)
    write_atomic(stage_dir / "compression.md", text + "\n")
    return {f"bytes_per_token_{row['text']}": row["ratio"] for row in table}


def head(documents, n_chars: int) -> str:
    """Return the first `n_chars` characters of a stream of documents."""
    parts, length = [], 0
    for text in documents:
        parts.append(text[: n_chars - length])
        length += len(parts[-1])
        if length >= n_chars:
            break
    return "\n".join(parts)
