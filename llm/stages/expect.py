"""Estimates how long a stage will take on this machine, and notes what it took, for the next one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from llm.config.stages import stage_row
from llm.model.compile import decide
from llm.model.linear import resolve_compute_dtype
from llm.parallel import collectives
from llm.parallel.launch import processes
from llm.scaling.batch_ramp import batch_schedule
from llm.scaling.duration import Estimate, Work, estimate, expected
from llm.scaling.machine import Parts, Run, earlier_runs, free_share, key, matmul_rate, remember
from llm.stages.micro_batch import training_device
from llm.stages.plan import evaluates, held_out_tokens

SAMPLE_TOKENS = 48  # of a printed sample
ANSWER_TOKENS = 64  # of an answer in an evaluation, and of a question before a drawn answer
LONG = 3600
FORWARD = 1 / 3  # of the FLOPs of a training pass


class Expected(NamedTuple):
    """The work of a stage, how fast this machine is, and how long the work will take on it.

    rate: FLOP/s of matrix products. share: of the processors' time that is free now, where the work takes less than
    LONG seconds; beside longer work others come and go. on: device, number format and the like.
    """

    work: Work
    rate: float
    share: float
    on: str
    estimate: Estimate


class HeldOut(NamedTuple):
    """Held-out rows of all processes: their positions, padding included, and the targets among them."""

    positions: int
    targets: int


def expect(cfg, derived: Mapping[str, Any], context: Any = None, done: int = 0) -> Expected:
    """Return what is expected of a stage of which `done` steps are done.

    derived: numbers of `model_facts`. context: the stage's, where it is built, for the sizes of its evaluations.
    """
    device, draws = training_device(cfg), stage_row(cfg.stage.name).draws_answers
    dtype = resolve_compute_dtype(cfg.precision.compute, device, draws)
    work = work_of(cfg, derived, context, done, decide(cfg.compile, cfg.stage.name, device, derived["steps"])[0])
    rate = matmul_rate(device, dtype)
    world = processes(cfg)
    on = key(device, dtype) + (", compiled" if work.compiled else "") + (f", {world} processes" if world > 1 else "")
    earlier = earlier_runs()
    found, share = estimate(work, rate, 1.0, on, earlier), 1.0
    if found.seconds < LONG and (share := free_share(device)) < 1:
        found = estimate(work, rate, share, on, earlier)
    return Expected(work, rate, share, on, found)


def work_of(cfg, derived: Mapping[str, Any], context: Any, done: int, compiled: bool) -> Work:
    """Return the work of one process in the steps that are left."""
    stage, world, steps = cfg.stage, processes(cfg), max(derived["steps"] - done, 1)
    per_token, tokens, drawn = derived["flops_per_token"], derived["tokens_per_step"], 0
    if "samples_per_step" in derived and stage.get("source") != "data":
        longest = min(stage.max_new_tokens, cfg.model.seq_len)
        drawn = derived["samples_per_step"] * longest / stage.updates_per_rollout
        tokens = derived["samples_per_step"] * min(longest + ANSWER_TOKENS, cfg.model.seq_len)
    batch, total = batch_schedule(cfg, derived["tokens_per_step"]), derived["steps"]
    rest = batch.total(total) - batch.total(total, total - steps)
    size = 1.0 if batch.parts == 1 else rest / (steps * batch.tokens)  # of a step, on average
    is_muon = cfg.optim.name.startswith("muon") and not cfg.model.lora.rank
    evaluated, sampled = evaluated_tokens(cfg, derived, context, steps)
    return Work(
        stage=stage.name,
        steps=steps,
        flops=tokens * size * per_token / world,
        drawn=drawn * per_token * FORWARD / world,
        layers=round(derived["micro_batches"] * size * len(derived["windows"].split())),  # with those that run again
        width=derived["n_embd"],
        blocks=derived["params_blocks"] if is_muon else 0,
        evaluated=evaluated * per_token * FORWARD / world,
        sampled=sampled * per_token * FORWARD / world,
        compiled=compiled,
    )


def evaluated_tokens(cfg, derived: Mapping[str, Any], context: Any, steps: int) -> tuple[int, int]:
    """Return the tokens that all evaluations pass through the network, and those that they draw, roughly."""
    stage, callbacks = cfg.stage, cfg.callbacks
    rounds = times(stage.eval_every, steps) + 1  # before the first step too
    evaluated = rounds * measured_tokens(cfg, context) if evaluates(cfg) else 0
    if stage.eval_every and "eval_pairs" in stage:
        evaluated += rounds * stage.eval_pairs * derived["tokens_per_step"] // stage.pairs_per_step
    sampled = 0
    if stage.eval_every and "eval_samples" in stage:
        sampled += rounds * stage.eval_examples * stage.eval_samples * stage.max_new_tokens
    if "samples" in callbacks and context is not None:
        sampled += times(stage.get("sample_every") or 0, steps) * len(context.prompts) * SAMPLE_TOKENS
    if "chat_eval" in callbacks and context is not None:
        limit = stage.get("chat_max_per_task") or 10**9
        items = sum(min(len(task), limit) for task in context.eval_tasks.values())
        sampled += times(stage.get("chat_every") or 0, steps) * items * ANSWER_TOKENS
    return evaluated, sampled


def measured_tokens(cfg, context: Any) -> int:
    """Return the tokens of one measurement of bits per byte, on all processes; `stage.eval_tokens` of unknown rows."""
    asked = cfg.stage.get("eval_tokens") or 0
    sizes = [] if context is None else list(held_out_sizes(cfg, context).values())
    return sum(asked if few is None else few.positions for few in sizes) if sizes else asked


def held_out_sizes(cfg, context: Any) -> dict[str, HeldOut | None]:
    """Return the sizes of held-out rows by the metric of them; None where they are as many as `stage.eval_tokens`.

    With several processes they are rounded up: each has only its share of the rows.
    """
    found: dict[str, HeldOut | None] = {}
    for name, batches in (("bpb", context.val_batches), ("bpb_text", context.text_batches)):
        if batches is not None:
            targets, world = [batch["targets"] for batch in batches], collectives.world_size()
            size = HeldOut(world * sum(t.numel() for t in targets), world * sum(int((t >= 0).sum()) for t in targets))
            found[name] = size if size.positions < held_out_tokens(cfg) else None
    return found


def times(every: int, steps: int) -> int:
    """Return how often a callback acts that does so every so many steps and after the last one; 0 = never."""
    return -(-steps // every) if every else 0


def note(forecast: Expected, stopwatch: Any, seconds: float) -> None:
    """Remember what a stage took. seconds: from the forecast to its end. A sitting of less than two steps says nothing.

    stopwatch: the one of `callbacks.stopwatch` that ran in it.
    """
    if stopwatch.steps < 2:
        return
    training = stopwatch.first_seconds + stopwatch.step_seconds * (stopwatch.steps - 1) + stopwatch.pauses
    work = forecast.work
    wanted, free = expected(work, forecast.rate), stopwatch.share
    done = stopwatch.steps / work.steps  # of the pauses, where the sitting ended early
    wanted = Parts(wanted.step, wanted.first, wanted.pauses * done, wanted.rest)
    rest = max(seconds - training, 0.0)
    took = (stopwatch.step_seconds, stopwatch.first_seconds, stopwatch.pauses, rest)
    took = Parts(*(part * free for part in took))  # as on a machine without other work
    remember(Run(forecast.on, work.stage, work.flops + work.drawn, wanted, took))
