"""Midtraining and supervised finetuning: conversations, all tokens or the assistant's only.

The two differ in their configuration alone: the mixture, `stage.train_on`, learning rates and horizon.
"""

from pathlib import Path
from typing import NamedTuple

from callbacks.noise import EmbeddingNoise
from llm.config.stages import stage_row
from llm.data.balance import FEW_STEPS, Reading
from llm.data.conversations import Forecast, forecast
from llm.data.loader import ConversationSteps, StepLayout, validation_batches
from llm.eval.samples import questions
from llm.parallel import collectives
from llm.parallel.launch import processes
from llm.scaling.rules import finetuning_batch, finetuning_passes
from llm.stages.begun import is_lengthened, kept
from llm.stages.common import (
    BuiltStage,
    eval_tasks,
    finetuning_scales,
    learning_rates,
    load_parent,
    model_facts,
    optimizer_state,
    step_context,
    steps_layout,
    task_cache,
)
from llm.stages.data_check import trained_tasks
from llm.stages.micro_batch import divisors
from llm.stages.plan import begun_step, evaluates, held_out_tokens
from llm.stages.step_module import StepData, StepModule
from tasks import Mixture, build_mixture, held_out_mixture


class Horizon(NamedTuple):
    """Size of a step and number of steps, by the configuration or by how much there is to train on."""

    tokens_per_step: int
    epochs: float
    steps: int


def build(cfg, parent: Path) -> BuiltStage:
    """Build the parent's network on the mixture that the stage's row names."""
    stage, seed = cfg.stage, cfg.seed
    train, held_out = mixtures(cfg)  # all rows are checked before weights are loaded
    chat_tasks = eval_tasks(cfg)
    net, tokenizer = load_parent(parent, cfg)
    expected = forecast(train, tokenizer, seq_len=cfg.model.seq_len, train_on=stage.train_on)
    tokens, epochs, total = horizon(cfg, expected)
    layout, scales = steps_layout(cfg, net.config, tokens), finetuning_scales(cfg, tokens)

    def loader(mixture, layout: StepLayout, position=None, loop: bool = True) -> ConversationSteps:
        return ConversationSteps(mixture, tokenizer, layout, position, train_on=stage.train_on, seed=seed, loop=loop)

    val_batches = None
    if evaluates(cfg):
        whole = loader(held_out, layout.undivided(), loop=False)
        val_batches = validation_batches(whole, held_out_tokens(cfg), layout.rank, layout.world)
    context = step_context(
        cfg,
        tokenizer,
        total,
        val_batches=val_batches,
        eval_tasks=chat_tasks,
        prompts=questions(held_out),
        optimizer_state=optimizer_state(cfg, parent, net),
        **scales,
    )
    derived = model_facts(net, cfg, total, tokens, layout.micro_per_step)
    derived |= {"conversations": len(train), "epochs": epochs} | learning_rates(net, cfg, **scales)
    module = StepModule(net, cfg.optim, stage, context)
    data = StepData(lambda position: loader(train, layout, position))
    noise = [] if stage.neftune_alpha is None else [EmbeddingNoise(stage.neftune_alpha, seed)]
    return BuiltStage(module, data, derived, noise, reading=reading(train, expected))


def horizon(cfg, expected: Forecast) -> Horizon:
    """Return the size of a step, the passes and the steps: as configured, and by rule where a key is null.

    A run with a checkpoint keeps what its run.json holds, on whatever devices. A micro-batch larger than a step that
    the rule chose is made smaller. Warns of so few steps that next to nothing is learnt.
    """
    before = {} if is_lengthened(cfg) else kept(cfg)
    tokens, epochs = cfg.batch.tokens_per_step, cfg.stage.epochs
    if tokens is None:
        seq_len, devices, rows = cfg.model.seq_len, processes(cfg), cfg.batch.micro_batch_size
        tokens = begun_step(cfg) or finetuning_batch(expected.tokens, seq_len, devices)
        if rows != "auto":
            fitting = divisors(tokens // (seq_len * devices))
            cfg.batch.micro_batch_size = next(n for n in fitting if n <= rows)
    if epochs is None:
        epochs = before.get("epochs") or finetuning_passes(expected.tokens)
    steps = cfg.max_steps or before.get("steps") or expected.steps(tokens, epochs)
    if cfg.max_steps:
        epochs = steps * tokens / expected.tokens
    if steps < FEW_STEPS and not cfg.max_steps and collectives.is_main():
        print(
            f"WARNING: {steps} steps are too few to learn from: lower batch.tokens_per_step={tokens} or raise "
            f"stage.epochs={epochs:g} (null = by the amount of data)",
            flush=True,
        )
    return Horizon(tokens, epochs, steps)


def reading(train: Mixture, expected: Forecast) -> Reading:
    """Return what is expected of one pass over the conversations, and what was left out of their files."""
    facts = {"median_length": expected.median_length, "seq_len": expected.seq_len}
    words = "one pass" if expected.sampled == expected.size else f"one pass, by a sample of {expected.sampled:,}"
    return Reading("conversations", expected.balance, facts, train.tasks, words)


def mixtures(cfg) -> tuple[Mixture, Mixture]:
    """The conversations to train on, and the held-out ones. Raises UserError where there are none."""
    row = stage_row(cfg.stage.name)
    name = row.mixture_key
    trained_tasks(cfg, row)
    weights, key = dict(cfg.data.mixture[name]), f"data.mixture.{name}"
    train = build_mixture(cfg.data.tasks, weights, "train", cfg.seed, task_cache(cfg), cfg.data.bad_rows, key)
    return train, held_out_mixture(cfg.data, name, cfg.seed, task_cache(cfg))
