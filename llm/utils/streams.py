"""Standard streams that never end a process: closed, full, without a reader, or in an encoding without some letters."""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO


def open_streams() -> None:
    """Make stdin, stdout and stderr usable where the process was started without them, or in a narrow encoding.

    A closed one becomes the null device: else the next file that is opened would take its place, and its text. Letters
    that the encoding lacks are written as `\\u2014`.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or open(0, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    if sys.stdout.errors != "backslashreplace":
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = _Output(sys.stderr)


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Run the `main` of a module that `python -m` starts, with usable streams, and exit with its status.

    It is 1, and nothing is printed, where the reader of stdout has gone, as in `... | head`.
    """
    open_streams()
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        status = without_reader()
    sys.exit(status)


def without_reader() -> int:
    """Send what is left of stdout to nowhere, else Python complains at exit that nobody reads it. Returns status 1."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def keep_going() -> None:
    """Let the work go on when stdout can no longer be written: one line says so, and `is_lost` tells it at the end."""
    if not isinstance(sys.stdout, _Output):
        sys.stdout = _Output(sys.stdout)


def is_lost() -> bool:
    """Return whether some of the output could not be written since `keep_going`."""
    return getattr(sys.stdout, "problem", None) is not None


class _Output:
    """Text stream that writes to another one until that fails, and to nowhere from then on."""

    def __init__(self, stream: TextIO):
        self.stream, self.problem = stream, None

    def write(self, text: str) -> int:
        """Write `text`; returns its length also where it is lost."""
        if self.problem is None:
            try:
                self.stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        if self.problem is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Say in one line on stderr that the output is lost; what libraries write there later is lost too."""
        self.problem = error
        number = self.stream.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        if number == 1:
            reason = os.strerror(error.errno) if error.errno else str(error)
            print(f"error: the output cannot be written ({reason}); going on without", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
