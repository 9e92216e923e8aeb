"""A picture of a comparison: both sides and their difference, at equal steps and at equal seconds."""

from pathlib import Path
from typing import Any

from llm.errors import UserError, reason_of
from llm.experiments.comparison import Comparison
from llm.report.plots import COLOURS, drawing

LATE = 0.25  # share of the way after which all values lie within the axis: curves begin far above


def draw_comparison(path: Path, result: Comparison) -> None:
    """Write the picture as PNG. Raises UserError where the file cannot be written.

    Above: means over the runs of each side, with a band from the lowest run to the highest. Below: the mean difference
    with its 95 % interval, and the margin as broken lines.
    """
    panels = [(at, points) for at, points in result.points.items() if len(points) > 1]
    if not panels:
        raise UserError(f"--plot {path}: {result.metric} was measured at one step only; there is no curve to draw")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with drawing(
            path, f"{result.metric}: {result.b.name} against {result.a.name}", (4.6 * len(panels), 5.8)
        ) as figure:
            axes = figure.subplots(2, len(panels), sharex="col", squeeze=False, height_ratios=(3, 2))
            for (at, points), (above, below) in zip(panels, axes.T, strict=True):
                _sides(above, points, result)
                _difference(below, points, result.margin)
                above.set_title(f"at equal {at}")
                below.set_xlabel("step" if at == "steps" else "seconds of training")
            axes[0][0].set_ylabel(result.metric)
            axes[1][0].set_ylabel(f"B - A of {result.metric}")
            axes[0][0].legend(loc="best")
            axes[1][0].legend(loc="best")
    except OSError as error:
        raise UserError(f"--plot {path} cannot be written: {reason_of(error, path)}") from error


def _sides(ax: Any, points: list[dict[str, Any]], result: Comparison) -> None:
    at = [point["at"] for point in points]
    drawn = [len(result.pairs or side.curves) for side in (result.a, result.b)]  # pairs leave others out
    for letter, side, colour, runs in zip("ab", (result.a, result.b), COLOURS, drawn, strict=False):
        low, high = ([point[f"{letter}_{end}"] for point in points] for end in ("min", "max"))
        band = f" (band: {runs} runs)" if runs > 1 else ""
        name = f"{letter.upper()}: {side.name}{band}"
        ax.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.plot(at, [point[letter] for point in points], color=colour, linewidth=1.8, label=name)
    late = [point for point in points if point["at"] >= at[0] + LATE * (at[-1] - at[0])]
    _limits(ax, [point[f"{letter}_{end}"] for point in late for letter in "ab" for end in ("min", "max")])


def _difference(ax: Any, points: list[dict[str, Any]], margin: float) -> None:
    at = [point["at"] for point in points]
    if known := [point for point in points if point["low"] is not None]:
        low, high = ([point[end] for point in known] for end in ("low", "high"))
        ax.fill_between([point["at"] for point in known], low, high, color="#7F7F7F", alpha=0.25, linewidth=0)
    ax.plot(at, [point["difference"] for point in points], color="#000000", linewidth=1.6, label="mean, 95 % interval")
    ax.axhline(0, color="#000000", linewidth=0.8)
    for number, line in enumerate((-margin, margin)):
        ax.axhline(line, color=COLOURS[2], linewidth=1.0, linestyle="--", label=None if number else "margin")
    late = [point for point in points if point["at"] >= at[0] + LATE * (at[-1] - at[0])]
    ends = [point[end] for point in late for end in ("low", "high", "difference") if point[end] is not None]
    _limits(ax, [*ends, -1.2 * margin, 1.2 * margin])


def _limits(ax: Any, values: list[float]) -> None:
    """Set the range of the y axis so that it holds `values`."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.01
    ax.set_ylim(low - room, high + room)
