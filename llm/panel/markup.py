"""Pieces of HTML for the pages: all text is escaped here, and nothing has an empty line, which would end the block."""

import html
from collections.abc import Collection, Iterable, Sequence
from typing import Any


def text(content: Any) -> str:
    """Escape a text; line breaks stay, as references that Markdown leaves alone."""
    return html.escape("" if content is None else str(content)).replace("\r", "").replace("\n", "&#10;")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], numeric: Collection[int] = (), name: str = "") -> str:
    """Return a table that scrolls by itself where the page is narrow. A cell that is `Markup` stands as it is."""

    def cells(tag: str, row: Sequence[Any]) -> str:
        kinds = (' class="n"' if place in numeric else "" for place in range(len(row)))
        inner = (cell if isinstance(cell, Markup) else text(cell) for cell in row)
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, inner, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    label = f' role="region" aria-label="{text(name)}"' if name else ""
    return f'<div class="scroll" tabindex="0"{label}><table><tr>{cells("th", header)}</tr>{body}</table></div>'


class Markup(str):
    """HTML that is ready to be shown."""


def section(title: str, *parts: str, opened: bool = True) -> str:
    """Return a part of a page that can be folded; "" where nothing is in it."""
    inner = "".join(parts)
    if not inner:
        return ""
    return f"<details{' open' if opened else ''}><summary>{text(title)}</summary>{inner}</details>"


def block(content: str, kind: str = "") -> str:
    """Return a text with its line breaks, such as a log; what is long scrolls."""
    return f'<pre class="block {kind}" tabindex="0">{text(content)}</pre>'


def problem(message: str) -> str:
    """Return a line that says what went wrong."""
    return f'<p class="problem" role="alert">{text(message)}</p>'


def page(*parts: str) -> str:
    """Return parts as one block of HTML."""
    return f'<div class="panel-html">{"".join(parts)}</div>'
