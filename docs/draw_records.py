"""Draw what the tables of the records and of the screenings in the lab notebook say.

    python docs/draw_records.py

Reads docs/records.md and docs/lab_notebook.md; writes images/records.png and images/switches.png beside them.
"""

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from llm.report.plots import COLOURS, WIDTH, drawing  # noqa: E402

SCREENED = re.compile(r"against the pool of five.*\| time of a step \|")  # header of a table of screened switches
SCATTER = 0.0054  # bpb, standard error of a single run against the mean of five
NAMES = {"optim.": "", "arch.": "", "stage.": "", "=true": "", "`": ""}


def main(folder: Path = DOCS / "images") -> None:
    """Write both pictures into a folder."""
    records = table((DOCS / "records.md").read_text(encoding="utf-8"), re.compile(r"\| bpb \| seeds \| spread \|"))
    draw_records(folder / "records.png", records)
    draw_switches(folder / "switches.png", table((DOCS / "lab_notebook.md").read_text("utf-8"), SCREENED))


def table(text: str, header: re.Pattern) -> list[list[str]]:
    """Return the cells of all rows below headers that match, in one list."""
    rows, inside = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
        elif header.search(line):
            inside = True
        elif inside and not set(line) <= set("|-: "):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def plain(words: str) -> str:
    """Return settings as they are named in a picture."""
    for old, new in NAMES.items():
        words = words.replace(old, new)
    return words


def draw_records(path: Path, rows: list[list[str]]) -> None:
    """Draw a point of bits per byte for each row, with the spread of its seeds, a colour for each machine."""
    colours = dict(zip(sorted({row[5] for row in rows}), COLOURS, strict=False))
    with drawing(path, "d4 after 600 steps: bits per byte", (WIDTH, 0.9 + 0.24 * len(rows))) as figure:
        ax = figure.subplots()
        for place, (bpb, seeds, spread, seconds, _, machine, *_) in enumerate(rows):
            colour, value = colours[machine], float(bpb)
            ax.errorbar(value, place, xerr=float(spread or 0), fmt="o", color=colour, capsize=3, markersize=5)
            facts = [bpb, f"{seeds} seed{'s' * (seeds != '1')}", *([f"{seconds} s"] if seconds else []), machine]
            write(ax, ", ".join(facts), value + float(spread or 0), place, "left")
        name_rows(ax, [plain(row[4]) for row in rows])
        left, right = ax.get_xlim()
        ax.set_xlim(left, right + 0.5 * (right - left))  # room for what is written
        ax.set_xlabel("bits per byte, held out; A to C are machines, and have a colour each")


def name_rows(ax: Any, names: list[str]) -> None:
    """Write names of rows at the left, the first on top."""
    ax.set_yticks(range(len(names)), names, fontsize=7.5)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def write(ax: Any, words: str, value: float, place: int, align: str) -> None:
    """Write a number beside the end of a bar or a point."""
    offset = {"xytext": (5 if align == "left" else -5, 0), "textcoords": "offset points"}
    ax.annotate(words, (value, place), **offset, va="center", ha=align, fontsize=7.5)


def draw_switches(path: Path, rows: list[list[str]]) -> None:
    """Draw what each switch changes of the bits per byte, the best first, with the time of a step behind its name."""
    rows = sorted(rows, key=lambda row: float(row[2]))
    title, height = "d4 after 300 steps: difference to the default's five seeds", 0.9 + 0.2 * len(rows)
    with drawing(path, title, (WIDTH, height)) as figure:
        ax = figure.subplots()
        ax.axvspan(-SCATTER, SCATTER, color="#E5E5E5", label="one seed's standard error")
        for place, value in enumerate(float(row[2]) for row in rows):
            ax.barh(place, value, color=COLOURS[value > 0], height=0.65)
            write(ax, f"{value:+.4f}", value, place, "left" if value > 0 else "right")
        name_rows(ax, [f"{plain(row[0])}   {row[3].replace('x ', '× ')}".rstrip() for row in rows])
        ax.xaxis.get_major_locator().set_params(nbins=5)
        ax.margins(x=0.2)
        ax.set_xlabel("bits per byte, held out; ×: time of a step")
        ax.legend(loc="upper right")


if __name__ == "__main__":
    main()
