"""A sample of the text that a source trains on, and what a packing makes of it."""

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np

from llm.data.balance import Balance
from llm.data.documents import Cursor, DocumentSource, FileDocuments, Shard, gives_ids
from llm.data.files import ZipMember, format_of
from llm.data.formats import Column, count_rows
from llm.data.packing import PACKINGS, Document

PLACES = 16  # of large files that are looked at: the first documents may be of another kind than all others
SMALL_BYTES = 16 * 2**20  # of files that are read from their beginning
BUFFERS = 8  # of documents that are packed before training to foretell the losses
SAMPLE_CHARS, ENCODED_CHARS = 32_000_000, 2_000_000  # of these documents, and of those among them that are tokenised


def spread_documents(source: DocumentSource, documents: int, chars: int) -> Iterator[tuple[Any, Cursor]]:
    """Yield about so many training documents, text or ids, of about so many characters or ids, with their cursors.

    Of large files on this machine they are taken from `PLACES` places, of everything else from the beginning.
    """
    places = _places(source)
    for start, end in pairwise([*places, None]):
        left = chars / len(places)
        for document, cursor in islice(source.iterate("train", start, loop=False), -(-documents // len(places))):
            if left < 0 or (end and (cursor["shard"], cursor["row"]) > (end["shard"], end["row"])):
                break
            yield document, cursor
            left -= len(document)


def sample_balance(source: DocumentSource, tokenizer, row_len: int, packing: str, buffer: int) -> Balance:
    """Return the balance of a sample of the training text, packed by itself.

    Of files on this machine it has at most about `BUFFERS` x `buffer` documents, since long ones first gather in the
    buffer, and 32 million characters; of other sources a quarter of the documents and two million characters. Of more
    than two million, the lengths of most documents are estimated from their characters.
    """
    here = getattr(getattr(source, "text", source), "is_stored", gives_ids(source))
    size = (BUFFERS * buffer, SAMPLE_CHARS) if here else (BUFFERS * buffer // 4, ENCODED_CHARS)
    documents = _documents(source, tokenizer, [document for document, _ in spread_documents(source, *size)])
    balance, packer = Balance(), PACKINGS[packing](row_len, buffer)
    ids, mask, feed = np.empty(row_len, np.int32), np.empty(row_len, bool), iter(documents)
    while used := packer.fill(ids, mask, feed):
        balance.trained += used - 1
        balance.masked += 1
        balance.padded += row_len - used
    sums = Balance(documents=len(documents), read=sum(len(document.ids) for document in documents))
    return balance + sums + Balance(cut=packer.lost, repeated=packer.repeated)


def _documents(source: DocumentSource, tokenizer, found: list) -> list[Document]:
    """Return the documents that were found in a source, or where they are many others of about their lengths."""
    if gives_ids(source):
        return [Document(ids) for ids in found]
    chars = sum(map(len, found))
    every = max(1, -(-chars // ENCODED_CHARS))
    encoded = [tokenizer.encode_document(text) for text in found[::every]]
    if every == 1:
        return [Document(np.asarray(ids, np.int32)) for ids in encoded]
    per_char = sum(map(len, encoded)) / sum(map(len, found[::every]))
    lengths = [max(1, round(per_char * len(text))) for text in found]
    blank = np.zeros(max(lengths), np.int32)
    return [Document(blank[:length]) for length in lengths]


def _places(source: DocumentSource) -> list[Cursor | None]:
    """Return the cursors at which a sample begins, in the order of the text; None: at the beginning.

    Between two of them lie equally many bytes of the files, where the files can be read from their middle.
    """
    if not isinstance(source, FileDocuments) or not source.is_stored:
        return [None]
    shards = dict(enumerate(source.shards("train")))
    sizes = {n: source.size_of(shard.path) for n, shard in shards.items() if is_here(shard)}
    total, before, found = sum(sizes.values()), 0, {}
    if total <= SMALL_BYTES:
        return [None]
    for number, size in sizes.items():
        wanted = [at for place in range(PLACES) if before <= (at := total * place // PLACES) < before + size]
        rows = _rows(shards[number], source.column) if wanted else None
        for at in wanted:
            found[number, 0 if rows is None else (at - before) * rows // size] = None
        before += size
    return [{"epoch": 0, "shard": number, "row": row, "index": 0} for number, row in found]


def is_here(shard: Shard) -> bool:
    """Return whether the file of a shard is on this machine; a file of the hub may not be fetched yet."""
    return isinstance(shard.path, ZipMember) or shard.path.is_file()


def _rows(shard: Shard, column: Column) -> int | None:
    """Return the rows of a shard that can be read from its middle without what is before it, as parquet can."""
    if format_of(shard.path).kind != "parquet":
        return None
    return (shard.stop or count_rows(shard.path, column)) - shard.start
