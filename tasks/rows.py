"""The rows of a task as a sequence: each read and checked once, bad ones told together, some left out and counted."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain, islice
from pathlib import Path

from llm.data.records import LISTED, SHOWN
from llm.errors import UserError
from tasks.base import Dropped, RowReader, Task

FIRST, SECONDS = 20, 2.0  # own answers that are judged at the start, where judging is slow
Check = Callable[[dict, str], None]


class BadRows(UserError):
    """Raised for rows that cannot be used. bad: their number by file; problems: the first of each file, in words."""

    def __init__(self, text: str, problems: Mapping[str, list[str]], bad: Mapping[str, int]) -> None:
        super().__init__(text)
        self.problems, self.bad = problems, bad


class FirstAnswers:
    """Check of rows that also judges the first own answers, of a type of task that judges too slowly for all of them.

    At most FIRST rows, and none that begins later than SECONDS after the first.
    """

    def __init__(self, task: type[Task], check: Check) -> None:
        self._task, self._check, self._judged, self._end = task, check, 0, math.inf

    def __call__(self, row: dict, where: str) -> None:
        self._check(row, where)
        if self._judged >= FIRST or time.monotonic() > self._end or not self._task.is_scored(row):
            return
        if not self._judged:
            self._end = time.monotonic() + SECONDS
        self._judged += 1
        self._task.check_reference(row, where, surely=True)


class RowCheck:
    """Reads rows and notes which cannot be used (bad rows) and which the configuration leaves out.

    key: place in the configuration that names the rows, such as data.tasks.chat.train; all errors begin with it.
    reader: turns what a file holds into a row; check(row, where): raises `UserError` for one that the type of the task
    cannot use; bad_rows: "stop" or "skip". skipped: number of rows left out so far, by reason. bad: number of bad rows
    so far, by file; problems: the first LISTED of each file, in words.
    """

    def __init__(self, key: str, reader: RowReader, check: Check, bad_rows: str = "stop") -> None:
        if bad_rows not in ("stop", "skip"):
            raise UserError(f"data.bad_rows={bad_rows}: must be one of stop, skip")
        self.key = key
        self.skipped: Counter[str] = Counter()
        self._reader, self._check, self._skips = reader, check, bad_rows == "skip"
        self.problems: dict[str, list[str]] = {}
        self.bad: Counter[str] = Counter()
        self._told: dict[tuple[str, str], int] = {}  # file and problem -> its first row

    @property
    def may_skip(self) -> bool:
        """True where rows can be left out, so that all must be read before they can be counted."""
        return self._skips or self._reader.may_drop

    def where(self, file: object, number: int) -> str:
        """Return the place of a row: key of the configuration, file and row number, from 1."""
        return f"{self.key}: {file} row {number}"

    def read(self, row: object, where: str) -> dict:
        """Return a row in the form that the task takes. Raises UserError, beginning with `where`, or Dropped."""
        return self._reader.read(row, where)

    def read_and_check(self, row: object, where: str) -> dict:
        """Return a row in the form that the task takes, if it can use it. Raises UserError or Dropped."""
        row = self._reader.read(row, where)
        self._check(row, where)
        return row

    def accepts(self, read: Callable[[], dict], file: object, number: int) -> bool:
        """Return whether `read`, which reads and checks row `number` of `file`, succeeds; note why it does not.

        Bad rows are collected until `finish`.
        """
        try:
            read()
            return True
        except Dropped as reason:
            self.skipped[str(reason)] += 1
        except UserError as error:
            if self._skips:
                self.skipped[f"bad rows of {Path(str(file)).name}"] += 1
            self._note(str(file), number, str(error).removeprefix(f"{self.where(file, number)}: "))
        return False

    def _note(self, file: str, number: int, problem: str) -> None:
        """Count a bad row and keep it with its problem; one that came before is told by its row."""
        self.bad[file] += 1
        if self.bad[file] <= LISTED:
            first = self._told.setdefault((file, problem), number)
            told = problem if first == number else f"as row {first}"
            self.problems.setdefault(file, []).append(f"{file} row {number}: {told}")

    def finish(self, kept: int) -> None:
        """Raise UserError for bad rows, unless they are skipped, and where no row is left; print what was left out."""
        listed, bad = list(islice(chain(*self.problems.values()), SHOWN)), self.bad.total()
        if bad and not self._skips:
            more = [f"and {bad - SHOWN:,} more, which stage=check lists"] if bad > SHOWN else []
            head = f"{bad:,} rows cannot be used; correct them, or leave them out: data.bad_rows=skip"
            text = listed[0] if bad == 1 else "\n  ".join([head, *listed, *more])
            raise BadRows(f"{self.key}: {text}", self.problems, self.bad)
        if self.skipped and not kept:
            first = f"; the first: {listed[0]}" if listed else ""
            text = f"{self.key}: no row is left ({describe(self.skipped)}){first}"
            raise BadRows(text, self.problems, self.bad) if bad else UserError(text)
        if self.skipped:
            print(f"{self.key}: {kept:,} rows, left out: {describe(self.skipped)}", flush=True)


def describe(skipped: Mapping[str, int]) -> str:
    """Return what was left out in words, such as "empty answer: 2, bad rows of a.jsonl: 3"."""
    return ", ".join(f"{reason}: {count:,}" for reason, count in skipped.items())
