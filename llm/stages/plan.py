"""Arithmetic of a stage, without its weights and data: shape, batch, horizon, and whether they fit the devices.

Light to import: the launcher of several processes checks with it what would fail in all of them. Builders use the
functions too, so each rule is said once.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from llm.checkpoint.model_folder import WEIGHTS_FILE, read_config
from llm.config.stages import Stage
from llm.errors import UserError
from llm.model.config import SMEAR_CHANNELS, GPTConfig
from llm.model.linear import resolve_compute_dtype
from llm.optim.build import ROWS_ONLY
from llm.parallel.launch import check_strategy, processes, processes_of_node
from llm.scaling.batch_ramp import BatchSchedule, batch_schedule
from llm.scaling.rules import (
    REFERENCE_DEPTH,
    auto_batch,
    decay_factor,
    has_middle_block,
    lr_batch_factor,
    micro_batches,
    model_config,
    pretrain_steps,
    training_tokens,
)
from llm.stages.begun import kept
from llm.stages.micro_batch import check_fits, divisors, training_device
from llm.stages.ramps import check_ramps
from llm.stages.text_loss import SWITCHES
from llm.tokenizer.bpe import Tokenizer
from llm.utils.environment import memory_gb
from llm.utils.registry import resolved

DRY_TOKENS = 2**18  # held-out ones that a dry run packs: about a second
CONFIG_KEYS = {
    "n_layer": "model.depth",
    "n_head": "model.depth (heads)",
    "n_kv_head": "model.n_kv_head",
    "head_dim": "model.head_dim",
    "n_embd": "model.aspect_ratio (width)",
    "seq_len": "model.seq_len",
    "vocab_size": "vocabulary",
    "bos_id": "arch.document_masks",
}


def check_ahead(cfg, row: Stage, parent: Path | None) -> None:
    """Raise UserError for what arithmetic tells of a stage, before any of its processes starts.

    parent: model/ folder that it starts from, of which the shape and the size of the vocabulary are read.
    """
    check_devices(cfg)
    check_strategy(cfg.strategy.name, processes(cfg), cfg.strategy.early_sums)
    if not row.makes_model or parent is None:
        return
    check_whole(cfg)
    if cfg.precision.fp8:
        dtype = resolve_compute_dtype(cfg.precision.compute, training_device(cfg), row.draws_answers)
        check_fp8(dtype, cfg.strategy.name == "fsdp")
    if cfg.strategy.early_sums and cfg.precision.compute == "fp16":
        raise UserError(
            "strategy.early_sums=true: with fp16 gradients are sums of scaled losses, and are scaled back after the "
            "last one; set precision.compute=bf16, or this to false"
        )
    config = shape_from(cfg, parent, read_config(parent)) if holds_weights(parent) else fresh_shape(cfg, parent)
    check_fits(config, memory_gb(), processes_of_node(cfg))
    if row.check:
        resolved(row.check, f"check of stage={row.name}")(cfg, config)


def check_pretraining(cfg, config: GPTConfig) -> None:
    """Raise UserError for a horizon or a step that cannot be, or best weights that nobody measures."""
    planned = plan(cfg, config.vocab_size)
    check_planned(cfg, planned.config, planned.batch.tokens)


def check_planned(cfg, config: GPTConfig, batch_tokens: int) -> None:
    """Raise UserError for best weights that nobody measures; an average, teachers, a step or a ramp that cannot be."""
    check_keeps_best(cfg)
    check_average(cfg)
    check_teachers(cfg)
    check_step(cfg, batch_tokens)
    check_ramps(cfg, config, batch_tokens)


def check_finetuning(cfg, config: GPTConfig) -> None:
    """Raise UserError for a step that cannot be shared out; one that is chosen by the data can where it is begun."""
    if cfg.batch.tokens_per_step is None:
        begun_step(cfg)
    else:
        check_step(cfg, cfg.batch.tokens_per_step)


def begun_step(cfg) -> int | None:
    """Return the tokens of a step that the data chose when the stage was begun; None where it is begun now.

    Raises UserError where the devices, which may be others now, cannot share it.
    """
    tokens, seq_len, world = kept(cfg).get("tokens_per_step"), cfg.model.seq_len, processes(cfg)
    if tokens is not None and tokens % (seq_len * world):
        rows = tokens // seq_len
        fits = ", ".join(str(n) for n in reversed(divisors(rows)))
        raise UserError(
            f"trainer.devices={cfg.trainer.devices}: {cfg.stage.name} was begun with {rows} rows a step "
            f"(batch.tokens_per_step=null), which {world} devices cannot share equally; resume it on {fits} of them, "
            "or overwrite=true starts it again"
        )
    return tokens


def check_shares(cfg, config: GPTConfig | None = None) -> None:
    """Raise UserError where a step of questions, pairs or rehearsed conversations has less than one for a device."""
    world = processes(cfg)
    for key in ("pairs_per_step", "prompts_per_step", "rehearsal"):
        value = cfg.stage.get(key)
        if value is not None and value < world and (value or key != "rehearsal"):
            raise UserError(f"stage.{key}={value}: fewer than the {world} devices; raise it or train on fewer")


def check_devices(cfg) -> None:
    """Raise UserError for devices that are absent, before anything is built."""
    if cfg.trainer.accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise UserError("trainer.accelerator=gpu: no GPU that torch can use; choose trainer=auto or trainer=cpu")


def check_step(cfg, tokens: int | None) -> None:
    """Raise UserError where no whole number of micro-batches, on all devices, makes a step of `tokens`."""
    if tokens is None:
        raise UserError(
            f"batch.tokens_per_step=null: stage={cfg.stage.name} has no rule for it; give it a number of tokens"
        )
    rows, seq_len, world = cfg.batch.micro_batch_size, cfg.model.seq_len, processes(cfg)
    if rows == "auto":
        divisors(tokens // seq_len // world)
    micro_batches(tokens, 1 if rows == "auto" else rows, seq_len, world)


def check_whole(cfg) -> None:
    """Raise UserError for an update that needs whole matrices, and for shared ones, where processes have rows."""
    if cfg.strategy.name != "fsdp" or processes(cfg) == 1:
        return
    if cfg.optim.get("hyperball"):
        raise UserError(ROWS_ONLY)
    if cfg.arch.get("loops", 1) > 1:
        raise UserError(
            f"arch.loops={cfg.arch.loops}: strategy=fsdp gathers each block by itself, and these share matrices; set "
            "strategy=muon or ddp"
        )


def check_fp8(dtype: torch.dtype, is_fsdp: bool) -> None:
    """Raise UserError where fp8 does not go with the number format of the network, or the strategy."""
    if is_fsdp:
        raise UserError("precision.fp8=true: not tested with strategy=fsdp; set precision.fp8=false or strategy=muon")
    if dtype != torch.bfloat16:
        raise UserError("precision.fp8=true: works beside bf16 only; set precision.compute=bf16")


def check_switches(cfg) -> None:
    """Raise UserError where a key of `gpu` could have no effect, whatever the device."""
    if cfg.gpu.joint_qkv and cfg.arch.name == "gpt2":
        raise UserError("gpu.joint_qkv=true: arch=gpt2 has biases, which the product leaves out; set it to false")
    if cfg.gpu.joint_qkv and cfg.model.lora.rank:
        raise UserError("gpu.joint_qkv=true: not made for adapters; set it to false or model.lora.rank=null")
    if cfg.gpu.bf16_tables and cfg.precision.compute in ("fp32", "fp16"):
        raise UserError(
            f"gpu.bf16_tables=true: goes with bf16, not with precision.compute={cfg.precision.compute}; set one of them"
        )
    into_values = cfg.arch.get("ngrams") and cfg.arch.ngram_into == "values"
    if cfg.gpu.bf16_tables and (into_values or cfg.arch.name == "gpt2"):
        adds = "arch.ngram_into=values" if into_values else "arch=gpt2"
        raise UserError(f"gpu.bf16_tables=true: {adds} adds rows of two tables, in fp32; set it to false")
    if cfg.gpu.bf16_tables and cfg.model.lora.rank:
        raise UserError("gpu.bf16_tables=true: not made for adapters; set it to false or model.lora.rank=null")
    if cfg.gpu.fp8_head and not cfg.precision.fp8:
        raise UserError("gpu.fp8_head=true: goes with precision.fp8=true only; set that, or this to false")
    if cfg.gpu.muon_kernels and (why := idle_kernels(cfg)) is not None:
        raise UserError(f"gpu.muon_kernels=true: {why}, so they would have nothing to do; set it to false")
    if cfg.gpu.tuned_products and cfg.compile is False:
        raise UserError("gpu.tuned_products=true: compile=false compiles no product; set compile=auto or this to false")


def idle_kernels(cfg) -> str | None:
    """Say in words why Muon's kernels for a GPU would have nothing to do; None if they have."""
    passes = ("row_normalize", "normuon_beta2", "renormalize", "cautious")
    if cfg.model.lora.rank:
        return "an adapter learns by AdamW"
    if cfg.optim.get("dion_rank") is not None:
        return f"optim.dion_rank={cfg.optim.dion_rank} takes the place of Muon"
    is_idle = all(cfg.optim.get(key) in (None, False) for key in passes)
    return f"none of optim.{', '.join(passes)} is on" if is_idle else None


def evaluates(cfg) -> bool:
    """Return True if the stage measures bits per byte: only then are validation batches made."""
    return cfg.stage.eval_every > 0 and "bpb" in cfg.callbacks


def held_out_tokens(cfg) -> int:
    """Return how many held-out tokens are made ready: a dry run looks whether there are few, and measures nothing."""
    return min(cfg.stage.eval_tokens, DRY_TOKENS) if cfg.dry_run else cfg.stage.eval_tokens


def check_keeps_best(cfg) -> None:
    """Raise UserError where the best weights are asked for in a run that never measures them."""
    if cfg.stage.get("keep_best") and not evaluates(cfg) and not cfg.dry_run:
        raise UserError(
            "stage.keep_best=bpb: the run measures no bpb (stage.eval_every=0, or no callbacks.bpb); set "
            "stage.eval_every=100, or stage.keep_best=null"
        )


def check_average(cfg) -> None:
    """Raise UserError for a share of no average of weights, and for an average where no process has all weights."""
    steps, share = cfg.stage.get("average_steps"), cfg.stage.get("average_share")
    if share is not None and steps is None:
        raise UserError(
            f"stage.average_share={share}: there is no average to take a share of; set stage.average_steps=100, or "
            "leave it out"
        )
    if steps is not None and cfg.strategy.name == "fsdp" and processes(cfg) > 1:
        raise UserError(
            f"stage.average_steps={steps}: no process has all weights with strategy=fsdp; use strategy=muon or ddp, or "
            "set stage.average_steps=null"
        )


def check_teachers(cfg) -> None:
    """Raise UserError for a share of no teachers, and for switches of the loss that do not go with them."""
    share = cfg.stage.get("teacher_share")
    if not cfg.stage.get("teachers"):
        if share is not None:
            raise UserError(
                f"stage.teacher_share={share}: there is nobody to learn from; name models, "
                "stage.teachers=[<run>,<run>], or leave it out"
            )
        return
    for name in SWITCHES:
        if (value := cfg.stage.get(name)) is not None:
            raise UserError(
                f"stage.{name}={value}: not made for stage.teachers, whose loss is over all tokens of the "
                "vocabulary; leave one of them out"
            )


class Plan(NamedTuple):
    """Shape, batch, horizon and scales that follow from the configuration and the size of the vocabulary."""

    config: GPTConfig
    batch: BatchSchedule
    steps: int
    scales: dict[str, float]  # lr_scale, decay_scale and fixed_lr_scale


def plan(cfg, vocab_size: int, tokens: int | None = None) -> Plan:
    """Plan shape, batch, horizon, rates and decay of pretraining by the rules of `llm.scaling.rules`.

    tokens: the horizon in training tokens, where a stage has a key of its own for it; max_steps comes first.
    """
    stage, config = cfg.stage, model_config(cfg.model, cfg.arch, vocab_size)
    if cfg.max_steps is not None and stage.target_flops is not None:
        raise UserError(
            f"max_steps={cfg.max_steps} and stage.target_flops={stage.target_flops:g} are two horizons: keep one"
        )
    reference = reference_config(cfg, vocab_size)
    by_rule, reference_tokens = (
        training_tokens(c, stage.tokens_per_param, stage.count_params) for c in (config, reference)
    )
    batch = batch_schedule(cfg, cfg.batch.tokens_per_step or auto_batch(by_rule, reference_tokens))
    if tokens is None:
        whole = pretrain_steps(config, batch.tokens, stage.tokens_per_param, stage.count_params, stage.target_flops)
    else:
        whole = max(1, tokens // batch.tokens)
    horizon = batch.steps_within(whole * batch.tokens)  # as many tokens as `whole` steps without a ramp
    decay_scale = decay_factor(batch.tokens, by_rule, reference_tokens) if cfg.optim.scale_decay else 1.0
    scales = {"lr_scale": lr_scale(cfg, batch.tokens), "decay_scale": decay_scale, "fixed_lr_scale": stage.lr_frac}
    return Plan(config, batch, cfg.max_steps or horizon, scales)


def reference_config(cfg, vocab_size: int) -> GPTConfig:
    """Return the model of depth 12 that batch and decay are measured by, without what only another width can have."""
    model = dict(cfg.model) | {"depth": REFERENCE_DEPTH, "n_kv_head": None}
    width = -(-REFERENCE_DEPTH * cfg.model.aspect_ratio // cfg.model.head_dim) * cfg.model.head_dim
    fitting = {
        "paired_heads": None,  # heads may be odd there
        "gate_channels": min(cfg.arch.get("gate_channels") or width, width),
        "smear": cfg.arch.get("smear") and width >= SMEAR_CHANNELS,
    }
    arch = dict(cfg.arch)
    return model_config(model, arch | {name: fitting[name] for name in fitting.keys() & arch.keys()}, vocab_size)


def lr_scale(cfg, batch_tokens: int | None) -> float:
    """Return the factor on the optimizer's rates: the stage's share, times a root of the batch if `optim.scale_lr`.

    batch_tokens: None where a step has no fixed number of them (grpo).
    """
    scaled = cfg.optim.scale_lr and batch_tokens is not None
    return cfg.stage.lr_frac * (lr_batch_factor(batch_tokens) if scaled else 1.0)


def holds_weights(parent: Path) -> bool:
    """Return whether a model/ folder has a network beside its tokenizer."""
    return (parent / WEIGHTS_FILE).is_file()


def shape_from(cfg, parent: Path, found: GPTConfig) -> GPTConfig:
    """Return the shape of a stage's network that continues the one of `parent`, whose shape is `found`.

    The context may be longer than the parent's, with arch=qwen3 shorter too, and document masks may be switched. Raises
    UserError where the configured model differs otherwise, or asks for an adapter that cannot be.
    """
    check_adapter(cfg)
    check_switches(cfg)
    check_vocab_size(cfg, found.vocab_size)
    wanted = model_config(cfg.model, cfg.arch, found.vocab_size)
    if found.arch == "modern" and not has_middle_block(found.n_layer):  # of old folders some have backout
        wanted = replace(wanted, backout=found.backout)
    changes = {}
    if (wanted.bos_id is None) != (found.bos_id is None):
        changes["bos_id"] = wanted.bos_id
    if wanted.seq_len < found.seq_len and found.arch == "qwen3" and found.rope_scaling is None:
        # checkpoints of others have contexts longer than a machine may hold; YaRN would stretch otherwise
        changes["seq_len"] = wanted.seq_len
    if wanted.seq_len > found.seq_len and found.arch != "gpt2":
        changes |= {name: getattr(wanted, name) for name in ("seq_len", "rope_base", "rope_scaling")}
        changes["rope_original"] = found.rope_original or found.seq_len
    shape = replace(found, **changes)
    check_same_model(wanted, shape, parent)
    return shape


def fresh_shape(cfg, parent: Path) -> GPTConfig:
    """Return the shape of a fresh network that takes the tokenizer of `parent`. UserError where it cannot be fresh."""
    check_fresh(cfg, parent)
    vocab_size = Tokenizer.load(parent).vocab_size
    check_vocab_size(cfg, vocab_size)
    return model_config(cfg.model, cfg.arch, vocab_size)


def check_fresh(cfg, parent: Path) -> None:
    """Raise UserError where `parent` holds a tokenizer alone and settings need a trained one, or have no effect."""
    check_switches(cfg)
    if cfg.arch.get("rope_scaling"):
        raise UserError(
            f"arch.rope_scaling={cfg.arch.rope_scaling}: a fresh network is trained at its full context; set it to "
            "null, or give a trained parent by init_from and a larger model.seq_len"
        )
    if cfg.model.lora.rank:
        raise UserError(
            f"model.lora.rank={cfg.model.lora.rank}: a fresh network has no weights to keep; set it to null, or give a "
            "trained parent by init_from"
        )
    if cfg.stage.get("warm_start"):
        raise UserError(f"stage.warm_start=true: {parent} holds no weights; name a model with init_from=<run>/pretrain")


def check_adapter(cfg) -> None:
    """Raise UserError where keys of `model.lora` do not go together, or not with fp8."""
    wanted = cfg.model.lora
    given = [name for name in ("alpha", "targets", "lr") if wanted[name] is not None]
    if given and not wanted.rank:
        raise UserError(
            f"model.lora.{given[0]}: there is no adapter without a rank; set model.lora.rank=8, or leave it out"
        )
    if wanted.rank and wanted.targets is not None and not wanted.targets:
        raise UserError("model.lora.targets=[]: an adapter needs a matrix; leave the key out, or name attention or mlp")
    if wanted.rank and cfg.precision.fp8:
        raise UserError("model.lora.rank: not tested with fp8; set precision.fp8=false or model.lora.rank=null")


def check_vocab_size(cfg, found: int) -> None:
    """Raise UserError where the tokenizer is not of the size that `model.vocab_size` asks for."""
    if cfg.model.vocab_size not in (None, found):
        raise UserError(
            f"model.vocab_size={cfg.model.vocab_size}: the tokenizer has {found} tokens; set model.vocab_size=null, or "
            "train a tokenizer of that size (stage=tokenizer stage.vocab_size=...)"
        )


def check_same_model(wanted: GPTConfig, found: GPTConfig, where: Path) -> None:
    """Raise UserError naming every key in which the configured model differs from the one in a model/ folder."""
    implied = dict.fromkeys(("rope_original", "ngram_bos", "copy_bos"))  # of other keys
    a, b = (
        c.to_dict() | implied | {"n_layer": c.n_blocks, "bos_id": c.bos_id is not None, "scalar_head": False}
        for c in (wanted, found)
    )
    differing = [
        f"{CONFIG_KEYS.get(k, 'arch' if k == 'arch' else f'arch.{k}')}: configured {a[k]}, found {b.get(k)}"
        for k in a
        if a[k] != b.get(k)
    ]
    if differing:
        raise UserError(
            f"the model in {where} is not the one configured ({'; '.join(differing)}): "
            "leave these keys out, and the stage takes the model's shape from its parent; or start from another one "
            "with init_from (init_from=<run>/tokenizer makes stage=pretrain begin with a fresh network)"
        )
