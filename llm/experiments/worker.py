"""The worker of a queue: it runs one job after another as a process of its own, and watches the one that runs."""

import contextlib
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from llm.errors import UserError
from llm.experiments.queue_store import OPEN, Job, Queue, process_name
from llm.run.objective import PICK, objective_of
from llm.run.stage_folder import read_manifest, read_metrics
from llm.utils.environment import die_with_parent
from llm.utils.format import duration
from llm.utils.source import program, python_path

POLL_SECONDS = 0.5
BEAT_SECONDS = 2.0
PRUNE_SECONDS = 5.0
METRIC = "bpb"  # of a job that names none
FEWEST_OTHERS = 3  # finished jobs of a family before one is given up for being worse than their median
MOST_MESSAGE = 300


def work(
    queue: Queue, minutes: float | None = None, wait: bool = False, say: Callable[[str], None] = print
) -> tuple[int, int]:
    """Run jobs until none can start; returns how many ended well and how many failed.

    minutes: after which the running job saves, goes back into the queue, and the worker ends. wait: whether the worker
    stays when there is nothing to do. SIGTERM and SIGINT end it like the time that is up.
    """
    owner, end = process_name(os.getpid()), None if minutes is None else time.monotonic() + 60 * minutes
    stop = _Stop(end)
    good = bad = 0
    with stop:
        while not stop.is_asked():
            job = queue.claim(owner)
            if job is None:
                if not wait and not any(other.state == "running" for other in queue.jobs()):
                    break
                time.sleep(POLL_SECONDS)
                continue
            say(f"job {job.id}: {' '.join(job.settings)}")
            state, message = _run(queue, job, stop)
            good, bad = good + (state == "done"), bad + (state == "failed")
            took = duration(time.time() - (job.started or time.time()))
            say(f"job {job.id}: {state} after {took}{': ' + message if message else ''}")
    left = [job for job in queue.jobs() if job.state in OPEN]
    if left:
        say(f"{len(left)} jobs are left: {', '.join(f'{job.id} ({waiting(job, queue.jobs())})' for job in left[:10])}")
    return good, bad


def waiting(job: Job, jobs: Sequence[Job]) -> str:
    """Say in a few words what an open job is at: `running`, or `waits for 3 (failed)`."""
    states = {other.id: other.state for other in jobs}
    if job.state != "queued" or not job.waits_for:
        return job.state
    return "waits for " + ", ".join(f"{n} ({states.get(n, 'gone')})" for n in job.waits_for)


class _Stop:
    """Hears when the worker is asked to end: by a signal, or because its time is up."""

    def __init__(self, end: float | None) -> None:
        self.end, self.signal, self._before = end, None, {}

    def __enter__(self) -> "_Stop":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._hear)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _hear(self, signum: int, frame: object) -> None:
        self.signal = signum

    def is_asked(self) -> bool:
        """Return whether no further job is to be started."""
        return self.signal is not None or (self.end is not None and time.monotonic() >= self.end)


def log_of(queue: Queue, job: Job) -> Path:
    """Return the file that takes what a job prints, of all its attempts."""
    return queue.path.parent / f"{queue.path.stem}.logs" / f"{job.id}.log"


def _run(queue: Queue, job: Job, stop: _Stop) -> tuple[str, str]:
    """Run a claimed job to its end; returns its state and what is to be said about it."""
    log = log_of(queue, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    settings = _present_settings(job)
    command = [*program(job.script), *settings]
    try:
        with log.open("ab") as out:
            out.write(f"$ {job.program} {' '.join(settings)}\n".encode())
            out.flush()
            at = out.tell()
            started = subprocess.Popen(
                command,
                cwd=job.cwd,
                env=os.environ | python_path(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the worker, which asks the job to save
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
    except OSError as error:
        return queue.end(job.id, "failed", f"cannot be started: {error}"), str(error)
    wish = _watch(queue, job, started, stop)
    if wish is not None and started.returncode != 0:
        state = {"stop": "queued"}.get(wish, wish)
        message = "its values were worse than the median of its family" if state == "pruned" else ""
        reached = _result(job)[0] if state == "pruned" else None  # of one that goes on later it would be no result
        return queue.end(job.id, state, message, reached), message
    if started.returncode == 0:
        result, message = _result(job)
        return queue.end(job.id, "done", message, result), message or _told(job, result)
    message = f"status {started.returncode}: {_last_line(log, at)}"
    return queue.end(job.id, "failed", message), message


def _present_settings(job: Job) -> list[str]:
    """Return a job's settings; once it has begun its stage, it goes on and does not overwrite that again."""
    started = None
    if job.script == "train" and job.folder:
        with contextlib.suppress(UserError, ValueError):  # train.py says what is wrong with the file
            started = datetime.fromisoformat((read_manifest(job.folder) or {}).get("started") or "").timestamp()
    if started is None or started < job.added:
        return job.settings
    kept = [word for word in job.settings if word.split("=")[0].lstrip("+") not in ("overwrite", "resume")]
    return [*kept, "overwrite=false", "resume=true"]


def _watch(queue: Queue, job: Job, started: subprocess.Popen, stop: _Stop) -> str | None:
    """Wait for a process; returns the state that it was asked to end in: by the queue, by its curve, or `stop`."""
    wish, asked, beaten, judged = None, False, -BEAT_SECONDS, time.monotonic()
    name = process_name(started.pid)
    while started.poll() is None:
        now = time.monotonic()
        if now - beaten >= BEAT_SECONDS:
            wanted, beaten = queue.beat(job.id, name), now
            wish = wanted or wish  # a later one counts
        wish = wish or ("stop" if stop.is_asked() else None)
        if job.prune_after is not None and wish is None and now - judged >= PRUNE_SECONDS:
            judged = now
            wish = "pruned" if is_worse(job, queue.jobs()) else None
        if wish is not None and not asked:
            started.send_signal(signal.SIGTERM)  # train.py saves and ends
            asked = True
        time.sleep(POLL_SECONDS)
    return wish


def is_worse(job: Job, jobs: Sequence[Job]) -> bool:
    """Return whether a running job is behind the median of its family's finished jobs at its last measured step.

    Compared is the best value so far of this job's metric (its last one for mode=last), as in the median rule of
    Golovin et al. 2017 (Google Vizier). Never before `prune_after` steps, nor with fewer than three finished jobs, nor
    by a curve from before the job was started: it may be one that the job overwrites.
    """
    table = Path(job.folder or "") / "metrics.csv"
    is_own = table.is_file() and table.stat().st_mtime >= (job.started or 0.0)
    metric = job.metric or METRIC
    own = _curve(job, metric) if is_own else []
    if not own or job.prune_after is None or own[-1][0] < job.prune_after:
        return False
    step, sign = own[-1][0], -1.0 if job.mode == "max" else 1.0
    others = [_curve(other, metric) for other in jobs if other.family == job.family and other.state == "done"]
    reached = [seen for curve in others if (seen := [value for at, value in curve if at <= step])]
    if len(reached) < FEWEST_OTHERS:
        return False
    pick = PICK[job.mode]
    return sign * pick([value for _, value in own]) > statistics.median(sign * pick(seen) for seen in reached)


def _curve(job: Job, metric: str) -> list[tuple[int, float]]:
    """Return the steps and values of a metric that a job has measured so far."""
    rows = read_metrics(job.folder) if job.folder else []
    return [(int(row["step"]), row[metric]) for row in rows if metric in row]


def _result(job: Job) -> tuple[float | None, str]:
    """Return the job's metric, and why there is none where the job names one."""
    if job.folder is None:
        return None, ""
    try:
        return objective_of(job.folder, job.metric or METRIC, job.mode), ""
    except UserError as error:
        return None, str(error) if job.metric else ""


def _told(job: Job, result: float | None) -> str:
    return "" if result is None else f"{job.metric or METRIC} {result:.6g}"


def _last_line(log: Path, at: int) -> str:
    """Return the line of a log, from a position on, that says what went wrong: its last one."""
    with log.open("rb") as file:
        file.seek(at)
        lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else "it printed nothing"
    return last if len(last) <= MOST_MESSAGE else f"{last[: MOST_MESSAGE - 1]}…"
