"""Estimate how many tokens the training text of a source holds, in about a second.

The characters of a sample are tokenised. Text of up to `EXACT_BYTES` of files is read once and its characters are
counted; of larger text the size of the files says how much there is, and the beginnings of some how much of that is
text.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from llm.data.documents import FileDocuments, Shard, gives_ids, texts
from llm.data.embedded_documents import EmbeddedDocuments
from llm.data.files import ZipMember, format_of, kind_of, split_suffix
from llm.data.formats import Column, count_rows, text_bytes, text_share
from llm.data.sample import PLACES, is_here, spread_documents
from llm.data.stores import StoredFile
from llm.data.text_mixture import MixedDocuments

EXACT_BYTES = 16 * 2**20
SAMPLE_DOCUMENTS, SAMPLE_CHARS = 1000, 400_000
COMPRESSED = 3.0  # bytes of text for one byte of a .gz or .zst file, roughly


def passes_over(source, tokenizer, planned: int) -> tuple[int | None, float | None]:
    """Return the tokens of the training text of `source` and how often a run of `planned` tokens reads them.

    Of a mixture, the passes are those of the source that is read most often. (None, None) where the size is unknown:
    no source, text of the hub that is not all here, or a source of a plugin.
    """
    source = getattr(source, "text", source)  # behind a cache of tokens
    parts = [(source, 1.0)]
    if isinstance(source, MixedDocuments):
        parts = [(part, source.weights[name]) for name, part in source.sources.items()]
    sizes = [text_tokens(part, tokenizer) for part, _ in parts]
    if any(not size for size in sizes):
        return None, None
    passes = max(planned * weight / size for size, (_, weight) in zip(sizes, parts, strict=True))
    return sum(sizes), passes


def text_tokens(source, tokenizer) -> int | None:
    """Return about how many tokens, BOS included, the training documents of one source hold; None if unknown."""
    if isinstance(source, EmbeddedDocuments):
        sample = list(islice(texts(source), SAMPLE_DOCUMENTS))
        return round(_tokens(sample, tokenizer) / len(sample) * len(source))
    if gives_ids(source):
        return source.tokens("train")
    if not isinstance(source, FileDocuments) or not all(map(is_here, source.shards("train"))):
        return None
    paths = {shard.path for shard in source.shards("train")}
    if sum(map(_text_bytes, paths)) <= EXACT_BYTES:
        return _by_reading(texts(source), tokenizer)
    kept = 1.0 if source.near_duplicates is None else source.near_duplicates.share_kept()
    return round(kept * _by_files(source, tokenizer))


def _by_reading(documents: Iterable[str], tokenizer) -> int:
    """Count the characters of all documents; tokenise a sample of them, spread over the text."""
    found = list(documents)
    chars = sum(map(len, found))
    sample = _sample(found[:: max(1, len(found) // SAMPLE_DOCUMENTS)])
    return round(_tokens(sample, tokenizer) / sum(map(len, sample)) * chars)


def _by_files(source: FileDocuments, tokenizer) -> int:
    """Take tokens per byte of documents from many places for the bytes of text in all files.

    How much of a file is text, the beginnings of up to `PLACES` files tell. In a store a look into a file costs
    requests: the names tell the formats, and the first file stands for all.
    """
    found = spread_documents(source, SAMPLE_DOCUMENTS, SAMPLE_CHARS)
    sample = [text[: SAMPLE_CHARS // PLACES] for text, _ in found]
    per_byte = _tokens(sample, tokenizer) / sum(len(text.encode("utf-8", "surrogatepass")) for text in sample)
    total, text_per_byte, others = 0.0, None, []
    for shard in source.shards("train"):
        in_store = isinstance(shard.path, StoredFile)
        if (kind_of(shard.path.name) if in_store else format_of(shard.path).kind) != "parquet":
            others.append(shard.path)
        elif in_store and shard.stop is None:
            size = shard.path.stat().st_size
            text_per_byte = text_per_byte or text_bytes(shard.path, source.column) / size
            total += text_per_byte * size
        else:
            total += _share(shard, source.column) * text_bytes(shard.path, source.column)
    if others:
        looked = others[:1] if isinstance(others[0], StoredFile) else others[:: -(-len(others) // PLACES)]
        text_per_byte = sum(text_share(path, source.column) for path in looked) / len(looked)
        total += text_per_byte * sum(map(_text_bytes, others))
    return round(per_byte * total)


def _share(shard: Shard, column: Column) -> float:
    """Return which part of a file's rows a shard is."""
    if not shard.start and shard.stop is None:
        return 1.0
    rows = count_rows(shard.path, column)
    return ((shard.stop or rows) - shard.start) / rows


def _text_bytes(path: Path | ZipMember) -> float:
    """Return about how many bytes a file holds, decompressed."""
    if isinstance(path, ZipMember):
        return path.size
    packed = split_suffix(path.name)[1] if isinstance(path, StoredFile) else format_of(path).compression
    return path.stat().st_size * (COMPRESSED if packed else 1)


def _sample(documents: Iterable[str]) -> list[str]:
    """Return documents, the last of them cut, of at most `SAMPLE_CHARS` characters in all."""
    taken, left = [], SAMPLE_CHARS
    for text in documents:
        taken.append(text[:left])
        left -= len(taken[-1])
        if left <= 0:
            break
    return taken


def _tokens(sample: list[str], tokenizer) -> int:
    return sum(len(tokenizer.encode_document(text)) for text in sample)
