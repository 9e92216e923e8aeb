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
        return path
    if ".jsonl" in path.name:
        content = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    else:
        content = "\n<|endoftext|>\n".join(rows).encode()
    pack = {".gz": gzip.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    path.write_bytes(pack.get(path.suffix, bytes)(content))
    return path


def read(source, split="train", **kwargs):
    return [text for text, _ in source.iterate(split, loop=False, **kwargs)]
