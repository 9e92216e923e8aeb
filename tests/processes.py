"""Processes that tests start: each ends with its test, and all of them end with pytest, however that ends.

The system kills a started process when the one that started it has gone. What it has started in turn is found by a mark
in its environment: after every test, and by a watcher process that outlives pytest until nothing with its mark is left.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from warm import Program, Server

REPO = Path(__file__).resolve().parent.parent
MARK = "FATHOM_TEST_PROCESSES"
HANG = 900.0  # seconds until something that never comes fails a test: a machine that is only busy takes less
PR_SET_PDEATHSIG = 1  # of Linux's prctl
NAME_SIZE = 15  # letters of the name that the system keeps of a process
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

started: list[tuple[subprocess.Popen | Program, str]] = []  # processes and the marks of what they start
server: Server | None = None


def start(*command: str, env: dict[str, str] | None = None, **popen) -> subprocess.Popen:
    """A process with text pipes, in the repository's folder; `env` is added to the environment, popen to Popen's."""
    mark = f"{os.environ.get(MARK, '')}/{uuid.uuid4().hex}"
    more = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {}), MARK: mark}
    options = {"cwd": REPO, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
    process = subprocess.Popen(command, env=os.environ | more, preexec_fn=begin, **options)
    started.append((process, mark))
    return process


def start_warm(script: Path | str, *args: str, cwd=REPO, env: dict[str, str] | None = None, **popen) -> Program:
    """Start a script of the repository with torch imported already (Linux; elsewhere in a new interpreter)."""
    global server
    if LIBC is None:
        return start(sys.executable, str(script), *args, cwd=cwd, env=env, **popen)
    if server is None:
        server = Server(die_with_parent)
    mark = uuid.uuid4().hex[:NAME_SIZE]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
    program = Program(
        server, mark, [str(script), *args], cwd, os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}), **streams
    )
    started.append((program, mark))
    return program


def finish(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each, in order, once all have ended."""
    ended = [(p.communicate(timeout=HANG), p.returncode)[::-1] for p in processes]
    return [(status, *texts) for status, texts in ended]


def run(*command: str, env: dict[str, str] | None = None, **popen) -> subprocess.CompletedProcess:
    """Run a program in a new process and wait for its end; what it leaves running is ended."""
    return _ended(start, *command, env=env, **popen)


def run_warm(script: Path | str, *args: str, env: dict[str, str] | None = None, **popen) -> subprocess.CompletedProcess:
    """Run a script with torch imported already and wait for its end; what it leaves running is ended."""
    return _ended(start_warm, script, *args, env=env, **popen)


def _ended(start, *command, hang: float = HANG, **options) -> subprocess.CompletedProcess:
    before = len(started)
    try:
        process = start(*command, **options)
        out, err = process.communicate(timeout=hang)
    finally:
        end_started(before)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run_python(code: str, *args: str, env: dict[str, str] | None = None, **popen) -> subprocess.CompletedProcess:
    """Run a program text in a new interpreter."""
    return run(sys.executable, "-c", code, *args, env=env, **popen)


def wait_until(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Return once the condition holds; fail if the process that should bring it about has ended, or after HANG."""
    end = time.monotonic() + HANG
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            raise AssertionError(f"ended with {process.returncode} too early: {process.communicate()}")
        if time.monotonic() > end:
            raise AssertionError(f"waited for {HANG:.0f} s in vain")
        time.sleep(0.02)


def end_started(first: int = 0) -> None:
    """End what was started since there were `first` processes, and all that came of it."""
    ending = started[first:]
    del started[first:]
    for process, _ in ending:
        if process.poll() is None:
            process.kill()
    for _, mark in ending:
        kill_marked(mark)
    for process, _ in ending:
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None and not pipe.closed:
                pipe.close()


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is more than an entry that nobody has asked for yet."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def children_of(pid: int) -> list[int]:
    """Living processes that `pid` has started, oldest first (Linux only)."""
    return [other for other in _all_pids() if is_alive(other) and _stat(other)[1:2] == [str(pid)]]


def offspring_of(pid: int) -> list[int]:
    """Living processes that `pid` has started, and those that they have started; sessions do not matter (Linux)."""
    children = children_of(pid)
    return children + [other for child in children for other in offspring_of(child)]


def marked(mark: str) -> list[int]:
    """Living processes, apart from this one, whose environment or name holds the mark (Linux only)."""
    return [pid for pid in _all_pids() if pid != os.getpid() and _holds(pid, mark.encode()) and is_alive(pid)]


def kill_marked(mark: str, spared: Sequence[int] = ()) -> list[int]:
    """SIGKILL to all processes with a mark, and to what they start meanwhile; returns who they were."""
    killed, end = set(), time.monotonic() + HANG
    while (left := set(marked(mark)) - set(spared)) and time.monotonic() < end:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed |= left
        time.sleep(0.01)
    return sorted(killed)


def mark_all() -> None:
    """Mark all that this process will start, and start the watcher that ends it when this process has gone."""
    os.environ[MARK] = f"{os.environ.get(MARK, '')}/{uuid.uuid4().hex}"
    if LIBC is not None:
        command = [sys.executable, "-S", __file__, str(os.getpid()), os.environ[MARK]]
        nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen(command, start_new_session=True, **nothing)


def watch(parent: int, mark: str) -> None:
    """Wait for the end of the process `parent`, which started this one, then for the end of all with its mark."""
    while os.getppid() == parent:
        time.sleep(0.2)
    kill_marked(mark)


def begin() -> None:
    """Prepare a started process before its program runs: Ctrl-C ends it, even where the parent ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()


def die_with_parent() -> None:
    """Have the system kill this process when the one that started it has gone (Linux only)."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _all_pids() -> list[int]:
    return sorted(int(folder.name) for folder in Path("/proc").glob("[0-9]*"))


def _stat(pid: int) -> list[str]:
    """State and parent, and further fields; empty for a process that has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def _holds(pid: int, mark: bytes) -> bool:
    try:
        folder = Path(f"/proc/{pid}")
        return mark in (folder / "environ").read_bytes() or mark in (folder / "comm").read_bytes()
    except OSError:
        return False


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
