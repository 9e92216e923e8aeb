"""Pretraining: next-token prediction on documents, packed into rows that begin with BOS."""

from pathlib import Path
from typing import NamedTuple

import torch

from llm.data.documents import texts
from llm.data.loader import UNDIVIDED, VAL_PACKING, TextSteps, validation_batches
from llm.data.sources import document_source, is_remote
from llm.data.tokens import CachedDocuments
from llm.errors import UserError
from llm.eval.samples import text_prompts
from llm.model.config import GPTConfig
from llm.model.gpt import GPT, build_network
from llm.parallel.launch import processes
from llm.scaling.gpu_estimate import named_gpu
from llm.scaling.rules import (
    REFERENCE_DEPTH,
    auto_batch,
    decay_factor,
    micro_batches,
    model_config,
    pretrain_steps,
    training_tokens,
)
from llm.stages.common import (
    BuiltStage,
    check_vocab_size,
    evaluates,
    gpu_estimate,
    learning_rates,
    lr_scale,
    model_facts,
    step_context,
    steps_layout,
)
from llm.stages.micro_batch import SHARE, checked_rows, divisors, largest_by_arithmetic
from llm.stages.step_module import StepData, StepModule
from llm.tokenizer.bpe import Tokenizer


class Plan(NamedTuple):
    """What follows from the configuration and the size of the vocabulary."""

    config: GPTConfig
    batch_tokens: int
    steps: int
    scales: dict[str, float]  # lr_scale and decay_scale


def plan(cfg, vocab_size: int) -> Plan:
    """Shape, batch, horizon, rates and decay by the rules of `llm.scaling.rules`."""
    stage, config = cfg.stage, model_config(cfg.model, cfg.arch, vocab_size)
    if cfg.max_steps is not None and stage.target_flops is not None:
        raise UserError(
            f"max_steps={cfg.max_steps} and stage.target_flops={stage.target_flops:g} are two horizons: keep one"
        )
    reference = model_config(dict(cfg.model) | {"depth": REFERENCE_DEPTH, "n_kv_head": None}, cfg.arch, vocab_size)
    tokens, reference_tokens = (
        training_tokens(c, stage.tokens_per_param, stage.count_params) for c in (config, reference)
    )
    batch = cfg.batch.tokens_per_step or auto_batch(tokens, reference_tokens)
    steps = cfg.max_steps or pretrain_steps(
        config, batch, stage.tokens_per_param, stage.count_params, stage.target_flops
    )
    decay_scale = decay_factor(batch, tokens, reference_tokens) if cfg.optim.scale_decay else 1.0
    return Plan(config, batch, steps, {"lr_scale": lr_scale(cfg, batch), "decay_scale": decay_scale})


def build(cfg, parent: Path) -> BuiltStage:
    """A fresh network on the tokenizer of `parent`."""
    tokenizer = Tokenizer.load(parent)
    check_vocab_size(cfg, tokenizer.vocab_size)
    planned = plan(cfg, tokenizer.vocab_size)
    config, batch_tokens, total, scales = planned
    layout = steps_layout(cfg, config, batch_tokens)
    no_text = cfg.dry_run and is_remote(cfg.data)  # numbers only: nothing is fetched
    source = train_source = None if no_text else document_source(cfg.data, cfg.paths.data)
    if cfg.data.token_cache and source is not None:
        folder = Path(cfg.paths.runs) / "token_cache" if cfg.data.token_cache is True else cfg.data.token_cache
        train_source = CachedDocuments(source, tokenizer, folder)
    net = build_network(config).init_weights(cfg.seed)

    def loader(split: str, position=None, **more) -> TextSteps:
        sizes = layout | more
        reads, packing = (train_source, cfg.data.packing) if split == "train" else (source, VAL_PACKING)
        options = {"split": split, "packing": packing, "buffer": cfg.stage.buffer}
        return TextSteps(reads, tokenizer, state=position, **options, **sizes)

    val_batches = None
    if evaluates(cfg):
        whole = loader("val", **UNDIVIDED)
        val_batches = validation_batches(whole, cfg.stage.eval_tokens, layout["rank"], layout["world"])
    context = step_context(
        cfg,
        tokenizer,
        total,
        val_batches=val_batches,
        prompts=[] if no_text else text_prompts(texts(source, "val")),
        **scales,
    )
    module = StepModule(net, cfg.optim, cfg.stage, context)
    return BuiltStage(module, StepData(lambda position: loader("train", position)), derived(cfg, planned, net))


def derived(cfg, planned: Plan, net: GPT) -> dict:
    """The numbers that are printed and saved; with dry_run also what the run would need on a GPU."""
    config, batch_tokens, total, scales = planned
    micro = micro_batches(batch_tokens, cfg.batch.micro_batch_size, cfg.model.seq_len, processes(cfg))
    values = model_facts(config, cfg, total, batch_tokens, micro) | learning_rates(net, cfg, **scales)
    return values | (gpu_estimate(config, cfg, values["planned_flops"]) if cfg.dry_run else {})


def derived_without_tokenizer(cfg) -> dict:
    """The same from `model.vocab_size` alone: no tokenizer, no data, no weights."""
    planned = plan(cfg, cfg.model.vocab_size)
    if cfg.batch.micro_batch_size == "auto":
        choices = divisors(planned.batch_tokens // cfg.model.seq_len)
        budget, again = SHARE * named_gpu(cfg.estimate.gpu).memory_gib * 2**30, cfg.trainer.activation_checkpointing
        cfg.batch.micro_batch_size = largest_by_arithmetic(choices, planned.config, budget, again)
    checked_rows(cfg.batch.micro_batch_size)
    with torch.device("meta"):
        net = build_network(planned.config)
    return derived(cfg, planned, net)
