"""Sources of pretraining text, with a cursor that resumes exactly.

A source walks its shards in name order, row by row, and gives document number `index` to rank `index % world`. So ranks
read disjoint documents, every rank sees one global order, and the union does not depend on the number of ranks. The
cursor names the next row to read in four integers: epoch, shard, row (inside the shard) and index (number of documents
before it, over all ranks and epochs, empty ones not counted). For a while after the number of ranks has changed it also
says what was `consumed` before. It knows nothing of threads or batch sizes.
"""

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from llm.data.files import ZipMember, find_data_files, format_of, size_of
from llm.data.formats import Column, check_file, count_rows, read_rows
from llm.data.records import SHOWN, BadRow, bad_rows_error
from llm.data.splits import divide
from llm.data.stores import StoredFile
from llm.errors import BadData, UserError
from llm.utils.addresses import without_secrets as shown
from llm.utils.source import command

SCAN_BYTES = 1 << 28  # files of up to so many bytes in all are read once before training, to find every bad row ...
SCAN_SECONDS = 3.0  # ... for so long at most
ID_CHARS = 1 << 24  # characters that tell one text from another: read in a fifth of a second
SCAN_BYTES_STORE = 1 << 24  # so many where the files lie in a store
VAL_SHARE = 0.05  # share of the rows that validate if a data set is a single file
LARGE_SHARE = 0.2  # the line about the text says so where a last file that nobody named is more of the bytes than this

Cursor = dict[str, Any]


class DocumentSource(Protocol):
    """Protocol of a source that pretraining and the tokenizer can read text from."""

    def check(self) -> str:
        """Raise UserError for mistakes that can be found cheaply; return one line on what is read and held out."""

    def iterate(
        self, split: str, cursor: Cursor | None = None, rank: int = 0, world: int = 1, loop: bool = True
    ) -> Iterator[tuple[str, Cursor]]:
        """Yield this rank's documents from `cursor` on, each with the cursor that continues after it.

        loop: start over at the end of the split, as training does.
        """


def texts(source: DocumentSource, split: str = "train") -> Iterator[str]:
    """Yield the documents of a split once, without cursors (tokenizer training, statistics)."""
    if gives_ids(source):
        return source.texts(split)
    return (text for text, _ in source.iterate(split, loop=False))


def gives_ids(source: DocumentSource) -> bool:
    """Return whether a source gives token ids (n,) int32 that begin with BOS, in the place of text."""
    return getattr(source, "gives_ids", False)


def text_id(source: DocumentSource, split: str = "val") -> str:
    """Return a digest of the first ID_CHARS characters of a split: another one means another text."""
    digest, left = hashlib.sha256(), ID_CHARS
    for text in texts(source, split):
        data = text[:left].encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
        left -= len(text)
        if left <= 0:
            break
    return digest.hexdigest()[:16]


class Consumed:
    """Documents behind a cursor that were read before, by ranks that were ahead when the number of ranks changed.

    A cursor lists them in `consumed`, one list of limits per change. Document i was read before a change if i <
    limits[i % len(limits)]. Cursors beyond all limits no longer carry the lists.
    """

    def __init__(self, cursor: dict):
        self.rules = cursor.get("consumed", [])
        self.end = max((max(rule) for rule in self.rules), default=0)

    def __contains__(self, number: int) -> bool:
        return number < self.end and any(number < rule[number % len(rule)] for rule in self.rules)

    def cursor(self, index: int) -> dict:
        """Return the resharding rules to store in the cursor at `index`; empty once they are no longer needed."""
        return {"consumed": self.rules} if index < self.end else {}


def in_order(
    shards: Sequence, rows: Callable[[Any, int], Iterator[str | None]], cursor: Cursor | None, loop: bool, where: str
) -> Iterator[tuple[str, Cursor]]:
    """Yield every document from `cursor` on: shard by shard, row by row, epoch after epoch, skipping empty ones.

    `rows(shard, start)` yields the rows of a shard from row `start` on. Raises UserError for a cursor beyond the
    shards, and for an epoch without a document, which would loop forever. `where` leads the message.
    """
    position = cursor or {"epoch": 0, "shard": 0, "row": 0, "index": 0}
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
                yield text, {"epoch": epoch, "shard": number, "row": row, "index": index}
            row = 0
        if complete and index == found:
            raise UserError(f"{where}: there is no document, or every one is empty. Name files that hold text.")
        if not loop:
            return
        epoch, first = epoch + 1, 0


def share(
    documents: Iterator[tuple[str, Cursor]], cursor: Cursor | None, rank: int, world: int
) -> Iterator[tuple[str, Cursor]]:
    """Yield this rank's documents of the global stream, from `cursor` on."""
    consumed = Consumed(cursor or {})
    for text, position in documents:
        number = position["index"] - 1
        if number % world == rank and number not in consumed:
            yield text, position | consumed.cursor(number + 1)


def walk(
    shards: Sequence,
    rows: Callable[[Any, int], Iterator[str | None]],
    cursor: Cursor | None,
    rank: int,
    world: int,
    loop: bool,
    where: str,
) -> Iterator[tuple[str, Cursor]]:
    """Yield this rank's documents of `shards`, in the order that all sources of shards have."""
    return share(in_order(shards, rows, cursor, loop, where), cursor, rank, world)


@dataclass(frozen=True)
class Shard:
    """Rows start <= row < stop (None: to the end) of one file."""

    path: Path
    start: int = 0
    stop: int | None = None


class FileDocuments:
    """Documents in files of any format of llm.data.files, read in name order, divided by `files` and `val`.

    Without `val` the last file is the validation split. With `val_size`, only the last `val_size` documents of that
    file validate, and the rest of it is trained on; of the files in `val`, the last `val_size` documents of the last
    one. A single file without `val_size` lends its last 5 % (at least one document).

    Rows carry the text in `column`; null and blank rows are skipped. A text file (.txt, .md, source code) is cut into
    documents at lines that read <|endoftext|>, at the first blank line after 2,000 characters and at the first line end
    after 8,000: neither a whole book nor every short line becomes one document. `key` is the place in the configuration
    that error messages name. bad_rows: "stop" raises UserError for a row that cannot be used, "skip" counts it in
    `skipped`. note: what the files' names decided, for the line of `check`.
    """

    is_stored = True  # the files are on this machine
    is_cached = True  # data.token_cache may keep the tokens: a change of the files is noticed
    near_duplicates = None  # llm.data.near_duplicates.NearDuplicates, or None: training reads every document
    shuffle = None  # llm.data.shuffle.Shuffle, or None: training reads the documents in the order of the files
    by_key = None  # "by data.val" where that key chose the files that validate, None: their names did

    def __init__(
        self,
        files: Sequence[Path],
        where: str,
        column: str = "text",
        val_size: int | None = None,
        key: str = "data",
        *,
        val: Sequence[Path] = (),
        bad_rows: str = "stop",
        encoding: str | None = None,
        separator: str | None = None,
        note: str = "",
    ) -> None:
        self.files, self.where, self.key, self.val_size = [*files, *val], where, key, val_size
        self.n_train, self.bad_rows, self.note = len(files), bad_rows, note
        self.column = Column(column, f"{key}.column", encoding or "utf-8", separator)
        self.names: dict[Any, str] = {}  # files by their names below the data folder; the name alone where not given
        self.skipped: dict[str, int] = {}  # by file: bad rows that were left out, each counted once
        self._bad: dict[str, set[int]] = {}  # numbers of the bad rows that were counted, by file
        self._split: dict[str, list[Shard]] | None = None
        self._checked: str | None = None  # the line of `check`

    def shards(self, split: str) -> list[Shard]:
        """Return the shards of "train" or "val".

        Raises ValueError for another split, UserError if the files cannot give both splits a document.
        """
        if self._split is None:
            self._split = self._make_split()
        if split not in self._split:
            raise ValueError(f"split={split!r}: must be one of {list(self._split)}")
        return self._split[split]

    def in_order(self, split: str, cursor: Cursor | None = None, loop: bool = True) -> Iterator[tuple[str, Cursor]]:
        """Yield the documents of all ranks, each with the cursor behind it."""
        shards, rows = self.shards(split), self._rows
        if split == "train" and self.near_duplicates is not None:
            rows = self._kept
        where = self._place(split)
        if self.shuffle is not None and split == "train" and loop:  # a single pass keeps the order
            return self.shuffle.in_order(shards, rows, cursor, loop, where)
        return in_order(shards, rows, cursor, loop, where)

    def _place(self, split: str) -> str:
        """Return the beginning of messages about a split."""
        shards = self.shards(split)
        return f"{self.where} ({split} split{': ' + shards[0].path.name if len(shards) == 1 else ''})"

    def iterate(
        self, split: str, cursor: Cursor | None = None, rank: int = 0, world: int = 1, loop: bool = True
    ) -> Iterator[tuple[str, Cursor]]:
        """Yield this rank's documents from `cursor` on, each with the cursor behind it."""
        return share(self.in_order(split, cursor, loop), cursor, rank, world)

    def check(self) -> str:
        """Open every file, look for the column and a first validation document; return one line on what is read.

        The files are read once, however often they are asked about. Raises UserError for the first mistake.
        """
        if self._checked is None:
            self._checked = self._check()
        return self._checked

    def _check(self) -> str:
        ends = dict.fromkeys((self.files[0], self.files[self.n_train - 1], self.files[-1]))
        seen = self.files if self.is_stored else ends  # far away every look costs a request
        for path in seen:
            check_file(path, self.column)
        if int(os.environ.get("RANK", 0)) == 0:  # the other processes would find the same
            self._scan()
        self._find_documents()
        kinds, count = sorted({format_of(path).kind for path in seen}), len(self.files)
        held_out = f"validation: {self._held_out()}"
        return f"{count} {'/'.join(kinds)} file{'s' * (count > 1)}, {self.where}; {held_out}{self._notes()}"

    def _notes(self) -> str:
        """Return what else there is to say about the files, each part behind a semicolon."""
        bad = sum(self.skipped.values())
        notes = [self.note, *(format_of(path).note for path in self.files if isinstance(path, Path) and path.exists())]
        notes.append(f"skipped: {bad:,} bad row{'s' * (bad > 1)} ({self.key}.bad_rows=skip)" if bad else "")
        return "".join(f"; {note}" for note in notes if note)

    def _scan(self) -> None:
        """Read the rows once, as far as the limits of SCAN_* reach; note what was not read.

        Raises UserError that names the bad ones, if they are not to be skipped.
        """
        bad: list[BadRow] = []
        limit = SCAN_BYTES if self.is_stored else SCAN_BYTES_STORE
        small = sum(map(size_of, self.files)) <= limit
        end = time.monotonic() + SCAN_SECONDS if small else 0.0
        whole = sum(1 for _ in takewhile(lambda path: self._scan_file(path, end, bad), self.files))
        if bad and self.bad_rows == "stop":
            raise bad_rows_error(bad, sum(self.skipped.values()), f"{self.key}.bad_rows")
        if whole < len(self.files):
            self.note = "; ".join(filter(None, [self.note, _unread(len(self.files) - whole, len(self.files))]))

    def _scan_file(self, path: Path, end: float, bad: list[BadRow]) -> bool:
        """Read rows until the clock shows `end` (s), add the first bad ones to `bad`; return whether it was in time."""
        if time.monotonic() > end:
            return False
        for number, row in enumerate(read_rows(path, self.column, 0)):
            if row.__class__ is BadRow:
                bad += [row] if len(bad) < SHOWN else []
                self._count(path, number)
            if not number % 256 and time.monotonic() > end:
                return False
        return True

    def _count(self, path: Path, number: int) -> None:
        """Count a bad row of a file, unless it was counted in an epoch before."""
        name = str(path)
        counted = self._bad.setdefault(name, set())
        counted.add(number)
        self.skipped[name] = len(counted)

    def _find_documents(self) -> None:
        """Raise UserError if a split has no document."""
        for split in ("train", "val"):
            next(in_order(self.shards(split), self._rows, None, False, self._place(split)))

    @property
    def left_out(self) -> dict[str, int]:
        """Near-duplicates that training leaves out, by file; they are looked for if they have not been yet."""
        return {} if self.near_duplicates is None else self.near_duplicates.by_file(self)

    def stamp(self, path: Path) -> tuple:
        """Return what changes with a file: its name, its size and the time of its last change."""
        return str(path.resolve()), *(_stamp(path) or (path.stat().st_size,))

    def name_of(self, path: Path) -> str:
        """Return the name of a file below the data folder, its whole path where two files have one name."""
        name = self.names.get(path, path.name)
        return name if self._name_counts[name] == 1 else str(path)

    @cached_property
    def _name_counts(self) -> Counter:
        return Counter(self.names.get(path, path.name) for path in self.files)

    def size_of(self, path: Path) -> int:
        """Return the bytes of a file."""
        return size_of(path)

    def present(self, path: Path) -> Path:
        """Return a path that can be read; subclasses may first have to fetch the file."""
        return path

    def _held_out(self) -> str:
        """Return the validation split in words."""
        shards = self.shards("val")
        val = shards[0]
        if self.n_train < len(self.files):
            if val.stop is not None:
                by = self.by_key or "by its name"
                return f"the last {val.stop - val.start:,} of {val.stop:,} documents of {val.path.name}, {by}"
            if len(shards) == 1:
                return f"{val.path.name}, {self.by_key or 'by its name'}"
            return f"{len(shards)} files, {self.by_key or 'by their names'}"
        if val.stop is None:
            return f"{val.path.name}, the last file, as no name says what validates{self._large(val.path)}"
        alone = ", as it is a single file" if self.val_size is None else ""
        if len(self.files) > 1:
            alone = ", the last file, as no name says what validates"
        return f"the last {val.stop - val.start:,} of {val.stop:,} documents of {val.path.name}{alone}"

    def _large(self, path: Path) -> str:
        """Return how much is held out with a file and how it becomes less, if that is a large share; else ''."""
        share = self.size_of(path) / max(1, sum(map(self.size_of, self.files))) if self.is_stored else 0.0
        remedy = f"with {self.key}.val_size=20 only the last 20 documents of it would be"
        return f"; this is {share:.0%} of the bytes and not trained on, {remedy}" if share > LARGE_SHARE else ""

    def _make_split(self) -> dict[str, list[Shard]]:
        """Return {split: shards}. Raises UserError if the files cannot give both splits a document."""
        if self.n_train < len(self.files):
            train, val = self.files[: self.n_train], self.files[self.n_train :]
            held = [Shard(path) for path in val]
            if self.val_size is not None:
                count = count_rows(self.present(val[-1]), self.column)
                held = [Shard(val[-1], max(0, count - self.val_size), count)]
            return {"train": [Shard(path) for path in train], "val": held}
        last = self.files[-1]
        if len(self.files) > 1 and self.val_size is None:
            return {"train": [Shard(path) for path in self.files[:-1]], "val": [Shard(last)]}
        count = count_rows(self.present(last), self.column)
        val = math.ceil(VAL_SHARE * count) if self.val_size is None else self.val_size
        if len(self.files) == 1 and count <= max(val, 1):
            asked = "" if self.val_size is None else f", and {self.key}.val_size={val} are to validate"
            raise UserError(
                f"{self.where}: {last} is the only file and holds {count} document{'s' * (count != 1)}{asked}, so a "
                "split would be empty. Add documents, or a second file: the last in name order validates."
            )
        if count < val:
            raise UserError(f"{self.key}.val_size={val}: {last}, the last file in name order, holds {count} documents")
        rest = [Shard(last, 0, count - val)] if count > val else []
        return {"train": [*(Shard(path) for path in self.files[:-1]), *rest], "val": [Shard(last, count - val, count)]}

    def _rows(self, shard: Shard, start: int) -> Iterator[str | None]:
        """Yield rows `start`.. of a shard (counted from the shard's own start); None where there is no text."""
        first, path = shard.start + start, self.present(shard.path)
        began = _stamp(path, now=True)
        if began and began[0] != _stamp(path)[0]:  # in a store: so much is read as was there when it was listed
            raise _changed(path)
        for number, text in enumerate(read_rows(path, self.column, first), start=first):
            if shard.stop is not None and number >= shard.stop:
                break
            if text.__class__ is BadRow:
                if self.bad_rows == "stop":
                    raise bad_rows_error([text], 1, f"{self.key}.bad_rows")
                self._count(shard.path, number)
                text = None
            yield text
        if _stamp(path, now=True) != began:
            raise _changed(path)

    def _kept(self, shard: Shard, start: int) -> Iterator[str | None]:
        """Yield rows `start`.. of a training shard; None in the place of near-duplicates too."""
        left_out = self.near_duplicates.rows(self, shard)
        waiting = iter(left_out[left_out >= start].tolist())
        skipped = next(waiting, None)
        for number, text in enumerate(self._rows(shard, start), start=start):
            if number == skipped:
                text, skipped = None, next(waiting, None)
            yield text


def held_out_all(key: str, value: Any, val_key: str, val: Any) -> UserError:
    """Return the error for files to train on that all validate, by `key`=`value` and `val_key`=`val`."""
    return UserError(
        f"{key}={shown(value)}: every file of it is also in {val_key}={shown(val)}, which validates and is not trained "
        f"on. Leave out {val_key}, or name other files in one of the two"
    )


class LocalDocuments(FileDocuments):
    """Documents of the user's own: a file, a folder (with its subfolders), a glob or a list of them.

    The names of files and folders say what trains and what validates (llm.data.splits); files of a test split are not
    read. `train` and `val` name files instead: what `train` names is trained on, whatever its name, and `path` is not
    read then; what `val` names validates and is never trained on.
    """

    def __init__(
        self,
        path: str | Path | None,
        column: str = "text",
        val_size: int | None = None,
        key: str = "data",
        *,
        train: str | Sequence[str] | None = None,
        val: str | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        found = find_data_files(train or path, f"{key}.{'train' if train else 'path'}")
        held = find_data_files(val, f"{key}.val") if val else None
        notes = [found.left_out, held.left_out if held else ""]
        parts = divide(found.names)
        if train or found.alone:  # named by the user: its name need not say anything
            files, validate = found.files, []
        else:
            files, validate = ([found.files[i] for i in part] for part in parts[:2])
            if parts.test:
                notes.append(f"left out: {_named([found.files[i] for i in parts.test])}, the test split by name")
        if held:
            resolved = {str(file.resolve()) for file in held.files}
            named, by_name, validate = files, validate, held.files
            files = [file for file in named if str(file.resolve()) not in resolved]
            if named and not files:
                raise held_out_all(f"{key}.train" if train else f"{key}.path", train or path, f"{key}.val", val)
            if unread := [file for file in by_name if str(file.resolve()) not in resolved]:
                notes.append(f"left out: {_named(unread)}, for validation by name, as {key}.val names other files")
            self.by_key = f"by {key}.val"
        if not files:
            raise UserError(
                f"{key}.path={shown(path)}: {_named(found.files)}: by their names none of the files is to be trained "
                f"on. Name those to train on in {key}.train"
            )
        where = f"{key}.train={shown(train)}" if train else f"{key}.path={shown(path)}"
        super().__init__(
            files, where, column, val_size, key, val=validate, note="; ".join(filter(None, notes)), **options
        )
        parts = (found, held) if held else (found,)
        self.names = {path: name for part in parts for path, name in zip(part.files, part.names, strict=True)}
        self.is_stored = not any(isinstance(getattr(file, "archive", file), StoredFile) for file in self.files)


def _stamp(path: Path, now: bool = False) -> tuple[int, int] | None:
    """Return size and time of change of a file or its archive, by which a change is noticed; None on the hub.

    now: of a file in a store, ask the store again. Else it is as it was listed.
    """
    path = path.archive if isinstance(path, ZipMember) else path
    if not isinstance(path, Path | StoredFile):
        return None
    stat = (path.fresh() if now and isinstance(path, StoredFile) else path).stat()
    return stat.st_size, stat.st_mtime_ns


def _changed(path: Path) -> BadData:
    return BadData(f"{path}: has changed while it was read. Restore the file that the run started with.")


def _unread(unread: int, count: int) -> str:
    """Return in words that `unread` of `count` files were not searched to their ends for bad rows."""
    files = f"{unread} of {count} files" if count > 1 else "all of the file"
    return f"not yet searched for bad rows: {files} ({command('train')} stage=check reads every row)"


def _named(files: Sequence[Path]) -> str:
    """Return the name of a file, or the number of several."""
    return files[0].name if len(files) == 1 else f"{len(files)} files"
