"""Files of token ids, one per shard of text, on disk or in a store.

    token ids of all documents (2 or 4 bytes each) | length of every row of the shard (int32; 0: nothing in it) | RECORD

The record says what the file was made of: the size of the text's file, the time of its last change and its SHA-256. So
a text that was copied or touched is recognised, and one that was changed is noticed.
"""

import hashlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from llm.data import stores
from llm.errors import UserError, reason_of

RECORD = struct.Struct("<8s5q8s")  # mark, bytes per token, tokens, rows, size and time (ns) of the text, its digest
MARK = b"fathomT2"
READ_BYTES = 1 << 20


class Origin(NamedTuple):
    """Text that a token file was made of: bytes, time of change (ns) and the first 8 bytes of its SHA-256."""

    size: int
    time: int
    digest: bytes


class Record(NamedTuple):
    """End of a token file: bytes per token, number of tokens and of rows, and the text it was made of."""

    token_bytes: int
    tokens: int
    rows: int
    origin: Origin


def origin_of(path) -> Origin:
    """Return what tells the content of a file of text from others; reads it once."""
    stat = path.stat()
    with path.open("rb") as file:
        return Origin(stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").digest()[:8])


def is_made_of(record: Record, path) -> bool:
    """Return whether a token file was made of the file of text `path`, which is read only if its time has changed."""
    stat = path.stat()
    if record.origin.size != stat.st_size:
        return False
    return record.origin.time == stat.st_mtime_ns or record.origin.digest == origin_of(path).digest


def read_record(path) -> Record | None:
    """Return the end of a token file; None unless the file is there and complete."""
    try:
        size = path.stat().st_size
        mark, token_bytes, tokens, rows, *origin = RECORD.unpack(_end(path, RECORD.size))
    except (OSError, struct.error):
        return None
    complete_size = token_bytes * tokens + 4 * rows + RECORD.size
    return Record(token_bytes, tokens, rows, Origin(*origin)) if mark == MARK and size == complete_size else None


def _end(path, count: int) -> bytes:
    if not isinstance(path, Path):
        return path.end(count)
    with path.open("rb") as file:
        file.seek(-min(count, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return file.read()


def write_token_file(
    path: Path,
    documents: Iterator[tuple[np.ndarray, int]],
    rows: Callable[[], int],
    dtype: np.dtype,
    origin: Origin,
) -> None:
    """Write ids (n,) of documents, each with the number of its row, to `path`; the other rows are empty.

    rows: gives the number of all rows once `documents` has ended. The caller renames the file into place.
    """
    lengths: list[int] = []
    tokens = 0
    with open(path, "wb") as file:
        for ids, row in documents:
            file.write(ids.astype(dtype).tobytes())
            lengths += [0] * (row - len(lengths)) + [len(ids)]
            tokens += len(ids)
        lengths += [0] * (rows() - len(lengths))
        file.write(np.array(lengths, np.int32).tobytes())
        file.write(RECORD.pack(MARK, dtype.itemsize, tokens, len(lengths), *origin))
        file.flush()
        os.fsync(file.fileno())


def read_token_file(path, start: int = 0) -> Iterator[np.ndarray | None]:
    """Yield the ids (n,) int32 of the rows of a complete token file from row `start` on, None for empty rows.

    The file is read in order, from the first wanted row on.
    """
    record = read_record(path)
    size, dtype = record.token_bytes, np.dtype(np.uint16 if record.token_bytes == 2 else np.int32)
    with path.open("rb", READ_BYTES) as file:
        file.seek(size * record.tokens)
        lengths = np.frombuffer(file.read(4 * record.rows), np.int32)
        file.seek(size * int(lengths[:start].sum()))
        for length in lengths[start:].tolist():
            yield np.frombuffer(file.read(size * length), dtype).astype(np.int32) if length else None


class TokenFolder:
    """Folder of token files that the key `key` of the configuration names: on disk, or at an address of a store."""

    def __init__(self, folder: str | Path, key: str) -> None:
        self.key, self.is_far = key, stores.is_address(folder)
        self.folder = str(folder).rstrip("/") if self.is_far else Path(folder).expanduser()

    def __str__(self) -> str:
        return str(self.folder)

    def find(self, name: str):
        """Return the file `name` of the folder, None where there is none."""
        if self.is_far:
            return stores.find(f"{self.folder}/{name}", self.key)
        path = self.folder / name
        return path if path.is_file() else None

    @contextmanager
    def only_one(self, name: str) -> Iterator[None]:
        """Wait until no other process writes `name`; of a store, which has no locks, none of this machine.

        Of several machines the last one wins there; their files are equal. Raises UserError if the disk refuses.
        """
        place = self.folder
        if self.is_far:
            digest = hashlib.sha256(place.encode()).hexdigest()
            place = Path(tempfile.gettempdir(), f"fathom-{os.getuid()}-{digest[:16]}")
        with self._said(name):
            place.mkdir(parents=True, exist_ok=True)
            lock = FileLock(place / f".{name}.lock")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def put(self, name: str, write: Callable[[Path], None]) -> None:
        """Have `write(path)` make a file and put it into place, whole or not at all. Raises UserError if that fails.

        Callers hold `only_one(name)`: what a killed process left behind is then written over.
        """
        with self._said(name), tempfile.TemporaryDirectory() if self.is_far else nullcontext(self.folder) as scratch:
            new = Path(scratch, f".{name}.new")
            try:
                write(new)
                if self.is_far:
                    stores.upload(new, f"{self.folder}/{name}", self.key)
                else:
                    new.replace(self.folder / name)
            finally:
                new.unlink(missing_ok=True)

    @contextmanager
    def _said(self, name: str) -> Iterator[None]:
        """Turn what the disk refuses into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder}/{name}: cannot be written ({reason_of(error, self.folder)}); name another folder in "
                f"{self.key}, or set {self.key}=null to train without it"
            ) from error
