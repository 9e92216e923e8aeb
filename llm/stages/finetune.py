"""Midtraining and supervised finetuning: conversations, all tokens or the assistant's only.

The two differ in their configuration alone: the mixture, `stage.train_on`, learning rates and horizon.
"""

from pathlib import Path

from llm.config.stages import stage_row
from llm.data.conversations import estimate_steps
from llm.data.loader import UNDIVIDED, ConversationSteps, validation_batches
from llm.errors import UserError
from llm.eval.samples import questions
from llm.stages.common import (
    BuiltStage,
    eval_tasks,
    evaluates,
    finetuning_scales,
    learning_rates,
    load_parent,
    model_facts,
    step_context,
    steps_layout,
    task_cache,
)
from llm.stages.step_module import StepData, StepModule
from tasks import build_mixture, held_out_mixture


def build(cfg, parent: Path) -> BuiltStage:
    """The parent's network on the mixture `data.mixture.<stage>`."""
    net, tokenizer = load_parent(parent, cfg)
    layout, scales = (
        steps_layout(cfg, net.config, cfg.batch.tokens_per_step),
        finetuning_scales(cfg, cfg.batch.tokens_per_step),
    )
    stage, mixture = cfg.stage, stage_row(cfg.stage.name).mixture_key
    weights = dict(cfg.data.mixture[mixture])
    if not any(weights.values()):
        raise UserError(f"data.mixture.{mixture} names no task with repeats above 0: nothing to train on")
    train = build_mixture(cfg.data.tasks, weights, "train", cfg.seed, task_cache(cfg))
    shape = {"seq_len": layout["seq_len"], "train_on": stage.train_on}
    total = cfg.max_steps or estimate_steps(train, tokenizer, cfg.batch.tokens_per_step, stage.epochs, **shape)

    def loader(mixture, **more) -> ConversationSteps:
        return ConversationSteps(mixture, tokenizer, train_on=stage.train_on, seed=cfg.seed, **layout | more)

    held_out, val_batches = held_out_mixture(cfg.data, mixture, cfg.seed, task_cache(cfg)), None
    if evaluates(cfg):
        whole = loader(held_out, loop=False, **UNDIVIDED)
        val_batches = validation_batches(whole, stage.eval_tokens, layout["rank"], layout["world"])
    context = step_context(
        cfg,
        tokenizer,
        total,
        val_batches=val_batches,
        eval_tasks=eval_tasks(cfg),
        prompts=questions(held_out),
        is_chat=True,
        **scales,
    )
    derived = model_facts(net.config, cfg, total, cfg.batch.tokens_per_step, layout["micro_per_step"])
    derived |= {"conversations": len(train)} | learning_rates(net, cfg, **scales)
    module = StepModule(net, cfg.optim, stage, context)
    return BuiltStage(module, StepData(lambda position: loader(train, state=position)), derived)
