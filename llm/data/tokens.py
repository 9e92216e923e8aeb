"""Documents as token ids: tokenised by threads on the fly, or read from a cache on disk.

The cache is one file per shard (llm.data.token_files), written whole and renamed into place. Its name follows from the
tokenizer and from the text's name below the data folder, so that a cache written elsewhere is found. Its documents have
the cursors of the text they come from. While a shard is read, a thread writes the next one, so that training waits for
the first one only. Among several processes one writes, and the others wait for it.
"""

import copy
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm.data.documents import Cursor, DocumentSource, FileDocuments
from llm.data.token_files import TokenFolder, is_made_of, origin_of, read_record, read_token_file, write_token_file
from llm.errors import UserError

PORTION_DOCUMENTS = 32  # documents that a thread tokenises in one go, fewer if they are long
PORTION_CHARS = 1 << 18
ENCODE_THREADS = min(4, os.cpu_count() or 1)
ENCODE_AHEAD = 4 * ENCODE_THREADS  # portions in work or waiting to be packed; their characters have a limit too


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


class Ids(NamedTuple):
    """Token ids in the place of a document's text."""

    ids: np.ndarray

    def isspace(self) -> bool:
        return False


class CachedDocuments:
    """Documents of a source of files as token ids, cached in `folder`.

    is_final: near-duplicates are left out of the files already, which are then read without the text. Raises UserError
    for any other kind of source.
    """

    gives_ids = True

    def __init__(self, source: DocumentSource, tokenizer, folder: str | Path, is_final: bool = False) -> None:
        if not isinstance(source, FileDocuments) or not source.is_cached:
            raise UserError(
                "data.token_cache is for files of text (data=local, or data=hub without data.streaming); set "
                "data.token_cache=null"
            )
        self.tokenizer, self.folder, self.column = (
            tokenizer,
            TokenFolder(folder, "data.token_cache"),
            source.column.identity(),
        )
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
        self.text, self._texts, self._source = source, source._rows, copy.copy(source)
        self.skipped = source.skipped  # bad rows that were left out, by file: one dict with the source
        self._source._rows = self._rows
        self._left_out = source.near_duplicates if is_final else None
        self._kept = source._kept
        self._current: set[tuple] = set()

    def iterate(
        self, split: str, cursor: Cursor | None = None, rank: int = 0, world: int = 1, loop: bool = True
    ) -> Iterator[tuple[np.ndarray, Cursor]]:
        """Yield this rank's documents from `cursor` on as token ids, each with the cursor behind it.

        The ids are int32 and begin with BOS.
        """
        for row, behind in self._source.iterate(split, cursor, rank, world, loop):
            yield row.ids, behind

    def _rows(self, shard, start: int) -> Iterator[Ids | None]:
        """Yield the ids of the rows of a shard from row `start` on, None for empty rows; write its cache if needed."""
        self.make(shard)
        if following := self._behind(shard):
            threading.Thread(target=self._make_ahead, args=(following,), name="fathom-cache", daemon=True).start()
        for ids in read_token_file(self.folder.find(self.name_of(shard)), start):
            yield None if ids is None else Ids(ids)

    def _behind(self, shard):
        """Return the shard that is read after this one, None if there is no other."""
        shards = next(shards for shards in map(self._source.shards, ("train", "val")) if shard in shards)
        following = shards[(shards.index(shard) + 1) % len(shards)]
        return None if following == shard else following

    def _make_ahead(self, shard) -> None:
        with suppress(Exception):  # a faulty shard is reported when training reaches it
            self.make(shard)

    def make(self, shard) -> bool:
        """Write the cache of a shard if it is missing, damaged or out of date; return whether it was written.

        Raises UserError if the text cannot be read, or if the disk refuses.
        """
        next(self._texts(shard, 0), None)  # raises UserError if the text cannot be read, as without a cache
        name = self.name_of(shard)
        if self._is_current(name, shard):
            return False
        with self.folder.only_one(name):
            if self._is_current(name, shard):
                return False
            self._write(shard, name)
            return True

    def name_of(self, shard) -> str:
        """Return the name of a shard's cache: by tokenizer, name and size of the text's file, rows and column."""
        name, size = self.text.name_of(shard.path), self.text.size_of(shard.path)
        parts = (self.tokenizer.fingerprint, name, size, shard.start, shard.stop, self.column)
        if self._left_out is not None:
            parts += (self._left_out.identity(),)
        digest = hashlib.sha256(repr(tuple(map(str, parts))).encode(errors="replace")).hexdigest()
        # A file's name has 255 bytes at most.
        shown = shard.path.name.encode(errors="replace")[:200].decode(errors="ignore")
        return f"{shown}-{digest[:16]}.tokens"

    def _is_current(self, name: str, shard) -> bool:
        """Return whether a shard's cache is complete and made of its text; the text is looked at once."""
        stat, path = shard.path.stat(), self.folder.find(name)
        known = (name, stat.st_size, stat.st_mtime_ns)
        record = None if path is None else read_record(path)
        if record is None or not (known in self._current or is_made_of(record, shard.path)):
            return False
        self._current.add(known)
        return True

    def _write(self, shard, name: str) -> None:
        begin, origin = time.perf_counter(), origin_of(shard.path)
        if (old := self.folder.find(name)) is not None and read_record(old) is not None:
            print(f"token cache: {shard.path} has changed since it was tokenised", flush=True)
        count = 0

        def documents() -> Iterator[tuple[str, int]]:
            nonlocal count
            is_whole = self._left_out is None or shard in self.text.shards("val")
            for text in (self._texts if is_whole else self._kept)(shard, 0):
                count += 1
                if text and not text.isspace():
                    yield text, count - 1

        ids = encoded(documents(), self.tokenizer)
        self.folder.put(name, lambda path: write_token_file(path, ids, lambda: count, self.dtype, origin))
        n_tokens, seconds = read_record(self.folder.find(name)).tokens, time.perf_counter() - begin
        print(
            f"token cache: {shard.path.name}, {n_tokens:,} tokens in {seconds:.1f} s: {self.folder}/{name}", flush=True
        )
