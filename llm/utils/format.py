"""Numbers and tables for people, as reports and the console show them."""

from collections.abc import Iterable, Sequence
from typing import Any

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def value(number: Any, stderr: float | None = None, digits: int = 4) -> str:
    """Format a number: whole ones with commas, fractions with `digits` decimals (tiny or huge: 1.2e-05), None as `-`.

    stderr: standard error, appended behind ±.
    """
    if number is None:
        return "-"
    if isinstance(number, bool) or not isinstance(number, int | float):
        return str(number)
    if isinstance(number, int) or (number.is_integer() and abs(number) < 1e15):
        whole = f"{int(number):,}" if abs(number) < 1e15 else f"{number:.3e}"
        return whole + ("" if stderr is None else f" ± {stderr:.{digits}f}")
    if abs(number) >= 1e6 or abs(number) < 1e-3:
        return f"{number:.3e}"
    return f"{number:,.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def percent(share: float | None, stderr: float | None = None) -> str:
    """Format a share as percent: 0.8125 as `81.2 %`, with one standard error if given; None as `-`."""
    if share is None:
        return "-"
    return f"{100 * share:.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}") + " %"


def amount(number: float | None) -> str:
    """Format a count in at most four digits and a unit: 1.05M, 560.99M; beyond 10^15 as 3.8e18; None as `-`."""
    if number is None:
        return "-"
    if number >= 1e15:
        return f"{number:.2e}".replace("e+", "e")
    for size, unit in _UNITS:
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:,.0f}"


def in_bytes(number: float) -> str:
    """Format a number of bytes in powers of 1000: `12.5 MB`, `24.1 GB`."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def in_rate(number: float) -> str:
    """Format operations per second: `453 GFLOP/s`, `1.2 TFLOP/s`."""
    return f"{number / 1e12:,.3g} TFLOP/s" if number >= 1e12 else f"{number / 1e9:,.3g} GFLOP/s"


def duration(seconds: float | None) -> str:
    """Format seconds: `4.2 s`, `3 min 12 s`, `2 h 05 min`, from three days on `12.5 days`; None as `-`."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if seconds >= 3 * 86_400:
        return f"{seconds / 86_400:,.1f} days"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def dollars(amount: float | None) -> str:
    """Format money without its sign, which Markdown takes for a formula: `12.34`, `0.0012`; None as `-`."""
    if amount is None:
        return "-"
    return f"{amount:,.2f}" if amount >= 0.01 or not amount else f"{amount:.2g}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """Return a Markdown table; columns in `numeric` are right-aligned, what cells and header hold stands as text."""
    numeric = set(numeric)
    ruler = ["---:" if number in numeric else "---" for number in range(len(header))]
    lines = [map(in_markdown, header), ruler, *(map(in_markdown, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_markdown(text: str) -> str:
    """Return text for one line of Markdown, without signs that end a cell, move the cursor, or load something."""
    text = in_one_line(text).replace("\\", "\\\\")
    return text.replace("|", "\\|").replace("<", "\\<").replace("![", "!\\[")


def in_one_line(text: str) -> str:
    """Return text with a blank in the place of every sign that does not print: ends of lines, colours, the bell."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


_CONTROLS = {*range(32), *range(127, 160)} - {*map(ord, "\n\t")}
_TURNS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # the direction in which all that follows is read
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _CONTROLS | _TURNS}


def harmless(text: str) -> str:
    """Return text that does nothing to a terminal: signs that control it, or turn its direction, stand as \\x1b."""
    return text.translate(_ESCAPES)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table with rich, in full width if the output is no terminal: a file or a pipe loses nothing."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(80, console.measure(table, options=console.options.update(width=1000)).maximum))
    console.print(table)
