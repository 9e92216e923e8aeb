"""Runs one program against its tests: `python -I -S -B tasks/sandbox <folder> <caller's pid>`.

One job comes on stdin, one result goes to stdout.

The runner makes the sandbox, starts the judge in it, keeps the time, and ends whatever is left. It never runs code of
the program, and the program cannot reach it.
"""

import json
import os
import select
import signal
import sys
import time

sys.path.pop(0)  # this folder, put there by Python: programs must not import from it
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confine  # noqa: E402
from judge import STDERR, STDOUT, judge  # noqa: E402
from messages import BadMessage, receive  # noqa: E402

sys.path.pop(0)

RESULT = 1


def main() -> None:
    """Run one job that the caller sends: the program in a confined child, its verdict back to the caller."""
    confine.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
    confine.prctl(confine.PR_SET_CHILD_SUBREAPER, 1)
    folder, caller = sys.argv[1], int(sys.argv[2])
    if os.getppid() != caller:
        return  # it ended before its end could be noticed
    job = receive(0)
    _tidy_descriptors(job["stdout"], job["stderr"])
    held = {"namespaces": job["namespaces"] and confine.enter_namespaces(folder, job["limits"]["disk_mb"])}
    if not held["namespaces"]:
        os.chdir(folder)
    confine.prctl(confine.PR_SET_DUMPABLE, 0)
    report_in, report_out = os.pipe()
    deadline = time.monotonic() + job["limits"]["seconds"]
    child = os.fork()
    if child == 0:
        os.close(RESULT)
        os.close(report_in)
        judge(job, "/tmp" if held["namespaces"] else folder, held, report_out)
    os.close(report_out)
    result = _await(report_in, deadline)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    _end_descendants()
    if not held["namespaces"]:
        confine.remove_files_left()
    os.write(RESULT, json.dumps(result).encode())


def _await(report: int, deadline: float) -> dict:
    ready, _, _ = select.select([report], [], [], max(0.0, deadline - time.monotonic()))
    if not ready:
        return {"verdict": "timeout", "detail": ""}
    try:
        return receive(report)
    except (EOFError, BadMessage):
        return {"verdict": "killed", "detail": "the judge was ended"}


def _end_descendants() -> None:
    """End what the program left running, where no process namespace does; orphans are children of this one."""
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = [int(pid) for pid in file.read().split()]
        except OSError:
            return
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
        if not children:
            return


def _tidy_descriptors(stdout: int, stderr: int) -> None:
    """Put the program's output files on 3 and 4 and close everything above, whatever numbers were inherited."""
    high = [os.dup2(fd, 60 + i) for i, fd in enumerate((stdout, stderr))]
    for target, fd in zip((STDOUT, STDERR), high, strict=True):
        os.dup2(fd, target)
    os.closerange(5, os.sysconf("SC_OPEN_MAX"))


main()
