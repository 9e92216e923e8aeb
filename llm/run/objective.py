"""The number that a search compares the jobs of a sweep by: a value of one column of metrics.csv."""

from pathlib import Path

from llm.errors import UserError
from llm.run.stage_folder import read_metrics

PICK = {"last": lambda values: values[-1], "min": min, "max": max}


class NoObjective(UserError):
    """A column that no stage of this kind writes: a mistake in the command, which every other job would repeat."""


def objective_of(stage_dir: str | Path, column: str, mode: str) -> float:
    """Return the `last`, `min` or `max` value of a column of metrics.csv in a stage folder.

    Raises NoObjective, with the columns that there are, where no row has a number in it.
    """
    rows = read_metrics(stage_dir)
    if values := [row[column] for row in rows if column in row]:
        return PICK[mode](values)
    known = ", ".join(sorted({name for row in rows for name in row} - {"step"}))
    raise NoObjective(f"objective={column}: metrics.csv has no numbers of this name (it has {known or 'no rows'})")
