"""Midtraining and supervised finetuning: conversations, all tokens or the assistant's only.

The two differ in their configuration alone: the mixture, `stage.train_on`, learning rates and horizon.
"""

from pathlib import Path

from llm.config.stages import stage_row
from llm.data.conversations import estimate_steps
from llm.data.loader import ConversationSteps, StepLayout, validation_batches
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
from tasks import Mixture, build_mixture, held_out_mixture


def build(cfg, parent: Path) -> BuiltStage:
    """Build the parent's network on the mixture that the stage's row names."""
    net, tokenizer = load_parent(parent, cfg)
    tokens, stage, seed = cfg.batch.tokens_per_step, cfg.stage, cfg.seed
    layout, scales = steps_layout(cfg, net.config, tokens), finetuning_scales(cfg, tokens)
    train, held_out = mixtures(cfg)
    total = cfg.max_steps or estimate_steps(
        train, tokenizer, tokens, stage.epochs, seq_len=layout.seq_len, train_on=stage.train_on
    )

    def loader(mixture, layout: StepLayout, position=None, loop: bool = True) -> ConversationSteps:
        return ConversationSteps(mixture, tokenizer, layout, position, train_on=stage.train_on, seed=seed, loop=loop)

    val_batches = None
    if evaluates(cfg):
        whole = loader(held_out, layout.undivided(), loop=False)
        val_batches = validation_batches(whole, stage.eval_tokens, layout.rank, layout.world)
    context = step_context(
        cfg,
        tokenizer,
        total,
        val_batches=val_batches,
        eval_tasks=eval_tasks(cfg),
        prompts=questions(held_out),
        **scales,
    )
    derived = model_facts(net.config, cfg, total, tokens, layout.micro_per_step)
    derived |= {"conversations": len(train)} | learning_rates(net, cfg, **scales)
    module = StepModule(net, cfg.optim, stage, context)
    return BuiltStage(module, StepData(lambda position: loader(train, layout, position)), derived)


def mixtures(cfg) -> tuple[Mixture, Mixture]:
    """The conversations to train on, and the held-out ones. Raises UserError where there are none."""
    name = stage_row(cfg.stage.name).mixture_key
    weights = dict(cfg.data.mixture[name])
    if not any(weights.values()):
        raise UserError(f"data.mixture.{name} names no task with repeats above 0: nothing to train on")
    train = build_mixture(cfg.data.tasks, weights, "train", cfg.seed, task_cache(cfg), cfg.data.bad_rows)
    return train, held_out_mixture(cfg.data, name, cfg.seed, task_cache(cfg))
