"""Files of rows: json lines, json arrays, csv, tsv, parquet and arrow, each plain or packed, read one row at a time.

The first bytes of a file say what it is; its name only tells csv from tsv and from json. Rows are numbered from 1:
lines of json lines, else rows of the table or items of the array. A mistake in a row is a `BadRow`, after which the
next row can be read; one that ends the reading of a file is a `UserError`.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from llm.errors import UserError

PACKED = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"PK\x03\x04": "zip"}
TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow_stream"}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
PACKINGS = (".gz", ".zst", ".bz2", ".xz", ".zip")
PEEKED = 1 << 16  # bytes that are looked at to tell the kind of a file
SPACE = re.compile(r"[ \t\r\n]*")
CHUNK = 1 << 20  # characters of a json array that are read at a time
BATCH = 1024  # rows of a table that are decoded at a time
csv.field_size_limit(1 << 30)


class BadRow(UserError):
    """A row that cannot be read; the text says why, without its place."""


def is_row_file(name: str) -> bool:
    """Return True for a name of a file of rows, plain or packed."""
    name = name.lower()
    for packing in PACKINGS:
        name = name.removesuffix(packing)
    return name.endswith(SUFFIXES)


def is_plain_lines(path: Path) -> bool:
    """Return True for an unpacked file of json lines: its rows can be found again by their place in the file."""
    with path.open("rb", PEEKED) as file:
        return _kind(_peek(file), path.name) == "lines"


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of a file; the row is a `BadRow` where it cannot be read.

    Raises UserError for a file that is damaged, of an unknown kind, or of no rows.
    """
    try:
        with path.open("rb", PEEKED) as file:
            yield from _rows(file, path.name, path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _first(error)
        raise UserError(f"{path}: cannot be read ({reason}). Fetch it again.") from error


def parse_line(line: bytes) -> Any:
    """Return the value of one line of JSON. Raises BadRow for anything else."""
    return parse_json(decode(line))


def decode(data: bytes) -> str:
    """Return the UTF-8 text of `data`; BadRow names the first byte that is none."""
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start} is not UTF-8 text: convert the file to UTF-8") from None


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises BadRow for a text that is none, or is nested too deep."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON ({error.msg} at column {error.colno}): one row per line") from None
    except RecursionError:
        raise BadRow("nested too deep to be a row") from None


def _rows(file: BinaryIO, name: str, path: Path) -> Iterator[tuple[int, Any]]:
    head = _peek(file)
    packing = next((kind for magic, kind in PACKED.items() if head.startswith(magic)), None)
    if packing == "zip":
        yield from _zip_rows(file, path)
        return
    if packing:
        inner = name
        for suffix in PACKINGS:
            inner = inner.removesuffix(suffix)
        yield from _rows(_unpacked(file, packing), inner, path)
        return
    kind = _kind(head, name)
    if kind in TABLES.values():
        yield from _table_rows(file, kind, path)
    elif kind in ("csv", "tsv"):
        yield from _csv_rows(file, "," if kind == "csv" else "\t", path)
    elif kind == "array":
        yield from _array_rows(file, path)
    elif kind == "object":
        raise UserError(f"{path}: holds one JSON object over several lines, not rows; write a list, or a row per line")
    else:
        yield from _line_rows(file)


def _unpacked(file: BinaryIO, packing: str) -> BinaryIO:
    """Return a stream of the unpacked bytes, with a `peek`."""
    if packing == "zst":
        import pyarrow as pa

        return io.BufferedReader(_Readable(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")), PEEKED)
    openers = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    return io.BufferedReader(openers[packing](file, "rb"), PEEKED)


class _Readable(io.RawIOBase):
    """Stream of pyarrow in the form that io.BufferedReader takes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _zip_rows(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of all files in an archive, numbered on; names of other kinds and hidden ones are passed over."""
    number = 0
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if is_row_file(name) and not name.endswith("/")]
        names = [name for name in names if not any(part.startswith((".", "__")) for part in PurePath(name).parts)]
        if not names:
            raise UserError(f"{path}: the archive holds no file of rows ({', '.join(SUFFIXES)})")
        for name in sorted(names):
            with archive.open(name) as member:
                for _, row in _rows(io.BufferedReader(member, PEEKED), name, path):
                    number += 1
                    yield number, row


def _peek(file: Any) -> bytes:
    return file.peek(PEEKED)[:PEEKED]


def _kind(head: bytes, name: str) -> str:
    """Return what an unpacked file is: a kind of `TABLES`, "csv", "tsv", "array", "object" or "lines"."""
    for magic, kind in TABLES.items():
        if head.startswith(magic):
            return kind
    if any(head.startswith(magic) for magic in PACKED):
        return "packed"
    suffix = PurePath(name).suffix.lower()
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if suffix in (".csv", ".tsv") and text[:1] not in (b"{", b"["):
        return suffix[1:]
    first, *rest = text.split(b"\n", 1)
    more = bool(rest and rest[0].strip())
    if text[:1] == b"[":
        return "lines" if _is_conversation(first, more) else "array"
    if text[:1] == b"{" and suffix == ".json" and first.strip() == b"{":
        return "object"
    return "lines"


def _is_conversation(line: bytes, more: bool) -> bool:
    """Return True where a line that begins with [ is a row by itself, a list of messages, and not an array of rows.

    more: whether other lines follow it, so that it must be a row if it is whole.
    """
    try:
        items = json.loads(line)
    except ValueError:  # an array over several lines, or longer than what was looked at
        start = line.lstrip(b"[ \t\r")
        return start.startswith((b'{"role"', b'{"from"', b'{"content"')) and not line.startswith(b"[[")
    return more or all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in items)


def _line_rows(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, parse_line(line)
            except BadRow as bad:
                yield number, bad


def _array_rows(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the items of a json array, of which few more than one are held at a time."""
    stream, decode, number = io.TextIOWrapper(file, encoding="utf-8-sig"), json.JSONDecoder().raw_decode, 1
    text, at, chunk, opened, ended = "", 0, CHUNK, False, False
    while True:
        try:
            if not opened:
                at, opened = _after(text, 0, "["), True
            start = SPACE.match(text, at).end()
            if text.startswith("]", start):
                return
            item, end = decode(text, start)
            end = SPACE.match(text, end).end()
            at = end if text.startswith("]", end) else _after(text, end, ",")
        except json.JSONDecodeError as error:  # or its rest is still to come
            if ended:
                raise UserError(f"{path}: not valid JSON ({error.msg} in item {number:,} of the list)") from None
            try:
                more = stream.read(chunk)
            except UnicodeDecodeError as bad:
                raise UserError(f"{path}: not UTF-8 text ({bad.reason}). Convert the file to UTF-8.") from None
            text, at, ended, chunk = text[at:] + more, 0, not more, chunk * 2
            continue
        yield number, item
        number, chunk = number + 1, CHUNK


def _after(text: str, at: int, sign: str) -> int:
    """Return the place behind `sign`, before which only white space may stand; raise JSONDecodeError otherwise."""
    at = SPACE.match(text, at).end()
    if not text.startswith(sign, at):
        raise json.JSONDecodeError(f"Expecting {sign!r}", text, at)
    return at + 1


def _csv_rows(file: BinaryIO, delimiter: str, path: Path) -> Iterator[tuple[int, Any]]:
    stream = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = csv.DictReader(stream, delimiter=delimiter, strict=True)
    number = 0
    try:
        names = rows.fieldnames or []
        if len(set(names)) < len(names) or "" in names:
            raise UserError(f"{path}: the first line must name each column once, found {', '.join(names)}")
        for number, row in enumerate(rows, start=1):
            cells = sum(value is not None for value in row.values())
            fits = None not in row and cells == len(names)
            yield number, row if fits else BadRow(f"{len(names)} columns are named, and the row has others")
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as csv after row {number:,} ({_first(error)})") from None


def _table_rows(file: BinaryIO, kind: str, path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == "parquet" or kind == "arrow":  # read from the end: a packed one is unpacked into memory
            whole = file if isinstance(getattr(file, "raw", None), io.FileIO) else io.BytesIO(file.read())
            if kind == "parquet":
                batches = pq.ParquetFile(whole).iter_batches(BATCH)
            else:
                reader = pa.ipc.open_file(whole)
                batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(file))
        slices = (batch.slice(at, BATCH) for batch in batches for at in range(0, batch.num_rows, BATCH))
        yield from enumerate(chain.from_iterable(part.to_pylist() for part in slices), start=1)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as {kind} ({_first(error)}). Fetch it again.") from error


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]
