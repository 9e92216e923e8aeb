"""Standard output as a terminal, in which a line can be drawn again."""

import contextlib
import os
import sys
from collections.abc import Iterator


def can_redraw() -> bool:
    """Return whether standard output is a terminal in which a line can be drawn again: no file, pipe or notebook."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextlib.contextmanager
def waiting(what: str, is_wanted: bool = True) -> Iterator[None]:
    """Show in a terminal that the program is at work, in `what`, until the block ends; prints nothing elsewhere."""
    if not (is_wanted and can_redraw()):
        yield
        return
    from rich.console import Console

    with Console().status(what):
        yield
