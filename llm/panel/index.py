"""The index of all stages in a folder of runs: a small row for each, read again only where its files have changed."""

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm import __version__
from llm.errors import UserError
from llm.experiments.runs import TOKENIZER, score_names, settings, stage_row_of
from llm.panel.columns import Columns
from llm.run.cost import cost
from llm.run.lock import holder, lock_path
from llm.run.stage_folder import MANIFEST, RunDir, list_runs, read_manifest
from llm.utils.files import read_json, write_json

FORMAT = 2
FILES = (MANIFEST, "eval.json")  # whose change makes a row new
BUSY = ("running",)
LOCKS = Path("/proc/locks")
HOLDER = re.compile(r"process (\d+) on (\S+) since ")

Row = dict[str, Any]


class Index:
    """Rows of all stages below `root`, kept in a file of the folder `cache`, which may be deleted at any time.

    A row is that of `llm.experiments.runs.stage_row_of` without its configuration, with `family` (equal for stages that
    differ in the seed only), `cost` (dollars or None), `total` (planned steps or None) and `scores` ({name: value}).
    """

    def __init__(self, root: str | Path, cache: str | Path, columns: Columns) -> None:
        self.root, self.columns = Path(root), columns
        self.file = Path(cache) / f"index-{hashlib.sha256(os.path.abspath(root).encode()).hexdigest()[:16]}.json"
        self.problems: list[str] = []
        self._rows: dict[str, list[Any]] | None = None  # folder -> [stamps of its files, row]
        self._lock = threading.Lock()

    def rows(self) -> list[Row]:
        """Return the row of every stage, runs in natural order; what cannot be read is in `problems`, a line each.

        A running stage has the steps, tokens and values that its metrics.csv has reached; one whose process has died is
        `interrupted`.
        """
        with self._lock:
            known = self._saved() if self._rows is None else self._rows
            found, problems, changed = {}, _unreadable(self.root), len(known)
            for run in list_runs(self.root):
                for stage in run.stages():
                    folder = run.path / stage
                    stamp = [_stamp(folder / name) for name in FILES]
                    before = known.get(str(folder))
                    if before is not None and before[0] == stamp:
                        found[str(folder)] = before
                        continue
                    changed = -1
                    try:
                        found[str(folder)] = [stamp, _row(folder, problems.append)]
                    except UserError as error:
                        problems.append(str(error))
            if changed != len(found):
                with contextlib.suppress(UserError):  # a full disk: they are read again next time
                    write_json(self.file, {"format": [FORMAT, __version__], "rows": found})
            self._rows, self.problems = found, problems
            rows = [row for _, row in found.values()]
        return [self._live(row) if row["status"] in BUSY else row for row in rows]

    def row(self, name: str) -> Row:
        """Return the row of `run/stage` without a look at any other. Raises UserError where there is none."""
        run, _, stage = name.partition("/")
        folder = RunDir(self.root, run).path / stage
        stamp = [_stamp(folder / file) for file in FILES]
        if Path(stage).name != stage or not stamp[0]:
            raise UserError(f"{name}: there is no such stage in {self.root}")
        with self._lock:
            before = (self._rows or {}).get(str(folder))
            if before is None or before[0] != stamp:
                before = [stamp, _row(folder, self.problems.append)]
                if self._rows is not None:
                    self._rows[str(folder)] = before
        return self._live(before[1]) if before[1]["status"] in BUSY else before[1]

    def _saved(self) -> dict[str, list[Any]]:
        try:
            content = read_json(self.file, most_bytes=1 << 28) or {}
        except (UserError, OSError, ValueError):
            return {}
        rows = content.get("rows")
        return rows if content.get("format") == [FORMAT, __version__] and isinstance(rows, dict) else {}

    def _live(self, row: Row) -> Row:
        """Return the row of a running stage with what it has reached, as far as that can be read."""
        last: dict[str, float] = {}
        try:
            last = self.columns.last(row["folder"])
        except UserError as error:
            self.problems += [str(error)] if str(error) not in self.problems else []
        known = {"steps": int(last["step"])} if "step" in last else {}
        known |= {name: last[name] for name in ("tokens", "flops", "seconds") if name in last}
        scores = row["scores"] | {name: last[name] for name in ("bpb", "loss") if name in last}
        status = "running" if process_of(row["folder"]) is not None else "interrupted"
        return row | known | {"scores": scores, "status": status}


def process_of(stage_dir: str | Path) -> int | None:
    """Return the process that writes a stage, 0 where another machine has one, None where nobody does.

    The lock itself is left alone: to try it could be in the way of a training that starts at this moment.
    """
    path = lock_path(Path(stage_dir))
    named = HOLDER.match(holder(path)) if path.is_file() else None
    if named is None:
        return None
    if named[2] != socket.gethostname():
        return 0
    return int(named[1]) if _holds(named[1], path) else None


def _holds(process: str, path: Path) -> bool:
    """Say whether a process holds the lock of a file: since the machine began anew, another may have its number.

    Where the system does not tell its locks, whether there is a process of this number.
    """
    try:
        inode, lines = str(path.stat().st_ino), LOCKS.read_text().splitlines()
    except OSError:
        return path.is_file() and (Path("/proc", process).is_dir() or not Path("/proc").is_dir())
    locks = [line.split() for line in lines]  # 1: FLOCK ADVISORY WRITE 4711 fe:00:99 0 EOF, of which 99 is the inode
    return any(fields[4:5] == [process] and fields[5].rpartition(":")[2] == inode for fields in locks)


def _unreadable(root: Path) -> list[str]:
    """Return a line for each folder of runs that this process may not read."""
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir()] if root.is_dir() else []
    closed = [folder for folder in folders if not os.access(folder, os.R_OK | os.X_OK)]
    return [f"{folder} cannot be read: it may belong to another user; its stages are left out" for folder in closed]


def _stamp(path: Path) -> list[int]:
    try:
        facts = path.stat()
    except OSError:
        return []
    return [facts.st_mtime_ns, facts.st_size, facts.st_ino]


def _row(folder: Path, problem: Callable[[str], None]) -> Row:
    """Return the row of a stage folder. Raises UserError where its run.json cannot be read."""
    row = stage_row_of(folder, problem)
    start = {} if row[TOKENIZER] is None else {"init_from": row[TOKENIZER]}  # by whatever name a second seed calls it
    kind = json.dumps([row["stage"], settings(row) | start], sort_keys=True, default=str)
    manifest, names = read_manifest(folder) or {}, score_names([row])
    row["family"] = hashlib.sha256(kind.encode()).hexdigest()[:16]
    row["scores"] = {name: row[name] for name in names}
    row["errors"] = {name: row[f"{name}_stderr"] for name in names if f"{name}_stderr" in row}
    row["total"] = (manifest.get("derived") or {}).get("steps")
    row["cost"] = cost(manifest)
    gone = {"config", *names, *(f"{name}_stderr" for name in names)}
    return {name: content for name, content in row.items() if name not in gone}
