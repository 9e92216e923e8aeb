"""Ctrl-C in a chat in the terminal: it takes an answer back, never the program apart. Light: it comes before torch."""

import contextlib
import signal
import sys


class CtrlC:
    """Handler of Ctrl-C, from before anything is loaded. `pressed` notes that it came while the chat was at work.

    An exception could come up anywhere: in an import, which stays half done, or between two steps of an engine. So
    KeyboardInterrupt is raised at the prompt only (`may_raise`), or where nothing has heeded a Ctrl-C before. patient:
    False where nobody sits at the terminal, and the first one ends the program.
    """

    def __init__(self, patient: bool):
        self.patient, self.pressed, self.may_raise = patient, False, not patient

    def __enter__(self) -> "CtrlC":
        try:
            self._before = signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # signals belong to the main thread
            self._before = None
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if kind is not None and self.patient:
            forget_typed()

    def _handle(self, number, frame) -> None:
        if self.may_raise or self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def heeded(self) -> bool:
        """Return whether Ctrl-C was pressed since the last call; the next one is noted again."""
        pressed, self.pressed = self.pressed, False
        return pressed

    @contextlib.contextmanager
    def at_the_prompt(self):
        """Let Ctrl-C raise KeyboardInterrupt inside the block."""
        self.may_raise = True
        try:
            yield
        finally:
            self.may_raise = not self.patient


def forget_typed() -> None:
    """Drop what was typed and not read, so that it does not reach the shell."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # no terminal
        import termios

        termios.tcflush(sys.stdin, termios.TCIFLUSH)
