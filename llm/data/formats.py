"""Text of data files, row by row from any row on, in every format and compression that llm.data.files knows.

Every mistake in a file is a UserError that names the file, the row and, where one is to blame, the configuration key. A
row that cannot be used comes as a `BadRow` in its place.
"""

import codecs
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from llm.data.files import PLAIN_TEXT, format_of, open_bytes, size_of
from llm.data.records import (
    DOCUMENT_BYTES,
    READ_ROWS,
    BadRow,
    arrow_batches,
    broken,
    count_lines,
    damage,
    is_json_lines,
    known_encoding,
    lines,
    open_utf8,
    parse,
    read_records,
    seekable,
    too_long,
    undecodable,
)
from llm.errors import UserError

READ_BYTES = 1 << 26  # parquet: bytes decoded at a time, where rows are long
TXT_CHARS = 2_000  # a text file: a document ends at the first blank line after this many characters ...
TXT_CHARS_MAX = 8_000  # ... or at the first line end after this many
TXT_LINE_BYTES = 1 << 16  # longer lines are cut
SHARE_BYTES = 1 << 22  # of a file tell how much of its bytes is text
PROSE_CHARS = 30  # a shorter text is not proposed as the text of a row: it may be a name or an address
TXT_SEPARATOR = "<|endoftext|>"  # a line of its own that always ends a document

Row = str | BadRow | None


class Column(NamedTuple):
    """Column or field that holds the text, the configuration key that named it, and how text files are read.

    A name with dots, such as `doc.text`, leads into objects. separator: ends a document of a text file wherever it
    stands; None: the rules of TXT_SEPARATOR and TXT_CHARS.
    """

    name: str
    key: str = "data.column"
    encoding: str = "utf-8"
    separator: str | None = None

    def __str__(self) -> str:
        return f"{self.key}={self.name}"

    def identity(self) -> str:
        """Return the text that tells what is read of a file, by which caches are named."""
        return "".join([str(self), *(f" {part}" for part in self[2:] if part not in ("utf-8", None))])


def check_file(path: Path, column: Column) -> None:
    """Raise UserError for obvious mistakes in a file: empty, no parquet, no such column."""
    if size_of(path) == 0:
        raise UserError(f"{path} is empty. Delete it or fetch it again.")
    if format_of(path).kind == "parquet":
        with seekable(path) as opened:
            _open_parquet(path, opened, column).close()


def read_rows(path: Path, column: Column, start: int) -> Iterator[Row]:
    """Yield the rows of a file from row `start` on; None where there is no text, a BadRow for what cannot be used."""
    kind = format_of(path).kind
    if kind == "parquet":
        return _parquet_rows(path, column, start)
    if kind in PLAIN_TEXT:
        return islice(_txt_documents(path, column), start, None)
    if kind == "arrow":
        return islice(_arrow_rows(path, column), start, None)
    if kind in ("csv", "tsv") or not is_json_lines(path, column.encoding):
        rows = read_records(path, start, column.encoding)
        return (_text_of(row, column, path, f"row {number:,}") for number, row in rows)
    return _jsonl_rows(path, column, start)


def count_rows(path: Path, column: Column) -> int:
    """Count the rows of a file, those of parquet and JSON lines without parsing them."""
    kind = format_of(path).kind
    if kind == "parquet":
        with seekable(path) as opened, _open_parquet(path, opened, column) as file:
            return file.metadata.num_rows
    if kind in ("json", "jsonl") and is_json_lines(path, column.encoding):
        return count_lines(path, column.encoding)
    return sum(1 for _ in read_rows(path, column, 0))


def text_bytes(path: Path, column: Column) -> int:
    """Return about how many bytes the text in a parquet file has, by what the file says of its column.

    Few texts that are repeated very often may be kept once, and then count once.
    """
    with seekable(path) as opened, _open_parquet(path, opened, column) as file:
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        return sum(max(0, _column_bytes(group, column.name) - 4 * group.num_rows) for group in groups)  # 4: a length


def text_share(path: Path, column: Column) -> float:
    """Return how many bytes of UTF-8 text there are for one byte of a file, decompressed: of its first SHARE_BYTES.

    Rows may hold far more than their text, and escapes such as \\u0434 are longer than the letter. 1 where no row ends
    there.
    """
    with damage(path, lambda: "its beginning"), open_bytes(path) as file:
        data = file.read(SHARE_BYTES)
    data = data[: data.rfind(b"\n") + 1] or data  # the line after it is cut
    size = 0
    with tempfile.TemporaryDirectory() as folder, suppress(UserError):  # of the end of an array, which is cut
        beginning = Path(folder, f"beginning.{format_of(path).kind}")
        beginning.write_bytes(data)
        for row in read_rows(beginning, column, 0):
            size += len(row.encode("utf-8", "surrogatepass")) if isinstance(row, str) else 0
    return size / len(data) if size else 1.0


def _text_of(row: Any, column: Column, path: Path, where: str) -> Row:
    """Return the text of a row; None where it is null, a BadRow where there is none."""
    if row is None or isinstance(row, BadRow):
        return row
    value = row
    for name in [column.name] if isinstance(row, dict) and column.name in row else column.name.split("."):
        if not isinstance(value, dict) or name not in value:
            keys = f"its keys are {', '.join(map(str, value))}" if isinstance(value, dict) else "it is not an object"
            return BadRow(f"{path}: {where}", f"no {column}: {keys}{_proposal(row, column)}")
        value = value[name]
    if not isinstance(value, str | None):
        return BadRow(f"{path}: {where}", f"{column.name} is a {type(value).__name__}, not text")
    return value


def _proposal(row: Any, column: Column) -> str:
    """Return the setting for the longest text in a row, of at least PROSE_CHARS characters with a blank; else ""."""
    found, waiting = [], [("", row)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}" if name else str(key), inner) for key, inner in value.items()]
        elif isinstance(value, str) and len(value) >= PROSE_CHARS and " " in value.strip():
            found.append((len(value), name))
    return f"; for {max(found)[1]}, set {column.key}={max(found)[1]}" if found else ""


def _jsonl_rows(path: Path, column: Column, start: int) -> Iterator[Row]:
    """Yield the text of the lines from number `start` on, None for blank lines."""
    for number, line in lines(path, column.encoding, start):
        row = parse(line, path, number)
        text = row.get(column.name) if type(row) is dict else None
        yield text if text.__class__ is str else _text_of(row, column, path, f"line {number:,}")


# ---- tables ---------------------------------------------------------------------------------------------------------


def _text_names(schema) -> list[str]:
    """Return the names of the columns of a schema that hold text or bytes, those inside structs with dots."""
    import pyarrow as pa

    names = []

    def look(field, before: str) -> None:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_struct(kind):
            for number in range(kind.num_fields):
                look(kind.field(number), f"{before}{field.name}.")
        elif str(kind) in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
            names.append(before + field.name)

    for field in schema:
        look(field, "")
    return names


def _check_column(schema, column: Column, path: Path) -> None:
    """Raise UserError unless a schema has text in the column, and one column of the name."""
    names = _text_names(schema)
    if schema.names.count(column.name) > 1:
        raise UserError(
            f"{path}: {column} is the name of {schema.names.count(column.name)} columns. Rename all but one."
        )
    if column.name not in names:
        problem = f"is of type {schema.field(column.name).type}" if column.name in schema.names else "does not exist"
        inner = [name for name in names if name.endswith(f".{column.name}")]
        proposal = f" Set {column.key}={inner[0]}." if len(inner) == 1 else ""
        raise UserError(f"{path}: {column} {problem}. Text columns here: {', '.join(names) or 'none'}.{proposal}")


def _open_parquet(path: Path, opened, column: Column):
    """Return the opened file. Raises UserError if it is no parquet file or has no text in `column`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(opened)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise broken(path, error, "row 0") from error
    _check_column(schema, column, path)
    return file


def _parquet_rows(path: Path, column: Column, start: int) -> Iterator[Row]:
    """Yield the text of the rows from `start` on; row groups before it are never decoded."""
    import pyarrow as pa

    with seekable(path) as opened, _open_parquet(path, opened, column) as file:
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        row = group = 0
        while group < len(counts) and row + counts[group] <= start:  # whole row groups before `start` are never decoded
            row, group = row + counts[group], group + 1
        groups = list(range(group, len(counts)))
        at_once = max(1, min(READ_ROWS, READ_BYTES // _mean_bytes(file.metadata, groups, column.name)))
        batches = file.iter_batches(at_once, row_groups=groups, columns=[column.name], use_threads=False)
        while groups:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise broken(path, error, f"row {row:,}") from error
            if batch is None:
                return
            yield from _texts(batch, column, path, row, max(0, start - row))
            row += batch.num_rows


def _arrow_rows(path: Path, column: Column) -> Iterator[Row]:
    """Yield the text of the rows of an arrow file or stream."""
    row = 0
    for batch in arrow_batches(path):
        _check_column(batch.schema, column, path)
        yield from _texts(batch, column, path, row, 0)
        row += batch.num_rows


def _texts(batch, column: Column, path: Path, before: int, skip: int) -> Iterator[Row]:
    """Yield the text of the rows of a record batch behind its first `skip`; `before` rows of the file precede it."""
    import pyarrow.compute as pc

    encoding, _ = known_encoding(column.encoding)
    names = [column.name] if column.name in batch.schema.names else column.name.split(".")
    values = batch.column(names[0])
    if len(names) > 1:
        values = pc.struct_field(values, names[1:])
    try:
        rows = values.to_pylist()
    except UnicodeDecodeError:
        rows = [_one(value) for value in values]
    for number, text in enumerate(rows[skip:], start=before + skip + 1):
        if text.__class__ is bytes:
            try:
                text = text.decode(encoding)
            except UnicodeDecodeError as error:
                text = error
        if isinstance(text, UnicodeDecodeError):
            text = BadRow(f"{path}: row {number:,}", undecodable(text))
        elif text is not None and len(text) > DOCUMENT_BYTES:
            text = BadRow(f"{path}: row {number:,}", too_long())
        yield text


def _one(value) -> str | UnicodeDecodeError | None:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error


def _mean_bytes(metadata, groups: list[int], name: str) -> int:
    """Return the bytes of a text column per row, in the row group with the most."""
    return max(
        [1, *(_column_bytes(group, name) // max(1, group.num_rows) for group in map(metadata.row_group, groups))]
    )


def _column_bytes(group, name: str) -> int:
    """Return the bytes of a column in a row group of parquet, uncompressed."""
    parts = map(group.column, range(group.num_columns))
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema == name)


# ---- plain text -----------------------------------------------------------------------------------------------------


def _pieces(path: Path, encoding: str) -> Iterator[str | BadRow]:
    """Yield the lines of a text file, longer ones in pieces of TXT_LINE_BYTES; a BadRow for what is not text."""
    number = 1
    with damage(path, lambda: f"line {number - 1:,}"), open_utf8(path, encoding) as (file, encoding):
        kind = codecs.getincrementaldecoder("utf-8-sig" if encoding == "utf-8" else encoding)
        decoder = kind()
        while raw := file.readline(TXT_LINE_BYTES):
            before = decoder.getstate()
            try:
                yield decoder.decode(raw)
            except UnicodeDecodeError as error:
                again = kind("replace")  # finds where the last character of the piece begins
                again.setstate(before)
                again.decode(raw)
                decoder.setstate(again.getstate())
                yield BadRow(f"{path}: line {number:,}", undecodable(error))
            number += raw.endswith(b"\n")
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            yield BadRow(f"{path}: line {number:,}", undecodable(error))


def _txt_documents(path: Path, column: Column) -> Iterator[str | BadRow]:
    """Yield the documents of a text file, cut at separators, blank lines and line ends; one is held at a time."""
    if column.separator is not None:
        yield from _separated(path, column)
        return
    lines, size = [], 0
    for line in _pieces(path, column.encoding):
        if isinstance(line, BadRow):
            yield line
            continue
        separator, blank = line.strip() == TXT_SEPARATOR, not line.strip()
        if not separator:
            lines.append(line.replace("\r\n", "\n"))
            size += len(line)
        if separator or (blank and size >= TXT_CHARS) or size >= TXT_CHARS_MAX:
            if text := "".join(lines).strip("\n"):
                yield text
            lines, size = [], 0
    if text := "".join(lines).strip("\n"):
        yield text


def _separated(path: Path, column: Column) -> Iterator[str | BadRow]:
    """Yield the documents of a text file that `column.separator` ends, wherever it stands."""
    mark = column.separator.replace("\\n", "\n")
    held, size, tail = [], 0, ""
    for line in _pieces(path, column.encoding):
        if isinstance(line, BadRow):
            yield line
            continue
        *whole, rest = (tail + line.replace("\r\n", "\n")).split(mark)
        for part in whole:
            if text := ("".join(held) + part).strip("\n"):
                yield text if size + len(part) <= DOCUMENT_BYTES else BadRow(str(path), f"a document is {too_long()}")
            held, size = [], 0
        keep = len(mark) - 1  # a separator may go on in the next piece
        done, tail = (rest[:-keep], rest[-keep:]) if keep else (rest, "")
        size += len(done)
        if size <= DOCUMENT_BYTES:
            held.append(done)
    if text := ("".join(held) + tail).strip("\n"):
        yield text if size <= DOCUMENT_BYTES else BadRow(str(path), f"a document is {too_long()}")
