"""Parts of local files as splits: `train: svamp.json[:700]` and `test: svamp.json[700:]` cut one file in two."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.errors import UserError

_PLACE = r"(-?\d+%?)?"
_SLICE = re.compile(rf"(?P<files>.+)\[{_PLACE}:{_PLACE}\]")
_SHARE = re.compile(r"[1-9]\d?%")


@dataclass(frozen=True)
class Part:
    """The rows from `start` up to `stop` of files: numbers as in Python, or percent of the rows; None = an end."""

    start: str | None
    stop: str | None

    def __str__(self) -> str:
        return f"[{self.start or ''}:{self.stop or ''}]"

    def rows(self, count: int) -> range:
        """Return the numbers of the rows among `count`, from 0."""
        places = [None if place is None else _number(place, count) for place in (self.start, self.stop)]
        return range(count)[slice(*places)]


def _number(place: str, count: int) -> int:
    """Return a place among `count` rows; a share from the end is at least a row: [:-5%] of 9 rows leaves out one."""
    if not place.endswith("%"):
        return int(place)
    number = round(int(place[:-1]) * count / 100)
    return -1 if number == 0 and int(place[:-1]) < 0 else number


def is_share(entry: Any) -> bool:
    """Return whether the entry `test` of a task is a share of the rows of `train`, such as 5%."""
    return isinstance(entry, str) and _SHARE.fullmatch(entry) is not None


def share_out(train: Any, share: str, where: str) -> dict[str, str]:
    """Return the entries `train` and `test` that hold out the last rows of `train`, a share of them as 5%.

    Raises UserError, beginning with `where`, unless `train` is a single entry that is not cut yet.
    """
    if not isinstance(train, str) or cut(train, where)[1] is not None:
        raise UserError(
            f"{where}.test={share}: a share is held out of one file, folder or pattern, not of {where}.train={train}"
        )
    return {"train": f"{train}[:-{share}]", "test": f"{train}[-{share}:]"}


def cut(entries: Any, where: str) -> tuple[Any, Part | None]:
    """Return (files, part of their rows) that an entry of `train` or `test` names; part None = all rows.

    Raises UserError, beginning with `where`, for a list with a part of one of its files.
    """
    if isinstance(entries, str):
        found = None if Path(entries).expanduser().is_file() else _SLICE.fullmatch(entries)
        return (found["files"], Part(found[2], found[3])) if found else (entries, None)
    for entry in entries or []:
        if (found := cut(str(entry), where)[1]) is not None:
            raise UserError(f"{where}: {entry}: a part such as {found} is taken of one entry, not within a list")
    return entries, None
