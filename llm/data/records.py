"""Rows of data files, whole: one reader for every format and compression, and the rows that cannot be used.

A row is a dict, a list (a bare conversation) or a text. A row that cannot be read comes as a `BadRow` in its place, so
that the caller stops or goes on. A file that is damaged as a whole raises UserError.
"""

import codecs
import csv
import io
import json
import lzma
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llm.data.files import PLAIN_TEXT, ZipMember, format_of, open_bytes
from llm.errors import BadData, UserError, system_reason
from llm.utils.files import once
from llm.utils.format import in_bytes

DOCUMENT_BYTES = 1 << 28  # a longer row is bad: its text, ids and copies would take gigabytes
READ_ROWS = 1024  # parquet rows decoded at a time, or fewer where they are long: bounds the memory
SHOWN = 10  # bad rows that one message names
LISTED = 1_000  # bad rows of a file that stage=check writes down
CHUNK = 1 << 20
DECODER = json.JSONDecoder(object_pairs_hook=once)
NO_ROW = "null is no row"
BETWEEN = re.compile(r"[ \t\r\n,]*")  # what stands between the values of an array
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError)


class BadRow(NamedTuple):
    """Row that cannot be used: where it stands, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def bad_rows_error(bad: Sequence[BadRow], count: int, key: str) -> BadData:
    """Return the error that names the first bad rows, the number of the rest, and the ways on; `key`: data.bad_rows."""
    shown = [str(row) for row in bad[:SHOWN]]
    more = f"; and {count - len(shown):,} more" if count > len(shown) else ""
    skip = "it" if count == 1 else f"all {count:,}"
    ways = f"Correct the row{'s' * (count > 1)}, or leave {skip} out by {key}=skip; stage=check lists all bad rows."
    return BadData(f"{'; '.join(shown)}{more}. {ways}")


def read_records(path, start: int = 0, encoding: str = "utf-8") -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row or BadRow) of a file behind its first `start` rows; None for a blank line.

    Numbers count lines of jsonl and of text, rows of the other formats. Raises UserError for a file that is damaged.
    """
    kind = format_of(path).kind
    if kind in PLAIN_TEXT:
        rows = (
            (number, line if isinstance(line, BadRow) else line.rstrip("\r\n"))
            for number, line in lines(path, encoding)
        )
    else:
        read = {"parquet": _parquet, "arrow": _arrow, "csv": _csv, "tsv": _csv}.get(kind, _json)
        rows = enumerate(read(path, encoding), start=1) if read is not _json else _json(path, encoding)
    return (row for row in rows if row[0] > start)


@contextmanager
def damage(path, position):
    """Turn what a damaged file raises into a UserError that names the file and `position()`, such as "line 12"."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise BadData(f"{path}: {undecodable(error)}, after {position()}.") from None
    except DAMAGE as error:
        raise broken(path, error, position()) from error


def broken(path, error: Exception, place: str) -> BadData:
    """Return the error of a file that cannot be read on after `place`, such as "line 12": the system's reason, if any.

    All else that a library says of a file, in words of its own, is damage.
    """
    if (reason := system_reason(error, path)) is not None:
        return BadData(f"{path}: cannot be read after {place}: {reason}.")
    form = format_of(path)
    what = "the file ends too early" if isinstance(error, EOFError) else f"no {form.compression or form.kind} follows"
    return BadData(f"{path}: damaged after {place} ({what}). Fetch it again.")


def undecodable(error: UnicodeDecodeError) -> str:
    """Return in words that bytes do not fit the encoding, with a proposal."""
    name = {"utf-8": "UTF-8"}.get(error.encoding, error.encoding)
    # In most of these any byte is a letter: with that of another language text is read without an error, as nonsense.
    other = "utf-16, or by language cp1252 (western), cp1251 (Russian), cp1253 (Greek), cp1256 (Arabic), cp874 (Thai)"
    if name != "UTF-8":
        other = "utf-8 (or utf-16-le)" if "BOM" in error.reason else "utf-8"
    keys = f"data.encoding={other}, or for a task data.tasks.<name>.encoding"
    return f"not {name} text ({error.reason}). Convert the file, or name its encoding by {keys}"


def lines(path, encoding: str = "utf-8", start: int = 0) -> Iterator[tuple[int, str | BadRow]]:
    """Yield (number from 1, line) of a text file behind its first `start` lines.

    A line that is too long or cannot be decoded comes as a BadRow.
    """
    number = 0
    with damage(path, lambda: f"line {number:,}"), open_utf8(path, encoding) as (file, encoding):
        number = _skip_lines(file, start)
        while raw := file.readline(DOCUMENT_BYTES):
            number += 1
            where = f"{path}: line {number:,}"
            if len(raw) == DOCUMENT_BYTES and not raw.endswith(b"\n"):
                while (more := file.readline(CHUNK)) and not more.endswith(b"\n"):
                    pass
                yield number, BadRow(where, too_long())
                continue
            if number == 1 and encoding == "utf-8" and raw.startswith(codecs.BOM_UTF8):
                raw = raw[3:]
            try:
                line = raw.decode(encoding)
            except UnicodeDecodeError as error:
                line = BadRow(where, undecodable(error))
            yield number, line


def _skip_lines(file: BinaryIO, count: int) -> int:
    """Move a file behind its next `count` lines, without a look at each; return how many there were."""
    left = count
    while left and (ahead := file.peek(CHUNK)):
        found, end = ahead.count(b"\n"), len(ahead)
        if found >= left:
            end = -1
            for _ in range(left):
                end = ahead.index(b"\n", end + 1)
            end, found = end + 1, left
        file.read(end)
        left -= found
    return count - left


def count_lines(path, encoding: str = "utf-8") -> int:
    """Count the lines of a text file by their ends, without blank lines behind the last that is not."""
    count, used = 0, 0
    with damage(path, lambda: f"line {count:,}"), open_utf8(path, encoding) as (file, _):
        while raw := file.read(CHUNK):
            if text := raw.rstrip(b" \t\r\n"):
                used = count + text.count(b"\n") + 1
            count += raw.count(b"\n")
    return used


@contextmanager
def open_utf8(path, encoding: str) -> Iterator[tuple[BinaryIO, str]]:
    """Open a text file whose lines end at the byte 10; return it and the encoding its lines have then."""
    encoding, line_end = known_encoding(encoding)
    with open_bytes(path) as file:
        if line_end == b"\n":
            yield file, encoding
        else:  # utf-16, utf-32
            yield io.BufferedReader(_Recoded(file, encoding)), "utf-8"


def known_encoding(encoding: str) -> tuple[str, bytes]:
    """Return Python's name of an encoding, and its bytes for a line end. Raises UserError if it is none of text."""
    try:
        if (name := codecs.lookup(encoding).name) in ("idna", "punycode"):
            raise LookupError("of names of hosts")
        return name, "\n".encode(encoding)
    except (LookupError, UnicodeError):  # base64 is an encoding, but of bytes
        raise UserError(
            f"data.encoding={encoding}: Python knows no such encoding of text. Try utf-8, cp1252 or utf-16."
        ) from None


class _Recoded(io.RawIOBase):
    """Bytes of a file in UTF-8, whatever its encoding."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self.file, self.encoding, self.rest = file, encoding, b""
        self.decoder = codecs.getincrementaldecoder(encoding)()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.rest:
            raw = self.file.read(len(buffer))
            try:
                self.rest = self.decoder.decode(raw, final=not raw).encode()
            except UnicodeDecodeError:
                raise
            except UnicodeError as error:  # the file does not begin as the encoding does
                raise UnicodeDecodeError(self.encoding, raw, 0, len(raw), str(error)) from None
            if not raw:
                break
        data, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def too_long() -> str:
    """Return in words that a row is longer than DOCUMENT_BYTES."""
    return f"longer than {in_bytes(DOCUMENT_BYTES)}. Cut it into documents"


# ---- json -----------------------------------------------------------------------------------------------------------


def _json(path, encoding: str) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of JSON lines, of arrays of rows, or of objects over several lines."""
    if not is_json_lines(path, encoding):
        yield from enumerate(_json_values(path, encoding), start=1)
        return
    for number, line in lines(path, encoding):
        yield number, parse(line, path, number)


def parse(line: str | BadRow, path, number: int) -> Any:
    """Return the value of a line of JSON; None for a blank line, a BadRow for `null` and for what is no JSON."""
    if isinstance(line, BadRow):
        return line
    if not line.strip():
        return None
    try:
        value = DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        return BadRow(f"{path}: line {number:,}", f"not valid JSON ({json_problem(error)})")
    return BadRow(f"{path}: line {number:,}", NO_ROW) if value is None else value


def json_problem(error: ValueError | RecursionError) -> str:
    """Return why a text is no JSON, at most 160 characters."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split("\n")[0][:160]


def is_json_lines(path, encoding: str = "utf-8") -> bool:
    """Return whether a file of JSON holds a row per line; False for arrays of rows and rows over several lines."""
    if _begins_array_of_rows(path, encoding):
        return False
    first = None
    for _, line in lines(path, encoding):
        if isinstance(line, BadRow):
            return True
        if line.strip():
            if first is not None:  # a second line: rows, if the first is whole
                return True
            try:
                first = json.loads(line)
            except (ValueError, RecursionError):
                # `{` alone on the line begins a row of several lines; any more is a bad row of JSON lines
                return line.strip() not in ("{", "[", "[{", "[[") and not line.lstrip().startswith("[")
            is_array = isinstance(first, list) and first and isinstance(first[0], dict | list | str)
            if not is_array or _is_turn(first[0]):
                return True
    return not isinstance(first, list)


def _begins_array_of_rows(path, encoding: str) -> bool:
    """Return True where the first bytes show an array and in it an object that is no turn of a conversation.

    So an array of any length on one line is not read as one row.
    """
    try:
        with open_utf8(path, encoding) as (file, encoding):
            text = file.read(1 << 16).decode(encoding, errors="ignore").lstrip("\ufeff \t\r\n")
    except (*DAMAGE, UnicodeDecodeError):
        return False  # told where the rows are read
    if not text.startswith("["):
        return False
    try:
        value, _ = json.JSONDecoder().raw_decode(text, BETWEEN.match(text, 1).end())
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not _is_turn(value)


def _is_turn(value) -> bool:
    """Return whether a value is one turn of a conversation, so that a list of them is one row."""
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def _json_values(path, encoding: str) -> Iterator[Any]:
    """Yield the rows of arrays, or values one after the other. After a fault nothing more can be read: UserError.

    A BadRow stands for `null`, and for a row with an object that has a key twice: its end is known.
    """
    text, at, number, in_array, ended = "", 0, 0, None, False
    behind_array = False  # another may follow: files are joined by cat, and a line may hold an array
    turns: list = []
    repeated: list[ValueError] = []  # keys that stand twice in the value
    decoder = json.JSONDecoder(object_pairs_hook=partial(_noting, repeated))
    with damage(path, lambda: f"row {number:,}"), open_utf8(path, encoding) as (file, encoding):
        reader = codecs.getreader("utf-8-sig" if encoding == "utf-8" else encoding)(file)
        while True:
            at = BETWEEN.match(text, at).end()
            if in_array is None and at < len(text):
                in_array = text[at] == "["
                if behind_array and not in_array:
                    raise UserError(
                        f"{path}: behind row {number:,}, the last of an array, stands {text[at : at + 20]!r}, "
                        "which is no array of rows. Correct it."
                    )
                at += in_array
                continue
            if at < len(text) and in_array and text[at] == "]":
                if turns:
                    yield next((turn for turn in turns if isinstance(turn, BadRow)), turns)
                in_array, behind_array, turns, at = None, True, [], at + 1
                continue
            repeated.clear()
            try:
                if at >= len(text):
                    raise ValueError("the file ends within the array") if in_array else StopIteration
                value, end = decoder.raw_decode(text, at)
                if end == len(text) and not ended:
                    raise ValueError("unfinished")
            except StopIteration:
                if ended:
                    break
                value = None
            except (ValueError, RecursionError) as error:
                if ended or len(text) - at > DOCUMENT_BYTES:
                    raise UserError(
                        f"{path}: row {number + 1:,} is not valid JSON ({json_problem(error)}). Correct it."
                    ) from None
                value = None
            else:
                number, at = number + 1, end
                is_turn = in_array and _is_turn(value)
                if value is None or repeated:
                    reason = NO_ROW if value is None else f"not valid JSON ({json_problem(repeated[0])})"
                    value = BadRow(f"{path}: row {number:,}", reason)
                if is_turn:
                    turns.append(value)
                else:
                    yield value
                continue
            more = reader.read(max(CHUNK, len(text) - at))
            text, at, ended = text[at:] + more, 0, not more


def _noting(problems: list[ValueError], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, and note a key that stands there twice."""
    try:
        return once(pairs)
    except ValueError as error:
        problems.append(error)
        return dict(pairs)


# ---- tables ---------------------------------------------------------------------------------------------------------


def _csv(path, encoding: str) -> Iterator[dict | BadRow]:
    """Yield the rows of a table with a head line; a BadRow for one with another number of fields."""
    csv.field_size_limit(DOCUMENT_BYTES)
    tabs = format_of(path).kind == "tsv"
    found: list[BadRow] = []

    def texts() -> Iterator[str]:
        for _, line in lines(path, encoding):
            found.extend([line] if isinstance(line, BadRow) else [])
            yield "\n" if isinstance(line, BadRow) else line

    rows = csv.reader(texts(), delimiter="\t" if tabs else ",", strict=True)
    head: list[str] | None = None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(f"{path}: line {rows.line_num:,} is no valid row ({error}). Correct it.") from None
        if row is None:
            return
        if found:
            yield found.pop()
        elif head is None:
            if row:
                head = row
            _check_names(row, path)
        elif row:
            where = f"{path}: line {rows.line_num:,}"
            fits = len(row) == len(head)
            yield (
                dict(zip(head, row, strict=True))
                if fits
                else BadRow(where, f"has {len(row)} fields, the head line {len(head)}")
            )


def _check_names(names: Sequence[str], path) -> None:
    """Raise UserError for a table in which two columns have one name: a row would lose one of them."""
    if len(set(names)) < len(names):
        raise UserError(f"{path}: names a column twice ({', '.join(names)}). Name each once.")


@contextmanager
def seekable(path) -> Iterator[Any]:
    """Return what pyarrow can read at any place: the path, or a temporary copy of what is packed."""
    if not isinstance(path, ZipMember) and not format_of(path).compression:
        yield path if isinstance(path, Path) else path.open()
        return
    with tempfile.TemporaryFile() as copy:
        with damage(path, lambda: "its beginning"), open_bytes(path) as file:
            shutil.copyfileobj(file, copy)
        copy.seek(0)
        yield copy


def _parquet(path, encoding: str) -> Iterator[Any]:
    """Yield the rows of a parquet file as dicts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with seekable(path) as opened:
        try:
            with pq.ParquetFile(opened) as file:
                for batch in file.iter_batches(READ_ROWS, use_threads=False):
                    for row in _dicts(batch, path, number):
                        number += 1
                        yield row
        except (pa.ArrowException, OSError) as error:
            raise broken(path, error, f"row {number:,}") from error


def _arrow(path, encoding: str) -> Iterator[Any]:
    """Yield the rows of an arrow file or stream as dicts."""
    number = 0
    for batch in arrow_batches(path):
        for row in _dicts(batch, path, number):
            number += 1
            yield row


def arrow_batches(path) -> Iterator:
    """Yield the record batches of an arrow file or stream. Raises UserError for a file that is neither."""
    import pyarrow as pa

    number = 0
    with seekable(path) as opened, open(opened, "rb") if isinstance(opened, Path) else opened as file:
        try:
            magic = file.read(6)
            file.seek(0)
            if magic == b"ARROW1":
                reader = pa.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                batches = iter(pa.ipc.open_stream(file))
            for batch in batches:
                yield batch
                number += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise broken(path, error, f"row {number:,}") from error


def _dicts(batch, path, before: int) -> Iterator[Any]:
    """Yield the rows of a record batch as dicts, a BadRow for one whose text is not UTF-8."""
    _check_names(batch.schema.names, path)
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError:
                yield BadRow(f"{path}: row {before + number + 1:,}", "not UTF-8 text")
