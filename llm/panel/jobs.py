"""Runs what the Train tab asks for: start through the queue, watch, stop and go on, and try a dry run first."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from llm.errors import UserError
from llm.experiments.queue import jobs_of
from llm.experiments.queue_store import OPEN, Job, is_alive
from llm.experiments.worker import METRIC, log_of, waiting
from llm.panel.defaults import LOCK
from llm.panel.form import Form, problems_of
from llm.panel.index import Row, process_of
from llm.panel.markup import block, page, problem, section, table, text
from llm.panel.runs_view import curves, progress
from llm.panel.state import Panel, file_stamps
from llm.panel.worker import start_worker
from llm.run.lock import is_locked
from llm.utils.format import duration
from llm.utils.source import program

DRY_SECONDS = 300
MOST_JOBS = 200  # that are shown, the last ones
TAIL = 12_000  # bytes of a log that are shown
ACTIONS = ("pause", "resume", "cancel", "retry")
WORKING = ("resume", "retry")  # actions after which a worker is needed
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

_dry = threading.Lock()
_workers: list[subprocess.Popen] = []


def check(panel: Panel, form: Form) -> list[str]:
    """Return the settings of a form, with the panel's folders. Raises UserError for the first mistake in it."""
    by_key, other = problems_of(form, panel.folders)
    for message in (*by_key.values(), *filter(None, [other])):
        raise UserError(message)
    return [*form.settings(), *panel.places]


def start(panel: Panel, form: Form, after: str = "", attempts: int = 1) -> list[int]:
    """Put the jobs of a form into the queue and see that a worker is there; returns their numbers.

    after: numbers of jobs that must be done before, as 3, 4. Raises UserError for a mistake.
    """
    panel.check_may_change()
    words = [word for word in check(panel, form) if word != "-m"]
    numbers = after.replace(",", " ").split()
    if wrong := [word for word in numbers if not word.isdecimal()]:
        raise UserError(f"after {wrong[0]}: must be the number of a job")
    queued = {job.folder: job.id for job in panel.queue.jobs() if job.folder and job.state in OPEN}
    options = {"needs": tuple(map(int, numbers)), "most_attempts": max(1, int(attempts))}
    with LOCK:
        jobs = jobs_of(words, "train", form.sweep, queued, **options)
    added = panel.queue.add(jobs)
    see_to_worker(panel)
    return added


def see_to_worker(panel: Panel) -> None:
    """Start a worker; it ends by itself where it is not needed."""
    _workers[:] = [one for one in _workers if one.poll() is None]
    _workers.append(start_worker(panel.queue_file))


def act(panel: Panel, action: str, number: int) -> str:
    """Pause, resume, cancel or retry a job; running ones save first. Returns what was asked for."""
    panel.check_may_change()
    if action not in ACTIONS:
        raise UserError(f"{action}: there is no such action")
    getattr(panel.queue, action)([number])
    if action in WORKING:
        see_to_worker(panel)
    return f"job {number}: {action}"


def move_up(panel: Panel, number: int) -> str:
    """Start a job before the one that stands before it among the open ones."""
    panel.check_may_change()
    jobs = [job.id for job in panel.queue.jobs() if job.state in OPEN]
    place = jobs.index(number) if number in jobs else 0
    if place == 0:
        raise UserError(f"job {number} has no open job before it")
    panel.queue.move(number, jobs[place - 1])
    return f"job {number} comes before job {jobs[place - 1]}"


def stop_process(panel: Panel, name: str) -> str:
    """Ask the training of `run/stage`, whoever started it, to save and end, as Ctrl-C does."""
    panel.check_may_change()
    row = panel.index.row(name)
    for job in panel.queue.jobs():
        if job.state == "running" and job.folder == os.path.realpath(row["folder"]):
            return act(panel, "pause", job.id)  # or its worker would count a failure
    process = process_of(row["folder"])
    if not process or not is_locked(row["folder"]):
        raise UserError(f"{name}: no process of this machine trains it")
    try:
        os.kill(process, signal.SIGTERM)
    except OSError as error:  # of another user, or it ended at this moment
        raise UserError(f"{name}: process {process} cannot be asked ({error.strerror})") from error
    return f"{name} was asked to save and end; the same command resumes"


def dry_run(panel: Panel, form: Form) -> str:
    """Return what train.py says with dry_run=true: sizes, tokens, passes, time and memory. Raises UserError."""
    return try_out(panel, form, "dry run", ("dry_run=true",))


def try_out(panel: Panel, form: Form, what: str, more: Sequence[str] = ()) -> str:
    """Return what train.py says, in a process of its own that ends soon. Raises UserError for a mistake in the form.

    what: name of it in messages. more: further settings.
    """
    panel.check_may_change()  # it takes a core for some seconds
    settings = check(panel, form)
    if form.sweep:
        raise UserError(f"{what}: one job at a time; leave several values out")
    if not _dry.acquire(blocking=False):
        raise UserError("a dry run or a check is under way already")
    try:
        done = subprocess.run(
            [*program("train"), *settings, *more],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DRY_SECONDS,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{what}: took more than {DRY_SECONDS} s; try it in the terminal") from None
    finally:
        _dry.release()
    said = (done.stdout + done.stderr).decode("utf-8", errors="replace")
    return ANSI.sub("", said).strip()


def job_label(job: Job) -> str:
    """Return a job in one line for a list."""
    return f"{job.id}: {job.state}, {words_of(job)}"[:160]


def words_of(job: Job) -> str:
    """Return the settings of a job, behind the name of its program where that is not train.py."""
    return " ".join([*([] if job.script == "train" else [job.script]), *job.settings])


def queue_page(panel: Panel) -> str:
    """Return the table of the queue."""
    if not panel.queue_file.is_file():
        return page("<p>The queue is empty.</p>")
    jobs = panel.queue.jobs()
    if not jobs:
        return page("<p>The queue is empty.</p>")
    lines = []
    for job in jobs[-MOST_JOBS:]:
        result = "" if job.result is None else f"{job.metric or METRIC} {job.result:.5g}"
        took = duration(job.ended - job.started) if job.ended and job.started else ""
        lines.append([job.id, waiting(job, jobs), words_of(job), result, took, job.message])
    idle = ""
    open_jobs = [job for job in jobs if job.state == "queued" and not job.waits_for]
    if open_jobs and not any(is_alive(job.owner, job.heartbeat) for job in jobs if job.state == "running"):
        idle = '<p class="hint">Jobs can start and no worker is at them: Work on the queue starts one.</p>'
    return page(idle, table(["job", "state", "settings", "result", "took", "message"], lines, (0,), "queue"))


def row_of(panel: Panel, job: Job) -> Row | None:
    """Return the row of the stage that a job writes; None before it has begun, and where it lies elsewhere."""
    folder = Path(job.folder or "")
    if folder.parent.parent != panel.runs.resolve():
        return None
    try:
        return panel.index.row(f"{folder.parent.name}/{folder.name}")
    except UserError:
        return None


def tail_of(path: Path, most: int = TAIL) -> str:
    """Return the end of a log, of lines that were written over each other the last form."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            content = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = content.split("\n")[1 if size > most else 0 :]
    return ANSI.sub("", "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)).rstrip()


def job_page(panel: Panel, number: int) -> str:
    """Return progress, curves and log of a job."""
    try:
        job = panel.queue.job(number)
    except UserError as error:
        return page(problem(str(error)))
    row = row_of(panel, job)
    log = tail_of(log_of(panel.queue, job))
    try:
        charts = section("Curves", curves(panel.columns, row, most=4)) if row else ""
    except UserError as error:
        charts = problem(str(error))
    return page(
        f"<h3>job {job.id} <small>{text(job.state)}</small></h3>",
        progress(row) if row else "",
        charts,
        section("Log", block(log, "log")) if log else "",
    )


def stamp(panel: Panel, number: int | None) -> tuple:
    """Return what changes whenever `queue_page` or `job_page` would show something else; cheap to ask for."""
    paths = [panel.queue_file]
    if number is not None and panel.queue_file.is_file():  # to open it may write into the file
        try:
            job = panel.queue.job(number)
        except UserError:
            return (number,)
        paths.append(log_of(panel.queue, job))
        if job.folder:
            paths += [Path(job.folder) / name for name in ("metrics.csv", "run.json", "eval.json")]
    return (number, *file_stamps(paths))
