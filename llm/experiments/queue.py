"""The queue of experiments, see docs/agent.md.

python -m llm.experiments.queue add -m experiment=tiny stage=pretrain optim.matrix_lr=0.01,0.02 seed=1,2
python -m llm.experiments.queue run

`add` puts jobs into the queue, `run` works them off.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llm.cli.compose import compose, find_sources, flags_of, quote_raw, quoted, unwrap_names
from llm.cli.overrides import check_overrides
from llm.cli.sweep import lines_of, separate_run
from llm.config.plugins import load_plugins, plugins_in
from llm.config.stages import row_or_stranger
from llm.errors import UserError
from llm.experiments.queue_store import OPEN, SCRIPTS, Job, NewJob, Queue
from llm.experiments.worker import METRIC, log_of, waiting, work
from llm.run.further import further_names
from llm.run.stage_folder import RunDir, stage_before
from llm.utils.format import print_table, value
from llm.utils.streams import keep_going, run_and_exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command on a queue. Returns the exit status: 0, 1 where a job failed, 2 after a mistake."""
    parser = _parser()
    args, more = parser.parse_known_intermixed_args(argv)
    if more and args.command != "add":
        parser.error(f"unknown: {' '.join(more)}")
    args.words += more  # of the command line of train.py, such as --config-dir=<folder>
    try:
        path = args.queue or compose("train", []).paths.queue
        return COMMANDS[args.command](Queue(path), args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llm.experiments.queue",
        description="Jobs of train.py, evaluate.py and llm.export, run one after another.",
    )
    parser.add_argument("command", choices=COMMANDS, help="add = append jobs, run = work on the queue, ...")
    parser.add_argument("words", nargs="*", help="settings key=value (add), numbers of jobs (the others)")
    parser.add_argument("--queue", type=Path, help="file of the queue (default: paths.queue)")
    parser.add_argument("--json", action="store_true", help="add, list, show, ledger: print JSON")
    parser.add_argument("-m", "--multirun", action="store_true", help="add: one job for every combination of values")
    parser.add_argument("--script", choices=SCRIPTS, default="train", help="add: what runs the settings")
    parser.add_argument("--after", default="", help="add: numbers of jobs that must be done before, as 3,4")
    parser.add_argument("--first", action="store_true", help="add: before all other jobs")
    parser.add_argument("--attempts", type=int, default=1, help="add: times that a failing job is tried")
    parser.add_argument("--family", default="", help="add: name of the jobs that are compared with each other")
    parser.add_argument("--hypothesis", default="", help="add: what the job is meant to find out")
    parser.add_argument(
        "--prune-after", type=int, help="add: from this step on, give up a job that is worse than its family's median"
    )
    parser.add_argument("--minutes", type=float, help="run: save and end after so many minutes")
    parser.add_argument("--wait", action="store_true", help="run: stay and wait for further jobs")
    parser.add_argument("--verdict", help="conclude: what the jobs say about their hypothesis")
    parser.add_argument("--before", type=int, help="move: number of the job that comes after")
    return parser


def jobs_of(
    words: Sequence[str],
    script: str = "train",
    multirun: bool = False,
    queued: Mapping[str, int] = MappingProxyType({}),
    **options: Any,
) -> list[NewJob]:
    """Check settings like the command line of the script, one of `SCRIPTS`, and return a job for every combination.

    A job needs the jobs that write what it starts from, reads beside it (as a teacher), scores or exports: earlier ones
    of these, or of `queued`, the stage folders that open jobs write and their numbers. Where a run is named and no
    stage of it, these are all that write one. options: further fields of `NewJob`. Imports the plugins that are named.
    Raises UserError for a setting that the script would refuse, and for a sweep without multirun.
    """
    load_plugins(plugins_in(words))  # the settings are composed here, so what they register is needed
    command = check_overrides(script, [*(["-m"] if multirun else []), *words])
    if command.searches or command.launcher != "basic":
        raise UserError("a queue takes lists of values; leave hydra/sweeper and hydra/launcher out")
    swept = {override.input_line: lines_of(override) for override in command.swept}
    single = [line for line in flags_of(command.argv).overrides if line not in swept]
    places = [word for word in words if word not in find_sources(script, words)[1]]  # as --config-dir=<folder>
    jobs, writes = [], dict(queued)
    for chosen in product(*swept.values()):
        cfg = compose(script, quote_raw(script, [*single, *chosen]), command.sources)
        unwrap_names(cfg)
        settings = [*places, *single, *chosen] if command.sweeps else list(words)
        root, folder, read = Path(cfg.paths.runs).resolve(), None, {}
        if script != "train":
            parents = {root / (cfg.run or "") / (cfg.stage or "")}
        else:
            row = row_or_stranger(cfg.stage.name)
            parents, settings = _placed(cfg, settings, chosen, root, writes)
            parents |= {place for name in further_names(cfg, row).values() for place in _places(root, name)}
            folder = str(root / cfg.run / row.name) if row.in_run else None
            read = {"metric": cfg.objective, "mode": cfg.objective_mode}
        made = (job for stage, job in writes.items() if {Path(stage), Path(stage).parent} & parents)
        needs = (*options.get("needs", ()), *made)
        jobs.append(NewJob(settings, script, os.getcwd(), folder, **(read | options | {"needs": needs})))
        if folder:
            writes[folder] = -len(jobs)
    return jobs


def _placed(
    cfg: Any, settings: list[str], chosen: Sequence[str], root: Path, writes: Mapping[str, int]
) -> tuple[set[Path], list[str]]:
    """Name the run and the parent of a job, as a sweep of train.py does for its values `chosen`; changes `cfg`.

    A run of a sweep that lacks the stage before shares that of the sweep's own name, if that is finished or one of
    `writes`; else it starts from another stage that may come before and is there. Returns the stage folders that the
    job may start from (none: it starts from nothing), and its settings.
    """
    shared, before = cfg.run or f"d{cfg.model.depth}", stage_before(cfg)
    separate_run(cfg, list(chosen))
    cfg.run = cfg.run or shared
    own = RunDir(root, cfg.run)
    there = [name for name in row_or_stranger(cfg.stage.name).parents if _is_there(own, name, writes)]
    if chosen and cfg.init_from is None and before and before not in there:
        if str(root / shared / before) in writes and shared != cfg.run:
            cfg.init_from = f"{shared}/{before}"
        elif there:
            cfg.init_from = f"{cfg.run}/{there[0]}"
    if chosen:
        named = {"run": cfg.run} | ({"init_from": cfg.init_from} if cfg.init_from else {})
        settings = [word for word in settings if word.split("=")[0] not in named]
        settings += [f"{key}={quoted(value)}" for key, value in named.items()]
    if cfg.init_from is None:
        return set() if before is None else {own.path / before}, settings
    return _places(root, str(cfg.init_from), before or ""), settings


def _places(root: Path, name: str, before: str = "") -> set[Path]:
    """Return what the name of a model may stand for: a run (its stage `before`), a run/stage, or a folder."""
    run, _, stage = name.strip("/").partition("/")
    places = {root / run / (stage or before)}
    if "/" in name:
        folder = Path(name).resolve()
        places.add(folder.parent if folder.name == "model" else folder)
    return places


def _is_there(run: RunDir, stage: str, writes: Mapping[str, int]) -> bool:
    """Return whether a stage of a run is finished, or one of the folders that queued jobs write."""
    return stage in run.finished() or str(run.path / stage) in writes


def _add(queue: Queue, args: argparse.Namespace) -> int:
    if args.attempts < 1:
        raise UserError(f"--attempts {args.attempts}: must be at least 1")
    options = {"most_attempts": args.attempts, "family": args.family, "hypothesis": args.hypothesis}
    options |= {"prune_after": args.prune_after, "needs": tuple(_numbers(args.after.split(","), "--after"))}
    if args.prune_after is not None and not args.family:
        raise UserError(f"--prune-after {args.prune_after}: name the jobs to compare with, --family <name>")
    queued = {job.folder: job.id for job in queue.jobs() if job.folder and job.state in OPEN}
    jobs = jobs_of(args.words, args.script, args.multirun, queued, **options)
    numbers = queue.add(jobs, args.first)
    if args.json:
        added = {job.id: job for job in queue.jobs()}
        _print_json([_as_json(queue, added[number]) for number in numbers])
    else:
        for number, job in zip(numbers, jobs, strict=True):
            print(f"job {number}: {job.program} {shlex.join(job.settings)}")
    return 0


def _run(queue: Queue, args: argparse.Namespace) -> int:
    keep_going()  # jobs do not end because nobody reads of them
    good, bad = work(queue, args.minutes, args.wait, say=lambda line: print(line, flush=True))
    print(f"{good} done, {bad} failed")
    return int(bad > 0)


def _list(queue: Queue, args: argparse.Namespace) -> int:
    jobs = queue.jobs()
    if args.json:
        _print_json([_as_json(queue, job) for job in jobs])
        return 0
    rows = [
        [
            str(job.id),
            waiting(job, jobs),
            job.family,
            " ".join(job.settings),
            "" if job.result is None else f"{job.metric or METRIC} {job.result:.5g}",
            job.message,
        ]
        for job in jobs
    ]
    print_table(["job", "state", "family", "settings", "result", "message"], rows)
    return 0


def _show(queue: Queue, args: argparse.Namespace) -> int:
    for number in _numbers(args.words):
        facts = _as_json(queue, queue.job(number))
        if args.json:
            _print_json(facts)
            continue
        for name, content in facts.items():
            print(f"{name:>13}  {content if isinstance(content, str) else json.dumps(content)}")
    return 0


def _change(name: str) -> Any:
    def change(queue: Queue, args: argparse.Namespace) -> int:
        numbers = _numbers(args.words)
        if not numbers:
            raise UserError(f"{name}: give the numbers of jobs; `list` shows them")
        getattr(queue, name)(numbers)
        return 0

    return change


def _conclude(queue: Queue, args: argparse.Namespace) -> int:
    numbers = _numbers(args.words)
    if not numbers or not args.verdict:
        raise UserError("conclude: give the numbers of jobs, and --verdict <text>")
    queue.conclude(numbers, args.verdict)
    return 0


def _ledger(queue: Queue, args: argparse.Namespace) -> int:
    """Print one entry for every hypothesis: its jobs, the mean of their results and its standard error, the verdict."""
    entries: dict[tuple[str, str], list[Job]] = {}
    for job in queue.jobs():
        if job.hypothesis:
            entries.setdefault((job.family, job.hypothesis), []).append(job)
    told = []
    for (family, hypothesis), jobs in entries.items():
        results = [job.result for job in jobs if job.state == "done" and job.result is not None]
        told.append(
            {
                "family": family,
                "hypothesis": hypothesis,
                "jobs": [job.id for job in jobs],
                "states": [job.state for job in jobs],
                "metric": jobs[0].metric or METRIC,
                "results": results,
                "mean": statistics.fmean(results) if results else None,
                "stderr": statistics.stdev(results) / len(results) ** 0.5 if len(results) > 1 else None,
                "verdict": next((job.verdict for job in jobs if job.verdict), ""),
            }
        )
    if args.json:
        _print_json(told)
        return 0
    rows = [
        [
            entry["hypothesis"],
            entry["family"],
            ", ".join(map(str, entry["jobs"])),
            "" if entry["mean"] is None else f"{entry['metric']} {value(entry['mean'], entry['stderr'])}",
            entry["verdict"] or ", ".join(sorted(set(entry["states"]))),
        ]
        for entry in told
    ]
    print_table(["hypothesis", "family", "jobs", "mean", "verdict"], rows)
    return 0


def _move(queue: Queue, args: argparse.Namespace) -> int:
    numbers = _numbers(args.words)
    if len(numbers) != 1 or args.before is None:
        raise UserError("move: give one job, and --before <job>")
    queue.move(numbers[0], args.before)
    return 0


def _clear(queue: Queue, args: argparse.Namespace) -> int:
    print(f"{queue.clear()} jobs forgotten; their runs stay")
    return 0


def _numbers(words: Sequence[str], where: str = "job") -> list[int]:
    """Parse numbers of jobs. Raises UserError for a word that is none."""
    words = [word for word in words if word]
    for word in words:
        if not word.isdecimal():
            raise UserError(f"{where} {word}: must be the number of a job")
    return [int(word) for word in words]


def _as_json(queue: Queue, job: Job) -> dict[str, Any]:
    """Return what a program reads of a job: its fields, and the file with its output."""
    return asdict(job) | {"log": str(log_of(queue, job))}


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


COMMANDS = {
    "add": _add,
    "run": _run,
    "list": _list,
    "show": _show,
    "ledger": _ledger,
    "conclude": _conclude,
    **{name: _change(name) for name in ("cancel", "pause", "resume", "retry")},
    "move": _move,
    "clear": _clear,
}

if __name__ == "__main__":
    run_and_exit(main)
