"""Task files, local or of the web: .jsonl rows and .txt word lists, checked row by row before any compute, then read
lazily.
"""

import glob
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from llm.data.download import WebFile
from llm.errors import UserError
from tasks.hub import Cache

Check = Callable[[dict, str], None]


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


def parse_row(line: bytes, where: str) -> dict:
    """Parse one JSON object; a bare array is taken as the messages of a conversation."""
    try:
        row = json.loads(decode(line, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno}): one row per line") from None
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object (or a list of messages), found {type(row).__name__}")
    return row


class JsonlRows(Sequence):
    """The rows of .jsonl files as a sequence: every row is parsed and checked once, then only its position is kept.

    check(row, where): raises `UserError` for a row that the task cannot use. limit: only the first rows. wanted: only
    the rows with these numbers, counted from 0 through all files; the others are not checked.
    """

    def __init__(self, files: Sequence[Path], check: Check, limit: int | None = None, wanted: range | None = None):
        self.positions: list[tuple[Path, int, int]] = []  # file, byte offset, row number
        self._wanted, self._passed = wanted, 0
        for path in files:
            before = len(self.positions)
            self._scan(path, check, limit)
            if limit is not None and len(self.positions) >= limit:
                break
            if len(self.positions) == before and wanted is None:
                raise UserError(f"{path}: the file holds no rows")

    def _scan(self, path: Path, check: Check, limit: int | None) -> None:
        try:
            with open(path, "rb") as file:
                offset = 0
                for number, line in enumerate(file, start=1):
                    if limit is not None and len(self.positions) >= limit:
                        return
                    if line.strip() and self._takes_next():
                        where = f"{path} row {number}"
                        check(parse_row(line, where), where)
                        self.positions.append((path, offset, number))
                    offset += len(line)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def _takes_next(self) -> bool:
        """Count a row; return whether it is wanted."""
        self._passed += 1
        return self._wanted is None or self._passed - 1 in self._wanted

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict:
        path, offset, number = self.positions[index]
        with open(path, "rb") as file:
            file.seek(offset)
            return parse_row(file.readline(), f"{path} row {number}")


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
