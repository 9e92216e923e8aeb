"""Run the commands of the guide, each in a copy of the project, and compare what they print with their tables.

    make test-guide                     # all chapters
    make test-guide ARGS="05 07"        # two of them

A copy holds the files that git tracks, as they are now. Runs, machine records and downloads of a command stay in it,
and nothing that it starts outlives it. The last output of a chapter that fails is shown.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import guide_pages
import processes

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900.0  # seconds; a chapter promises 300 on two cores that do nothing else
TAIL = 30  # lines of a failed command that are shown
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Result:
    """Outcome of a chapter's command."""

    name: str
    seconds: float
    values: list[str]
    problems: list[str]
    output: str


def copy_tracked(root: Path, folder: Path) -> None:
    """Copy the files that git tracks below `root`, and link to the environment that runs this."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)


def execute(block: str, folder: Path, limit: float) -> tuple[int | None, str]:
    """Run a bash block in a copy; return its status (None: it took longer than `limit`) and all that it printed."""
    own = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "FATHOM_MACHINE": str(folder / "machine.json"),
        "FATHOM_DATA": str(folder / "fathom_data"),
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        block = f"unset OMP_NUM_THREADS\n{block}"
    before = len(processes.started)
    # A file, since a pipe would stay open as long as something in the background holds it.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = processes.start(
            *("bash", "-euo", "pipefail", "-c", block), env=own, cwd=folder, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            processes.end_started(before)
        printed.seek(0)
        return status, ESCAPES.sub("", printed.read())


def check(page: Path, root: Path, limit: float) -> Result:
    """Run the command of a chapter in a new copy and compare the numbers behind the words of its table."""
    with tempfile.TemporaryDirectory(prefix="fathom_guide_") as name:
        copy_tracked(root, Path(name))
        begin = time.monotonic()
        status, output = execute(guide_pages.command(page), Path(name), limit)
        seconds = time.monotonic() - begin
    problems, values = [], []
    if status != 0:
        problems.append(f"longer than {limit:.0f} s" if status is None else f"ended with status {status}")
    for row in guide_pages.rows(page):
        value = row.value(output)
        values.append(f"{row.words} {'-' if value is None else f'{value:g}'}")
        if value is None:
            problems.append(f"printed no number behind {row.words!r}")
        elif not row.holds(value):
            problems.append(f"{row.words}: {value:g}, expected {row.expected:g} within {row.within:g}")
    return Result(page.stem, seconds, values, problems, output)


def chosen(root: Path, names: list[str]) -> list[Path]:
    """Return the chapters whose names begin with one of `names`, all without any; ValueError where one fits none."""
    pages = guide_pages.chapters(root)
    if missing := [name for name in names if not any(page.stem.startswith(name) for page in pages)]:
        raise ValueError(f"no chapter begins with {missing}; there are {[page.stem for page in pages]}")
    return [page for page in pages if not names or page.stem.startswith(tuple(names))]


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Run the chosen chapters, print the table, and return the number of those that are not as they say."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chapters", nargs="*", help="beginnings of names, such as 05; default: all")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for one chapter (default {LIMIT:.0f})")
    options = parser.parse_args(arguments)
    try:
        pages = chosen(root, options.chapters)
    except ValueError as error:
        parser.error(str(error))
    if not pages:
        parser.error(f"{root / 'docs/guide'} has no chapter")
    results = []
    for page in pages:
        print(f"== {page.stem}", flush=True)
        result = check(page, root, options.limit)
        results.append(result)
        if result.problems:
            print("\n".join(["  its last output:", *result.output.splitlines()[-TAIL:]]))
            print("\n".join(f"  wrong: {problem}" for problem in result.problems), flush=True)
    print("\n| chapter | seconds | values | ok |\n|---|---:|---|---|")
    for result in results:
        verdict = "no" if result.problems else "yes"
        print(f"| {result.name} | {result.seconds:.0f} | {', '.join(result.values)} | {verdict} |")
    return sum(bool(result.problems) for result in results)


if __name__ == "__main__":
    processes.mark_all()
    sys.exit(min(main(sys.argv[1:]), 1))
