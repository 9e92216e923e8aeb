"""Build Lightning's Trainer for a stage, and fit."""

import contextlib
import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from llm.config.check import shown
from llm.config.stages import stage_row
from llm.errors import BadLoss, UserError, is_out_of_memory
from llm.parallel.env import lost_another
from llm.run.formats import ROLLBACKS as FORM
from llm.run.formats import read_form
from llm.utils.files import write_json

ROLLBACKS = "rollbacks.json"


def fit(trainer, built, stage_dir: Path) -> None:
    """Train from the newest checkpoint on, or from the start, without the data that a roll-back left out."""
    from llm.checkpoint.resume import newest_checkpoint, set_aside
    from llm.parallel import collectives

    newest, problem = None, None
    if collectives.is_main():
        try:
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
    with restoring(built.module, path):
        trainer.fit(built.module, datamodule=built.data, ckpt_path=None if path is None else str(path))


def needed(module) -> Any:
    """Return what a checkpoint must hold for a stage: the tensors of its network and of its optimizer."""
    import torch

    from llm.checkpoint.parts import Needed, facts
    from llm.optim.build import build_optimizer
    from llm.optim.optimizer import rule_of

    always = ("kind", "lr", "weight_decay", "decays", "initial_lr", "initial_decay", "params")
    groups = build_optimizer(module.net, module.optim_config).param_groups
    return Needed(
        module.context.total_steps,
        facts(module.kept(module.state_dict())),
        [{name: group[name] for name in (*always, *rule_of(group).needs)} for group in groups],
        [
            facts(rule_of(group).new_state(group, torch.empty_like(parameter, device="meta")))
            for group in groups
            for parameter in group["params"]
        ],
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


def check_devices(cfg) -> None:
    """Raise UserError for devices that are absent, before anything is built."""
    import torch

    if cfg.trainer.accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise UserError("trainer.accelerator=gpu: no GPU that torch can use; choose trainer=auto or trainer=cpu")


def build_trainer(cfg, stage_dir: Path, built) -> tuple[Any, Any]:
    """Return Lightning's Trainer and the callback that knows whether a signal ended it.

    The network is made ready for the trainer's device.
    """
    import lightning as L

    from llm.checkpoint.resume import CheckpointWriter
    from llm.parallel.strategy import cluster_environment, layout_of_processes, make_strategy

    callbacks, stop = build_callbacks(cfg, stage_dir, built)
    trainer = L.Trainer(
        accelerator=cfg.trainer.accelerator,
        **layout_of_processes(),
        strategy=make_strategy(cfg.strategy.name),
        precision="32-true",
        max_steps=built.module.context.total_steps,
        max_epochs=-1,
        logger=[instantiate_part(f"logger.{n}", part, save_dir=str(stage_dir)) for n, part in cfg.logger.items()],
        callbacks=callbacks,
        plugins=[CheckpointWriter(cfg.keep_last, cfg.save_async), cluster_environment()],
        default_root_dir=str(stage_dir),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        check_val_every_n_epoch=None,
    )
    prepare_network(cfg, built, trainer)
    return trainer, stop


def build_callbacks(cfg, stage_dir: Path, built) -> tuple[list, Any]:
    """Return the callbacks in the order in which they act, and the one that stops on signals.

    Compare the processes and save, then evaluate, then measure, then write the row, then show it.
    """
    from callbacks.best import BestWeights
    from callbacks.checkpoint import StepCheckpoint
    from callbacks.metrics import MetricsLog
    from callbacks.runtime import CleanStop, GarbageControl
    from callbacks.watch import LossGuard, ProcessWatch

    checkpoint = StepCheckpoint(cfg.save_every, stage_dir / "checkpoints", cfg.save_minutes)
    stop = CleanStop(checkpoint)
    chosen = {name: instantiate_part(f"callbacks.{name}", part) for name, part in cfg.callbacks.items()}
    speed, display = ([chosen.pop(name)] if name in chosen else [] for name in ("throughput", "progress"))
    log = MetricsLog(stage_dir / "metrics.csv", cfg.log_every)
    guards = [LossGuard(checkpoint, stage_dir, saves=cfg.watch.bad_loss == "stop"), GarbageControl()]
    processes = ProcessWatch(checkpoint, cfg.watch.every, cfg.watch.slow)
    own = [*built.callbacks, *([BestWeights(stage_dir)] if cfg.stage.get("keep_best") else [])]
    return [processes, checkpoint, stop, *guards, *chosen.values(), *own, *speed, log, *display], stop


def prepare_network(cfg, built, trainer) -> None:
    """Set number formats, attention kernel and compilation for the trainer's device, and print what was chosen."""
    from llm.model.compile import compile_training, decide
    from llm.model.linear import choose_fp32_products, resolve_compute_dtype
    from llm.parallel.strategy import FSDPStrategy

    net, device, row = built.module.net, trainer.strategy.root_device, stage_row(cfg.stage.name)
    net.compute_dtype = resolve_compute_dtype(cfg.precision.compute, device, row.draws_answers)
    if device.type == "cpu":
        choose_fp32_products(by_onednn=row.draws_answers)
    is_fsdp = isinstance(trainer.strategy, FSDPStrategy)
    if cfg.precision.fp8:
        if is_fsdp:
            raise UserError(
                "precision.fp8=true: not tested with strategy=fsdp; set precision.fp8=false or strategy=muon"
            )
        print(use_fp8(net, device), flush=True)
    net.activation_checkpointing = cfg.trainer.activation_checkpointing
    attention = net.set_attention(cfg.attention, device, row.fixed_shapes)
    compiled, why = decide(cfg.compile, cfg.stage.name, device, built.module.context.total_steps)
    if compiled:
        compile_training(net, by_block=is_fsdp)
    dtype = str(net.compute_dtype).removeprefix("torch.")
    how = "compiled" if compiled else "eager"
    print(f"device {device}, compute {dtype}, attention {attention}, {how} ({why})", flush=True)


def use_fp8(net, device) -> str:
    """Turn fp8 on where the device has it; returns what was done, in words for the log."""
    import torch

    from llm.model.fp8 import can_fp8
    from llm.model.linear import enable_fp8

    if net.compute_dtype != torch.bfloat16:
        raise UserError("precision.fp8=true: works beside bf16 only; set precision.compute=bf16")
    if not can_fp8(device):
        return f"precision.fp8=true: {device} has no fp8 (Hopper GPUs and newer do), so this trains in bf16"
    return f"fp8: {enable_fp8(net)} matrices"


def instantiate_part(key: str, part, **more):
    """Call Hydra's instantiate; its errors become a UserError that names the config key."""
    try:
        return instantiate(part, **more)
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"{key}: cannot be built from {shown(part)} ({cause})") from error


def quiet_lightning() -> None:
    """Silence Lightning's own start-up lines and tips: they say nothing that the stage does not say itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")  # see SummingDDPStrategy
