"""Running model-written Python against tests: in a sandbox, many programs side by side.

`tasks/sandbox/` is what runs there, one process tree per program; docs/evaluation.md says what holds and what does not.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from llm.errors import UserError
from llm.utils.files import parse_json
from llm.utils.shapes import mapping, one_of, text, truth
from tasks.sandbox.messages import framed

RUNNER = [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("sandbox"))]
VERDICTS = ("pass", "fail", "error", "timeout", "killed")
ANSWER = mapping(
    {"verdict": one_of(*VERDICTS), "detail": text, "held": mapping(others=truth)}, needs=("verdict", "detail")
)
PROTECTIONS = {
    "namespaces": "namespaces (own files, processes and network)",
    "landlock": "Landlock (files)",
    "own_user": "a user of its own",
    "filter": "system call filter",
}
SHOWN_BYTES = 4_000  # of stdout and stderr that a result keeps
STARTING = 30.0  # seconds that making and ending a sandbox may take on a busy machine


@dataclass(frozen=True)
class Program:
    """Code that defines `entry_point`, and tests that define `check(candidate)`, which asserts what it answers.

    The tests run in another process, after `setup` (trusted code whose names they use). Arguments and answers are
    plain data: numbers, text, bytes, None, and lists, tuples, sets and dicts of them.
    """

    code: str
    entry_point: str
    tests: str
    setup: str = ""


@dataclass(frozen=True)
class Limits:
    """Limits of a program and its tests.

    seconds: wall clock of the tests together, and CPU time per process. memory_mb: address space per process.
    processes: besides the program's first. file_mb: the largest file, output included; disk_mb: all files together.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    processes: int = 4
    open_files: int = 64
    file_mb: int = 1
    disk_mb: int = 16


@dataclass(frozen=True)
class ProgramResult:
    """Outcome of running a program.

    verdict: "pass" (the tests came to their end), "fail" (a test is not satisfied), "error" (the program raised, or
    ended early), "timeout" or "killed" (by a signal, such as a crash or the CPU limit). detail: one line that says why.

    held: which protections were in force, by name.
    """

    verdict: str
    detail: str
    stdout: str
    stderr: str
    held: dict[str, bool]

    @property
    def ok(self) -> bool:
        return self.verdict == "pass"


def run_program(
    program: Program, limits: Limits | None = None, namespaces: bool = True, head: bool = False
) -> ProgramResult:
    """Run one program and return the verdict. Never raises for what the program does.

    head: of a long output keep the beginning, not the end. namespaces: False is for testing the protections that are
    left where the kernel allows no namespaces.
    """
    limits = limits or Limits()
    with (
        tempfile.TemporaryDirectory(prefix="fathom-program-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        job = {"code": program.code, "entry_point": program.entry_point, "limits": asdict(limits)}
        job |= {"stdout": out.fileno(), "stderr": err.fileno(), "namespaces": namespaces}
        question = framed(job) + framed({"setup": program.setup, "tests": program.tests})
        answer = _ask_runner(
            [*RUNNER, folder, str(os.getpid())], question, (out.fileno(), err.fileno()), limits.seconds + STARTING
        )
        shown = [_shown(file, head) for file in (out, err)]
    if answer["verdict"] == "timeout":
        answer["detail"] = f"stopped after {limits.seconds:g} s"
    return ProgramResult(answer["verdict"], answer["detail"], *shown, answer.get("held", {}))


def _ask_runner(command: list[str], question: bytes, output: tuple[int, int], seconds: float) -> dict:
    """Return the runner's answer, or "killed" with what the runner died of."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={}, pass_fds=output) as runner:
        try:
            answer, errors = runner.communicate(question, timeout=seconds)
        except subprocess.TimeoutExpired:
            runner.kill()
            return {"verdict": "timeout", "detail": ""}
        except BaseException:
            runner.kill()
            raise
    try:
        found = parse_json(answer, "the sandbox's answer")
        ANSWER(found, "the sandbox's answer")
        return found
    except UserError:
        last = (errors.decode(errors="replace").strip().splitlines() or [f"status {runner.returncode}"])[-1]
        return {"verdict": "killed", "detail": f"the sandbox was ended: {last}"}


def _shown(file: IO[bytes], head: bool) -> str:
    file.seek(0 if head else max(0, file.seek(0, os.SEEK_END) - SHOWN_BYTES))
    return file.read(SHOWN_BYTES).decode(errors="replace")


def run_programs(
    programs: Sequence[Program], limits: Limits | None = None, workers: int | None = None
) -> list[ProgramResult]:
    """Run many programs and return the verdicts, `workers` at a time (default: one per CPU core, up to 32).

    Says once per process what confines them. Raises `UserError` if the sandbox does not work here.
    """
    announce_sandbox()
    with ThreadPoolExecutor(workers or min(32, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda program: run_program(program, limits), programs))


@lru_cache
def announce_sandbox() -> None:
    """Print the line about the protections that hold on this machine."""
    print(f"sandbox for programs: {sandbox_report()}", flush=True)


def sandbox_report() -> str:
    """Return one line about the protections that hold on this machine and those that do not.

    Raises UserError where no program can be run at all.
    """
    probe = Program("import json\ndef f(x):\n    return x", "f", "def check(f):\n    assert f((1, 2)) == (1, 2)\n")
    result = run_program(probe)
    if not result.ok:
        raise UserError(f"the sandbox for programs does not work here: {result.detail} {result.stderr}".strip())
    return describe(result.held)


def describe(held: Mapping[str, bool]) -> str:
    """Return the protections in force, and the things that programs can reach because others are not."""
    names = [text for name, text in PROTECTIONS.items() if held[name]]
    gaps = []
    if not held["namespaces"]:
        if not held["landlock"]:
            gaps.append("files that all may use" if held["own_user"] else "this user's files and environment")
        if not held["filter"]:
            gaps.append("the network")
        gaps.append("the space on the disk")
    if not held["filter"]:
        gaps.append("memory beyond the limit")
    open_to = f"; NOT out of reach: {', '.join(gaps)}" if gaps else ""
    return f"{', '.join([*names, 'limits'])}{open_to}"
