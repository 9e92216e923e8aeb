"""Documents as token ids: tokenised by threads on the fly, or read from a cache on disk.

The cache is one file per shard, written whole and renamed into place: token ids (2 or 4 bytes each), the length of
every row of the shard (0: nothing in it), and a last record of what they were made of. It is read through the page
cache, and its documents have the cursors of the text they come from. While a shard is read, a thread writes the next
one, so that training waits for the first one only. Among several processes one writes, and the others wait for it.
"""

import copy
import hashlib
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from llm.data.documents import Cursor, DocumentSource, FileDocuments
from llm.errors import UserError, reason_of

PORTION_DOCUMENTS = 32  # documents that a thread tokenises in one go, fewer if they are long
PORTION_CHARS = 1 << 18
ENCODE_THREADS = min(4, os.cpu_count() or 1)
ENCODE_AHEAD = 4 * ENCODE_THREADS  # portions in work or waiting to be packed; their characters have a limit too
RECORD = struct.Struct("<8s5q")  # mark, bytes per token, tokens, rows, size and time (ns) of the shard's file
MARK = b"fathomT1"


def encoded(documents: Iterator[tuple[str, Cursor]], tokenizer) -> Iterator[tuple[np.ndarray, Cursor]]:
    """Yield the token ids (int32, BOS first) of each text with its cursor, in order; threads tokenise ahead."""

    def encode(portion: list[tuple[str, Cursor]]) -> list[tuple[np.ndarray, Cursor]]:
        return [(tokenizer.encode_document(text), cursor) for text, cursor in portion]

    with ThreadPoolExecutor(ENCODE_THREADS) as executor:
        waiting, chars_ahead = deque(), 0
        for portion, chars in _portions(documents):
            waiting.append((executor.submit(encode, portion), chars))
            chars_ahead += chars
            while len(waiting) > ENCODE_AHEAD or chars_ahead > ENCODE_AHEAD * PORTION_CHARS:
                done, chars = waiting.popleft()
                chars_ahead -= chars
                yield from done.result()
        for done, _ in waiting:
            yield from done.result()


def _portions(documents: Iterator[tuple[str, Cursor]]) -> Iterator[tuple[list[tuple[str, Cursor]], int]]:
    """Yield groups of documents that one thread works on, each with its number of characters."""
    portion, chars = [], 0
    for document in documents:
        portion.append(document)
        chars += len(document[0])
        if len(portion) == PORTION_DOCUMENTS or chars >= PORTION_CHARS:
            yield portion, chars
            portion, chars = [], 0
    if portion:
        yield portion, chars


class _Ids(NamedTuple):
    """Token ids in the place of a document's text."""

    ids: np.ndarray

    def isspace(self) -> bool:
        return False


class CachedDocuments:
    """Documents of a source of local files as token ids, cached in `folder`.

    Raises UserError for any other kind of source.
    """

    def __init__(self, source: DocumentSource, tokenizer, folder: str | Path) -> None:
        if not isinstance(source, FileDocuments) or not source.is_stored:
            raise UserError(
                "data.token_cache is for files of text (data=local, or data=hub without data.streaming); set "
                "data.token_cache=null"
            )
        self.tokenizer, self.folder, self.column = tokenizer, Path(folder), source.column.identity()
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
        self.text, self._texts, self._source = source, source._rows, copy.copy(source)
        self.skipped = source.skipped  # bad rows that were left out, by file: one dict with the source
        self._source._rows = self._rows

    def iterate(
        self, split: str, cursor: Cursor | None = None, rank: int = 0, world: int = 1, loop: bool = True
    ) -> Iterator[tuple[np.ndarray, Cursor]]:
        """Yield this rank's documents from `cursor` on as token ids, each with the cursor behind it.

        The ids are int32 and begin with BOS.
        """
        for row, behind in self._source.iterate(split, cursor, rank, world, loop):
            yield row.ids, behind

    def _rows(self, shard, start: int) -> Iterator[_Ids | None]:
        """Yield the ids of the rows of a shard from row `start` on, None for empty rows; write its cache if needed."""
        self._make(shard)
        if following := self._behind(shard):
            threading.Thread(target=self._make_ahead, args=(following,), name="fathom-cache", daemon=True).start()
        tokens, lengths = self._read(shard)
        end = int(lengths[:start].sum())
        for length in lengths[start:].tolist():
            begin, end = end, end + length
            yield _Ids(tokens[begin:end].astype(np.int32)) if length else None

    def _behind(self, shard):
        """Return the shard that is read after this one, None if there is no other."""
        shards = next(shards for shards in map(self._source.shards, ("train", "val")) if shard in shards)
        following = shards[(shards.index(shard) + 1) % len(shards)]
        return None if following == shard else following

    def _make_ahead(self, shard) -> None:
        with suppress(Exception):  # a faulty shard is reported when training reaches it
            self._make(shard)

    def _make(self, shard) -> None:
        """Write the cache of a shard if it is missing, damaged or out of date. Raises UserError if the disk refuses."""
        next(self._texts(shard, 0), None)  # raises UserError if the text cannot be read, as without a cache
        path, made_of = self._path(shard), _identity(shard)
        if _is_current(path, made_of):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock")):
                if not _is_current(path, made_of):
                    self._write(shard, path, made_of)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({reason_of(error, path)}); name another folder in data.token_cache, or "
                "set data.token_cache=null to train without it"
            ) from error

    def _read(self, shard) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens (n,) of a shard, mapped from disk, and the lengths (rows,) of its rows."""
        path = self._path(shard)
        size, n_tokens, n_rows, *_ = _record(path)
        lengths = np.fromfile(path, np.int32, n_rows, offset=size * n_tokens)
        if not n_tokens:
            return np.zeros(0, self.dtype), lengths
        return np.asarray(np.memmap(path, self.dtype, "r", shape=(n_tokens,))), lengths

    def _path(self, shard) -> Path:
        """Return the path of a shard's cache; its name depends on tokenizer, file, rows and column."""
        parts = (self.tokenizer.fingerprint, shard.path.resolve(), shard.start, shard.stop, self.column)
        digest = hashlib.sha256(repr(tuple(map(str, parts))).encode()).hexdigest()
        return self.folder / f"{shard.path.name}-{digest[:16]}.tokens"

    def _write(self, shard, path: Path, made_of: tuple[int, int]) -> None:
        begin, new = time.perf_counter(), path.with_name(f".{path.name}.new")
        if _record(path) is not None:
            print(f"token cache: {shard.path} has changed since it was tokenised", flush=True)
        lengths, n_tokens = [], 0
        rows = ((text, row) for row, text in enumerate(self._texts(shard, 0)) if text and not text.isspace())
        try:
            with open(new, "wb") as file:
                for ids, row in encoded(rows, self.tokenizer):
                    file.write(ids.astype(self.dtype).tobytes())
                    lengths += [0] * (row - len(lengths)) + [len(ids)]
                    n_tokens += len(ids)
                file.write(np.array(lengths, np.int32).tobytes())
                file.write(RECORD.pack(MARK, self.dtype.itemsize, n_tokens, len(lengths), *made_of))
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        finally:
            with suppress(OSError):
                new.unlink()
        seconds = time.perf_counter() - begin
        print(f"token cache: {shard.path.name}, {n_tokens:,} tokens in {seconds:.1f} s: {path}", flush=True)


def _identity(shard) -> tuple[int, int]:
    """Return size and time of change (ns) of a shard's file, by which a later change of it is noticed."""
    stat = shard.path.stat()
    return stat.st_size, stat.st_mtime_ns


def _is_current(path: Path, made_of: tuple[int, int]) -> bool:
    record = _record(path)
    return record is not None and record[3:] == made_of


def _record(path: Path) -> tuple[int, ...] | None:
    """Return bytes per token, tokens, rows, size and time of the source; None unless the file is complete."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - RECORD.size))
            mark, *record = RECORD.unpack(file.read())
    except (OSError, struct.error):
        return None
    complete_size = record[0] * record[1] + 4 * record[2] + RECORD.size
    return tuple(record) if mark == MARK and size == complete_size else None
