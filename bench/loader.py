"""Cost of the pretraining loader: reading, tokenising, packing and the whole, from text and from a cache of tokens.

Rates are tokens per second of CPU time, which a busy machine changes little, and of the clock; the parts take turns.
Text is `--path` (files as data.path) or generated words; the tokenizer is trained on its first characters. `--far` is a
folder of an object store, such as s3://bucket/here: a copy of the text and its tokens are put there and read.
"""

import resource
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import _bench  # noqa: F401  first: it sets up the process
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm.data.documents import LocalDocuments, texts
from llm.data.loader import StepLayout, TextSteps
from llm.data.packing import PACKINGS, Document
from llm.data.stores import upload
from llm.data.tokens import CachedDocuments, encoded
from llm.tokenizer.bpe import train_tokenizer

DOCUMENTS = 4000  # on which the parts of the loader are measured


def generated(folder: Path, chars: int) -> Path:
    """Write two parquet shards of words with a long tail of frequencies; the second, a tiny one, validates."""
    rng, folder = np.random.default_rng(0), folder / "text"
    folder.mkdir()
    letters = np.array(list("etaoinshrdlucmfwygpb"))
    words = np.array(["".join(rng.choice(letters, n)) for n in rng.integers(2, 10, 20_000)])
    for name, size in (("a", chars), ("b", 100_000)):
        rows, have = [], 0
        while have < size:
            picks = rng.zipf(1.3, int(rng.lognormal(6.3, 0.6))) % len(words)
            rows.append(" ".join(words[picks]))
            have += len(rows[-1])
        pq.write_table(pa.table({"text": rows}), folder / f"{name}.parquet", row_group_size=1000)
    return folder


def rates(parts: dict[str, Callable[[], int]], repeats: int) -> dict[str, tuple[float, float]]:
    """Return the median million tokens per second of CPU time and of the clock, by part."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in parts}
    for turn in range(repeats + 1):
        for name, part in parts.items():
            cpu, clock = time.process_time(), time.perf_counter()
            tokens = part() / 1e6
            if turn:
                seen[name].append((tokens / (time.process_time() - cpu), tokens / (time.perf_counter() - clock)))
    return {
        name: tuple(_bench.median(list(values)) for values in zip(*pairs, strict=True)) for name, pairs in seen.items()
    }


def main() -> None:
    """Measure every part and print the rates."""
    numbers = {"seq-len": 2048, "rows": 16, "vocab": 8192, "buffer": 1000, "steps": 30, "repeats": 5}
    args = _bench.arguments(__doc__, numbers | {"chars": 20_000_000}, path="", packing="best_fit", far="")
    with tempfile.TemporaryDirectory() as folder:
        source = LocalDocuments(args.path or generated(Path(folder), args.chars))
        tokenizer = train_tokenizer(texts(source), args.vocab, 20_000_000, 10_000)
        some = list(islice(texts(source), DOCUMENTS))
        documents = [Document(tokenizer.encode_document(text)) for text in some]

        def steps(reads) -> Callable[[], int]:
            layout = StepLayout(args.seq_len, args.rows)
            running = TextSteps(reads, tokenizer, layout, packing=args.packing, buffer=args.buffer).steps()
            next(running)
            return lambda: sum(step["n_tokens"] for step in islice(running, args.steps))

        def pack() -> int:
            packer, coming = PACKINGS[args.packing](args.seq_len + 1, args.buffer), cycle(documents)
            ids, mask = np.empty(args.seq_len + 1, np.int32), np.empty(args.seq_len + 1, bool)
            return sum(packer.fill(ids, mask, coming) for _ in range(args.rows * args.steps))

        cache = CachedDocuments(source, tokenizer, Path(folder) / "cache")
        written = sum(1 for _ in cache.iterate("train", loop=False))  # the whole cache, before anything is measured
        print(f"{written:,} documents", flush=True)
        parts = {
            "tokenizer": lambda: sum(len(tokenizer._encoding.encode_ordinary(text)) for text in some),
            "tokenise": lambda: sum(len(ids) for ids, _ in encoded(((text, {}) for text in some), tokenizer)),
            "pack": pack,
            "whole": steps(source),
            "cached": steps(cache),
        }
        if args.far:
            for file in source.files:
                upload(file, f"{args.far}/text/{file.name}", "--far")
            copy = LocalDocuments(f"{args.far}/text")
            far = CachedDocuments(copy, tokenizer, f"{args.far}/tokens")
            sum(1 for _ in far.iterate("train", loop=False))
            parts |= {"far_whole": steps(copy), "far_cached": steps(far)}
        measured = rates(parts, args.repeats)
    result = {"text": args.path or "generated", "packing": args.packing, "seq_len": args.seq_len, "rows": args.rows}
    for name, (cpu, clock) in measured.items():
        result |= {f"{name}_mtok_per_cpu_s": cpu, f"{name}_mtok_per_s": clock}
    ceiling = measured["tokenizer"][0]
    result |= {f"{name}_to_tokenizer": measured[name][0] / ceiling for name in measured if name != "tokenizer"}
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    _bench.show(result)


if __name__ == "__main__":
    main()
