"""Learning curves of a metric at evaluated steps, and their values at equal steps and at equal seconds."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.experiments.runs import Row, way_of
from llm.run.stage_folder import read_metrics


@dataclass(frozen=True)
class Curve:
    """A metric over one run. steps, values: where it was measured, ascending.

    seconds: of training until each of those steps, without evaluations; None where they were not recorded. tokens:
    trained on until the last of those steps; None where they were not recorded. way: see `runs.way_of`, None where the
    training measured it.
    """

    run: str
    seed: int | None
    steps: tuple[int, ...]
    values: tuple[float, ...]
    seconds: tuple[float, ...] | None
    tokens: float | None = None
    way: tuple[str, str | None] | None = None

    def at(self, step: int) -> float:
        """Return the value measured at a step."""
        return self.values[self.steps.index(step)]

    def after(self, seconds: float) -> float:
        """Return the value after so many seconds of training, on a straight line between the evaluations around."""
        return interpolate(seconds, self.seconds or (), self.values)


def read_curve(row: Row, metric: str) -> Curve:
    """Return the curve of a metric, from the stage folder of a row; without points where it was never measured.

    metric: a column of metrics.csv, that of a task also without `chat/`. One that was measured after the training only
    (in eval.json) is a curve of one point without seconds.
    """
    rows = read_metrics(Path(row["folder"]), finite=False)
    column = next((name for name in (metric, f"chat/{metric}") if any(name in line for line in rows)), None)
    if column is None:
        measured = isinstance(row.get(metric), int | float)
        steps, values = ((row["steps"] or 0,), (row[metric],)) if measured else ((), ())
        return Curve(row["run"], row["seed"], steps, values, None, way=way_of(row, metric))
    points = [(int(line["step"]), line[column]) for line in rows if column in line]
    steps, values = zip(*points, strict=True)
    timed = [(line["step"], line["seconds"]) for line in rows if math.isfinite(line.get("seconds", math.nan))]
    counted = [line["tokens"] for line in rows if line["step"] <= steps[-1] and line.get("tokens", math.nan) > 0]
    return Curve(row["run"], row["seed"], steps, values, _seconds_at(steps, timed), max(counted, default=None))


def _seconds_at(steps: Sequence[int], timed: list[tuple[float, float]]) -> tuple[float, ...] | None:
    """Return the seconds of training at steps, from (step, seconds) rows; training begins with step 0."""
    if not timed:
        return None
    at, seconds = zip(*([] if timed[0][0] == 0 else [(0.0, 0.0)]), *timed, strict=True)
    rate = seconds[-1] / max(at[-1], 1)
    return tuple(interpolate(step, at, seconds) + max(0, step - at[-1]) * rate for step in steps)


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return the value at `x` of the line through points with ascending `xs`, constant beyond its ends."""
    if x <= xs[0]:
        return ys[0]
    i = bisect_left(xs, x)
    if i == len(xs):
        return ys[-1]
    (left, right), (before, after) = xs[i - 1 : i + 1], ys[i - 1 : i + 1]
    return before + (after - before) * (x - left) / (right - left)


def common_steps(curves: Sequence[Curve]) -> list[int]:
    """Return the steps at which all curves have a value, ascending; without step 0 where there are others."""
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    return [step for step in steps if step] or steps


def common_seconds(curves: Sequence[Curve], points: int = 40) -> list[float]:
    """Return equally spaced times up to the end of the quickest curve, the last of them that end; [] if unknown.

    They begin where all curves have been measured within the training.
    """
    if any(curve.seconds is None or len(curve.seconds) < 2 for curve in curves):
        return []
    end = min(curve.seconds[-1] for curve in curves)
    first = max(next((s for s in curve.seconds if s > 0), math.inf) for curve in curves)
    if end <= 0 or first > end:
        return []
    return [first + (end - first) * number / (points - 1) for number in range(points)] if first < end else [end]
