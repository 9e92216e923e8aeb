"""Figures of scaling laws: isoFLOP parabolas, and predicted against measured losses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm.experiments.laws import Law, Point, fit_parabola
from llm.report.plots import COLOURS, drawing


def draw_isoflops(path: Path, points: Sequence[Point]) -> None:
    """Draw the loss over training tokens, one curve per budget in FLOPs, with its parabola and minimum."""
    with drawing(path, "Equal FLOPs (star: best size)", (6.4, 4.2)) as drawn:
        ax = drawn.subplots()
        budgets = sorted({p.budget for p in points})
        for colour, flops in zip(_cycle(len(budgets)), budgets, strict=True):
            same = sorted((p for p in points if p.budget == flops), key=lambda p: p.tokens)
            tokens = [p.tokens for p in same]
            ax.plot(tokens, [p.loss for p in same], "o", color=colour, label=f"{flops:.2g} FLOPs")
            for p in same:
                ax.annotate(f"d{p.depth}", (p.tokens, p.loss), xytext=(4, 4), textcoords="offset points", fontsize=7)
            if (best := fit_parabola(same)) is not None:
                line = np.geomspace(min(tokens) * 0.8, max(tokens) * 1.25, 100)
                ax.plot(line, [best.at(t) for t in line], color=colour, linewidth=1)
                if best.is_inside:
                    ax.plot(best.tokens, best.loss, "*", color=colour, markersize=12, markeredgecolor="white")
        ax.set(xscale="log", xlabel="training tokens", ylabel="bits per byte")
        ax.legend()


def draw_law(path: Path, points: Sequence[Point], held_out: Sequence[Point], law: Law) -> None:
    """Draw the law over training tokens for every size, with the runs: filled if fitted, hollow if held out."""
    with drawing(path, law.FORMULA, (6.4, 4.2)) as drawn:
        ax = drawn.subplots()
        everything = [*points, *held_out]
        span = np.geomspace(min(p.tokens for p in everything) * 0.8, max(p.tokens for p in everything) * 1.25, 100)
        depths = sorted({p.depth for p in everything})
        for colour, depth in zip(_cycle(len(depths)), depths, strict=True):
            runs = [p for p in everything if p.depth == depth]
            is_held = runs[0] in held_out
            tokens, losses = [p.tokens for p in runs], [p.loss for p in runs]
            fill = "none" if is_held else colour
            label = f"d{depth}, held out" if is_held else f"d{depth}"
            ax.plot(tokens, losses, "o", color=colour, markerfacecolor=fill, label=label)
            ax.plot(span, [law.at(runs[0].params, t) for t in span], color=colour, linestyle="--" if is_held else "-")
        ax.set(xscale="log", xlabel="training tokens", ylabel="bits per byte")
        ax.legend()


def _cycle(count: int) -> list[str]:
    """Return `count` colours."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
