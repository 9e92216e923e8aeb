"""Build Lightning's Trainer for a stage, and fit."""

import contextlib
import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.errors import BadLoss, UserError, is_out_of_memory
from llm.parallel.env import lost_another
from llm.run.formats import ROLLBACKS as FORM
from llm.run.formats import read_form
from llm.stages.own_parts import instantiate_part
from llm.utils.files import write_json

ROLLBACKS = "rollbacks.json"
# Keys of `trainer` that are keywords of Lightning's Trainer.
PASSED_ON = ("gradient_clip_val", "deterministic", "detect_anomaly", "overfit_batches", "benchmark")
# Callbacks of Lightning that count batches of their own or change the optimizer, and what to use in their place.
REFUSED_CALLBACKS = {
    "GradientAccumulationScheduler": "raise batch.tokens_per_step, whose micro-batches are added up",
    "StochasticWeightAveraging": "use lightning.pytorch.callbacks.EMAWeightAveraging, or stage.keep_best=bpb",
    "BatchSizeFinder": "set batch.micro_batch_size=auto",
    "LearningRateFinder": "sweep over it: train.py -m stage.lr_frac=0.5,1,2",
    "BaseFinetuning": "set model.lora.rank=8 to train a part of the network",
    "ModelPruning": "train a smaller model, model=d<depth>",
}


def fit(trainer, built, stage_dir: Path) -> None:
    """Train from the newest checkpoint on, or from the start, without the data that a roll-back left out."""
    from llm.checkpoint.resume import newest_checkpoint, set_aside
    from llm.parallel import collectives

    newest, problem = None, None
    if collectives.is_main():
        try:
            check_within(stage_dir / "checkpoints", built.module.context.total_steps)
            newest = newest_checkpoint(stage_dir / "checkpoints", lambda saved: needed(built.module).misfit(saved))
            set_aside(stage_dir / "checkpoints", newest)
        except UserError as error:  # for all processes
            problem = str(error)
    (step, path), problem = collectives.broadcast_object((newest or (0, None), problem))
    if problem is not None:
        raise UserError(problem)
    if path is not None:
        print(f"resuming at step {step} of {built.module.context.total_steps}", flush=True)
    left_out = (read_form(stage_dir / ROLLBACKS, FORM) or {}).get("left_out", {})
    built.data.left_out = left_out.get(str(step), 0)
    if built.data.left_out > built.module.context.total_steps:
        raise UserError(
            f"{stage_dir / ROLLBACKS}: left_out.{step} is {built.data.left_out}, more than the stage's steps"
        )
    with restoring(built.module, path), told_by_key():
        trainer.fit(built.module, datamodule=built.data, ckpt_path=None if path is None else str(path))


def check_within(folder: Path, steps: int) -> None:
    """Raise UserError where a stage of `steps` has saved a later one: nothing is wrong with that checkpoint."""
    from llm.checkpoint.resume import newest_step

    if (newest := newest_step(folder)) > steps:
        raise UserError(
            f"{folder}: step {newest} was saved, but the stage has {steps} steps now, so its data or its settings are "
            "others than when it began; restore them, or overwrite=true starts it again"
        )


def needed(module) -> Any:
    """Return what a checkpoint must hold for a stage: the tensors of its network and of its optimizer."""
    from llm.checkpoint.parts import Needed, facts
    from llm.optim.build import build_optimizer
    from llm.optim.optimizer import first_states, rule_of

    always = ("kind", "lr", "weight_decay", "decays", "initial_lr", "initial_decay", "params")
    groups = build_optimizer(module.net, module.optim_config).param_groups
    return Needed(
        module.context.total_steps,
        facts(module.kept(module.state_dict())),
        [{name: group[name] for name in (*always, *rule_of(group).needs)} for group in groups],
        [*map(facts, first_states(groups))],
    )


@contextlib.contextmanager
def restoring(module, path: Path | None) -> Iterator[None]:
    """Say in one line that a checkpoint cannot be used: what goes wrong between its loading and the first step."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        if path is None or module.has_begun or isinstance(error, UserError) or is_out_of_memory(error):
            raise
        if lost_another(error):  # a process that died in the first rollout says nothing about the checkpoint
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = (
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}, {Path(last.filename).name}:{last.lineno}"
        )
        raise UserError(
            f"{path}: the stage cannot go on from it ({reason}); delete it, and the same command uses the one before"
        ) from error


def roll_back(stage_dir: Path, error: BadLoss, limit: int) -> None:
    """Note that the data between the newest checkpoint and a bad step is to be left out. Raises `error` at the limit.

    The note stays, `rollbacks.json`: whoever resumes from that checkpoint later leaves out the same data.
    """
    from llm.checkpoint.resume import newest_checkpoint
    from llm.parallel import collectives

    noted = collectives.broadcast_object(read_form(stage_dir / ROLLBACKS, FORM)) or {"count": 0, "left_out": {}}
    if noted["count"] >= limit:
        raise UserError(f"{error}. It was rolled back {noted['count']} times before (watch.rollbacks={limit})")
    if collectives.is_main():
        step, _ = newest_checkpoint(stage_dir / "checkpoints") or (0, None)
        steps = noted["left_out"].get(str(step), 0) + error.step - step
        noted["left_out"][str(step)] = steps
        write_json(stage_dir / ROLLBACKS, noted | {"count": noted["count"] + 1})
        print(f"{error.problem}: back to step {step}, leaving out {steps} steps of data", flush=True)
    collectives.barrier()


def build_trainer(cfg, stage_dir: Path, built) -> tuple[Any, Any]:
    """Return Lightning's Trainer and the callback that knows whether a signal ended it.

    Raises UserError for what Lightning refuses.
    """
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

    from callbacks.metrics import MetricsLog
    from llm.checkpoint.resume import CheckpointWriter
    from llm.parallel.strategy import cluster_environment, layout_of_processes, make_strategy

    callbacks, stop = build_callbacks(cfg, stage_dir, built)
    rows = next(one.logger for one in callbacks if isinstance(one, MetricsLog))
    own = [instantiate_part(f"trainer.plugins.{n}", part) for n, part in cfg.trainer.plugins.items()]
    with told_by_key():
        trainer = L.Trainer(
            accelerator=cfg.trainer.accelerator,
            **{name: cfg.trainer[name] for name in PASSED_ON if cfg.trainer[name] is not None},
            profiler=profiler(cfg.trainer.profiler, stage_dir),
            **layout_of_processes(),
            strategy=make_strategy(cfg.strategy.name, cfg.strategy.early_sums),
            precision="32-true",
            max_steps=built.module.context.total_steps,
            max_epochs=-1,
            logger=rows,  # the user's are attached while it trains
            log_every_n_steps=cfg.log_every,
            callbacks=callbacks,
            plugins=[CheckpointWriter(cfg.keep_last, cfg.save_async), cluster_environment(), *own],
            default_root_dir=str(stage_dir),
            enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
            enable_progress_bar=cfg.trainer.enable_progress_bar
            and any(isinstance(one, ProgressBar) for one in callbacks),
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,  # our callbacks evaluate, on more than this process's own batches
            inference_mode=False,
            check_val_every_n_epoch=None,
        )
    begin_always(trainer)
    built.module.make_ready(trainer)
    return trainer, stop


def begin_always(trainer) -> None:
    """Let a training that resumes at its last step begin and end as others do; Lightning calls no hook of such a one.

    A run that was killed between its last checkpoint and the row of that step makes up its evaluation and its row when
    training begins.
    """
    from lightning.pytorch.loops import _FitLoop

    class FitLoop(_FitLoop):
        skip = False

    loop = FitLoop(trainer, max_epochs=-1)
    loop.epoch_loop, trainer.fit_loop = trainer.fit_loop.epoch_loop, loop


def build_callbacks(cfg, stage_dir: Path, built) -> tuple[list, Any]:
    """Return the callbacks in the order in which they act, and the one that stops on signals.

    Compare the processes and save, then evaluate, then measure, then write the row, then show it.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, WeightAveraging

    from callbacks.average import AverageReadOut
    from callbacks.best import BestWeights
    from callbacks.cadence import Periodic
    from callbacks.checkpoint import StepCheckpoint
    from callbacks.metrics import MetricsLog
    from callbacks.runtime import CleanStop, GarbageControl
    from callbacks.stopwatch import Stopwatch
    from callbacks.validation import MonitorCheck, ValidationBegin, ValidationEnd
    from callbacks.watch import LossGuard, ProcessWatch

    checkpoint = StepCheckpoint(cfg.save_every, stage_dir / "checkpoints", cfg.save_minutes)
    stop = CleanStop(checkpoint)
    chosen = {name: instantiate_part(f"callbacks.{name}", part) for name, part in cfg.callbacks.items()}
    check_callbacks(chosen, cfg.strategy.name)
    if "progress" in chosen and not cfg.trainer.enable_progress_bar:
        chosen["progress"].wants_bar = False
    speed, display = ([chosen.pop(name)] if name in chosen else [] for name in ("throughput", "progress"))
    log = MetricsLog(stage_dir / "metrics.csv", cfg.log_every)
    guards = [LossGuard(checkpoint, stage_dir, saves=cfg.watch.bad_loss == "stop"), GarbageControl()]
    processes = ProcessWatch(cfg.watch.every, cfg.watch.slow)
    own = [*built.callbacks, *([BestWeights(stage_dir)] if cfg.stage.get("keep_best") else [])]
    begin = ValidationBegin([one for one in (*chosen.values(), *own) if isinstance(one, Periodic)])
    for one in chosen.values():  # there are evaluations, though none that Lightning knows of
        if isinstance(one, ModelCheckpoint) and begin.acts and one._save_on_train_epoch_end is None:
            one._save_on_train_epoch_end = False
    monitors = MonitorCheck(monitors_of(chosen, [*chosen.values(), *own], begin, built.module), begin)
    if any(isinstance(one, ProgressBar) for one in chosen.values()):
        display = []  # Lightning's bar in the place of ours
    averages = [one for one in chosen.values() if isinstance(one, WeightAveraging)]
    others = [one for one in chosen.values() if one not in averages]
    if steps := cfg.stage.get("average_steps"):
        if averages:
            raise UserError(
                f"stage.average_steps={steps}: {type(averages[0]).__name__} of `callbacks` averages the weights "
                "already; keep one of the two"
            )
        averages = [AverageReadOut(steps, cfg.stage.get("average_share"))]
    first = [
        Stopwatch(),
        *averages,
        processes,
        checkpoint,
        stop,
        *guards,
        begin,
    ]  # averaged weights are what is evaluated
    return [*first, *others, *own, *speed, log, monitors, ValidationEnd(begin), *display], stop


def profiler(name: str | None, stage_dir: Path) -> Any:
    """Return Lightning's profiler of a name, which writes into the stage's folder; None without one."""
    from lightning.pytorch import profilers

    kinds = {"simple": "SimpleProfiler", "advanced": "AdvancedProfiler", "pytorch": "PyTorchProfiler"}
    return None if name is None else getattr(profilers, kinds[name])(dirpath=str(stage_dir), filename="profile")


def check_callbacks(chosen: dict[str, Any], strategy: str) -> None:
    """Raise UserError for callbacks of Lightning that cannot work where a batch is a whole optimizer step.

    An average of weights is a copy of the whole network, which `strategy` fsdp has on no process.
    """
    from lightning.pytorch import callbacks as lightning_callbacks

    from llm.parallel import collectives

    shards = strategy == "fsdp" and collectives.world_size() > 1
    for key, callback in chosen.items():
        if shards and isinstance(callback, lightning_callbacks.WeightAveraging):
            raise UserError(f"callbacks.{key}: no process has all weights with strategy=fsdp; use strategy=muon or ddp")
        for name, instead in REFUSED_CALLBACKS.items():
            if isinstance(callback, getattr(lightning_callbacks, name)):
                raise UserError(f"callbacks.{key}: {name} does not work with one optimizer step a batch; {instead}")


def monitors_of(chosen: dict[str, Any], callbacks: list, begin, module) -> Any:
    """Return what callbacks of the configuration look at. Raises UserError where nothing is evaluated for them."""
    from lightning.pytorch.callbacks import EarlyStopping

    from callbacks.validation import Monitors, known_names

    by_key = {f"callbacks.{key}": one.monitor for key, one in chosen.items() if getattr(one, "monitor", None)}
    for key, one in chosen.items():
        if isinstance(one, EarlyStopping) and not begin.acts:
            raise UserError(f"callbacks.{key}: it looks at {one.monitor} after evaluations; set stage.eval_every=100")
    monitors, known = Monitors(by_key), known_names(callbacks, module)
    if known is not None and (problem := monitors.missing(sorted(known))):
        raise UserError(problem)
    return monitors


@contextlib.contextmanager
def told_by_key() -> Iterator[None]:
    """Turn what Lightning refuses into one line."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"Lightning refuses this: {' '.join(str(error).split())}") from error


def quiet_lightning() -> None:
    """Silence Lightning's own start-up lines and tips: they say nothing that the stage does not say itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")  # see SummingDDPStrategy
