"""Starts evaluations through the queue: evaluate.py in a process of its own, its settings those of the typed schema."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import Field
from functools import lru_cache

from llm.cli.compose import compose
from llm.cli.options import group_options
from llm.cli.overrides import check_overrides
from llm.config.schema import known_keys
from llm.errors import UserError
from llm.experiments.queue import jobs_of
from llm.experiments.queue_store import OPEN
from llm.panel.defaults import LOCK
from llm.panel.form import assigned, key_help, refusal
from llm.panel.jobs import see_to_worker
from llm.panel.state import Panel
from llm.run.config_diff import flatten
from llm.utils.files import plain
from llm.utils.source import command

PARTS = tuple(group_options("eval"))
CLOSED = ("include_path", "judges", *PARTS)  # keys of eval: the first two load code, the others are the parts
TASKS = re.compile(r"[\w\-,\[\] ]+")  # no paths: a task file of lm-eval may hold code
MOST = 40  # stages at once


def keys() -> dict[str, Field]:
    """Return the keys of `eval` that the panel sets, with their schema fields."""
    known = known_keys("evaluate").items()
    return {name: spec for name, spec in known if name.startswith("eval.") and name.split(".")[1] not in CLOSED}


def about(name: str) -> tuple[str, str]:
    """Return the help of a key with its bounds, and its default as text."""
    return key_help(keys()[name]), _defaults()[name]


@lru_cache(maxsize=1)
def _defaults() -> dict[str, str]:
    from omegaconf import OmegaConf

    with LOCK:
        cfg = compose("evaluate", [])
    found = flatten({"eval": plain(OmegaConf.to_container(cfg.eval, resolve=True))})
    return {name: "null" if content is None else str(content).lower() for name, content in found.items()}


def settings(panel: Panel, name: str, chosen: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Return the words of evaluate.py for a stage. Raises UserError for the first mistake.

    name: run/stage. chosen: parts, of `PARTS`. values: text of keys of `keys`; an empty one takes the default.
    """
    if not chosen:
        raise UserError("choose what to measure: bpb, chat, samples, ...")
    if wrong := [part for part in chosen if part not in PARTS]:
        raise UserError(f"eval={wrong[0]}: choose from {', '.join(PARTS)}")
    panel.index.row(name)  # refuses a name that is none
    run, _, stage = name.partition("/")
    words = [
        assigned("run", run),
        assigned("stage", stage),
        f"eval=[{','.join(part for part in PARTS if part in chosen)}]",
    ]
    for key, given in values.items():
        given = (given or "").strip()
        if not given:
            continue
        if key not in keys() or (wrong := refusal(key, given, panel.folders)) is not None:
            raise UserError(wrong if key in keys() else f"{key}: the panel does not set this key; use the terminal")
        if key == "eval.tasks" and not TASKS.fullmatch(given):
            raise UserError(f"{key}={given[:80]}: the panel takes names of tasks only, as in [arc_easy,hellaswag]")
        words.append(f"{key}={given}")
    with LOCK:
        check_overrides("evaluate", words)
    return [*words, *panel.places]  # the worker composes anew


def start(panel: Panel, names: Sequence[str], chosen: Sequence[str], values: Mapping[str, str]) -> list[int]:
    """Put an evaluation of each stage into the queue and see that a worker is there; returns the numbers of the jobs.

    A stage that a job of the queue is still to write is evaluated after that. Raises UserError for a mistake.
    """
    panel.check_may_change()
    if not 1 <= len(names) <= MOST:
        raise UserError(f"{len(names)} stages are chosen; 1 to {MOST} are evaluated at once")
    lines = [settings(panel, name, chosen, values) for name in names]
    queued = {job.folder: job.id for job in panel.queue.jobs() if job.folder and job.state in OPEN}
    with LOCK:
        jobs = [job for words in lines for job in jobs_of(words, "evaluate", False, queued)]
    added = panel.queue.add(jobs)
    see_to_worker(panel)
    return added


def line(words: Sequence[str]) -> str:
    """Return the command to copy."""
    return f"{command('evaluate')} {shlex.join(words)}"
