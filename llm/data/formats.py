"""Files of documents: parquet, jsonl and txt, the latter two also compressed, read row by row from any row on.

Every mistake in a file is a UserError that names the file, the row and, where one is to blame, the configuration key.
"""

import codecs
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llm.errors import UserError
from llm.utils.format import in_bytes

SUFFIXES = {
    ".parquet": "parquet",
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst"), "jsonl"),
    **dict.fromkeys((".txt", ".txt.gz", ".txt.zst"), "txt"),
}
KNOWN = "parquet, jsonl or txt (.gz, .zst)"
READ_ROWS = 1024  # parquet rows decoded at a time, or fewer where they are long: bounds the memory
READ_BYTES = 1 << 26
DOCUMENT_BYTES = 1 << 28  # a longer row is an error: its text, ids and copies would take gigabytes
TXT_CHARS = 2_000  # a text file: a document ends at the first blank line after this many characters ...
TXT_CHARS_MAX = 8_000  # ... or at the first line end after this many
TXT_LINE_BYTES = 1 << 16  # longer lines are cut
TXT_SEPARATOR = "<|endoftext|>"  # a line of its own that always ends a document


class Column(NamedTuple):
    """Column or field that holds the text, and the configuration key that named it."""

    name: str
    key: str = "data.column"

    def __str__(self) -> str:
        return f"{self.key}={self.name}"


def kind_of(name: str) -> str | None:
    """Return the kind of a file by its name: "parquet", "jsonl" or "txt"; None for any other file."""
    return next((kind for suffix, kind in SUFFIXES.items() if name.lower().endswith(suffix)), None)


def find_files(path: str | Path, key: str) -> list[Path]:
    """Return the data files of a file name, folder or glob in name order.

    Raises UserError if there are none, or if a folder holds several kinds: a README must not be trained on.
    """
    if not path or not str(path):
        raise UserError(f"{key}={path} is not set: name a file, a folder or a pattern of {KNOWN} files")
    root = Path(path).expanduser()
    if root.is_dir():
        found = [p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    elif root.exists():
        found = [root]
    else:
        found = [Path(p) for p in glob.glob(str(root), recursive=True)]
        if not found:
            raise UserError(f"{key}={path}: no such file or folder, and no file matches it as a glob. Correct {key}.")
    files = sorted((p for p in found if p.is_file() and kind_of(p.name)), key=lambda p: p.as_posix())
    if not files:
        raise UserError(f"{key}={path}: holds no {KNOWN} file. Convert the text to one of these.")
    if root.is_dir():
        check_one_kind([p.name for p in files], f"{key}={path}: the folder", f"{key}='{root}/*%s'")
    return files


def check_one_kind(names: list[str], what: str, fix: str) -> None:
    """Raise UserError for files of several kinds; `fix` has a %s for the suffix to choose."""
    kinds = {kind: sum(kind_of(name) == kind for name in names) for kind in sorted({kind_of(name) for name in names})}
    if len(kinds) > 1:
        counts = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise UserError(f"{what} mixes {counts} files. Name those to read, such as {fix % f'.{list(kinds)[-1]}'}.")


def check_file(path: Path, column: Column) -> None:
    """Raise UserError for obvious mistakes in a file: empty, no parquet, no such column."""
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty. Delete it or fetch it again.")
    if kind_of(path.name) == "parquet":
        _open_parquet(path, column).close()


def read_rows(path: Path, column: Column, start: int) -> Iterator[str | None]:
    """Yield the rows of a file from row `start` on; None where there is no text."""
    return {"parquet": _parquet_rows, "jsonl": _jsonl_rows, "txt": _txt_rows}[kind_of(path.name)](path, column, start)


def count_rows(path: Path, column: Column) -> int:
    """Count the rows of a file without parsing them."""
    kind = kind_of(path.name)
    if kind == "parquet":
        with _open_parquet(path, column) as file:
            return file.metadata.num_rows
    return sum(1 for _ in (_lines(path) if kind == "jsonl" else _txt_documents(path)))


def _open_parquet(path: Path, column: Column):
    """Return the opened file. Raises UserError if it is no parquet file or has no text in `column`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path if isinstance(path, Path) else path.open())
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({_short(error)}). Fetch the file again.") from error

    def is_text(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

    names = [name for name in schema.names if is_text(schema.field(name).type)]
    if column.name not in names:
        problem = f"is of type {schema.field(column.name).type}" if column.name in schema.names else "does not exist"
        raise UserError(f"{path}: {column} {problem}. Text columns here: {', '.join(names) or 'none'}.")
    return file


def _parquet_rows(path: Path, column: Column, start: int) -> Iterator[str | None]:
    """Yield the text of the rows from `start` on; row groups before it are never decoded."""
    import pyarrow as pa

    with _open_parquet(path, column) as file:
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
                raise UserError(f"{path}: damaged after row {row:,} ({_short(error)}). Fetch it again.") from error
            if batch is None:
                return
            values = batch.column(0)
            try:
                rows = values.to_pylist()
            except UnicodeDecodeError:
                row += next(i for i, value in enumerate(values) if not _is_utf8(value))
                raise UserError(
                    f"{path}: row {row:,} (from 0) is not UTF-8 text. Convert it or drop the row."
                ) from None
            for number, text in enumerate(rows[max(0, start - row) :], start=max(start, row)):
                if text is not None and len(text) > DOCUMENT_BYTES:
                    raise _too_long(path, f"row {number:,} (from 0)")
                yield text
            row += len(rows)


def _mean_bytes(metadata, groups: list[int], name: str) -> int:
    """Return the bytes of a text column per row, in the row group with the most."""
    means = [1]
    for group in map(metadata.row_group, groups):
        parts = (group.column(i) for i in range(group.num_columns))
        size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema == name)
        means.append(size // max(1, group.num_rows))
    return max(means)


def _too_long(path: Path, where: str) -> UserError:
    return UserError(f"{path}: {where} is longer than {in_bytes(DOCUMENT_BYTES)}. Cut it into documents.")


def _is_utf8(value) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _lines(path: Path, piece: int | None = None) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of a UTF-8 file; with `piece`, longer lines come in pieces of so many bytes.

    Without `piece`, a line longer than DOCUMENT_BYTES raises UserError.
    """
    decoder, number = codecs.getincrementaldecoder("utf-8-sig")(), 1
    try:
        with _opened(path) as file:
            while raw := file.readline(piece or DOCUMENT_BYTES):
                if piece is None and len(raw) == DOCUMENT_BYTES:
                    raise _too_long(path, f"line {number:,}")
                line = decoder.decode(raw)
                yield number, line
                number += raw.endswith(b"\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number:,} is not UTF-8 text ({error.reason}). Convert the file.") from None
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path}: damaged after line {number - 1:,} ({_short(error)}). Fetch it again.") from error


def _opened(path: Path) -> BinaryIO:
    """Open a file for reading bytes, decompressed on the fly."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path if isinstance(path, Path) else path.open(), "rb")
    if name.endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(path.open("rb"), compression="zstd"))
    return path.open("rb")


def _jsonl_rows(path: Path, column: Column, start: int) -> Iterator[str | None]:
    """Yield the text of the rows from `start` on, None for blank lines."""
    for number, line in _lines(path):
        if number <= start:
            continue
        if not line.strip():
            yield None
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}: line {number:,} is not valid JSON ({error}). Correct or delete the line."
            ) from None
        if not isinstance(row, dict) or column.name not in row:
            keys = f"its keys are {', '.join(row)}" if isinstance(row, dict) else "it is not an object"
            raise UserError(f"{path}: line {number:,} has no {column}: {keys}.")
        text = row[column.name]
        if not isinstance(text, str | None):
            raise UserError(f"{path}: line {number:,}: {column.name} is a {type(text).__name__}, not text.")
        yield text


def _txt_rows(path: Path, column: Column, start: int) -> Iterator[str]:
    """Yield documents of a text file from number `start` on; `column` has no meaning here."""
    return islice(_txt_documents(path), start, None)


def _txt_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a text file, cut at separators, blank lines and line ends; one is held at a time."""
    lines, size = [], 0
    for _, line in _lines(path, TXT_LINE_BYTES):
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


def _short(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]
