"""Runs one stage from a composed configuration: checks, Lightning trainer, hand-over to the next stage.

    missing -> train -> finished          finished, same config  -> says so
    unfinished -> resume -> finished      any, other config      -> error naming the keys (overwrite=true starts again)

Everything a user can have got wrong is checked before the first step; a stage that stops early leaves a checkpoint and
a run.json that says so.
"""

import contextlib
import os
import time
import warnings
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from llm.config.said import names_key
from llm.config.saved import kind_of_schema
from llm.config.stages import Stage, stage_row
from llm.errors import UserError
from llm.parallel.env import LAUNCHER, check_layout, is_launched, launched_rank
from llm.parallel.launch import launch, processes, processes_here
from llm.parallel.process_group import join
from llm.run.config_diff import describe_differences, neutral_keys, rules_before
from llm.run.cost import cost
from llm.run.further import further_names
from llm.run.lock import one_writer
from llm.run.mirror import fetch, fetch_named, mirrored
from llm.run.objective import objective_of
from llm.run.stage_folder import RunDir
from llm.stages.data_check import check_data
from llm.stages.idle import check_idle
from llm.stages.job import Job, shows_bar
from llm.stages.lengthen import lengthens
from llm.stages.loggers import check_packages
from llm.stages.own_parts import check_own_parts
from llm.stages.parents import (
    check_parents_unchanged,
    check_same_origin,
    differing,
    find_model,
    find_parents,
    holds_work,
)
from llm.stages.same_files import check_same_files
from llm.stages.shape import take_shape
from llm.utils.format import dollars
from llm.utils.imports import importing
from llm.utils.registry import resolved
from llm.utils.terminal import waiting


def run_stage(cfg: DictConfig) -> float | None:
    """Train the stage that `cfg` describes, resume it, or report that it is done; return its `objective`, if any."""
    row = stage_row(cfg.stage.name)
    if not row.in_run:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once on every node
            runner(row)(cfg)
        return None
    if not is_launched():
        run = own_run(cfg, row)
        work_on_stage(cfg, row, run)
        return reached(cfg, run)
    import torch

    from llm.parallel import collectives

    check_layout(cfg)
    join(on_gpu=cfg.trainer.accelerator != "cpu" and torch.cuda.is_available())
    status = 0
    try:
        if row.parallel or collectives.is_main():
            work_on_stage(cfg, row, own_run(cfg, row))
    except SystemExit as stop:  # by a signal, as all of them
        status = stop.code
    collectives.barrier()  # the next stage finds what this one wrote; who ends early makes the others fail
    if status:
        raise SystemExit(status)
    return None


def runner(row: Stage):
    """Return the function that runs a stage, or fetches data: the row's `run`."""
    return resolved(row.run, f"runner of stage={row.name}")


def reached(cfg: DictConfig, run: RunDir) -> float | None:
    """Return the value of `cfg.objective` that a stage has reached; None where none is asked for."""
    asked = cfg.objective is not None and not cfg.dry_run
    return objective_of(run.stage_dir(cfg.stage.name), cfg.objective, cfg.objective_mode) if asked else None


def work_on_stage(cfg: DictConfig, row: Stage, run: RunDir) -> None:
    """Run the stage of `run` in this process, or launch one process per device and wait for them."""
    with writer(cfg, row, run):
        work_as_writer(cfg, row, run)


def writer(cfg: DictConfig, row: Stage, run: RunDir) -> contextlib.AbstractContextManager:
    """Return the lock of the stage folder, to be held by one process of the job; raises UserError on all where taken.

    That is the process that the user started, on the first node, or rank 0 of a foreign launcher. A dry run needs none.
    """
    if cfg.dry_run:
        return contextlib.nullcontext()
    if not is_launched():
        first = cfg.trainer.num_nodes == 1 or os.environ.get("NODE_RANK", "0") == "0"
        return one_writer(run.path / row.name) if first else contextlib.nullcontext()
    return one_writer_of_job(run.path / row.name, row.parallel)


@contextlib.contextmanager
def one_writer_of_job(stage_dir: Path, together: bool):
    """Hold the lock in rank 0; the others (`together`: they take part) hear whether it was free."""
    from llm.parallel import collectives

    with contextlib.ExitStack() as stack:
        taken = None
        if collectives.is_main():
            try:
                stack.enter_context(one_writer(stage_dir))
            except UserError as error:
                taken = str(error)
        if together:
            taken = collectives.broadcast_object(taken)
        if taken:
            raise UserError(taken)
        yield


def work_as_writer(cfg: DictConfig, row: Stage, run: RunDir) -> None:
    """Check, launch or run the stage, the only one that writes its folder."""
    keep_old_defaults(cfg, run.manifest(row.name))
    config = OmegaConf.to_container(cfg, resolve=True)
    if not cfg.dry_run and is_finished(run, row.name, config, cfg):
        print(f"{run.name}/{row.name} is finished: {run.stage_dir(row.name)}")
        return
    check_data(cfg, row)
    if cfg.overwrite or run.manifest(row.name) is None:  # older releases took such keys, and their runs may go on
        check_idle(cfg)
    check_packages(cfg)
    starts = not (cfg.dry_run or is_launched()) and (processes(cfg) > 1 or (row.parallel and cfg.trainer.max_restarts))
    if starts or (is_launched() and row.parallel and LAUNCHER not in os.environ):  # our own launcher has done it
        check_ahead(cfg, row, run)
    if starts:
        if status := start_processes(cfg, row, run, config):
            raise SystemExit(status)
        return
    parents = find_parents(cfg, row, run)
    if parents is None:
        from llm.stages.start import show_plan

        show_plan(cfg, resolved(row.derive, f"stage={row.name}")(cfg))
        print("No tokenizer yet: numbers for model.vocab_size, nothing but files of text was checked.")
        return
    with importing():  # Lightning
        check_own_parts(cfg, row)
    with waiting("starting", shows_bar(cfg)):
        job = Job(cfg, row, run, config, *parents)
    check_same_origin(job)
    check_same_files(job)
    print(f"\n== {job.title}", flush=True)
    begin = time.perf_counter()
    mirror = None if cfg.dry_run or launched_rank() > 0 else cfg.save_mirror
    with mirrored(mirror, run, row.name, job.models.values()):
        with waiting("starting", shows_bar(cfg)), importing():
            work = runner(row)  # imports what the stage needs
        results = work(job)
        if results is not None:  # None: a dry run
            conclude(job, results, time.perf_counter() - begin)


def own_run(cfg: DictConfig, row: Stage) -> RunDir:
    """Return the run that the stage belongs to, with what its mirror holds of it, and take its parent's shape.

    Changes `cfg.run`, null until then, to its name.
    """
    named = RunDir(cfg.paths.runs, cfg.run or f"d{cfg.model.depth}")
    fetch_missing(cfg, row, named)
    run = take_shape(cfg, row, named)
    if run != named:
        fetch_missing(cfg, row, run)
    cfg.run = run.name
    return run


def fetch_missing(cfg: DictConfig, row: Stage, run: RunDir) -> None:
    """Fetch a run from its mirror where this stage is not here, and the runs of its parents where those are not.

    That is done by rank 0, or by the launcher before it starts any.
    """
    if cfg.save_mirror is None or cfg.dry_run or LAUNCHER in os.environ:
        return
    if launched_rank() == 0:
        if run.manifest(row.name) is None:
            fetch(cfg.save_mirror, run)
        for value in filter(None, (cfg.init_from, *further_names(cfg, row).values())):
            fetch_named(cfg.save_mirror, run.root, value)
    if is_launched() and row.parallel:
        from llm.parallel import collectives

        collectives.barrier()


def check_ahead(cfg: DictConfig, row: Stage, run: RunDir) -> None:
    """Raise UserError in this process for what would fail in all that train together, and needs no data.

    That is before it starts any, or in each of those that torchrun or srun has started.
    """
    from llm.stages import plan

    parents = find_parents(cfg, row, run)
    plan.check_ahead(cfg, row, None if parents is None else parents[0])


def start_processes(cfg: DictConfig, row: Stage, run: RunDir, config: dict) -> int:
    """Train in processes of their own on this machine; returns their exit status."""
    from llm.checkpoint.resume import newest_step
    from llm.stages.start import change_lines

    checkpoints, old = run.stage_dir(row.name) / "checkpoints", started(run, row.name)

    def present_config() -> dict:
        """Return the configuration; once the stage has begun, it goes on and is not overwritten again."""
        begun = started(run, row.name) not in (None, old)
        return config | {"overwrite": False, "resume": True} if begun else config

    if lines := change_lines(cfg):  # the processes do not know them
        print("\n".join(lines), flush=True)
    title = f"{run.name}.{row.name}"
    return launch(cfg.trainer, processes_here(cfg), title, present_config, lambda: newest_step(checkpoints))


def started(run: RunDir, stage: str) -> str | None:
    """Return when a stage was begun, None if it was not."""
    return (run.manifest(stage) or {}).get("started")


def keep_old_defaults(cfg: DictConfig, manifest: dict | None) -> None:
    """Let a run of an older version go on as it began, where its keys have new defaults now.

    From before `data.shuffle` existed: its packing, epochs and tokens per step stay; nothing is shuffled, no pass is
    left out, the last weights count. Of data=own, from before it read files of any name: its two files stay. From
    before the keys of `rules_before` existed: update rules and windows stay, but for keys that the command names.
    """
    old = {} if manifest is None or cfg.overwrite else manifest.get("config") or {}
    for key, value in rules_before(old).items():
        group, name = key.split(".")
        if name in cfg[group] and not names_key(cfg, key):
            OmegaConf.update(cfg, key, value)
    for name, task in ((old.get("data") or {}).get("tasks") or {}).items():
        folder = cfg.data.tasks[name].train if name in cfg.data.tasks else None
        two = {"train": f"{folder}/train.jsonl", "test": f"{folder}/val.jsonl"}
        if folder is not None and two.items() <= (task or {}).items():
            cfg.data.tasks[name].update(two)
    if not old.get("data") or "shuffle" in old["data"]:
        return
    for key, by_rule in (("data.packing", "auto"), ("stage.epochs", None), ("batch.tokens_per_step", None)):
        group, name = key.split(".")
        known = (old.get(group) or {}).get(name)
        if known is not None and name in cfg[group] and cfg[group][name] == by_rule:
            kind_of_schema(OmegaConf.get_type(cfg[group]))(
                {name: known}, f"{cfg.run}/{cfg.stage.name}/run.json: config.{group}"
            )
            OmegaConf.update(cfg, key, known)
    for key in ("data.shuffle", "stage.max_passes", "stage.keep_best"):
        if OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, None)


def conclude(job: Job, results: dict, seconds: float) -> None:
    """Write run.json and the report in the first process; raises SystemExit where a signal stopped the stage."""
    if launched_rank() > 0:
        signum = results.get("signal")
    else:
        signum = job.finish(results, seconds)
    if signum is not None:
        raise SystemExit(128 + signum)
    if launched_rank() == 0:
        report(job.run)
        if job.at_end is not None:
            job.at_end()
        paid = "" if job.cfg.device_price is None else f" for {dollars(cost(job.manifest))} dollars"
        print(f"{job.title} finished in {job.manifest['seconds']:.0f} s{paid}: {job.stage_dir}", flush=True)


def is_finished(run: RunDir, stage: str, config: dict, cfg) -> bool:
    """Return True if the stage is done with this config. Raises UserError if it was begun with another one.

    A finished stage of which a larger number of steps is asked is not done (see `llm.stages.lengthen`).
    """
    manifest = run.manifest(stage)
    if manifest is None or cfg.overwrite or not holds_work(run.stage_dir(stage)):
        return False
    if not manifest.get("config"):
        raise UserError(
            f"{run.stage_dir(stage) / 'run.json'}: config is missing; restore the file, or overwrite=true starts again"
        )
    find = partial(find_model, cfg, stage_row(stage), run)
    differences = differing(manifest, config, neutral_keys(stage), find)
    if differences and stage in run.finished() and lengthens(manifest, differences, cfg):
        check_parents_unchanged(run, stage, manifest)
        return False
    if differences:
        raise UserError(
            f"{run.stage_dir(stage)} was made with another configuration ({describe_differences(differences)}): "
            "use run=<new name>, overwrite=true to start it again, or the old values"
        )
    if stage in run.finished():
        check_parents_unchanged(run, stage, manifest)
        return True
    if not cfg.resume:
        raise UserError(f"resume=false, but {run.stage_dir(stage)} is unfinished: overwrite=true starts it again")
    return False


def report(run: RunDir) -> None:
    """Rebuild report.md; a failure here must not cost a finished stage."""
    from llm.report.report import build_report

    try:
        build_report(run.path)
    except Exception as error:
        warnings.warn(f"the report could not be rebuilt: {error}", stacklevel=2)
