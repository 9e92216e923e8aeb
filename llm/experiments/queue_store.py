"""The queue of jobs: one SQLite file that several processes read and change at once.

A job is a list of settings of train.py or evaluate.py. A worker claims it, says every few seconds that it lives, and
records how it ended. A job whose worker has died goes back into the queue; what it had trained is on disk, and train.py
goes on from there. SQLite locks files, so the file belongs on a local disk and not on a network file system.
"""

import contextlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.utils.files import parse_json

STALE_SECONDS = 120.0  # without a sign of life from another machine, after which its job is taken over
MOST_DEATHS = 10  # of a worker in the middle of one job, after which the job counts as failed
OPEN = ("queued", "paused", "running")  # others have ended: done, failed, cancelled, pruned
SCRIPTS = ("train", "evaluate", "export")
FORM = 1  # of the tables, kept in the file

TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    position REAL NOT NULL,                  -- order in which jobs are started
    script TEXT NOT NULL,                    -- train | evaluate | export
    settings TEXT NOT NULL,                  -- JSON list of key=value
    cwd TEXT NOT NULL,                       -- folder that relative paths start from
    folder TEXT,                             -- stage folder that the job writes, NULL = none
    state TEXT NOT NULL DEFAULT 'queued',
    wish TEXT,                               -- state that a running job is asked to end in
    attempts INTEGER NOT NULL DEFAULT 0,     -- begun since it was queued, but for those that were stopped in good order
    most_attempts INTEGER NOT NULL,          -- of attempts that failed
    failures INTEGER NOT NULL DEFAULT 0,
    family TEXT NOT NULL DEFAULT '',         -- jobs that are compared with each other
    hypothesis TEXT NOT NULL DEFAULT '',
    metric TEXT,                             -- column of metrics.csv, NULL = bpb where there is one
    mode TEXT NOT NULL,                      -- last | min | max
    prune_after INTEGER,                     -- step from which the job may be given up, NULL = never
    result REAL,                             -- metric at the end
    message TEXT NOT NULL DEFAULT '',
    verdict TEXT NOT NULL DEFAULT '',        -- on the hypothesis, by who asked
    owner TEXT,                              -- worker, as host:pid:start
    process TEXT,                            -- its process that trains, as host:pid:start
    heartbeat REAL,                          -- seconds since 1970
    added REAL NOT NULL, started REAL, ended REAL
);
CREATE TABLE IF NOT EXISTS needs (job INTEGER NOT NULL, needed INTEGER NOT NULL, PRIMARY KEY (job, needed));
"""


@dataclass(frozen=True)
class NewJob:
    """A job to be added: what to run, where, after which others, and how its result is read."""

    settings: list[str]
    script: str = "train"
    cwd: str = "."
    folder: str | None = None
    needs: tuple[int, ...] = ()
    most_attempts: int = 1
    family: str = ""
    hypothesis: str = ""
    metric: str | None = None
    mode: str = "last"
    prune_after: int | None = None

    @property
    def program(self) -> str:
        """Name of what runs the settings: train.py, evaluate.py or llm.export."""
        return "llm.export" if self.script == "export" else f"{self.script}.py"


@dataclass(frozen=True)
class Job(NewJob):
    """A job of the queue and what has become of it; times in seconds since 1970."""

    id: int = 0
    position: float = 0.0
    state: str = "queued"
    wish: str | None = None
    attempts: int = 0
    failures: int = 0
    result: float | None = None
    message: str = ""
    verdict: str = ""
    owner: str | None = None
    process: str | None = None
    heartbeat: float | None = None
    added: float = 0.0
    started: float | None = None
    ended: float | None = None
    waits_for: tuple[int, ...] = field(default=())  # jobs that must be done first, and are not yet


def process_name(pid: int) -> str:
    """Name a process of this machine so that no later one with the same number is taken for it: host:pid:start."""
    return f"{socket.gethostname()}:{pid}:{_start_of(pid)}"


def _start_of(pid: int) -> str:
    """Return when a process started, in ticks since the machine did and with the machine's own start; "" unknown."""
    with contextlib.suppress(OSError):
        ticks = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        if ticks[0] != "Z":  # a zombie has ended
            return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()[:8]}-{ticks[19]}"
    return ""


def is_alive(name: str | None, heartbeat: float | None) -> bool:
    """Return whether a process named by `process_name` lives; on another machine, whether it was heard of lately."""
    if name is None:
        return False
    host, pid, start = name.rsplit(":", 2)
    if host != socket.gethostname():
        return heartbeat is not None and time.time() - heartbeat < STALE_SECONDS
    if start:
        return _start_of(int(pid)) == start
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Queue:
    """The jobs in one SQLite file. Every change is one transaction; processes and threads may call them at once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._transaction() as db:
                form = db.execute("PRAGMA user_version").fetchone()[0]
                if form > FORM:
                    raise UserError(f"{self.path} is a queue of a later version of Fathom: update, or use another file")
                for statement in filter(str.strip, TABLES.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {FORM}")
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"paths.queue={self.path}: cannot be used as a queue ({error}); name another file"
            ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Give a connection that has the file to itself; changes are kept unless the block raises."""
        db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        db.row_factory = sqlite3.Row
        try:
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        finally:
            db.close()

    def add(self, jobs: Sequence[NewJob], first: bool = False) -> list[int]:
        """Append jobs, or put them first; returns their numbers. A number -k in `needs` is the k-th of `jobs`, an
        earlier one.

        Raises UserError, and adds none, where a needed job is not there, and where an open one writes the same folder.
        """
        with self._transaction() as db:
            self._take_back(db)
            known = {job.id: job for job in self._jobs(db)}
            taken = _writers(known.values())
            ends = db.execute("SELECT min(position), max(position) FROM jobs").fetchone()
            at, step = ((ends[0] or 0.0) - len(jobs), 1.0) if first else ((ends[1] or 0.0) + 1.0, 1.0)
            numbers: list[int] = []
            for job in jobs:
                _check_folder(job, taken, "give this one run=<name>")
                needed = [numbers[-n - 1] if n < 0 else n for n in job.needs]
                if missing := [n for n in needed if n not in known and n not in numbers]:
                    raise UserError(f"--after {missing[0]}: there is no such job; the list has {_listed(known)}")
                numbers.append(self._insert(db, job, at, needed))
                if job.folder:
                    taken[job.folder] = numbers[-1]
                at += step
            return numbers

    def _insert(self, db: sqlite3.Connection, job: NewJob, at: float, needed: Iterable[int]) -> int:
        row = {name: getattr(job, name) for name in NewJob.__dataclass_fields__ if name not in ("settings", "needs")}
        row |= {"settings": json.dumps(job.settings), "position": at, "added": time.time()}
        columns, marks = ", ".join(row), ", ".join("?" * len(row))
        number = db.execute(f"INSERT INTO jobs ({columns}) VALUES ({marks})", tuple(row.values())).lastrowid
        db.executemany("INSERT INTO needs VALUES (?, ?)", [(number, other) for other in set(needed)])
        return number

    def jobs(self) -> list[Job]:
        """Return all jobs in the order in which they are started."""
        with self._transaction() as db:
            return self._jobs(db)

    def _jobs(self, db: sqlite3.Connection) -> list[Job]:
        needs: dict[int, list[int]] = {}
        for row in db.execute("SELECT job, needed FROM needs ORDER BY needed"):
            needs.setdefault(row["job"], []).append(row["needed"])
        rows = db.execute("SELECT * FROM jobs ORDER BY position, id").fetchall()
        done = {row["id"] for row in rows if row["state"] == "done"}
        return [self._job(row, needs.get(row["id"], []), done) for row in rows]

    def _job(self, row: sqlite3.Row, needs: list[int], done: set[int]) -> Job:
        values: dict[str, Any] = dict(row)
        values["settings"] = parse_json(values["settings"].encode(), self.path)
        return Job(**values, needs=tuple(needs), waits_for=tuple(n for n in needs if n not in done))

    def job(self, number: int) -> Job:
        """Return one job. Raises UserError where there is none of this number."""
        jobs = {job.id: job for job in self.jobs()}
        if number not in jobs:
            raise UserError(f"job {number} is not in the queue; the list has {_listed(jobs)}")
        return jobs[number]

    # What a worker calls

    def claim(self, owner: str) -> Job | None:
        """Give the first job that can start to the worker `owner`, as running; None where there is none."""
        with self._transaction() as db:
            self._take_back(db)
            for job in self._jobs(db):
                if job.state == "queued" and not job.waits_for:
                    db.execute(
                        "UPDATE jobs SET state = 'running', wish = NULL, owner = ?, process = NULL, heartbeat = ?, "
                        "attempts = attempts + 1, started = ?, ended = NULL, message = '' WHERE id = ?",
                        (owner, time.time(), time.time(), job.id),
                    )
                    return next(other for other in self._jobs(db) if other.id == job.id)
        return None

    def _take_back(self, db: sqlite3.Connection) -> None:
        """Queue again what a dead worker was at, as soon as the process that it had started has ended too."""
        for job in self._jobs(db):
            if job.state != "running" or is_alive(job.owner, job.heartbeat) or is_alive(job.process, job.heartbeat):
                continue
            state, message = job.wish or "queued", "its worker ended in the middle"
            if job.attempts - job.failures >= MOST_DEATHS:
                state, message = "failed", f"its worker ended in the middle {MOST_DEATHS} times"
            db.execute(
                "UPDATE jobs SET state = ?, message = ?, wish = NULL, owner = NULL, process = NULL WHERE id = ?",
                (state, message, job.id),
            )

    def beat(self, number: int, process: str | None = None) -> str | None:
        """Say that a job is alive, and which process trains; returns the state that someone wants it to end in."""
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET heartbeat = ?, process = coalesce(?, process) WHERE id = ?",
                (time.time(), process, number),
            )
            row = db.execute("SELECT wish FROM jobs WHERE id = ?", (number,)).fetchone()
            return row["wish"] if row else "cancelled"

    def end(self, number: int, state: str, message: str = "", result: float | None = None) -> str:
        """Record how a running job ended; returns its state.

        It is queued again where a failure leaves attempts. What has not ended is cancelled or paused where asked for.
        """
        with self._transaction() as db:
            job = next(job for job in self._jobs(db) if job.id == number)
            failures, attempts = job.failures + (state == "failed"), job.attempts - (state in OPEN)
            if state == "failed" and failures < job.most_attempts:
                state = "queued"
            if job.wish and state in OPEN:  # asked for while it saved, which its worker has not heard
                state = job.wish
            db.execute(
                "UPDATE jobs SET state = ?, message = ?, result = ?, failures = ?, attempts = ?, ended = ?, "
                "wish = NULL, owner = NULL, process = NULL WHERE id = ?",
                (state, message, result, failures, attempts, time.time(), number),
            )
            return state

    # What people and programs call

    def cancel(self, numbers: Sequence[int]) -> None:
        """Take jobs out of the queue; running ones are asked to save and end. Raises UserError for ended ones."""
        self._wish(numbers, "cancelled", from_states=OPEN)

    def pause(self, numbers: Sequence[int]) -> None:
        """Hold jobs back until `resume`; running ones are asked to save and end. Raises UserError for ended ones."""
        self._wish(numbers, "paused", from_states=("queued", "running"))

    def resume(self, numbers: Sequence[int]) -> None:
        """Queue paused jobs again; what they had trained is kept. Raises UserError for others."""
        self._wish(numbers, "queued", from_states=("paused",))

    def retry(self, numbers: Sequence[int]) -> None:
        """Queue failed, cancelled and pruned jobs again, with all their attempts.

        Raises UserError for others, and where an open job writes the same folder.
        """
        self._wish(numbers, "queued", from_states=("failed", "cancelled", "pruned"))

    def _wish(self, numbers: Sequence[int], state: str, from_states: Sequence[str]) -> None:
        """Put jobs into a state, those that run as soon as their worker hears of it; all of them or none."""
        with self._transaction() as db:
            self._take_back(db)  # of its own: it stays where a mistake undoes the rest
        with self._transaction() as db:
            jobs = {job.id: job for job in self._jobs(db)}
            taken = _writers(jobs.values())
            for number in dict.fromkeys(numbers):
                if number not in jobs:
                    raise UserError(f"job {number} is not in the queue; the list has {_listed(jobs)}")
                job = jobs[number]
                if job.state not in from_states:
                    raise UserError(
                        f"job {number} is {job.state}: this is for jobs that are {' or '.join(from_states)}"
                    )
                if job.state not in OPEN and job.folder:
                    _check_folder(job, taken, "cancel that one first")
                    taken[job.folder] = number
                if job.state == "running":
                    db.execute("UPDATE jobs SET wish = ? WHERE id = ?", (state, number))
                else:
                    ended = time.time() if state == "cancelled" else None
                    cleared = ", result = NULL, message = ''" if state == "queued" else ""  # of what was before
                    db.execute(
                        f"UPDATE jobs SET state = ?, failures = 0, attempts = 0, ended = ?{cleared} WHERE id = ?",
                        (state, ended, number),
                    )

    def conclude(self, numbers: Sequence[int], verdict: str) -> None:
        """Note a verdict on the hypothesis of jobs, whatever their state. Raises UserError where one is not there."""
        with self._transaction() as db:
            jobs = {job.id for job in self._jobs(db)}
            for number in numbers:
                if number not in jobs:
                    raise UserError(f"job {number} is not in the queue; the list has {_listed(jobs)}")
                db.execute("UPDATE jobs SET verdict = ? WHERE id = ?", (verdict, number))

    def move(self, number: int, before: int) -> None:
        """Start a job before another one. Raises UserError where one of them is not there, or both are one."""
        self.job(number), self.job(before)
        if number == before:
            raise UserError(f"--before {before}: is the job that is moved; name another one")
        with self._transaction() as db:
            order = [job.id for job in self._jobs(db) if job.id != number]
            order.insert(order.index(before), number)
            db.executemany("UPDATE jobs SET position = ? WHERE id = ?", enumerate(order, 1))

    def clear(self) -> int:
        """Forget jobs that have ended and that no open one needs, by others too; returns how many. Their runs stay."""
        with self._transaction() as db:
            self._take_back(db)
            jobs = {job.id: job for job in self._jobs(db)}
            kept = [job.id for job in jobs.values() if job.state in OPEN]
            for number in kept:  # it grows: who fails and is queued again needs what was done before it
                if jobs[number].state != "done":
                    kept += [n for n in jobs[number].needs if n in jobs and n not in kept]
            gone = [number for number in jobs if number not in kept]
            db.executemany("DELETE FROM jobs WHERE id = ?", [(n,) for n in gone])
            db.executemany("DELETE FROM needs WHERE job = ?", [(n,) for n in gone])
            return len(gone)


def _writers(jobs: Iterable[Job]) -> dict[str, int]:
    """Return the stage folders that open jobs write, and the numbers of these."""
    return {job.folder: job.id for job in jobs if job.folder and job.state in OPEN}


def _check_folder(job: NewJob, taken: Mapping[str, int], fix: str) -> None:
    """Raise UserError where a job that is to be queued writes a folder that is taken."""
    if job.folder in taken:
        what = f"job {taken[job.folder]} of the queue writes {job.folder} already"
        raise UserError(f"{' '.join(job.settings)}: {what}; {fix}")


def _listed(jobs: Iterable[int]) -> str:
    numbers = sorted(jobs)
    return ", ".join(map(str, numbers[-10:])) if numbers else "no jobs"
