"""Parts that the stages on preferences share: their rows, the size of a step, the steps, and what is evaluated."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from callbacks.preference_eval import PreferenceEval
from llm.data.balance import Reading
from llm.data.preferences import PreferenceSteps, Usable
from llm.errors import UserError
from llm.eval.preferences import Rewards
from llm.parallel import collectives
from llm.parallel.launch import processes
from llm.stages.common import (
    BuiltStage,
    finetuning_scales,
    learning_rates,
    model_facts,
    step_context,
    task_cache,
)
from llm.stages.drift import drift_context
from llm.stages.micro_batch import resolve_rows
from llm.stages.plan import check_shares
from llm.stages.reward_model import win_rates
from llm.stages.step_module import Objective, StepData, StepModule
from tasks.base import Task
from tasks.registry import build_preferences


@dataclass(frozen=True)
class Rows:
    """Rows to train on and held-out ones: their sources, and which of their rows fit the context."""

    train: list[Task]
    held_out: list[Task]
    usable: Usable
    usable_held_out: Usable


def read_sources(cfg) -> tuple[list[Task], list[Task]]:
    """Return the sources of `stage.preferences` (null = all of data.preferences), to train on and held-out.

    All rows are checked. Raises UserError where there are none.
    """
    from llm.stages.data_check import preferred

    names = preferred(cfg)
    train, held_out = (
        build_preferences(cfg.data, names, split, task_cache(cfg), cfg.data.bad_rows) for split in ("train", "test")
    )
    return train, held_out


def usable_rows(cfg, tokenizer, sources: tuple[list[Task], list[Task]], labelled: bool = False) -> Rows:
    """Find the rows that fit the context, and print what was cut and dropped.

    labelled: whether single answers with a label can be trained. Raises UserError where they cannot and are there.
    """
    limit, stage = cfg.model.seq_len, cfg.stage
    usable = Usable.of(sources[0], tokenizer, limit)
    held_out = Usable.of(sources[1], tokenizer, limit, stage.eval_pairs)
    if not labelled and not (usable.is_paired and held_out.is_paired):
        what = f"stage.loss={stage.loss}" if "loss" in stage else f"stage={stage.name}"
        raise UserError(
            f"{what}: needs pairs, but data.preferences has single answers with a label; train on these with stage=dpo "
            "stage.loss=kto, or name other sources in stage.preferences"
        )
    if collectives.is_main():
        for rows, name in ((usable, "training"), (held_out, "held-out")):
            print(
                f"preferences: {len(rows):,} {name} rows; {rows.cut:,} prompts cut at their start and {rows.dropped:,} "
                f"rows dropped, whose answers alone do not fit model.seq_len={limit}",
                flush=True,
            )
    return Rows(*sources, usable, held_out)


def resolve_step(cfg, config) -> tuple[int, int]:
    """Return (rows of the data in a step, sequences of a micro-batch). Raises UserError for a step without enough."""
    world, per_step = processes(cfg), cfg.stage.pairs_per_step
    check_shares(cfg)
    cfg.batch.micro_batch_size = resolve_rows(cfg, config, 2 * per_step // world)
    return per_step, cfg.batch.micro_batch_size


def build_stage(
    cfg,
    net,
    tokenizer,
    rows: Rows,
    objective: Objective,
    rewards: Rewards,
    *,
    labelled: bool = False,
    prepare: Callable | None = None,
    prepare_held_out: Callable | None = None,
    parent: Path | None = None,
    chat_tasks: dict | None = None,
) -> BuiltStage:
    """Build the stage that trains `net` by an objective of pairs, or of labelled answers.

    rewards: (network, micro-batch) -> rewards of the sequences, for held-out rows; prepare: see `PreferenceSteps`;
    prepare_held_out: see `PreferenceEval`; parent: whose free answers those of the network are compared with.
    """
    stage, per_step = cfg.stage, resolve_step(cfg, net.config)[0]
    total = cfg.max_steps or max(1, math.ceil(stage.epochs * len(rows.usable) / per_step))
    options = {
        "per_step": per_step,
        "rows_per_micro": cfg.batch.micro_batch_size,
        "seed": cfg.seed,
        "rank": collectives.rank(),
        "world": collectives.world_size(),
        "labelled": labelled,
    }
    more = {} if prepare is None else {"prepare": prepare}
    data = StepData(
        lambda position: PreferenceSteps(rows.train, rows.usable, tokenizer, position=position, **options, **more)
    )
    batches = PreferenceSteps(rows.held_out, rows.usable_held_out, tokenizer, **options).fixed()
    callbacks = [PreferenceEval(stage.eval_every, batches, rewards, prepare_held_out)]
    callbacks += win_rates(cfg, net, tokenizer, held_out_rows(rows), parent)
    scales = finetuning_scales(cfg, None)
    chat = {} if chat_tasks is None else drift_context(cfg, tokenizer, chat_tasks)
    context = step_context(cfg, tokenizer, total, **chat, **scales)
    micro = math.ceil(2 * per_step / (cfg.batch.micro_batch_size * processes(cfg)))
    derived = model_facts(net, cfg, total, 2 * per_step * rows.usable.median, micro)
    derived |= {"preferences": len(rows.usable), "preferences_held_out": len(rows.usable_held_out)}
    derived |= {"prompts_cut": rows.usable.cut, "rows_dropped": rows.usable.dropped}
    derived |= {"epochs": total * per_step / len(rows.usable)} | learning_rates(net, cfg, **scales)
    reading = Reading("preferences", parts=rows.train)
    module = StepModule(net, cfg.optim, stage, context, objective)
    return BuiltStage(module, data, derived, callbacks, reading)


def held_out_rows(rows: Rows) -> Iterable[tuple]:
    """Return the held-out rows that fit the context, as (source, row)."""
    return ((rows.held_out[source], rows.held_out[source][row]) for source, row in rows.usable_held_out.places)
