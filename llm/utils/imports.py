"""Imports in less time: Python's garbage collector waits meanwhile.

While torch and Lightning are imported, millions of objects come and stay, and the collector looks through all of them
again and again: a fifth of the time. Numbers: docs/lab_notebook.md.
"""

import contextlib
import gc
from collections.abc import Iterator

_paused = False  # by this module, until it is resumed


def pause_collector() -> None:
    """Turn Python's garbage collector off at the begin of a process that imports much, until `resume_collector`."""
    global _paused
    gc.disable()
    _paused = True


def resume_collector() -> None:
    """Turn the collector on again where `pause_collector` has turned it off; what there is by now it no longer sees."""
    global _paused
    if _paused:
        gc.freeze()
        gc.enable()
    _paused = False


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Keep the garbage collector off meanwhile; for a block that imports much.

    What is imported stays out of the collector's sight where earlier imports do: where `resume_collector` has put them
    out of it, and not in a user's notebook.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on and gc.get_freeze_count():
            gc.freeze()
        if was_on:
            gc.enable()
