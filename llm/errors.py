"""The exception type for mistakes a user can make and mend, and errors of the system in words."""

import errno
import os
import re
import shutil
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT)
REASONS = {
    errno.ENOSPC: "no space left on {place}",
    errno.EDQUOT: "the quota of {place} is used up",
    errno.EFBIG: "the file would be larger than the system allows (ulimit -f, or the file system)",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.EISDIR: "the path is a folder",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",  # said of a folder that is to be made
    errno.ENOENT: "no such file or folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "the path is a symbolic link in a circle",
    errno.EMFILE: "too many open files (ulimit -n)",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "out of memory",
    errno.EIO: "the device reports an error",
    errno.ESTALE: "the network file system has lost the file",
    errno.EPIPE: "whoever read it has gone",
}
ADVICE = dict.fromkeys(FULL, "free some space or choose another place")
OUT_OF_MEMORY = re.compile(
    "(can't|cannot) allocate memory|bad_alloc|ALLOC_FAILED|out of memory|can't start new thread|"
    "failed to map segment|could not create a primitive",
    re.IGNORECASE,
)
ENOUGH = 300  # characters of a value that an error repeats
ENDLESS = re.compile(r"\S{1025,}")  # longer than the longest path in use


class UserError(ValueError):
    """A wrong config value, file or combination. The text names the key or file, the value and the fix.

    Entry points print it as one `error: ...` line without a traceback and exit with status 2. Of a value without blanks
    that is longer than any path, as a foreign file may hold, only the beginning is repeated.
    """

    def __init__(self, text: object = ""):
        super().__init__(ENDLESS.sub(lambda word: f"{word[0][:ENOUGH]}...", str(text)))

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython, and so a notebook, shows in the place of a traceback."""
        return [f"error: {self}"]


class BadData(UserError):
    """Raised for data that cannot be read on: a bad row, or a damaged file. Training saves its last step before."""


class BadLoss(UserError):
    """A training step whose loss is not finite or far above the last ones, raised before it changes the weights.

    step: the one that failed, counted from 1. finite: whether its loss is; then the steps before may be at fault.
    documents: ids (B, T) of the micro-batch that did it, None where it is another process's or unknown.
    """

    def __init__(self, step: int, problem: str, finite: bool, documents=None):
        super().__init__(
            f"{problem}: lower the learning rate (stage.lr_frac) and start again with overwrite=true or "
            "run=<new name>, or let it leave out such data (watch.bad_loss=roll_back)"
        )
        self.step, self.problem, self.finite, self.documents = step, problem, finite, documents


def reason_of(error: BaseException, path: str | os.PathLike) -> str:
    """Return in words why reading or writing `path` failed: what the system's error number means, and what mends it.

    The number may stand in the text alone, as libraries written in Rust and Arrow give it, or in the error's cause.
    """
    known = system_reason(error, path)
    return known or (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def system_reason(error: BaseException, path: str | os.PathLike) -> str | None:
    """Return what the system's error number of an error means, and what mends it; None for an error without one."""
    number = _errno_of(error)
    if number not in REASONS:
        return None
    reason = REASONS[number].format(place=_device(path) if number in FULL else "")
    return f"{reason}; {ADVICE[number]}" if number in ADVICE else reason


def system_problem(error: BaseException) -> str | None:
    """Return one line for an error that the system is at fault for and not the program; None for all others."""
    if is_out_of_memory(error):
        return f"out of memory ({memory_detail(error)}): make room on this machine, or raise its limit (ulimit -v)"
    path = getattr(error, "filename", None)
    if isinstance(error, OSError) and path and error.errno in REASONS and error.errno != errno.ENOENT:
        return f"{path}: {reason_of(error, path)}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or the one that it came of, says that memory is short, on the host or on a GPU."""
    return not isinstance(error, UserError) and any(map(_tells_of_memory, _chain(error)))


def _tells_of_memory(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}  # of torch, which is not imported here
    if names & {"MemoryError", "OutOfMemoryError"} or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | ImportError) and bool(OUT_OF_MEMORY.search(str(error)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def memory_detail(error: BaseException) -> str:
    """Return the line of an error, or of the one that it came of, that tells of short memory; at most 160 letters."""
    error = next(filter(_tells_of_memory, _chain(error)), error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next(filter(OUT_OF_MEMORY.search, lines), lines[0])[:160]


def _errno_of(error: BaseException) -> int | None:
    """Return the system's error number of an error, of its text or of what caused it; None if there is none."""
    for part in _chain(error):
        if (number := getattr(part, "errno", None)) is not None:
            return number
        if found := re.search(r"(?:os error|errno) (\d+)", str(part), re.IGNORECASE):
            return int(found[1])
        if "inline_container" in str(part) and "unexpected pos" in str(part):  # torch.save, of a write that failed
            return errno.ENOSPC
    return None


def _device(path: str | os.PathLike) -> str:
    """Return the mount point of `path`, or of the nearest folder above that exists, and the space that is free."""
    place = os.path.abspath(path)
    while not os.path.exists(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    try:
        free = f" ({shutil.disk_usage(place).free / 1e6:,.0f} MB free)"
    except OSError:
        free = ""
    while not os.path.ismount(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    return place + free
