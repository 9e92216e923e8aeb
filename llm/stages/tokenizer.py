"""The tokenizer stage: byte-level BPE on the training text, with a table of how well it compresses."""

import time
from pathlib import Path

from llm.data.documents import texts
from llm.stages.build import document_source
from llm.tokenizer import train_tokenizer

TABLE_CHARS = 200_000  # of each text in the compression table


def run(cfg, stage_dir: Path) -> dict:
    """Train, save to `stage_dir`/model, and return the values of run.json: derived numbers and metrics."""
    stage, source = cfg.stage, document_source(cfg.data)
    start = time.perf_counter()
    tokenizer = train_tokenizer(texts(source, "train"), stage.vocab_size, stage.max_chars, stage.doc_cap)
    seconds = time.perf_counter() - start
    tokenizer.save(stage_dir / "model")
    metrics = {}
    for split in ("train", "val"):
        text = head(texts(source, split), TABLE_CHARS)
        n_bytes = len(text.encode())
        metrics[f"bytes_per_token_{split}"] = n_bytes / max(len(tokenizer.encode(text)), 1)
    sizes = tokenizer.token_bytes()
    sizes = sizes[sizes > 0]
    derived = {"vocab_size": tokenizer.vocab_size, "token_bytes_mean": float(sizes.mean()), "token_bytes_max": int(sizes.max())}
    return {"derived": derived, "metrics": metrics | {"train_seconds": seconds}, "seconds": seconds}


def head(documents, n_chars: int) -> str:
    """The first `n_chars` characters of a stream of documents."""
    parts, length = [], 0
    for text in documents:
        parts.append(text[: n_chars - length])
        length += len(parts[-1])
        if length >= n_chars:
            break
    return "\n".join(parts)


