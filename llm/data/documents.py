"""Where pretraining text comes from: sources of documents with a cursor that resumes exactly.

A source walks its shards in name order, row by row, and gives document number `index` to rank `index % world`, so that
ranks read disjoint documents, every rank sees the same global order and the union does not depend on the number of
ranks. The cursor names the next row to read, in four integers: epoch, shard, row (inside the shard) and index (number
of documents before it, over all ranks and epochs, empty ones not counted), and for a while after the number of ranks
has changed what was `taken` before. It knows nothing of threads or batch sizes.
"""

import codecs
import glob
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from llm.errors import UserError

SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".txt": "txt"}
VAL_SHARE = 0.05  # of the rows of a data set that consists of one single file
READ_ROWS = 1024  # parquet rows decoded at a time: bounds the memory, whatever the row group size
TXT_CHARS = 2_000  # a text file: a document ends at the first blank line after this many characters ...
TXT_CHARS_MAX = 8_000  # ... or at the first line end after this many
TXT_LINE_BYTES = 1 << 16  # longer lines are cut
TXT_SEPARATOR = "<|endoftext|>"  # a line of its own that always ends a document

Cursor = dict[str, Any]


class DocumentSource(Protocol):
    """Anything that pretraining and the tokenizer can read text from."""

    def check(self) -> str:
        """Raise UserError for what can be found wrong cheaply; return one line that says what is read and held out."""

    def shards(self, split: str) -> Sequence:
        """The pieces of `split` ("train" or "val") in reading order."""

    def iterate(
        self, split: str, cursor: Cursor | None = None, rank: int = 0, world: int = 1, loop: bool = True
    ) -> Iterator[tuple[str, Cursor]]:
        """Yield this rank's documents from `cursor` on, each with the cursor that continues after it."""


def texts(source: DocumentSource, split: str = "train") -> Iterator[str]:
    """One pass over the documents of a split, without cursors (tokenizer training, statistics)."""
    return (text for text, _ in source.iterate(split, loop=False))


class Taken:
    """The documents behind a cursor that were read before, by ranks that were ahead when their number changed.

    A cursor names them in `taken`: for every change a list by old rank, in which number i was read where
    i < list[i % len(list)]. Cursors beyond all of them no longer do.
    """

    def __init__(self, cursor: dict):
        self.rules = cursor.get("taken", [])
        self.end = max((max(rule) for rule in self.rules), default=0)

    def __contains__(self, number: int) -> bool:
        return number < self.end and any(number < rule[number % len(rule)] for rule in self.rules)

    def cursor(self, index: int) -> dict:
        """What the cursor behind `index` documents has to carry on."""
        return {"taken": self.rules} if index < self.end else {}


def walk(
    shards: Sequence,
    rows: Callable[[object, int], Iterator[str | None]],
    cursor: Cursor | None,
    rank: int,
    world: int,
    loop: bool,
    where: str,
) -> Iterator[tuple[str, Cursor]]:
    """The order all sources share: shard by shard, row by row, epoch after epoch, skipping empty documents.

    `rows(shard, start)` yields the rows of a shard from row `start` on. An epoch in which no rank finds a document is a
    UserError and never an endless loop.
    """
    position = cursor or {"epoch": 0, "shard": 0, "row": 0, "index": 0}
    taken = Taken(position)
    epoch, first, row, index = (position[key] for key in ("epoch", "shard", "row", "index"))
    if first >= len(shards):
        raise UserError(
            f"{where}: the checkpoint's position is in shard {first}, but there are {len(shards)} shards now. "
            "Restore the files that the run started with, or start another with run=<new name>."
        )
    while True:
        complete, found = first == 0 and row == 0, index
        for number in range(first, len(shards)):
            for text in rows(shards[number], row):
                row += 1
                if not text or text.isspace():
                    continue
                index += 1
                if (index - 1) % world == rank and index - 1 not in taken:
                    yield text, {"epoch": epoch, "shard": number, "row": row, "index": index} | taken.cursor(index)
            row = 0
        if complete and index == found:
            raise UserError(f"{where}: there is no document, or every one is empty. Name files that hold text.")
        if not loop:
            return
        epoch, first = epoch + 1, 0


@dataclass(frozen=True)
class Shard:
    """Rows start <= row < stop (None: to the end) of one file."""

    path: Path
    start: int = 0
    stop: int | None = None

    @property
    def kind(self) -> str:
        return _kind(self.path)


class LocalDocuments:
    """Text of the user's own: a file, a folder (with its subfolders) or a glob of .parquet, .jsonl(.gz) or .txt shards.

    Shards are read in name order and the last one is the validation split. A single file lends its last 5 % of rows (at
    least one) to validation. Rows of parquet and jsonl files carry the text in `column`; null and blank rows are
    skipped. A .txt file is cut into documents at lines that read <|endoftext|>, at the first blank line after 2,000
    characters and at the first line end after 8,000: neither a whole book nor every short line becomes one document.
    """

    def __init__(self, path: str | Path, column: str = "text") -> None:
        self.where, self.column = f"data.path={path}", column
        self._files = _find_files(path, self.where)
        self._split: dict[str, list[Shard]] | None = None

    def shards(self, split: str) -> list[Shard]:
        if self._split is None:
            self._split = self._make_split()
        if split not in self._split:
            raise ValueError(f"split={split!r}: must be one of {list(self._split)}")
        return self._split[split]

    def iterate(
        self, split: str, cursor: Cursor | None = None, rank: int = 0, world: int = 1, loop: bool = True
    ) -> Iterator[tuple[str, Cursor]]:
        shards = self.shards(split)
        where = f"{self.where} ({split} split{': ' + shards[0].path.name if len(shards) == 1 else ''})"
        return walk(shards, self._rows, cursor, rank, world, loop, where)

    def check(self) -> str:
        """Open every file, look for the column and a first validation document; see DocumentSource.check."""
        for path in self._files:
            if path.stat().st_size == 0:
                raise UserError(f"{self.where}: {path} is empty. Delete it or fetch it again.")
            if _kind(path) == "parquet":
                _open_parquet(path, self.column).close()
        for split in ("train", "val"):
            next(self.iterate(split, loop=False))
        kinds = sorted({_kind(path) for path in self._files})
        count, val = len(self._files), self.shards("val")[0]
        if count == 1:
            held_out = f"its last {val.stop - val.start:,} of {val.stop:,} documents, as it is a single file"
        else:
            held_out = val.path.name
        return f"{count} {'/'.join(kinds)} file{'s' * (count > 1)}, {self.where}; validation: {held_out}"

    def _make_split(self) -> dict[str, list[Shard]]:
        if len(self._files) > 1:
            return {"train": [Shard(path) for path in self._files[:-1]], "val": [Shard(self._files[-1])]}
        path = self._files[0]
        count = _count_rows(path, self.column)
        if count < 2:
            raise UserError(
                f"{self.where}: {path} is the only file and holds {count} document{'s' * (count != 1)}, so the "
                "validation split would be empty. Add documents, or a second file: the last in name order validates."
            )
        val = math.ceil(VAL_SHARE * count)
        return {"train": [Shard(path, 0, count - val)], "val": [Shard(path, count - val, count)]}

    def _rows(self, shard: Shard, start: int) -> Iterator[str | None]:
        """Rows `start`.. of a shard (counted from the shard's own start); None where there is no text."""
        read = {"parquet": _parquet_rows, "jsonl": _jsonl_rows, "txt": _txt_rows}[shard.kind]
        first = shard.start + start
        rows = read(shard.path, self.column, first)
        for number, text in enumerate(rows, start=first):
            if shard.stop is not None and number >= shard.stop:
                return
            yield text


class EmbeddedDocuments:
    """The generated world of llm.data.embedded: `size` training documents and `val_size` validation documents."""

    def __init__(self, size: int, seed: int = 42, val_size: int | None = None) -> None:
        val_size = max(1, size // 20) if val_size is None else val_size
        if size < 1 or val_size < 1:
            raise UserError(f"data.size={size}, data.val_size={val_size}: both must be at least 1")
        self.seed, self._sizes = seed, {"train": size, "val": val_size}

    def shards(self, split: str) -> list[str]:
        if split not in self._sizes:
            raise ValueError(f"split={split!r}: must be one of {list(self._sizes)}")
        return [split]

    def iterate(
        self, split: str, cursor: Cursor | None = None, rank: int = 0, world: int = 1, loop: bool = True
    ) -> Iterator[tuple[str, Cursor]]:
        return walk(self.shards(split), self._rows, cursor, rank, world, loop, "data=embedded")

    def check(self) -> str:
        return (
            f"{self._sizes['train']:,} generated documents, seed {self.seed}; validation: {self._sizes['val']:,} others"
        )

    def _rows(self, split: str, start: int) -> Iterator[str]:
        from llm.data.embedded import documents

        return documents({"train": "train", "val": "test"}[split], self._sizes[split], self.seed, start)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def _find_files(path: str | Path, where: str) -> list[Path]:
    """Data files of a file name, folder or glob in name order; a folder must hold one kind: no README is trained on."""
    if not path or not str(path):
        raise UserError(f"data.path={path} is not set. Name a file, a folder or a glob of {', '.join(SUFFIXES)} files.")
    root = Path(path).expanduser()
    if root.is_dir():
        found = [p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    elif root.exists():
        found = [root]
    else:
        found = [Path(p) for p in glob.glob(str(root), recursive=True)]
        if not found:
            raise UserError(f"{where}: no such file or folder, and no file matches it as a glob. Correct data.path.")
    files = sorted((p for p in found if p.is_file() and _kind(p)), key=lambda p: p.as_posix())
    if not files:
        raise UserError(f"{where}: holds no {', '.join(SUFFIXES)} file. Convert the text to one of these.")
    kinds = {kind: sum(_kind(p) == kind for p in files) for kind in sorted({_kind(p) for p in files})}
    if root.is_dir() and len(kinds) > 1:
        counts = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise UserError(
            f"{where}: the folder mixes {counts} files. Name those to read, such as data.path='{root}/*.txt'."
        )
    return files


def _open_parquet(path: Path, column: str):
    """The opened file; UserError if it is no parquet file or has no text in `column`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({_short(error)}). Fetch the file again.") from error

    def is_text(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

    names = [name for name in schema.names if is_text(schema.field(name).type)]
    if column not in names:
        problem = f"is of type {schema.field(column).type}" if column in schema.names else "does not exist"
        raise UserError(f"{path}: data.column={column} {problem}. Text columns here: {', '.join(names) or 'none'}.")
    return file


def _parquet_rows(path: Path, column: str, start: int) -> Iterator[str | None]:
    import pyarrow as pa

    with _open_parquet(path, column) as file:
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        row = group = 0
        while group < len(counts) and row + counts[group] <= start:  # whole row groups before `start` are never decoded
            row, group = row + counts[group], group + 1
        groups = list(range(group, len(counts)))
        batches = file.iter_batches(READ_ROWS, row_groups=groups, columns=[column], use_threads=False)
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
            yield from rows[max(0, start - row) :]
            row += len(rows)


def _count_rows(path: Path, column: str) -> int:
    """Rows of a file without parsing them."""
    if _kind(path) == "parquet":
        with _open_parquet(path, column) as file:
            return file.metadata.num_rows
    return sum(1 for _ in (_lines(path) if _kind(path) == "jsonl" else _txt_documents(path)))


def _is_utf8(value) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _lines(path: Path, limit: int = -1) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a UTF-8 file, .gz included; pieces of at most `limit` bytes where one is given."""
    decoder, number = codecs.getincrementaldecoder("utf-8-sig")(), 1
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            while raw := file.readline(limit):
                line = decoder.decode(raw)
                yield number, line
                number += raw.endswith(b"\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number:,} is not UTF-8 text ({error.reason}). Convert the file.") from None
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path}: damaged after line {number - 1:,} ({_short(error)}). Fetch it again.") from error


def _jsonl_rows(path: Path, column: str, start: int) -> Iterator[str | None]:
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
        if not isinstance(row, dict) or column not in row:
            keys = f"its keys are {', '.join(row)}" if isinstance(row, dict) else "it is not an object"
            raise UserError(f"{path}: line {number:,} has no data.column={column}: {keys}.")
        if not isinstance(row[column], str | None):
            raise UserError(f"{path}: line {number:,}: {column} is a {type(row[column]).__name__}, not text.")
        yield row[column]


def _txt_rows(path: Path, column: str, start: int) -> Iterator[str]:
    """Documents of a text file, cut as LocalDocuments describes; `column` has no meaning here."""
    return islice(_txt_documents(path), start, None)


def _txt_documents(path: Path) -> Iterator[str]:
    """A pass over the file that holds one document at a time."""
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


def document_source(data) -> DocumentSource:
    """The text of the config group `data`, checked as far as that is cheap."""
    if data.name == "embedded":
        source = EmbeddedDocuments(data.size, data.seed, data.val_size)
    elif data.path is None:
        raise UserError("data.path is not set: data=local needs data.path=<folder, file or pattern of your text>")
    else:
        source = LocalDocuments(data.path, data.column)
    print(f"text: {source.check()}", flush=True)
    return source
