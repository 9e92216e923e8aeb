"""`batch.micro_batch_size=auto`: the largest micro-batch that fits the device and divides the step."""

import gc
import os

import torch

from llm.errors import UserError, memory_detail
from llm.model.config import GPTConfig, num_params
from llm.model.gpt import GPT, build_network
from llm.optim.build import build_optimizer
from llm.optim.optimizer import first_states
from llm.parallel.launch import processes_of_node
from llm.scaling.batch_ramp import batch_schedule
from llm.scaling.gpu_estimate import memory_bytes
from llm.utils.environment import memory_gb

CPU_TOKENS = 8192  # larger micro-batches are no faster on a CPU
SHARE = 0.9  # of the device's memory that a micro-batch may fill: evaluation and fragments need the rest
CPU_SHARE = 0.5  # the estimate is a GPU's: attention on a CPU keeps about a quarter more


def resolve_rows(cfg, config: GPTConfig, total_rows: int) -> int:
    """Return the rows of a micro-batch where a device has `total_rows` a step; prints what auto chose.

    Raises UserError for a model that this machine cannot hold, before it is built.
    """
    from llm.parallel import collectives  # which takes a second to import: `llm.stages.plan` does without

    check_fits(config, memory_gb(), processes_of_node(cfg))
    rows = cfg.batch.micro_batch_size
    if rows != "auto":
        return rows
    device, choices = training_device(cfg), divisors(total_rows)
    if device.type == "cuda":
        rows = largest_trial(choices, lambda n: one_pass(cfg, config, n, device))
        what = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB used in a trial"
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
        again = cfg.trainer.activation_checkpointing
        free /= processes_of_node(cfg)  # which all choose at the same time
        kept = kept_unbuilt(config, cfg)
        rows = largest_by_arithmetic(choices, config, kept, CPU_SHARE * free, again, max_tokens=CPU_TOKENS)
        what = f"about {memory_bytes(config, rows, kept, again) / 2**30:.1f} of {free / 2**30:.1f} GiB free"
    print(f"batch.micro_batch_size=auto: {rows} rows of {config.seq_len} tokens ({what})", flush=True)
    return min(collectives.all_gather_object(rows))


def check_fits(config: GPTConfig, memory: float | None, copies: int = 1) -> None:
    """Raise UserError where the weights alone are larger than the memory of the machine, in GiB (None = unknown).

    copies: processes of this machine, each of which builds the whole network before it shares or moves it.
    """
    count = num_params(config)["total"]
    weights = 4 * count * copies / 2**30
    if memory is not None and weights > memory:
        each = f" in each of {copies} processes" if copies > 1 else ""
        raise UserError(
            f"model.depth={config.n_layer}: the weights of {count:,} parameters{each} are {weights:,.0f} GiB, more "
            f"than the {memory:g} GiB of memory of this machine; take a smaller model, or a larger machine"
        )


def divisors(total_rows: int) -> list[int]:
    """Return sizes of a micro-batch that divide a step of `total_rows`, the largest first."""
    if total_rows < 1:
        raise UserError(
            "batch.micro_batch_size=auto: batch.tokens_per_step holds no whole row of model.seq_len tokens; raise it"
        )
    return [n for n in range(total_rows, 0, -1) if total_rows % n == 0]


def out_of_memory(cfg, micro_batches: int, error: BaseException, saved: int | None) -> str:
    """Return the error line for a training that ran out of memory: what needs less, and which step is saved.

    micro_batches: those of a step on one device. saved: the step of the newest checkpoint.
    """
    rows = cfg.batch.micro_batch_size
    less = ["trainer.activation_checkpointing=true"] if not cfg.trainer.activation_checkpointing else []
    part = rows * micro_batches // batch_schedule(cfg, 1).parts  # the smallest step of a batch ramp
    if smaller := next((n for n in divisors(part) if n < rows), None):
        less.insert(0, f"batch.micro_batch_size={smaller}")
    advice = f"give {' or '.join(less)}" if less else "take a smaller model or model.seq_len"
    kept = "nothing was saved" if saved is None else f"step {saved} is saved, the same command with that resumes"
    return f"out of memory with batch.micro_batch_size={rows} ({memory_detail(error)}): {advice}; {kept}"


def training_device(cfg) -> torch.device:
    """Return the device on which `cfg.trainer` will train."""
    if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def kept_bytes(net: GPT, cfg) -> int:
    """Return the bytes of what a device keeps from step to step: weights, gradients, optimizer state, an average.

    All are counted as if no other device shared them.
    """
    weights = sum(p.nbytes for p in net.parameters())
    trained = sum(p.nbytes for p in net.parameters() if p.requires_grad)
    states = first_states(build_optimizer(net, cfg.optim).param_groups)
    average = weights if cfg.stage.get("average_steps") else 0
    return weights + trained + average + sum(value.nbytes for state in states for value in state.values())


def kept_unbuilt(config: GPTConfig, cfg) -> int:
    """Return `kept_bytes` of a network of this shape, without building it."""
    with torch.device("meta"):
        return kept_bytes(build_network(config), cfg)


def largest_by_arithmetic(
    choices,
    config: GPTConfig,
    kept: float,
    budget: float,
    activation_checkpointing: bool,
    max_tokens: float = float("inf"),
) -> int:
    """Return the first of the falling `choices` estimated to need at most `budget` bytes; the smallest if none is.

    kept: as of `memory_bytes`.
    """
    for rows in choices:
        needed = memory_bytes(config, rows, kept, activation_checkpointing)
        if rows * config.seq_len <= max_tokens and needed <= budget:
            return rows
    return choices[-1]


def largest_trial(choices, attempt) -> int:
    """Return the first of the falling `choices` that `attempt(rows)` survives without running out of memory."""
    for rows in choices:
        try:
            attempt(rows)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        gc.collect()  # not earlier: within `except` the error's frames still hold what the trial made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if fits:
            return rows
    raise UserError(
        "batch.micro_batch_size=auto: not even one row fits the device; use a smaller model or model.seq_len, or "
        "trainer.activation_checkpointing=true"
    )


def one_pass(cfg, config: GPTConfig, rows: int, device: torch.device) -> None:
    """Run forward and backward of a later micro-batch of a step, in `SHARE` of the memory.

    Beside it are all that an optimizer keeps, and the gradients of the micro-batches before.
    """
    from llm.model.linear import resolve_compute_dtype

    torch.cuda.set_per_process_memory_fraction(SHARE, device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        net = build_network(config).init_weights(0).to(device)
        net.compute_dtype = resolve_compute_dtype(cfg.precision.compute, device)
        net.activation_checkpointing = cfg.trainer.activation_checkpointing
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        held = 2 * sum(p.nbytes for p in net.parameters())
        state = torch.zeros(kept_bytes(net, cfg) - held, dtype=torch.uint8, device=device)
        ids = torch.zeros(rows, config.seq_len, dtype=torch.long, device=device)
        net(ids, ids, reduction="sum").backward()
        del net, state
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
