"""Small text files of every kind, written and read by the tests of documents and loaders."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq


def words(n, first=0):
    """n different documents of different lengths."""
    return [f"{i:04d}" + "." * (i * 7 % 40) for i in range(first, first + n)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        pq.write_table(pa.table({"text": rows}), path, row_group_size=16)
    elif path.name.endswith(".jsonl"):
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress("".join(json.dumps({"text": row}) + "\n" for row in rows).encode()))
    else:
        path.write_text("\n<|endoftext|>\n".join(rows))
    return path


def read(source, split="train", **kwargs):
    return [text for text, _ in source.iterate(split, loop=False, **kwargs)]
