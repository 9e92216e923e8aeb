"""Task files, local or of the web: rows of every format and .txt word lists, checked before any compute."""

import glob
import os
import pickle
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from llm.data.download import WebFile
from llm.data.files import Listed, ZipMember, format_of, kind_of, list_files, open_bytes, zip_members
from llm.data.records import BadRow, is_json_lines, parse, read_records
from llm.data.splits import split_of
from llm.data.stores import is_address
from llm.errors import UserError, reason_of
from llm.tokenizer.bpe import without_surrogates
from llm.utils.addresses import without_secrets as shown
from llm.utils.words import word_of
from tasks.hub import Cache
from tasks.rows import RowCheck

TABLES = ("parquet", "arrow", "csv", "tsv")


def is_web(entry: object) -> bool:
    """Return whether an entry of `train` or `test` is an address of the web, whose file is fetched once."""
    return str(entry).startswith(("https://", "http://"))


def web_file(entry: str, where: str, cache: Cache) -> Path:
    """Return the file at an address, fetched into the cache if it is not there yet."""
    file = WebFile(entry, where, cache.folder)
    if file.is_here():
        return file.path
    if not cache.may_fetch:
        raise UserError(f"{file}: it is not in {file.root}, and dry_run=true fetches nothing: run stage=download first")
    return file.fetch()


def find_files(
    paths: str | Sequence[str],
    where: str,
    exclude: Sequence[Path] = (),
    cache: Cache | None = None,
    split: str | None = None,
    suffixes: tuple[str, ...] = (),
) -> list:
    """Return the files that a path, folder, glob, address or list of them names, sorted per entry, without `exclude`.

    Of a folder, only files of rows, or those that end with `suffixes`, are looked at; of a folder or glob, only those
    whose names speak for `split`, where names speak at all (`llm.data.splits`). What is left out is printed. Raises
    `UserError` naming `where` (the config key) for an entry that matches no file, or where nothing is left.
    """
    found: list = []
    for entry in [paths] if isinstance(paths, (str, Path)) else list(paths):
        if is_web(entry) and cache is not None:
            entry = web_file(str(entry), where, cache)
        matches = existing(entry, where, suffixes)
        chosen = (split and named_for(entry, split, where, suffixes)) or matches
        if others := [path.name for path in matches if path not in set(chosen)]:
            print(f"{where}: left out by their names: {_some(others)}", flush=True)
        found += chosen
    left_out = {path.resolve() for path in exclude}
    found = list({path.resolve(): path for path in found if path.resolve() not in left_out}.values())
    if not found:
        held_out = f" that is not also a test file ({', '.join(map(str, exclude))})" if exclude else ""
        raise UserError(f"{where}: names no file{held_out}")
    return found


def existing(entry: object, where: str, suffixes: tuple[str, ...] = ()) -> list:
    """Return the files that a path, folder, glob or address names; of a folder those of rows, or with `suffixes`.

    Raises UserError naming `where` (the config key) where that is nothing.
    """
    if found := _matching(entry, where, suffixes)[1]:
        return [path for path, _ in found]
    raise UserError(f"{where}: no file matches {shown(entry)} (relative to {Path.cwd()}){_beside(entry)}")


def named_for(entry: object, split: str, where: str, suffixes: tuple[str, ...] = ()) -> list:
    """Return the files of a folder or glob that belong to a split, "train" or "test", by their names.

    Files without a split in their names are trained on. Held out are the files for validation, or if there are none
    those for the test. Of a single file, whose name does not matter, that is none.
    """
    kind, files = _matching(entry, where, suffixes)
    if kind == "file":
        return []
    names = [split_of(name) for _, name in files]
    wanted = ("train", None) if split == "train" else ("val",) if "val" in names else ("test",)
    return [path for (path, _), own in zip(files, names, strict=True) if own in wanted]


def _matching(entry: object, where: str, suffixes: tuple[str, ...]) -> Listed:
    """Return the files that an entry names; of a folder those of rows, or with `suffixes`.

    A zip archive stands for its files of rows, and is a folder of them.
    """
    kind, listed = list_files(entry, where)
    wanted = (lambda name: name.lower().endswith(suffixes)) if suffixes else _holds_rows
    files = [(path, name) for path, name in listed if path.is_file() and (kind != "folder" or wanted(name))]
    if suffixes or not any(is_zip(name) for _, name in files):
        return Listed(kind, files)
    above = (lambda name: "") if kind == "file" else "{}/".format  # the own name of a file says nothing
    within = [(member, name) for path, name in files for member in members(path, where)]
    return Listed(
        "folder" if kind == "file" else kind,
        [(one, above(name) + one.member if isinstance(one, ZipMember) else name) for one, name in within],
    )


def _holds_rows(name: str) -> bool:
    return kind_of(name) in (*TABLES, "jsonl", "json") or is_zip(name)


def _beside(entry: object) -> str:
    """Return a hint at files of the same name and another format, for an error message."""
    if is_address(entry):
        return ""
    wanted = Path(str(entry)).expanduser()
    stem = wanted.name.split(".")[0]
    found = sorted(path.name for path in wanted.parent.glob(f"{glob.escape(stem)}.*")) if stem else []
    return f"; there is {_some(found)}" if found else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


class FileRows(Sequence):
    """The rows of task files as a sequence: all are read and checked once, then found again by their places.

    Rows of plain json lines stay in their files. Those of other formats are kept in a temporary file without a
    name, which is as large as the rows and goes with the process. check: reads rows and notes those that are left
    out; limit: only the first rows; wanted: only the rows with these numbers, counted from 0 through all files, the
    others are not checked; encoding: of files of text. skipped: number of rows left out, by reason; bad and problems:
    those of `check`, by file. Raises
    UserError for files without rows or that cannot be read, and for all bad rows together unless `check` skips
    them.
    """

    def __init__(
        self,
        files: Sequence[Path],
        check: RowCheck,
        limit: int | None = None,
        wanted: range | None = None,
        encoding: str = "utf-8",
    ) -> None:
        self._files = list(files)
        self._check, self._wanted, self._encoding = check, wanted, encoding
        self._passed = 0  # rows of all files so far
        self._offsets, self._lengths, self._numbers = array("q"), array("I"), array("I")  # of the bytes of each row
        self._starts: list[int] = []  # position of each file's first row
        self._states: list[os.stat_result | None] = []  # of each file as it was checked; None: its rows are kept
        self._kept: IO[bytes] | None = None
        for path in self._files:
            if limit is not None and len(self) >= limit:
                break
            if not self._scan(path, limit):
                raise UserError(f"{check.key}: {path}: the file holds no rows")
        check.finish(len(self))
        self.skipped, self.bad, self.problems = dict(check.skipped), check.bad, check.problems
        if self._kept is not None:
            self._kept.flush()

    def _scan(self, path: Any, limit: int | None) -> int:
        """Read and check the rows of a file; return how many it has."""
        self._starts.append(len(self))
        rows = 0
        try:
            form = format_of(path)
            if form.note:
                print(f"{self._check.key}: {form.note}", flush=True)
            plain = _has_places(path, self._encoding)
            self._states.append(path.stat() if plain else None)
            for number, row, place in _lines(path) if plain else _others(path, self._encoding):
                rows, self._passed = rows + 1, self._passed + 1
                if self._wanted is not None and self._passed - 1 not in self._wanted:
                    continue
                if self._check.accepts(partial(self._read, row, path, number, check=True), path, number):
                    offset, length = place or self._keep(row)
                    self._offsets.append(offset)
                    self._lengths.append(length)
                    self._numbers.append(number)
                if limit is not None and len(self) >= limit:
                    break
        except OSError as error:
            raise UserError(f"{self._check.key}: {path}: cannot be read ({reason_of(error, path)})") from None
        except UserError as error:
            raise UserError(f"{self._check.key}: {error}") from None
        return rows

    def _keep(self, row: Any) -> tuple[int, int]:
        """Write a row behind those in the temporary file; return its offset and length there."""
        if self._kept is None:
            self._kept = tempfile.TemporaryFile()
        offset, data = self._kept.tell(), pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
        self._kept.write(data)
        return offset, len(data)

    def _read(self, row: Any, path: Any, number: int, check: bool = False) -> dict:
        """Return a row as the task takes it; row: bytes of a line, a parsed row, or why it cannot be parsed."""
        where = self._check.where(path, number)
        row = parse_line(row, path, number) if isinstance(row, bytes | str) else row
        if isinstance(row, BadRow):
            raise UserError(f"{where}: {row.reason}")
        return self._check.read_and_check(row, where) if check else self._check.read(row, where)

    def __len__(self) -> int:
        return len(self._offsets)

    def by_file(self) -> dict[str, range]:
        """Return the rows of each file that was read."""
        ends = [*self._starts[1:], len(self)]
        return {str(file): range(*part) for file, *part in zip(self._files, self._starts, ends, strict=False)}

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        file = bisect_right(self._starts, index) - 1
        path, state, number = self._files[file], self._states[file], self._numbers[index]
        length, offset = self._lengths[index], self._offsets[index]
        if state is None:
            return self._read(pickle.loads(os.pread(self._kept.fileno(), length, offset)), path, number)
        try:
            with path.open("rb", 0) as plain:
                now = os.fstat(plain.fileno())
                if (now.st_size, now.st_mtime_ns) != (state.st_size, state.st_mtime_ns):
                    raise UserError(f"{self._check.key}: {path} was changed while it was in use. Start again.")
                return self._read(os.pread(plain.fileno(), length, offset), path, number)
        except OSError as error:
            raise UserError(f"{self._check.where(path, number)}: cannot be read ({reason_of(error, path)})") from None


def count_rows(files: Sequence[Path], encoding: str = "utf-8") -> int:
    """Return the number of rows of task files, bad ones with them. Raises UserError for a file that cannot be read."""
    return sum(1 for one in files for _ in (_lines(one) if _has_places(one, encoding) else _others(one, encoding)))


def _has_places(path: Any, encoding: str) -> bool:
    """Return whether the rows of a file can be found again by their places: plain lines of JSON in UTF-8."""
    form = format_of(path)
    is_plain = form.kind not in TABLES and not form.compression and isinstance(path, Path)
    return is_plain and encoding == "utf-8" and is_json_lines(path)


def is_zip(name: str) -> bool:
    """Return whether a name is that of a zip archive."""
    return name.lower().endswith(".zip")


def members(path: Any, where: str) -> list:
    """Return the files of rows in a zip archive, hidden ones not; of any other file the file.

    Raises UserError naming `where` (the config key) for an archive that holds none or cannot be read.
    """
    if not is_zip(path.name):
        return [path]
    try:
        found = [member for member in zip_members(path) if _holds_rows(member.name)]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not found:
        raise UserError(f"{where}: {path}: the archive holds no file of rows (jsonl, json, csv, tsv, parquet, arrow)")
    return sorted(found, key=str)


def parse_line(line: bytes | str | BadRow, path: Any, number: int) -> Any:
    """Return the value of a line of JSON, a BadRow for what is none."""
    try:
        text = decode(line) if isinstance(line, bytes) else line
        row = parse(text, path, number)
        return without_halves(row) if isinstance(text, str) and "\\u" in text else row
    except UnicodeDecodeError as error:
        return BadRow(
            str(path), f"byte {error.start} is not UTF-8 text: convert the file, or set data.tasks.<name>.encoding"
        )


def without_halves(value: Any) -> Any:
    """Return a value of JSON whose texts UTF-8 can hold: half a surrogate pair becomes U+FFFD, as in its tokens."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list):
        return [without_halves(item) for item in value]
    if isinstance(value, dict):
        return {without_halves(key): without_halves(item) for key, item in value.items()}
    return value


def decode(line: bytes) -> str:
    """Return the text of a line in UTF-8, without the mark that may begin a file."""
    return line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")


def _lines(path: Path) -> Iterator[tuple[int, bytes, tuple[int, int]]]:
    """Yield (number, bytes, (offset, length)) of the lines of a file that are not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line, (offset, len(line))
            offset += len(line)


def _others(path: Any, encoding: str) -> Iterator[tuple[int, Any, None]]:
    """Yield (number, row, None) of the rows of a file of any format; lines of text are lines of JSON."""
    has_escapes = format_of(path).kind in ("json", "jsonl")
    for number, row in read_records(path, encoding=encoding):
        if isinstance(row, str) and row.strip():
            yield number, parse_line(row, path, number), None
        elif row is not None and not isinstance(row, str):
            yield number, without_halves(row) if has_escapes else row, None


def read_words(files: Sequence[Path], where: str) -> list[str]:
    """Return the words of .txt files, one per line, in file order, each once.

    Entries with other characters than letters and their marks (digits, quotes) are left out: the spelling format cannot
    hold them. How many is printed behind `where`, the config key.
    """
    words, read, left_out = {}, 0, 0
    for path in files:
        with open_bytes(path) as file:
            lines = file.read().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                word = decode(line).strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{path} row {number}: byte {error.start} is not UTF-8 text: convert it") from None
            if len(word.split()) > 1:
                raise UserError(f"{path} row {number}: one word per line, found {word!r}")
            if found := word_of(word):
                words[found] = None
            read, left_out = read + bool(word), left_out + (bool(word) and found is None)
    if not words:
        raise UserError(f"{', '.join(map(str, files))}: no word made of letters")
    if left_out:
        print(f"{where}: {left_out:,} of {read:,} words are left out: they hold more than letters", flush=True)
    return list(words)


def need(row: dict, where: str, **types: type | tuple[type, ...]) -> None:
    """Raise `UserError` where a key is missing or has another type than the task needs."""
    for key, kind in types.items():
        if key not in row:
            raise UserError(f"{where}: key {key!r} is missing (found: {', '.join(map(str, row)) or 'nothing'})")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(row[key], kinds) or (isinstance(row[key], bool) and bool not in kinds):  # true is an int
            names = " or ".join(k.__name__ for k in kinds)
            raise UserError(f"{where}: {key!r} must be {names}, found {type(row[key]).__name__}")
