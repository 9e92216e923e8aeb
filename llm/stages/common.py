"""Parts that stages share when they are built: the parent's model, step layout, scales, context, derived numbers."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from llm.checkpoint.model_folder import load_model_folder
from llm.config.stages import stage_row
from llm.data.balance import Reading
from llm.data.loader import StepLayout
from llm.errors import UserError
from llm.eval.samples import given_prompts
from llm.model.config import GPTConfig, flops_per_token, num_params, scaling_params
from llm.model.gpt import GPT, build_network
from llm.model.lora import ALPHA, DEFAULT_TARGETS, LEARNING_RATE, LoRA, add_adapter
from llm.optim.build import build_optimizer
from llm.parallel import collectives
from llm.parallel.launch import processes
from llm.run.content import check_content, fingerprints
from llm.run.notes import content_note, say
from llm.run.stage_folder import find_further
from llm.scaling.batch_ramp import batch_schedule
from llm.scaling.gpu_estimate import estimate
from llm.scaling.rules import micro_batches
from llm.stages.device import DeviceOptions
from llm.stages.micro_batch import kept_bytes, resolve_rows
from llm.stages.plan import check_fresh, check_step, check_vocab_size, lr_scale, shape_from
from llm.stages.step_module import StageContext, StepData, StepModule
from llm.stages.warm_start import parent_optimizer
from llm.tokenizer.bpe import Tokenizer
from llm.utils.addresses import public
from llm.utils.files import plain
from tasks import Cache, build_task


@dataclass
class BuiltStage:
    """A stage ready to train: Lightning module and data module, what was derived, callbacks of its own, its data."""

    module: StepModule
    data: StepData
    derived: dict
    callbacks: list = field(default_factory=list)
    reading: Reading | None = None  # what is known of the data before training

    def __post_init__(self):
        """Make the resolved configuration and the derived numbers the module's `hparams`, which all loggers get."""
        told = self.module.context.config | {"derived": plain(self.derived)}
        self.module.save_hyperparameters(told, logger=collectives.is_main())
        self.data.module = self.module


def load_parent(parent: Path, cfg, scalar_head: bool = False) -> tuple[GPT, Tokenizer]:
    """Load network and tokenizer of the parent's model/ folder.

    scalar_head: whether the network is to have one; a new one is zero, one that is not wanted is left out. The context
    may be longer than the parent's, and document masks may be switched. Raises UserError where the configured model
    differs otherwise.
    """
    net, tokenizer = load_model_folder(parent, verify=cfg.verify)
    shape = shape_from(cfg, parent, net.config)
    if shape.seq_len != net.config.seq_len:
        net = with_context(net, shape)
    if shape.bos_id != net.config.bos_id:
        net = with_document_masks(net, shape)
    if net.config.scalar_head != scalar_head:
        net = with_scalar_head(net, scalar_head)
    if collectives.is_main():
        say(content_note(parent))
    return with_adapter(net, parent, cfg), tokenizer


def with_adapter(net: GPT, parent: Path, cfg) -> GPT:
    """Give a network the adapter that `model.lora` asks for, if any; its base is the model folder `parent`.

    Raises UserError for targets that the network lacks.
    """
    wanted = cfg.model.lora
    if not wanted.rank:
        return net
    targets = DEFAULT_TARGETS if wanted.targets is None else dict.fromkeys(wanted.targets)
    base = fingerprints(parent, weigh=True)["weights"]
    shape = LoRA(wanted.rank, wanted.alpha or ALPHA, tuple(targets), wanted.lr or LEARNING_RATE, base)
    add_adapter(net, shape, cfg.seed)
    if collectives.is_main():
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        print(f"adapter of rank {shape.rank} on {', '.join(targets)}: {trained:,} parameters are trained", flush=True)
    return net


def with_context(net: GPT, wanted: GPTConfig) -> GPT:
    """Return a network with the weights of `net` and the context of `wanted`.

    A longer one takes its RoPE base and RoPE scaling too. Short windows follow the context by the rule of
    `GPTConfig.window`.
    """
    old = net.config
    if wanted.seq_len < old.seq_len:
        shorter = build_network(replace(old, seq_len=wanted.seq_len))
        shorter.load_state_dict(net.state_dict())
        return shorter
    changes = {name: getattr(wanted, name) for name in ("seq_len", "rope_base", "rope_scaling")}
    longer = build_network(replace(old, **changes, rope_original=old.rope_original or old.seq_len))
    longer.load_state_dict(net.state_dict())
    if collectives.is_main():
        how = f"rope_base={wanted.rope_base:g}, rope_scaling={wanted.rope_scaling or 'null'}"
        print(f"context made longer from {old.seq_len} to {wanted.seq_len} tokens ({how})", flush=True)
    return longer


def with_scalar_head(net: GPT, wanted: bool) -> GPT:
    """Return a network with the weights of `net` and a scalar head of zeros, or without its scalar head."""
    other = build_network(replace(net.config, scalar_head=wanted))
    weights = net.state_dict()
    weights.pop("scalar_head.weight", None)
    if wanted:
        weights["scalar_head.weight"] = torch.zeros(1, net.config.n_embd)
    other.load_state_dict(weights)
    return other


def with_document_masks(net: GPT, wanted: GPTConfig) -> GPT:
    """Return a network with the weights of `net` that keeps the documents of a row apart, or not, as `wanted` does."""
    other = build_network(replace(net.config, bos_id=wanted.bos_id))
    other.load_state_dict(net.state_dict())
    if collectives.is_main():
        how = "a token sees the whole row" if wanted.bos_id is None else "a token sees its own document only"
        print(f"document masks switched: from this stage on {how}", flush=True)
    return other


def load_tokenizer(parent: Path, cfg) -> Tokenizer:
    """Load the tokenizer of the parent's model/ folder for a fresh network.

    Raises UserError where the configuration asks for what a fresh network cannot have.
    """
    check_fresh(cfg, parent)
    tokenizer = Tokenizer.load(parent)
    check_content(parent, cfg.verify)
    check_vocab_size(cfg, tokenizer.vocab_size)
    if collectives.is_main():
        say(content_note(parent))
    return tokenizer


def optimizer_state(cfg, parent: Path, net: GPT) -> dict | None:
    """Return the optimizer state that training begins with: the parent's if stage.warm_start, else None."""
    if not cfg.stage.warm_start:
        return None
    if cfg.model.lora.rank:
        raise UserError("stage.warm_start=true: an adapter begins with a fresh optimizer; set stage.warm_start=false")
    state = parent_optimizer(parent, net, cfg.optim)
    say_taken(parent, "optimizer state (stage.warm_start=true)")
    return state


def say_taken(parent: Path, parts: str) -> None:
    """Print in one line which `parts` of its parent a stage starts from; the first process does."""
    if collectives.is_main():
        say(content_note(parent))
        print(f"taken from {parent}: {parts}", flush=True)


def load_further(cfg, key: str, value: str, what: str, net: GPT, tokenizer: Tokenizer) -> tuple[GPT, Path]:
    """Return the network, and its folder, of another model that `key`=`value` names for a stage that trains `net`.

    what: part that it plays, for messages. Raises UserError for another tokenizer or a context that is too short.
    """
    folder = find_further(cfg.paths.runs, cfg.run, cfg.stage.name, key, value)
    found, its_tokenizer = load_model_folder(folder, verify=cfg.verify)
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{key}={value}: {folder} has another tokenizer ({its_tokenizer.vocab_size:,} tokens) than the trained "
            f"model ({tokenizer.vocab_size:,} tokens); choose a {what} that was trained with an equal one"
        )
    c = found.config
    if c.seq_len < net.config.seq_len:
        raise UserError(
            f"{key}={value}: its context of {c.seq_len} tokens is shorter than model.seq_len={net.config.seq_len}; "
            f"choose another {what}"
        )
    say_taken(folder, f"{what} ({c.arch}, {c.n_layer} layers, {c.n_embd} wide)")
    return found, folder


def steps_layout(cfg, config: GPTConfig, tokens: int | None, parts: int = 1) -> StepLayout:
    """Lay out a step of `tokens` over all ranks; resolves batch.micro_batch_size=auto.

    parts: equal parts of a step, of a batch ramp, that are whole micro-batches each. Raises UserError where no whole
    number of micro-batches makes such a step.
    """
    check_step(cfg, tokens)
    seq_len, world = cfg.model.seq_len, processes(cfg)
    cfg.batch.micro_batch_size = rows = resolve_rows(cfg, config, tokens // parts // seq_len // world)
    return StepLayout(
        seq_len=seq_len,
        rows_per_micro=rows,
        micro_per_step=micro_batches(tokens, rows, seq_len, world),
        rank=collectives.rank(),
        world=collectives.world_size(),
        timeout_s=cfg.watch.data_seconds,
        pin_memory=torch.cuda.is_available() and cfg.trainer.accelerator != "cpu",
    )


def eval_tasks(cfg) -> dict:
    """Return held-out tasks of `stage.chat_tasks` or `data.eval` by name, if the stage evaluates them."""
    if not cfg.stage.chat_every:
        return {}
    names = cfg.data.eval if cfg.stage.chat_tasks is None else cfg.stage.chat_tasks
    return {name: held_out_task(cfg, name) for name in names}


def held_out_task(cfg, name: str):
    """Return the held-out rows of a task of `data.tasks`. Raises UserError where there are none."""
    return build_task(name, cfg.data.tasks[name], "test", task_cache(cfg), cfg.data.bad_rows)


def task_cache(cfg) -> Cache:
    """Return the cache of tasks' rows that come over the network; a dry run fetches none."""
    return Cache(cfg.paths.data, not cfg.dry_run)


def finetuning_scales(cfg, batch_tokens: int | None) -> dict[str, float]:
    """Return factors on rates and decay for stages that start from a trained network; by rule, these do not decay."""
    return {"lr_scale": lr_scale(cfg, batch_tokens), "decay_scale": 0.0 if cfg.optim.scale_decay else 1.0}


def step_context(cfg, tokenizer, total_steps: int, **more) -> StageContext:
    """Return the stage's context for `StepModule` and callbacks; `more` are further fields of `StageContext`.

    Prompts of `stage.prompts` come before those in `more`. Raises UserError for those that nothing can be said to.
    """
    row = stage_row(cfg.stage.name)
    if not row.servable and cfg.stage.get("sample_every"):
        raise UserError(f"stage.sample_every: a model of stage={row.name} writes no text; set it to 0")
    if (prompts := cfg.stage.get("prompts")) is not None:
        if not row.servable:
            raise UserError(f"stage.prompts: a model of stage={row.name} writes no text; leave the key out")
        more["prompts"] = given_prompts(prompts, tokenizer, cfg.model.seq_len, row.is_chat)
    return StageContext(
        name=cfg.stage.name,
        tokenizer=tokenizer,
        token_bytes=torch.from_numpy(tokenizer.token_bytes()),
        total_steps=total_steps,
        seq_len=cfg.model.seq_len,
        loss_jump=cfg.watch.loss_jump,
        max_minutes=cfg.max_minutes,
        config=public(plain(OmegaConf.to_container(cfg, resolve=True))),
        options=DeviceOptions(
            cfg.precision.compute,
            cfg.precision.fp8,
            cfg.attention,
            cfg.compile,
            cfg.trainer.activation_checkpointing,
            row.fixed_shapes,
            row.draws_answers,
            cfg.gpu.joint_qkv,
            cfg.gpu.tuned_products,
            cfg.gpu.fp8_head,
            cfg.gpu.bf16_tables,
            cfg.gpu.early_check,
            cfg.gpu.muon_kernels,
        ),
        **more,
    )


def model_facts(net: GPT, cfg, total_steps: int, tokens_per_step: int, micro_per_step: int) -> dict:
    """Return the derived numbers that every model stage prints and saves, with dry_run also what it needs on a GPU.

    FLOPs are of the training passes only. tokens_per_param counts parameters as `stage.tokens_per_param` does.
    """
    net_config = net.config
    n, scaling = num_params(net_config), scaling_params(net_config)
    counted = n["total"] if cfg.stage.get("count_params") == "all" else scaling
    per_token = flops_per_token(net_config)
    tokens = batch_schedule(cfg, tokens_per_step).total(total_steps)
    on_gpu = gpu_estimate(net, cfg, float(tokens * per_token)) if cfg.dry_run else {}
    return {
        "depth": net_config.n_blocks,
        "n_embd": net_config.n_embd,
        "n_head": net_config.n_head,
        "n_kv_head": net_config.n_kv_head,
        "vocab_size": net_config.vocab_size,
        "seq_len": net_config.seq_len,
        **{f"params_{kind}": count for kind, count in n.items()},
        "params_scaling": scaling,
        "windows": " ".join(str(net_config.window(layer) or "full") for layer in range(net_config.n_layer)),
        "flops_per_token": per_token,
        "micro_batches": micro_per_step,
        "tokens_per_step": tokens_per_step,
        "steps": total_steps,
        "planned_tokens": tokens,
        "tokens_per_param": tokens / counted,
        "planned_flops": float(tokens * per_token),
        **on_gpu,
    }


def gpu_estimate(net: GPT, cfg, flops: float) -> dict:
    """Estimate memory, time and cost on the GPU of `estimate`."""
    e = cfg.estimate
    again, size = cfg.trainer.activation_checkpointing, {"flops": flops, "rows": cfg.batch.micro_batch_size}
    more = {"activation_checkpointing": again, "kept": kept_bytes(net, cfg)}
    return estimate(net.config, **size, gpu=e.gpu, devices=e.devices, mfu=e.mfu, **more)


def learning_rates(net: GPT, cfg, lr_scale: float, decay_scale: float, fixed_lr_scale: float | None = None) -> dict:
    """Return the base rate of every parameter group by `lr/<name>` (see `name_groups`), and the weight decay."""
    groups = build_optimizer(net, cfg.optim, lr_scale, decay_scale, fixed_lr_scale=fixed_lr_scale).param_groups
    rates = {f"lr/{group['name']}": group["lr"] for group in groups}
    return rates | {"weight_decay": cfg.optim.weight_decay * decay_scale}
