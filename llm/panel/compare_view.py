"""Builds the Compare tab: chosen stages in one chart per metric, scores side by side, and the verdict."""

from collections.abc import Sequence

from llm.errors import UserError
from llm.experiments.compare import TESTS, as_json, in_words, place_of
from llm.experiments.comparison import compare
from llm.panel.chart import COLOURS, Line, draw
from llm.panel.columns import Columns
from llm.panel.curves import band, curve, fewer, smooth
from llm.panel.index import Row
from llm.panel.markup import page, problem, section, table, text
from llm.panel.runs_view import name_of, scores_table
from llm.panel.state import Panel

MOST_STAGES = 40
AXIS_NAMES = {"step": "step", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}


def metrics_of(columns: Columns, rows: Sequence[Row]) -> list[str]:
    """Return all columns of metrics.csv that stages have, those of evaluations first."""
    names = dict.fromkeys(name for row in rows for name in columns.names(row["folder"]))
    return sorted(names, key=lambda name: not name.startswith(("bpb", "loss", "chat/", "core", "reward")))


def comparison_page(
    panel: Panel, names: Sequence[str], metrics: Sequence[str], axis: str, share: float, seeds: bool
) -> str:
    """Return charts and scores of stages.

    names: run/stage. axis: one of `curves.AXES`. share: of the past in the smoothing, 0 = none. seeds: draw stages that
    differ in their seed only as one mean with a band from the lowest to the highest.
    """
    if not names:
        return page("<p>Choose stages above: each becomes a curve.</p>")
    if len(names) > MOST_STAGES:
        return page(problem(f"{len(names)} stages are chosen; a chart takes {MOST_STAGES} at most"))
    known = {name_of(row): row for row in panel.index.rows()}
    rows = [known[name] for name in names if name in known]
    try:
        lines = {metric: lines_of(panel.columns, rows, metric, axis, share, seeds) for metric in metrics}
    except UserError as error:
        return page(problem(str(error)))
    charts = [draw(metric, curves, AXIS_NAMES[axis]) for metric, curves in lines.items()]
    inner = f'<div class="charts">{"".join(charts)}</div>' if charts else "<p>Choose a metric above.</p>"
    return page(inner, section("Scores side by side", scores_table(rows)))


def lines_of(columns: Columns, rows: Sequence[Row], metric: str, axis: str, share: float, seeds: bool) -> list[Line]:
    """Return the lines of a chart: one per stage, or one per group of seeds; their colours are equal in all charts."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["family"] if seeds else name_of(row), []).append(row)
    lines = []
    for number, members in enumerate(groups.values()):
        curves = [(row, curve(columns, row["folder"], metric, axis)) for row in members]
        curves = [(row, x, smooth(y, share)) for row, (x, y) in curves]
        drawn = [one for one in curves if len(one[1])]
        colour = number % COLOURS
        if len(drawn) < 2:
            row, x, y = (drawn or curves)[0]
            lines.append(Line(name_of(row), *fewer(x, y), colour=colour))
            continue
        x, mean, low, high = band([(x, y) for _, x, y in drawn])
        name = f"{len(drawn)} seeds of {name_of(drawn[0][0])}"
        lines.append(Line(name, x, mean, colour, low, high))
    return lines


def verdict_page(panel: Panel, a: str, b: str, metric: str, margin: str = "") -> str:
    """Return the verdict of `llm.experiments.compare` on two sides, each runs separated by commas, or a pattern."""
    if not a.strip() or not b.strip():
        return page("<p>Name the runs of both sides: a name, a pattern such as base-*, or several with commas.</p>")
    try:
        result = compare(panel.runs, a.strip(), b.strip(), metric.strip() or "bpb", margin=margin.strip() or None)
    except UserError as error:
        return page(problem(str(error)))
    found = as_json(result)
    lines = []
    for one in found["measures"]:
        numbers = [one[name] for name in ("a", "b", "difference", "stderr", "low", "high", "p", "p_equal")]
        lines.append(
            [
                place_of(one["at"], one["point"]),
                one["of"],
                *("-" if n is None else f"{n:.4g}" for n in numbers),
                one["verdict"],
            ]
        )
    header = ["at", "of", "A", "B", "B - A", "s.e.", "low", "high", "p", "p equal", "verdict"]
    test = TESTS[result.measures[0].found.test].format(len(result.pairs or []))
    notes = "".join(f"<li>{text(note)}</li>" for note in found["notes"])
    differing = [[key, *map(str, pair)] for key, pair in found["differences"].items()]
    return page(
        f'<p class="verdict {text(found["verdict"])}">{text(in_words(result))}</p>',
        table(header, lines, range(2, 10), "measures"),
        f"<p>{text(test)}; differences below {result.margin:.4g} do not matter (the margin).</p>",
        f"<ul>{notes}</ul>" if notes else "",
        section("Settings that differ", table(["key", "A", "B"], differing)) if differing else "",
    )
