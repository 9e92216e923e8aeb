"""Learning curves as PNG files, drawn from rows of metrics.csv and scores of eval.json."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from llm.config.stages import row_or_stranger
from llm.report.results import TITLES, curve, evaluated_metrics, final_metrics, is_held_out, plain, task_names
from llm.utils.files import write_atomic
from llm.utils.format import percent

Stages = Mapping[str, Mapping[str, Any]]  # {stage: its run.json with "eval" and "rows"}

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
MARKED = 30  # points of a curve with a dot at each
WIDTH = 7.0  # inches of every figure: its text can be read on a page, and on a phone
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
EVALUATED = " A diamond is what `evaluate.py` measured of the finished model; then its number is that of the tables."
SMOOTH = (
    " The thick line is a mean over a twelfth of the rows to each side (from 20 rows on), the thin one each row; the "
    "number at the end is that of the table *Training*."
)


class Drawing(NamedTuple):
    """A figure of the report: its caption, its file, and the sentences under it."""

    caption: str
    path: Path
    text: str


class Plan(NamedTuple):
    """A figure before it is known whether there is anything to draw: the columns in it, and how they are drawn."""

    caption: str
    file: str
    columns: Sequence[str]
    label: str
    text: str
    in_bands: bool = False  # all stages in one panel, values in percent; else a panel for each stage


def plans(columns: Iterable[str], tasks: Sequence[str]) -> list[Plan]:
    """Return the figures that a report may have, in reading order.

    columns: those of metrics.csv of all stages; tasks: names of the tasks, in the order of the table of results.
    """
    return [
        Plan(
            "Accuracy on held-out tasks",
            "chat.png",
            [f"chat/{task}" for task in tasks],
            "accuracy (%)",
            "Share of held-out questions of each task that were answered right: all stages in a row, each from its "
            "first step to its last. A dotted line comes from the stage that it started from." + EVALUATED,
            in_bands=True,
        ),
        Plan(
            "Training loss",
            "loss.png",
            ["loss"],
            "loss (nats per token)",
            "How badly the next token was predicted in the batches of the training; lower is better. Stages train on "
            "other data, so their losses cannot be compared." + SMOOTH,
        ),
        Plan(
            "Bits per byte on held-out data",
            "bpb.png",
            ["bpb"],
            "bits per byte",
            "How many bits the model needs for a byte of text that it was not trained on; lower is better, and "
            "tokenizers do not matter. Each panel has its own axis; chat stages are measured on answers." + EVALUATED,
        ),
        Plan(
            "CORE: mean centred accuracy",
            "core.png",
            ["core"],
            "CORE",
            "Mean accuracy on the tasks of the bundle, where 0 is guessing and 1 is perfect; while training on a part "
            "of each task." + EVALUATED,
        ),
        Plan(
            "Mean reward of sampled answers",
            "reward.png",
            ["reward"],
            "mean reward",
            "Mean reward of the answers that were drawn to train on; higher is better." + SMOOTH,
        ),
        Plan(
            "Pass rate on held-out problems",
            "pass.png",
            sorted((key for key in columns if key.startswith("pass@")), key=lambda key: (len(key), key)),
            "solved (%)",
            "Share of held-out problems that one of k drawn answers solves (pass@k), from the first step of each stage "
            "to its last." + EVALUATED,
            in_bands=True,
        ),
    ]


def draw_curves(folder: Path, run: str, stages: Stages, redraw: bool = True) -> list[Drawing]:
    """Write every figure that the metrics allow into `folder`; returns them in reading order.

    redraw=False keeps figures that exist.
    """
    stages = {stage: _drawn(stage, facts) for stage, facts in stages.items()}
    columns = dict.fromkeys(key for facts in stages.values() for row in facts["rows"] for key in row)
    drawn = []
    for plan in plans(columns, task_names(stages.values())):
        shown = {stage: facts for stage, facts in stages.items() if any(ends(facts, key) for key in plan.columns)}
        path = folder / plan.file
        if not shown:
            path.unlink(missing_ok=True)
            continue
        if redraw or not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            (_bands if plan.in_bands else _panels)(path, f"{plan.caption}: {run}", shown, plan)
        drawn.append(Drawing(plan.caption, path, plan.text))
    return drawn


def _drawn(stage: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a stage without the columns that mean something else for it, and with its final metrics."""
    left_out = row_or_stranger(stage).no_curves
    rows = [{key: number for key, number in row.items() if key not in left_out} for row in facts.get("rows") or []]
    metrics = {key: number for key, number in (facts.get("metrics") or {}).items() if key not in left_out}
    own = {**facts, "rows": rows, "metrics": metrics}
    return {**own, "final": final_metrics(own), "evaluated": evaluated_metrics(own)}


class End(NamedTuple):
    """End of a curve: its last step, final value, one standard error or None, and whether that was evaluated."""

    step: float
    value: float
    stderr: float | None
    evaluated: bool


def ends(facts: Mapping[str, Any], column: str) -> End | None:
    """Return the end of a stage's curve, the number that the tables have too; None where there is nothing to draw.

    facts: as `_drawn` gives them. A stage that was evaluated alone ends at its last step.
    """
    name, rows = column.removeprefix("chat/"), facts["rows"]
    measured = [row["step"] for row in rows if column in row]
    if name not in facts["final"] or not (measured or name in facts["evaluated"]):
        return None
    last = max((row["step"] for row in rows), default=facts.get("steps") or 0)
    if name in facts["evaluated"]:
        return End(last, *facts["final"][name], True)
    handed = (facts.get("weights") or {}).get("step")
    return End(handed if is_held_out(column) and handed in measured else measured[-1], *facts["final"][name], False)


@contextmanager
def drawing(path: Path, title: str, size: tuple[float, float]) -> Iterator[Any]:
    """Yield a figure of matplotlib, `size` inches large, in the style of all figures; write it as PNG at the end."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=11, fontweight="bold")
        yield figure
        picture = BytesIO()
        figure.savefig(picture, format="png")
        write_atomic(path, picture.getvalue())  # a training and an evaluation may draw one run at once


def _figure(path: Path, title: str, height: float, draw: Callable[[Any], None]) -> None:
    """Let `draw` fill a figure of `WIDTH` and write it. height: inches."""
    with drawing(path, title, (WIDTH, height)) as figure:
        draw(figure)


def _panels(path: Path, title: str, stages: Stages, plan: Plan) -> None:
    """Draw one panel per stage, at most three beside each other, each with its own axis."""
    (column,) = plan.columns
    wide = len(stages) if len(stages) <= 3 else 2 if len(stages) == 4 else 3
    high = -(-len(stages) // wide)

    def draw(figure: Any) -> None:
        axes = figure.subplots(high, wide, squeeze=False).flatten()
        for ax, (stage, facts) in zip(axes, stages.items(), strict=False):
            _curve(ax, facts, column)
            ax.set_title(stage)
            ax.xaxis.get_major_locator().set_params(integer=True, nbins=4)
            ax.yaxis.get_major_locator().set_params(nbins=6)
        for ax in axes[len(stages) :]:
            ax.set_visible(False)
        figure.supxlabel("step", fontsize=9)
        figure.supylabel(plan.label, fontsize=9)

    _figure(path, title, 0.6 + high * (2.7 if high == 1 else 2.1), draw)


def _curve(ax: Any, facts: Mapping[str, Any], column: str) -> None:
    """Draw a column of one stage against the step, and write its final value at its end."""
    rows, end = facts["rows"], ends(facts, column)
    raw, points, colour = [(row["step"], row[column]) for row in rows if column in row], curve(rows, column), COLOURS[0]
    if points != raw:
        ax.plot(*zip(*raw, strict=True), color=colour, alpha=0.3, linewidth=0.8)
    if points:
        marker = "o" if is_held_out(column) and len(points) <= MARKED else None
        ax.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, marker=marker, markersize=3.5)
    if end.evaluated:
        ax.plot(end.step, end.value, color=colour, marker="D", markersize=6, markeredgecolor="white", zorder=4)
    first, last = min((row["step"] for row in rows), default=0), max((row["step"] for row in rows), default=end.step)
    room = 0.03 * max(last - first, 1)
    ax.set_xlim(first - room, last + room)
    place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    ax.annotate(plain(end.value), (end.step, end.value), color=colour, fontsize=8.5, **place)


def _bands(path: Path, title: str, stages: Stages, plan: Plan) -> None:
    """Draw all stages in one panel, a band for each beside the other, and a colour for each column, in percent."""
    colours = {column: COLOURS[i % len(COLOURS)] for i, column in enumerate(plan.columns)}
    evaluated = any(key.removeprefix("chat/") in one["evaluated"] for one in stages.values() for key in plan.columns)
    apart = min(0.012 * len(stages), 0.1 / len(colours)) * evaluated  # diamonds of equal values lie side by side

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        for place, (stage, facts) in enumerate(stages.items()):
            if place % 2 == 0:
                ax.axvspan(place, place + 1, color="#F6F6F6", zorder=0, linewidth=0)
            found = {column: end for column in plan.columns if (end := ends(facts, column))}
            for number, (column, end) in enumerate(found.items()):
                span = place + START, place + _end(len(stages)) - apart * (len(found) - 1 - number)
                _band_line(ax, facts, column, colours[column], span, end, _before(stages, stage, column))
            _label_band(ax, place + _end(len(stages)), {colours[column]: end.value for column, end in found.items()})
        ax.set_xlim(0, len(stages))
        ax.set_ylim(-2, 104)
        ax.set_xticks([place + 0.5 for place in range(len(stages))], list(stages))
        ax.tick_params(axis="x", length=0)
        ax.grid(axis="x", visible=False)
        ax.set_ylabel(plan.label)
        handles = [ax.plot([], [], color=colour, marker="o", markersize=4)[0] for colour in colours.values()]
        names = [TITLES.get(column.removeprefix("chat/"), column.removeprefix("chat/")) for column in colours]
        if len(names) > 1:
            figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6))

    _figure(path, title, 3.6, draw)


def _before(stages: Stages, stage: str, column: str) -> float | None:
    """Return the final value of the stage that another one started from, where it is in the figure."""
    parts = Path(stages[stage].get("parent") or "").parts
    parent = parts[-2] if len(parts) >= 3 and parts[-1] == "model" else None
    end = ends(stages[parent], column) if parent in stages and parent != stage else None
    return None if end is None else end.value


START = 0.06  # of a band: where its first step lies


def _end(bands: int) -> float:
    """Return where the last step of a band lies, one of `bands`: before the room that its numbers need."""
    return max(0.4, 0.95 - 0.07 * bands)


def _band_line(
    ax: Any,
    facts: Mapping[str, Any],
    column: str,
    colour: str,
    span: tuple[float, float],
    end: End,
    before: float | None,
) -> None:
    """Draw a column of one stage between the two places of `span`: its points as a line, its evaluation as a diamond.

    before: value of the stage that it started from, joined by a dotted line where the first step was not measured.
    """
    last = max([end.step, *(row["step"] for row in facts["rows"])]) or 1

    def at(step: float) -> float:
        return span[0] + (span[1] - span[0]) * step / last

    points = [(at(step), 100 * number) for step, number in curve(facts["rows"], column)]
    if points:
        ax.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, marker="o", markersize=3.5)
    final = at(end.step), 100 * end.value
    if before is not None and (not points or points[0][0] > span[0]):
        first = points[0] if points else final
        ax.plot([span[0], first[0]], [100 * before, first[1]], color=colour, linewidth=1.2, linestyle=":")
    if end.evaluated:
        if end.stderr:
            ax.errorbar(*final, yerr=100 * end.stderr, color=colour, capsize=2, elinewidth=1)
        ax.plot(*final, color=colour, marker="D", markersize=6, markeredgecolor="white", zorder=4)


def _label_band(ax: Any, place: float, finals: Mapping[str, float]) -> None:
    """Write final values behind `place`, where their lines end, one below the other. finals: {colour: share}."""
    order = sorted(finals.items(), key=lambda pair: pair[1])
    heights = spaced([100 * share for _, share in order], 5.0, 101)
    offset = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    for (colour, share), height in zip(order, heights, strict=True):
        ax.annotate(percent(share).removesuffix(" %"), (place, height), color=colour, fontsize=8.5, **offset)


def spaced(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Move ascending heights apart to at least `gap`: upwards, then down again from `top` where they exceed it."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], top if i == len(moved) - 1 else moved[i + 1] - gap)
    return moved


def draw_bars(path: Path, title: str, panels: dict[str, list[tuple[str, float, float | None, str]]]) -> None:
    """Write a figure of one panel of bars for each title of `panels`: (name, value, value before or None, colour).

    A line across a bar is the value before. Two panels stand beside each other.
    """
    wide, counts = min(len(panels), 2), [len(bars) for bars in panels.values()]
    most = [max(counts[i : i + wide]) for i in range(0, len(panels), wide)]  # bars in a panel of each row

    def draw(figure: Any) -> None:
        ratios = [0.4 + number for number in most]
        axes = figure.subplots(len(most), wide, squeeze=False, height_ratios=ratios).flatten()
        for i, (ax, (name, bars)) in enumerate(zip(axes, panels.items(), strict=False)):
            places = range(len(bars))
            ax.barh(places, [bar[1] for bar in bars], color=[bar[3] for bar in bars], height=0.65)
            for place, (_, number, before, _) in zip(places, bars, strict=True):
                if before is not None:
                    ax.plot([before, before], [place - 0.42, place + 0.42], color="#000000", linewidth=1.4)
                text = f" {number:.1f}" if name.endswith("(%)") else f" {plain(number)}"
                ax.annotate(text, (max(number, before or number), place), va="center", fontsize=8.5)
            ax.set_yticks(places, [bar[0] for bar in bars])
            ax.set_ylim(most[i // wide] - 0.4, -0.6)  # bars of all panels are of one size
            ax.margins(x=0.22)
            ax.set_title(name)
            ax.grid(axis="y", visible=False)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)

    _figure(path, title, max(2.0, 0.4 + sum(0.7 + 0.3 * number for number in most)), draw)
