"""Runs one stage from a composed configuration: checks, Lightning trainer, hand-over to the next stage.

    missing -> train -> finished          finished, same config  -> says so
    unfinished -> resume -> finished      any, other config      -> error naming the keys (overwrite=true starts again)

Everything a user can have got wrong is checked before the first step; a stage that stops early leaves a checkpoint and
a run.json that says so.
"""

import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from llm import __version__
from llm.config.schema import DOWNLOAD
from llm.errors import BadLoss, UserError
from llm.parallel.env import SIGUSR1, check_layout, is_launched, launched_rank
from llm.parallel.launch import launch, processes, processes_here
from llm.parallel.process_group import join
from llm.run.config_diff import describe_differences, diff_configs, neutral_keys
from llm.run.stage_folder import RunDir, find_parent, read_manifest, read_metrics, stage_before, write_manifest
from llm.stages.trainer import build_trainer, check_devices, fit, quiet_lightning, roll_back
from llm.utils.environment import environment, git_commit
from llm.utils.files import write_atomic

SIGNAL_NAMES = {SIGUSR1: "SIGUSR1", signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


def run_stage(cfg: DictConfig) -> None:
    """Train the stage that `cfg` describes, resume it, or report that it is done."""
    if cfg.stage.name == DOWNLOAD:
        return fetch_data(cfg)
    if not is_launched():
        return work_on_stage(cfg)
    import torch

    from llm.parallel import collectives

    check_layout(cfg)
    join(on_gpu=cfg.trainer.accelerator != "cpu" and torch.cuda.is_available())
    status = 0
    try:
        if cfg.stage.name != "tokenizer" or collectives.is_main():
            work_on_stage(cfg)
    except SystemExit as stop:  # by a signal, as all of them
        status = stop.code
    collectives.barrier()  # the next stage finds what this one wrote; who ends early makes the others fail
    if status:
        raise SystemExit(status)


def fetch_data(cfg: DictConfig) -> None:
    """stage=download: fetch what `data` takes from the network; no run is touched."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once on every node
        from llm.stages.download import run

        run(cfg)


def work_on_stage(cfg: DictConfig) -> None:
    """The same for one of the processes; the one that starts others only waits for them."""
    run = RunDir(cfg.paths.runs, cfg.run or f"d{cfg.model.depth}")
    stage, stage_dir = cfg.stage.name, run.stage_dir(cfg.stage.name)
    config = OmegaConf.to_container(cfg, resolve=True)
    if not cfg.dry_run and is_finished(run, stage, config, cfg):
        print(f"{run.name}/{stage} is finished: {stage_dir}")
        return
    if not (cfg.dry_run or is_launched()) and processes(cfg) > 1:
        if status := launch(config, processes_here(cfg)):
            raise SystemExit(status)
        return
    try:
        parent = find_parent(run.root, run.name, stage, cfg.init_from, stage_before(cfg))
    except UserError:
        if not (cfg.dry_run and stage == "pretrain" and cfg.init_from is None and cfg.model.vocab_size):
            raise
        from llm.stages.pretrain import derived_without_tokenizer

        show_config(cfg, derived_without_tokenizer(cfg))
        print("No tokenizer yet: numbers for model.vocab_size, nothing else was checked.")
        return
    manifest = {
        "stage": stage,
        "status": "running",
        "parent": None if parent is None else str(parent),
        "parent_id": identity(parent),
        "config": config,
        "commit": git_commit(),
        "environment": environment(),
        "version": __version__,
        "started": now(),
    }
    check_same_parent(run, stage, manifest, cfg)
    print(f"\n== {run.name}/{stage}" + (f", from {parent}" if parent else ""), flush=True)
    begin = time.perf_counter()
    if stage == "tokenizer":
        results = run_tokenizer(cfg, stage_dir, manifest)
    else:
        results = run_model_stage(cfg, stage_dir, parent, manifest)
    if results is None:  # dry run
        return
    if launched_rank() > 0:  # the rest is for one process
        if "signal" in results:
            raise SystemExit(128 + results["signal"])
        return
    earlier = (read_manifest(stage_dir) or {}).get("seconds", 0.0)
    manifest |= {"seconds": earlier + time.perf_counter() - begin} | results
    if manifest["status"] != "running":
        write_manifest(stage_dir, manifest)
        raise SystemExit(128 + manifest["signal"])
    write_manifest(stage_dir, manifest | {"status": "finished", "finished": now()})
    report(run)
    print(f"{run.name}/{stage} finished in {manifest['seconds']:.0f} s: {stage_dir}", flush=True)


def is_finished(run: RunDir, stage: str, config: dict, cfg) -> bool:
    """Whether the stage is done with this config. Raises UserError if it was begun with another one."""
    manifest = run.manifest(stage)
    if manifest is None or cfg.overwrite or not holds_work(run.stage_dir(stage)):
        return False
    differences = diff_configs(manifest["config"], config, neutral_keys(stage))
    if differences:
        raise UserError(
            f"{run.stage_dir(stage)} was made with another configuration ({describe_differences(differences)}): "
            "use run=<new name>, overwrite=true to start it again, or the old values"
        )
    if stage in run.finished():
        check_parent_unchanged(run, stage, manifest)
        return True
    if not cfg.resume:
        raise UserError(f"resume=false, but {run.stage_dir(stage)} is unfinished: overwrite=true starts it again")
    return False


def holds_work(stage_dir: Path) -> bool:
    """Whether a stage got as far as a checkpoint or its result: only then is there something to lose."""
    return (stage_dir / "model").is_dir() or any(stage_dir.glob("checkpoints/*.ckpt"))


def check_parent_unchanged(run: RunDir, stage: str, manifest: dict) -> None:
    """A finished stage whose parent was trained again is out of date."""
    parent = None if manifest["parent"] is None else Path(manifest["parent"])
    if parent is not None and parent.is_dir() and identity(parent) != manifest.get("parent_id"):
        raise UserError(
            f"{run.stage_dir(stage)} was trained from an earlier version of {parent}: overwrite=true trains it again "
            "from the present one"
        )


def check_same_parent(run: RunDir, stage: str, manifest: dict, cfg) -> None:
    """An unfinished stage may only be resumed from the parent it began with."""
    old = run.manifest(stage)
    if old is None or cfg.overwrite or cfg.dry_run or not holds_work(run.stage_dir(stage)):
        return
    if old.get("parent_id") != manifest["parent_id"]:
        raise UserError(
            f"{run.stage_dir(stage)} was begun from another version of {old['parent']}: overwrite=true starts it again"
        )


def identity(parent: Path | None) -> str | None:
    """What tells two trainings of a parent apart: when it was finished. None for a folder without run.json."""
    manifest = None if parent is None else read_manifest(parent.parent)
    return None if manifest is None else manifest.get("finished")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def begin_stage(cfg, stage_dir: Path, manifest: dict) -> None:
    """Last act before work starts: what was there is removed if the user said so, and run.json says `running`."""
    if cfg.overwrite and stage_dir.exists():
        shutil.rmtree(stage_dir)
    old = read_manifest(stage_dir) or {}
    kept = {key: old[key] for key in ("started", "seconds") if key in old}
    write_manifest(stage_dir, manifest | kept)
    manifest |= {key: kept[key] for key in kept if key == "started"}
    write_atomic(stage_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def run_tokenizer(cfg, stage_dir: Path, manifest: dict) -> dict | None:
    from llm.data.sources import document_source
    from llm.stages.tokenizer import named_encoders, prepared, run

    ready = prepared(cfg.stage)
    show_config(cfg, {"vocab_size": cfg.stage.vocab_size if isinstance(ready, str) else ready.vocab_size})
    if cfg.dry_run:
        return None
    source = document_source(cfg.data, cfg.paths.data)
    encoders = named_encoders(cfg.stage.compare)
    begin_stage(cfg, stage_dir, manifest)
    return run(cfg, stage_dir, source, ready, encoders)


def run_model_stage(cfg, stage_dir: Path, parent: Path, manifest: dict) -> dict | None:
    """Build, train and hand over; returns the values of run.json, with another status if the user stopped it."""
    from llm.checkpoint.model_folder import save_model_folder
    from llm.parallel import collectives
    from llm.parallel.strategy import full_model

    quiet_lightning()
    check_devices(cfg)
    build = stage_builder(cfg.stage.name)
    built = build(cfg, parent)
    show_config(cfg, built.derived)
    if cfg.dry_run:
        return None
    trainer, stop = build_trainer(cfg, stage_dir, built)
    collectives.barrier()  # nobody writes before all have read
    if collectives.is_main():
        begin_stage(cfg, stage_dir, manifest)
    while True:
        try:
            fit(trainer, built, stage_dir)
            break
        except BadLoss as error:
            if cfg.watch.bad_loss == "stop":
                raise
            roll_back(stage_dir, error, cfg.watch.rollbacks)
        built = build(cfg, parent)
        trainer, stop = build_trainer(cfg, stage_dir, built)
    module = built.module
    results = {
        "derived": built.derived,
        "tokens": module.tokens_seen,
        "flops": float(module.tokens_seen * module.flops_per_token),
        "steps": trainer.global_step,
        "metrics": last_values(stage_dir),
    }
    if stop.signum is not None and trainer.global_step < module.context.total_steps:
        name = SIGNAL_NAMES[stop.signum]
        print(
            f"stopped by {name} at step {trainer.global_step}, checkpoint saved; the same command resumes", flush=True
        )
        return results | {"status": "interrupted", "signal": int(stop.signum)}
    net = full_model(module.net)
    if collectives.is_main():
        save_model_folder(stage_dir / "model", net, module.context.tokenizer)
    return results


def stage_builder(name: str) -> Callable:
    if name == "pretrain":
        from llm.stages.pretrain import build
    elif name == "grpo":
        from llm.stages.grpo import build
    else:
        from llm.stages.finetune import build
    return build


def last_values(stage_dir: Path) -> dict[str, float]:
    """The last logged value of every column of metrics.csv."""
    values: dict[str, float] = {}
    for row in read_metrics(stage_dir):
        values.update(row)
    values.pop("step", None)
    return values


def show_config(cfg, derived: dict) -> None:
    """Print the resolved config and the derived numbers; the same are saved in config.yaml and run.json."""
    print(OmegaConf.to_yaml(cfg, resolve=True))
    print("derived:")
    for key, value in derived.items():
        text = value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.7g}"
        print(f"  {key}: {text}")
    print(flush=True)


def report(run: RunDir) -> None:
    """Rebuild report.md; a failure here must not cost a finished stage."""
    from llm.report.report import build_report

    try:
        build_report(run.path)
    except Exception as error:
        warnings.warn(f"the report could not be rebuilt: {error}", stacklevel=2)
