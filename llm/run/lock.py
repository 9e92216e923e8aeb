"""One writer for each stage: a lock of the operating system that is held from start to end and released by death.

The lock lies beside the stage folder, `runs/<run>/.<stage>.lock`, so that overwrite=true cannot delete it. Its text
says who holds it. Several processes of one job share the lock of the first: the environment tells them of it.
"""

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from llm.errors import UserError, reason_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HELD = "FATHOM_LOCKED"  # paths of the locks that this process or the one that started it holds, a line each
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # the file system has none
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)  # who cannot make a file there does no harm
IMPORT_SECONDS = 3600.0  # to wait while another process reads the weights of another program, which may be giants
MOST_SHOWN = 200  # characters of a holder

_open: set[int] = set()  # file descriptors of the locks held here


@contextlib.contextmanager
def one_writer(stage_dir: Path) -> Iterator[None]:
    """Hold the lock of a stage folder. Raises UserError that says who holds it already.

    Where the file system has no locks, a line says so and work goes on.
    """
    path = lock_path(stage_dir)
    if _is_ours(path):
        yield
        return
    try:
        fd = _locked(path)
    except BlockingIOError:
        raise UserError(
            f"{stage_dir} is being written by {holder(path)}: wait until that has ended or stop it, or use "
            "run=<new name>; overwrite=true does not take a running stage away"
        ) from None
    except OSError as error:
        if error.errno not in (*NO_LOCKS, *READ_ONLY) or (error.errno in READ_ONLY and path.exists()):
            reason = reason_of(error, path)
            raise UserError(f"{path}: cannot be locked ({reason}); set paths.runs to another folder") from error
        fd = None
        if error.errno in NO_LOCKS:
            print(f"note: {path.parent} has no file locks: start each stage once only", file=sys.stderr)
    before = os.environ.get(HELD, "")
    os.environ[HELD] = "\n".join(filter(None, (before, str(path))))  # a name may have a colon
    try:
        yield
    finally:
        os.environ[HELD] = before
        _release(path, fd)


@contextlib.contextmanager
def waiting_lock(path: Path, seconds: float = 60) -> Iterator[None]:
    """Hold a lock for a moment, to read and rewrite a small file beside it; wait for others who do.

    Goes on without it where the file system has none, or after `seconds`.
    """
    fd, end = None, time.monotonic() + seconds
    while fd is None:
        try:
            fd = _locked(path)
        except BlockingIOError:
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        except OSError:
            break
    try:
        yield
    finally:
        _release(path, fd)


def lock_path(stage_dir: Path) -> Path:
    """Return the file whose lock belongs to a stage folder."""
    return Path(stage_dir).absolute().with_name(f".{Path(stage_dir).name}.lock")


def holder(path: Path) -> str:
    """Return who holds a lock, in words."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = "".join(letter for letter in file.read(MOST_SHOWN) if letter.isprintable())
    except OSError:
        text = ""
    return text or "another process"


def is_locked(stage_dir: Path) -> bool:
    """Return whether a process on this machine, or one that the file system knows of, writes the stage folder."""
    path = lock_path(stage_dir)
    if _is_ours(path) or not path.is_file():
        return _is_ours(path)
    try:
        _release(path, _locked(path))
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _is_ours(path: Path) -> bool:
    return str(path) in os.environ.get(HELD, "").splitlines()


def _locked(path: Path) -> int:
    """Return the descriptor of the locked file at `path`. Raises BlockingIOError where another process has it.

    A holder removes the file at its end. So the file that was locked must still be the one at `path`.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no file locks on this system")
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = _opened(path)
        except FileNotFoundError:  # the folder went meanwhile, with another's lock
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
                    os.ftruncate(fd, 0)
                    os.write(fd, _myself().encode())
                _open.add(fd)
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _opened(path: Path) -> int:
    """Open the file of a lock, made where there is none; of another user's, who lets no other write, to read only."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _release(path: Path, fd: int | None) -> None:
    """Remove the file and let go of the lock; a run folder that is left empty goes too."""
    if fd is None or fd not in _open:  # a forked child has none
        return
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            path.unlink()
    with contextlib.suppress(OSError):
        path.parent.rmdir()
    _open.discard(fd)
    os.close(fd)


def _myself() -> str:
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"


def _forget() -> None:
    """Close the locks' files in a forked child, which would keep a lock beyond the death of its holder."""
    for fd in _open:
        os.close(fd)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
