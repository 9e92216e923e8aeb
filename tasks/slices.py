"""Parts of local files as splits: `train: svamp.json[:700]` and `test: svamp.json[700:]` cut one file in two."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.errors import UserError

_PLACE = r"(-?\d+%?)?"
_SLICE = re.compile(rf"(?P<files>.+)\[{_PLACE}:{_PLACE}\]")


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
    return round(int(place[:-1]) * count / 100) if place.endswith("%") else int(place)


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
