"""Task files, local or of the web: .jsonl rows and .txt word lists, checked row by row before any compute, then read
lazily.
"""

import glob
import json
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm.data.download import WebFile
from llm.errors import UserError
from tasks.hub import Cache
from tasks.rows import RowCheck


def is_address(entry: object) -> bool:
    """Return whether an entry of `train` or `test` is an address of the web."""
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
    paths: str | Sequence[str], where: str, exclude: Sequence[Path] = (), cache: Cache | None = None
) -> list[Path]:
    """Return the files that a path, glob, address or list of them names, sorted per entry, without `exclude`.

    Raises `UserError` naming `where` (the config key) for an entry that matches no file, or where nothing is left.
    """
    found: list[Path] = []
    for entry in [paths] if isinstance(paths, (str, Path)) else list(paths):
        if is_address(entry) and cache is not None:
            found.append(web_file(str(entry), where, cache))
            continue
        text = str(Path(str(entry)).expanduser())
        matches = [Path(text)] if Path(text).is_file() else [Path(p) for p in sorted(glob.glob(text, recursive=True))]
        matches = [path for path in matches if path.is_file()]
        if not matches:
            raise UserError(f"{where}: no file matches {entry} (relative to {Path.cwd()})")
        found += matches
    left_out = {path.resolve() for path in exclude}
    found = [path for path in found if path.resolve() not in left_out]
    if not found:
        held_out = f" that is not also a test file ({', '.join(map(str, exclude))})" if exclude else ""
        raise UserError(f"{where}: names no file{held_out}")
    return found


def decode(data: bytes, where: str) -> str:
    """Return the UTF-8 text of `data`, or raise `UserError` naming file, row and byte."""
    try:
        return data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8 text: convert the file to UTF-8") from None


def parse_row(line: bytes, where: str) -> Any:
    """Parse one line of JSON."""
    try:
        return json.loads(decode(line, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno}): one row per line") from None


class FileRows(Sequence):
    """The rows of task files as a sequence: all are read and checked once, then only their positions are kept.

    check: reads rows and notes those that are left out; limit: only the first rows. skipped: number of rows left out,
    by reason. Raises UserError for files without rows, and for all bad rows together unless `check` skips them.
    """

    def __init__(self, files: Sequence[Path], check: RowCheck, limit: int | None = None):
        self._files, self._check = list(files), check
        self._offsets, self._numbers = array("q"), array("q")  # byte offset and row number of each row
        self._starts: list[int] = []  # position of each file's first row
        for path in self._files:
            self._starts.append(len(self))
            if limit is not None and len(self) >= limit:
                break
            if not self._scan(path, limit):
                raise UserError(f"{path}: the file holds no rows")
        check.finish(len(self))
        self.skipped = dict(check.skipped)

    def _scan(self, path: Path, limit: int | None) -> int:
        """Read and check the rows of a file; return how many it has."""
        rows = offset = 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if limit is not None and len(self) >= limit:
                        break
                    if line.strip():
                        rows += 1
                        read = partial(self._parse, line, path, number)
                        if self._check.accepts(read, path, number):
                            self._offsets.append(offset)
                            self._numbers.append(number)
                    offset += len(line)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        return rows

    def _parse(self, line: bytes, path: Path, number: int) -> dict:
        where = self._check.where(path, number)
        return self._check.read(parse_row(line, where), where)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        path = self._files[bisect_right(self._starts, index) - 1]
        with open(path, "rb") as file:
            file.seek(self._offsets[index])
            return self._parse(file.readline(), path, self._numbers[index])


def read_words(files: Sequence[Path]) -> list[str]:
    """Return the words of .txt files, one per line, in file order, each once.

    Entries with other characters than letters (marks, digits, quotes) are left out: the spelling format cannot hold
    them.
    """
    words: dict[str, None] = {}
    for path in files:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            word = decode(line, f"{path} row {number}").strip()
            if len(word.split()) > 1:
                raise UserError(f"{path} row {number}: one word per line, found {word!r}")
            if word.isalpha():
                words[word] = None
    if not words:
        raise UserError(f"{', '.join(map(str, files))}: no word made of letters")
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
