"""Learning curves as PNG files, drawn from rows of metrics.csv."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm.config.stages import row_or_stranger

Rows = list[dict[str, float]]

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
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
    "legend.fontsize": 8,
}


def draw_curves(folder: Path, run: str, stages: dict[str, Rows], redraw: bool = True) -> list[tuple[str, Path]]:
    """Write every figure that the metrics allow into `folder`; returns (caption, file) in reading order.

    stages: {stage: rows of metrics.csv}. Figures: loss, bits per byte, task accuracy, CORE, reward. redraw=False keeps
    figures that exist.
    """
    stages = {stage: without_columns(rows, row_or_stranger(stage).no_curves) for stage, rows in stages.items()}
    tasks = sorted({key for rows in stages.values() for row in rows for key in row if key.startswith("chat/")})
    passes = sorted({key for rows in stages.values() for row in rows for key in row if key.startswith("pass@")})
    figures = [
        ("Training loss", "loss.png", ["loss"], "loss (nats per token)", {"smooth": True}),
        ("Bits per byte on held-out data", "bpb.png", ["bpb"], "bits per byte", {"marks": True}),
        ("Accuracy on held-out tasks", "chat.png", tasks, "accuracy (%)", {"marks": True, "percent": True}),
        ("CORE: mean centred accuracy", "core.png", ["core"], "CORE", {"marks": True}),
        ("Mean reward of sampled completions", "reward.png", ["reward"], "mean reward", {"smooth": True}),
        ("Pass rate on held-out problems", "pass.png", passes, "solved (%)", {"marks": True, "percent": True}),
    ]
    drawn = []
    for caption, name, keys, label, options in figures:
        shown = {stage: rows for stage, rows in stages.items() if any(key in row for row in rows for key in keys)}
        path = folder / name
        if not shown:
            path.unlink(missing_ok=True)
            continue
        if redraw or not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _figure(path, f"{caption}: {run}", shown, keys, label, **options)
        drawn.append((caption, path))
    return drawn


def without_columns(rows: Rows, names: Sequence[str]) -> Rows:
    """Return the rows without the columns `names`."""
    return [{key: number for key, number in row.items() if key not in names} for row in rows]


@contextmanager
def drawing(path: Path, title: str, size: tuple[float, float]) -> Iterator[Any]:
    """Yield a figure of matplotlib, `size` inches large, in the style of all figures; write it as PNG at the end."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=11, fontweight="bold")
        yield figure
        temporary = path.with_suffix(".tmp.png")
        figure.savefig(temporary)
        temporary.replace(path)


def _figure(
    path: Path,
    title: str,
    panels: dict[str, Rows],
    keys: Sequence[str],
    label: str,
    smooth: bool = False,
    marks: bool = False,
    percent: bool = False,
) -> None:
    """Draw one panel per stage, side by side; percentages share their axis, other quantities have one per panel."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(6.0, 3.4 * len(panels)), 3.3), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=11, fontweight="bold")
        axes = figure.subplots(1, len(panels), sharey=percent, squeeze=False)[0]
        for ax, (stage, rows) in zip(axes, panels.items(), strict=True):
            ends = [
                _curve(ax, rows, key, COLOURS[i % len(COLOURS)], smooth, marks, 100.0 if percent else 1.0)
                for i, key in enumerate(keys)
            ]
            ax.set_title(stage)
            ax.set_xlabel("step")
            ax.xaxis.get_major_locator().set_params(integer=True, nbins=6)
            first, last = min(row["step"] for row in rows), max(row["step"] for row in rows)
            room = 0.02 * max(last - first, 1)
            ax.set_xlim(first - room, last + room)
            if percent:
                ax.set_ylim(-2, 102)
            _label_ends(ax, [end for end in ends if end], ".0f" if percent else ".3f")
        axes[0].set_ylabel(label)
        handles, names = axes[0].get_legend_handles_labels()
        for ax in axes[1:]:
            more = [pair for pair in zip(*ax.get_legend_handles_labels(), strict=True) if pair[1] not in names]
            handles, names = handles + [pair[0] for pair in more], names + [pair[1] for pair in more]
        if len(names) > 1:
            figure.legend(handles, names, loc="outside right center")
        temporary = path.with_suffix(".tmp.png")
        figure.savefig(temporary)
        temporary.replace(path)


def draw_bars(path: Path, title: str, panels: dict[str, list[tuple[str, float, float | None, str]]]) -> None:
    """Write a figure of one panel of bars for each title of `panels`: (name, value, value before or None, colour).

    A line across a bar is the value before. At most four panels stand beside each other.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide = min(len(panels), 4)
    high, most = -(-len(panels) // wide), max(map(len, panels.values()))
    with matplotlib.rc_context(_STYLE):
        size = max(6.0, 3.2 * wide + 0.8), high * max(2.4, 0.9 + 0.3 * most)
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=11, fontweight="bold")
        axes = figure.subplots(high, wide, squeeze=False).flatten()
        for ax, (name, bars) in zip(axes, panels.items(), strict=False):
            places = range(len(bars))
            ax.barh(places, [bar[1] for bar in bars], color=[bar[3] for bar in bars], height=0.65)
            for place, (_, number, before, _) in zip(places, bars, strict=True):
                if before is not None:
                    ax.plot([before, before], [place - 0.42, place + 0.42], color="#000000", linewidth=1.4)
                ax.annotate(f" {number:.3g}", (max(number, before or number), place), va="center", fontsize=7)
            ax.set_yticks(places, [bar[0] for bar in bars])
            ax.invert_yaxis()
            ax.margins(x=0.18)
            ax.set_title(name)
            ax.grid(axis="y", visible=False)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        temporary = path.with_suffix(".tmp.png")
        figure.savefig(temporary)
        temporary.replace(path)


def _curve(
    ax: Any, rows: Rows, key: str, colour: str, smooth: bool, marks: bool, scale: float
) -> tuple[float, float, str] | None:
    """Draw one column against the step; returns where it ends and its colour, None if it was never measured."""
    points = [(row["step"], row[key] * scale) for row in rows if key in row]
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    name = key.removeprefix("chat/")
    if smooth and len(values) >= 20:
        ax.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        values = smoothed(values, len(values) // 12)
        ax.plot(steps, values, color=colour, linewidth=1.8, label=name)
    else:
        ax.plot(steps, values, color=colour, linewidth=1.8, marker="o" if marks else None, markersize=3.5, label=name)
    return steps[-1], values[-1], colour


def _label_ends(ax: Any, ends: list[tuple[float, float, str]], form: str) -> None:
    """Write last values to the right of their curves."""
    ends = sorted(ends, key=lambda end: end[1])
    low, high = ax.get_ylim()
    heights = spaced([value for _, value, _ in ends], 0.065 * (high - low), high)
    place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    for (step, value, colour), height in zip(ends, heights, strict=True):
        ax.annotate(format(value, form), (step, height), color=colour, fontsize=8, **place)


def spaced(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Move ascending heights apart to at least `gap`: upwards, then down again from `top` where they exceed it."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], top if i == len(moved) - 1 else moved[i + 1] - gap)
    return moved


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the moving average over `window` values to each side, so that it does not lag.

    Narrow at the start, where curves are steep, one-sided at the end, where they are flat and one value is noise.
    """
    result = []
    for i in range(len(values)):
        reach = min(window, i)
        part = values[i - reach : i + reach + 1]
        result.append(sum(part) / len(part))
    return result
