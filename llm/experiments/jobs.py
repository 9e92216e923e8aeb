"""Jobs of a queue in a SQLite file: what is to be trained, in which order, and what became of it.

Every change is one transaction, so a process that is killed leaves no job half changed, and several workers may share
a queue. A worker that holds a job writes the time into it every few seconds; a job whose worker has gone is free again.
"""

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.utils.files import parse_json

STATES = ("waiting", "running", "done", "failed", "cancelled", "paused", "pruned")
OVER = ("done", "failed", "cancelled", "pruned")
BEAT = 5.0  # seconds between two signs of life of a worker
STALE = 60.0  # seconds without one after which a worker on another machine counts as gone
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY, words TEXT NOT NULL, after TEXT NOT NULL, place REAL NOT NULL, state TEXT NOT NULL,
    attempts INTEGER NOT NULL, most INTEGER NOT NULL, owner TEXT, beat REAL, pid INTEGER, started REAL, ended REAL,
    result INTEGER)
"""


@dataclass(frozen=True)
class Job:
    """A training. words: what follows `train.py`. after: numbers of jobs that must be done before.

    place: jobs with a lower one come first. attempts: failures so far, of `most`. owner: of a running job, its worker
    as `host:process number`; beat: its last sign of life, in seconds since 1970, as are started and ended. pid: the
    process of the training. result: its exit status.
    """

    id: int
    words: list[str]
    after: list[int]
    place: float
    state: str
    attempts: int
    most: int
    owner: str | None
    beat: float | None
    pid: int | None
    started: float | None
    ended: float | None
    result: int | None

    def value(self, key: str) -> str | None:
        """Return the value of an override of this job, the last one; None where it has none."""
        return next((word.partition("=")[2] for word in reversed(self.words) if word.partition("=")[0] == key), None)


class Jobs:
    """The jobs in a file, which is made where there is none. Raises UserError for a file that is no queue."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._change() as base:
                base.execute(_TABLE)
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(f"--queue {path} cannot be used as a queue: {error}") from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection within a transaction that no other process interrupts."""
        base = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        base.row_factory = sqlite3.Row
        try:
            base.execute("BEGIN IMMEDIATE")
            yield base
            base.execute("COMMIT")
        finally:
            base.close()  # without a commit nothing has changed

    def all(self) -> list[Job]:
        """Return all jobs in the order in which they are to be done."""
        with self._change() as base:
            return self._jobs(base)

    def _jobs(self, base: sqlite3.Connection) -> list[Job]:
        return [self._job(row) for row in base.execute("SELECT * FROM jobs ORDER BY place, id")]

    def get(self, number: int) -> Job:
        """Return a job. Raises UserError where there is none of this number."""
        found = next((job for job in self.all() if job.id == number), None)
        if found is None:
            raise UserError(f"{self.path} has no job {number}; `list` shows those that there are")
        return found

    def _job(self, row: sqlite3.Row) -> Job:
        lists = {name: parse_json(row[name].encode(), self.path) for name in ("words", "after")}
        return Job(**(dict(row) | lists))

    def add(self, words: Sequence[str], after: Sequence[int] = (), most: int = 2, first: bool = False) -> int:
        """Put a job behind all others, or before them; return its number.

        Raises UserError where it names no run, where another job writes the same stage of that run, and for a number in
        `after` that no job has.
        """
        key = _target(words)
        with self._change() as base:
            jobs = self._jobs(base)
            twins = (job for job in jobs if _target(job.words) == key and job.state not in ("failed", "cancelled"))
            if (same := next(twins, None)) is not None:
                raise UserError(f"run={key[0]} stage={key[1]}: job {same.id} ({same.state}) is this training already")
            if missing := set(after) - {job.id for job in jobs}:
                raise UserError(f"--after {min(missing)}: there is no such job in {self.path}")
            places = [job.place for job in jobs] or [0.0]
            place = min(places) - 1 if first else max(places) + 1
            row = (json.dumps(list(words)), json.dumps(list(after)), place, "waiting", 0, most)
            added = base.execute(
                "INSERT INTO jobs (words, after, place, state, attempts, most) VALUES (?, ?, ?, ?, ?, ?)", row
            )
            return int(added.lastrowid or 0)

    def claim(self, owner: str) -> Job | None:
        """Give the next job that can be done to a worker; None where there is none now."""
        with self._change() as base:
            jobs = self._jobs(base)
            done = {job.id for job in jobs if job.state == "done"}
            free = (job for job in jobs if job.state == "waiting" and job.owner is None)
            if (job := next((job for job in free if done.issuperset(job.after)), None)) is None:
                return None
            now = time.time()
            held = {"state": "running", "owner": owner, "beat": now, "started": job.started or now, "pid": None}
            return self._job(_update(base, job.id, held))

    def beat(self, job: Job, pid: int) -> str:
        """Write a sign of life of a job's worker; return the state that the job has now."""
        with self._change() as base:
            return _update(base, job.id, {"beat": time.time(), "pid": pid})["state"]

    def end(self, job: Job, state: str, result: int | None, failed: bool = False) -> Job:
        """Take a job from its worker. A state that somebody has given it meanwhile stays; failed: count an attempt."""
        with self._change() as base:
            now = base.execute("SELECT state FROM jobs WHERE id = ?", (job.id,)).fetchone()["state"]
            state = state if now == "running" else now
            new = {"state": state, "owner": None, "pid": None, "result": result, "attempts": job.attempts + failed}
            return self._job(_update(base, job.id, new | {"ended": time.time() if state in OVER else None}))

    def set_state(self, number: int, state: str, allowed: Sequence[str]) -> Job:
        """Give a job another state. Raises UserError where its present one is not among `allowed`."""
        job = self.get(number)
        if job.state not in allowed:
            raise UserError(f"job {number} is {job.state}; only jobs that are {' or '.join(allowed)} become {state}")
        new: dict[str, Any] = {"state": state, "ended": time.time() if state in OVER else None}
        with self._change() as base:
            return self._job(_update(base, number, new | ({"attempts": 0} if state == "waiting" else {})))

    def take_back(self) -> list[Job]:
        """Return jobs, now waiting again, whose worker has gone without a word and whose training has ended too."""
        free = []
        for job in self.all():
            if job.owner is not None and is_gone(job):
                with self._change() as base:
                    row = base.execute("SELECT owner, state FROM jobs WHERE id = ?", (job.id,)).fetchone()
                    if row["owner"] == job.owner:
                        state = "waiting" if row["state"] == "running" else row["state"]
                        free.append(self._job(_update(base, job.id, {"state": state, "owner": None, "pid": None})))
        return free


def _update(base: sqlite3.Connection, number: int, new: dict[str, Any]) -> sqlite3.Row:
    base.execute(f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in new)} WHERE id = ?", (*new.values(), number))
    return base.execute("SELECT * FROM jobs WHERE id = ?", (number,)).fetchone()


def _target(words: Sequence[str]) -> tuple[str, str]:
    """Return the run and the stage that a job writes. Raises UserError where the words name no run."""
    values = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    if not values.get("run"):
        raise UserError("a job needs run=<name>, so that no training overwrites another")
    return values["run"], values.get("stage", "pretrain")


def this_owner() -> str:
    """Return the name of this process as a worker."""
    return f"{socket.gethostname()}:{os.getpid()}"


def is_gone(job: Job) -> bool:
    """Say whether the worker of a job has gone: without a sign of life, or, on this machine, without its process.

    A training on this machine that still runs holds its job: it saves and ends by itself when its worker has gone.
    """
    host, _, pid = (job.owner or "").rpartition(":")
    silent = time.time() - (job.beat or 0) > STALE
    if host != socket.gethostname():
        return silent
    return (silent or not _is_alive(int(pid))) and not (job.pid and _is_alive(job.pid))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
