"""Line charts as SVG text, drawn on the server: no script, colours by style sheet for light and dark."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WIDTH, HEIGHT = 720, 300  # units of the drawing, which is scaled to the page
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 34
BOX = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
INNER = f'<svg {BOX} viewBox="{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}">'  # what is outside is cut
COLOURS = 10  # in page.css: .l0 to .l9
LATE = 0.1  # share of the way after which all values lie within the axis: curves begin far above
UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Line:
    """A curve (N,) of a chart; low and high, (N,) each or empty, are the edges of a band around."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    low: np.ndarray = field(default_factory=lambda: np.empty(0))
    high: np.ndarray = field(default_factory=lambda: np.empty(0))


def draw(title: str, lines: Sequence[Line], x_name: str) -> str:
    """Return a figure: chart, legend with the last values, and which curves have values that are NaN or infinite.

    The first tenth of the way does not set the range of the y axis where it lies above or below all that follows.
    """
    shown = [line for line in lines if len(line.x)]
    if not shown:
        return f'<figure class="chart"><figcaption>{html.escape(title)}: nothing was measured</figcaption></figure>'
    x_low, x_high = min(line.x[0] for line in shown), max(line.x[-1] for line in shown)
    y_low, y_high = _range(shown, x_low + LATE * (x_high - x_low))
    x_high = x_high if x_high > x_low else x_low + max(1.0, 0.05 * abs(x_low))  # 1 is nothing to 1e18 FLOPs
    sx, sy = (WIDTH - LEFT - RIGHT) / (x_high - x_low), (HEIGHT - TOP - BOTTOM) / (y_high - y_low)

    def place(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return LEFT + (x - x_low) * sx, HEIGHT - BOTTOM - (y - y_low) * sy

    parts = [*_grid(x_low, x_high, y_low, y_high, place), INNER]
    for line in shown:
        if len(line.low):
            edges = _points(*place(np.append(line.x, line.x[::-1]), np.append(line.low, line.high[::-1])))
            parts.append(f'<polygon class="band l{line.colour % COLOURS}" points="{edges}"/>')
        parts += [f'<polyline class="l{line.colour % COLOURS}" points="{piece}"/>' for piece in _pieces(line, place)]
    parts.append("</svg>")
    frame = f'<rect class="frame" {BOX}/>'
    label = html.escape(f"{title} by {x_name}, {len(shown)} curves; the last values stand in the list below")
    names = f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{html.escape(x_name)}</text>'
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}{frame}{names}</svg>'
    items = "".join(f"<li>{_legend(line)}</li>" for line in lines)
    return f'<figure class="chart"><figcaption>{html.escape(title)}</figcaption>{svg}<ul>{items}</ul></figure>'


def _legend(line: Line) -> str:
    fine = line.y[np.isfinite(line.y)]
    last = f" {number(fine[-1])}" if len(fine) else " not measured"
    note = " <em>with gaps: NaN or infinite</em>" if len(fine) < len(line.y) else ""
    return f'<span class="key l{line.colour % COLOURS}"></span>{html.escape(line.name)}<b>{last}</b>{note}'


def _range(lines: Sequence[Line], late: float) -> tuple[float, float]:
    """Return the range of the y axis, with some room."""
    values = [part[line.x >= late] for line in lines for part in (line.y, line.low, line.high) if len(part)]
    values = [part[np.isfinite(part)] for part in values]
    if not any(len(part) for part in values):
        values = [line.y[np.isfinite(line.y)] for line in lines]
    known = np.concatenate(values)
    if not len(known):
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _pieces(line: Line, place) -> list[str]:
    """Return the points of a line, broken where a value is NaN or infinite."""
    fine = np.isfinite(line.y)
    breaks = np.flatnonzero(~fine)
    pieces = []
    for part in np.split(np.arange(len(line.y)), breaks):
        part = part[fine[part]]
        if len(part) == 1:
            part = np.append(part, part)  # a dot
        if len(part):
            pieces.append(_points(*place(line.x[part], line.y[part])))
    return pieces


def _points(x: np.ndarray, y: np.ndarray) -> str:
    y = np.clip(y, -HEIGHT, 2 * HEIGHT)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _grid(x_low: float, x_high: float, y_low: float, y_high: float, place) -> list[str]:
    parts = []
    for tick in ticks(y_low, y_high):
        y = float(place(np.array(x_low), np.array(tick))[1])
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(x_low, x_high, 6):
        x = float(place(np.array(tick), np.array(y_low))[0])
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        anchor = "end" if x > WIDTH - 2 * RIGHT else "middle"  # nothing is cut on a phone
        place_of = f'x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}"'
        parts.append(f'<text class="tick" {place_of}>{number(tick)}</text>')
    return parts


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers within a range: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Return a number in a few characters: 1.5 k, 0.0123, 2.1e-05."""
    size = abs(value)
    for unit, letter in UNITS:
        if size >= unit and (size >= 10_000 or unit > 1000):
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}" if size >= 1e-4 or not value else f"{value:.1e}"
