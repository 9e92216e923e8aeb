"""Running model-written Python in a separate, limited process.

The program gets a time limit, a memory limit, no inherited environment, no standard input, an empty working folder that
is deleted afterwards, and a limit on what it may write. This keeps honest mistakes (endless loops, huge lists, stray
files) from hurting the caller; it does not stop hostile code from reading files or opening connections.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

MEMORY_MB = 512
OUTPUT_BYTES = 1_000_000  # size limit of every file the program writes, its output included
SHOWN_CHARS = 4_000  # of stdout and stderr that a result keeps

# Runs inside the child: limits first, then the program in a fresh namespace, then the proof that it came to its end.
# argv: program file, proof, memory bytes, file bytes, CPU seconds.
RUNNER = """
import sys
path, proof = sys.argv[1:3]
memory, size, cpu = map(int, sys.argv[3:6])
try:
    import resource
except ImportError:
    resource = None
if resource:
    for name, limit in (("RLIMIT_AS", memory), ("RLIMIT_FSIZE", size), ("RLIMIT_CPU", cpu), ("RLIMIT_CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, name), (limit, limit))
        except (AttributeError, ValueError, OSError):
            pass
with open(path, encoding="utf-8") as file:
    code = file.read()
sys.argv = [path]
exec(compile(code, "program.py", "exec"), {"__name__": "__main__"})
with open(path + ".done", "w") as file:
    file.write(proof)
"""


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended: `ok` means it ran to its last line. `error` is empty, or one line that says why not."""

    ok: bool
    timed_out: bool
    error: str
    stdout: str
    stderr: str


def run_program(code: str, timeout: float = 5.0, memory_mb: int = MEMORY_MB) -> ProgramResult:
    """Run `code` in a separate process for at most `timeout` seconds and `memory_mb` MiB of address space.

    An exception, `sys.exit` and any other way of ending before the last line count as failure. Never raises for what
    the program does; `OSError` where no process can be started at all.
    """
    with tempfile.TemporaryDirectory(prefix="fathom-program-", ignore_cleanup_errors=True) as folder:
        work = Path(folder) / "work"
        work.mkdir()
        program, out, err = (Path(folder) / name for name in ("program.py", "stdout", "stderr"))
        program.write_text(code, encoding="utf-8", errors="replace")
        proof = secrets.token_hex(16)
        limits = [str(memory_mb * 2**20), str(OUTPUT_BYTES), str(int(timeout) + 1)]
        command = [sys.executable, "-I", "-B", "-c", RUNNER, str(program), proof, *limits]
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=work,
                env={},
                start_new_session=True,
            )
            timed_out = _wait(process, timeout)
        done = program.with_name("program.py.done")
        ok = not timed_out and process.returncode == 0 and done.exists() and done.read_text() == proof
        shown = [path.read_text(encoding="utf-8", errors="replace")[-SHOWN_CHARS:] for path in (out, err)]
    return ProgramResult(ok, timed_out, "" if ok else _reason(timed_out, timeout, process.returncode, shown[1]), *shown)


def _wait(process: subprocess.Popen, timeout: float) -> bool:
    """Wait for the end or the time limit; then end whatever the program started. True if the limit was reached."""
    try:
        process.wait(timeout)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        if os.name == "posix":
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        else:
            process.kill()
        process.wait()


def _reason(timed_out: bool, timeout: float, returncode: int, stderr: str) -> str:
    if timed_out:
        return f"stopped after {timeout:g} s"
    lines = stderr.strip().splitlines()
    if returncode > 0 and lines:
        return lines[-1]
    return f"ended early with status {returncode}"
