"""Runs a stage that makes a model: build it, train it, and hand the network over in model/."""

import contextlib
import signal
import time
import warnings
from dataclasses import replace

from callbacks.best import hand_over_best
from callbacks.checkpoint import check_finite
from callbacks.stopwatch import Stopwatch
from llm.checkpoint.examples import save_examples
from llm.checkpoint.model_folder import save_model_folder
from llm.checkpoint.resume import list_checkpoints
from llm.config.stages import Stage
from llm.data.balance import FEW_STEPS, Reading, describe, total
from llm.errors import BadLoss, UserError, is_out_of_memory
from llm.eval.examples import choose_examples
from llm.inference.engine import Engine
from llm.model.gpt import GPT
from llm.parallel import collectives
from llm.parallel.env import SIGHUP, SIGUSR1, note_late
from llm.parallel.strategy import full_model
from llm.run.best_score import best_line
from llm.run.stage_folder import last_values, read_metrics
from llm.stages.common import held_out_task
from llm.stages.expect import note as remember_times
from llm.stages.job import Job, shows_bar
from llm.stages.lengthen import begin_longer
from llm.stages.loggers import logging_to
from llm.stages.micro_batch import out_of_memory
from llm.stages.plan import check_devices
from llm.stages.start import show_start
from llm.stages.step_module import StageContext
from llm.stages.trainer import build_trainer, fit, quiet_lightning, roll_back
from llm.utils.imports import importing
from llm.utils.registry import resolved
from llm.utils.terminal import waiting

SIGNAL_NAMES = {SIGUSR1: "SIGUSR1", SIGHUP: "SIGHUP", signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


def run(job: Job) -> dict | None:
    """Build, train and hand over; returns the values of run.json, with another status if a signal stopped the stage.

    None after a dry run.
    """
    cfg = job.cfg
    quiet_lightning()
    check_devices(cfg)
    with waiting("preparing", shows_bar(cfg)):
        built = build(job)
    if built.reading is not None:
        job.manifest["data"] = built.reading.to_dict()
    if cfg.dry_run:
        show_start(job, built)
        return None
    begin_longer(job, built)
    with importing():  # torch's compiler
        trainer, stop = build_trainer(cfg, job.stage_dir, built)
    forecast, begin = show_start(job, built) if collectives.is_main() else None, time.perf_counter()
    collectives.barrier()  # nobody writes before all have read
    if collectives.is_main():
        job.manifest["derived"] = built.derived  # a killed run resumes with the plan it began with
        job.begin()
    while True:
        try:
            with logging_to(trainer, cfg, job.stage_dir):
                fit(trainer, built, job.stage_dir)
            break
        except BadLoss as error:
            if cfg.watch.bad_loss == "stop":
                raise
            roll_back(job.stage_dir, error, cfg.watch.rollbacks)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            saved = list_checkpoints(job.stage_dir / "checkpoints")
            rows = built.derived["micro_batches"]
            raise UserError(out_of_memory(cfg, rows, error, saved[-1][0] if saved else None)) from None
        built = build(job)
        trainer, stop = build_trainer(cfg, job.stage_dir, built)
    if forecast is not None:
        job.at_end = lambda: remember_times(forecast, stopwatch_of(trainer), time.perf_counter() - begin)
    note_late(stop.asked)
    return hand_over(job, built, trainer, stop.signum)


def stopwatch_of(trainer) -> Stopwatch:
    """Return the stopwatch among the trainer's callbacks."""
    return next(one for one in trainer.callbacks if isinstance(one, Stopwatch))


def build(job: Job):
    """Build the stage; its checkpoints will say which training saved them."""
    built = builder(job.row)(job.cfg, job.parent)
    built.module.origin = job.origin
    return built


def builder(row: Stage):
    """Return the function `build(cfg, parent) -> BuiltStage` of a stage's row."""
    return resolved(row.build, f"builder of stage={row.name}")


def hand_over(job: Job, built, trainer, signum: int | None) -> dict:
    """Return the values of run.json after training; model/ is written unless the signal `signum` ended it early."""
    module = built.module
    results = {
        "derived": built.derived,
        "tokens": module.progress.tokens,
        "flops": float(module.progress.tokens * module.flops_per_token),
        "steps": trainer.global_step,
        "metrics": last_values(job.stage_dir),
    }
    results |= balance_of(built)
    if signum is not None and trainer.global_step < module.context.total_steps:
        name, step = SIGNAL_NAMES[signum], trainer.global_step
        print(f"stopped by {name} at step {step}, checkpoint saved; the same command resumes", flush=True)
        return results | {"status": "interrupted", "signal": int(signum)}
    if trainer.global_step < module.planned_steps and collectives.is_main():
        print(f"ended at step {trainer.global_step} of {module.planned_steps}: max_minutes or a callback", flush=True)
        if job.cfg.max_minutes is not None and trainer.global_step < FEW_STEPS:
            print(
                f"WARNING: {trainer.global_step} steps teach next to nothing: give more than "
                f"max_minutes={job.cfg.max_minutes:g}, in which compiling counts, or set compile=false",
                flush=True,
            )
    net = full_model(module.net)
    saved = job.stage_dir / "checkpoints"
    after = f"Nothing was handed over; delete the newest file in {saved}, and the same command uses the one before"
    if not job.cfg.stage.get("keep_best"):  # a checkpoint of an older release may hold such weights
        check_finite(net, trainer.global_step, after)
    if job.row.servable and net.config.scalar_head:  # a critic, which is of no use behind its training
        net.scalar_head, net.config = None, replace(net.config, scalar_head=False)
    if collectives.is_main():
        handed = hand_over_best(job.stage_dir) if job.cfg.stage.get("keep_best") else None
        if handed is None:
            save_model_folder(job.stage_dir / "model", net, module.context.tokenizer)
        results["weights"] = handed or {"step": trainer.global_step}
        if job.row.is_chat and handed is None:
            add_examples(job, module.context, net)
        if line := best_line(read_metrics(job.stage_dir), results["weights"]):
            print(line, flush=True)
    return results


def add_examples(job: Job, context: StageContext, net: GPT) -> None:
    """Ask `net` held-out questions of the tasks in `data.eval`, and keep some that it answers right in model/.

    Tasks without held-out rows here are passed over. A failure must not cost a finished stage.
    """
    cfg, tasks = job.cfg, {}
    try:
        for name in cfg.data.eval:
            with contextlib.suppress(UserError):
                tasks[name] = context.eval_tasks.get(name) or held_out_task(cfg, name)
        questions = choose_examples(Engine(net, context.tokenizer), tasks, context.prompts)
        save_examples(job.stage_dir / "model", questions)
    except Exception as error:
        warnings.warn(f"no example questions were chosen: {error}", stacklevel=2)


def balance_of(built) -> dict[str, dict]:
    """Return {"data": the balance of what all processes have read} for run.json, and print it; {} if nobody counted."""
    position = built.data.position
    position = position() if callable(position) else position
    saved = collectives.all_gather_object((position or {}).get("balance"))
    if not any(saved):
        return {}
    read, reading = total(one for one in saved if one), built.reading or Reading("documents")
    if collectives.is_main():
        print("data, all that was read:", *describe(read, reading.unit), sep="\n  ", flush=True)
    return {"data": reading.to_dict(read)}
