"""Starts exports through the queue: `llm.export` of a finished stage, for transformers or llama.cpp."""

from llm.errors import UserError
from llm.experiments.queue import jobs_of
from llm.experiments.queue_store import OPEN
from llm.panel.defaults import LOCK
from llm.panel.form import assigned
from llm.panel.jobs import see_to_worker
from llm.panel.state import Panel

TO = ("hf", "gguf")


def start(panel: Panel, name: str, to: str, replace: bool = False) -> int:
    """Put the export of `run/stage` into the queue, see that a worker is there, and return the number of the job.

    to: one of `TO`. replace: whether a folder that an earlier export wrote may be replaced. A stage that a job of the
    queue is still to write is exported after that. Raises UserError for a mistake.
    """
    panel.check_may_change()
    if to not in TO:
        raise UserError(f"to={to}: choose from {', '.join(TO)}")
    panel.index.row(name)  # refuses a name that is none
    run, _, stage = name.partition("/")
    words = [assigned("run", run), assigned("stage", stage), f"to={to}", *(["overwrite=true"] if replace else [])]
    words += panel.places
    queued = {job.folder: job.id for job in panel.queue.jobs() if job.folder and job.state in OPEN}
    with LOCK:
        jobs = jobs_of(words, "export", False, queued)
    (number,) = panel.queue.add(jobs)
    see_to_worker(panel)
    return number
