"""Estimate memory, time and money of a training run on a named GPU, from arithmetic alone."""

from typing import NamedTuple

from llm.errors import UserError
from llm.model.config import GPTConfig


class GPU(NamedTuple):
    """One kind of GPU: dense bf16 FLOP/s, memory in GiB, a common price in dollars per hour."""

    flops: float
    memory_gib: float
    dollars_per_hour: float


# Peaks: vendors' data sheets. Prices: on-demand clouds in 2025 to 2026; they change.
GPUS = {
    "a100": GPU(312e12, 80, 1.79),
    "h100": GPU(989e12, 80, 3.00),
    "h100pcie": GPU(756e12, 80, 2.50),
    "h200": GPU(989e12, 141, 3.80),
    "b200": GPU(2250e12, 180, 6.00),
    "l40s": GPU(362e12, 48, 1.00),
    "rtx3090": GPU(71e12, 24, 0.25),
    "rtx4090": GPU(165e12, 24, 0.40),
    "rtx5090": GPU(209e12, 32, 0.60),
}
CHUNK_BYTES = 1.5e9  # the loss head's logits and their gradients


def peak_of(device_name: str) -> float | None:
    """Return the bf16 peak (FLOP/s) of the GPU that the driver calls `device_name`; None if it is not in the table."""
    plain = device_name.lower().replace(" ", "")
    return next((GPUS[key].flops for key in sorted(GPUS, key=len, reverse=True) if key in plain), None)


def named_gpu(name: str) -> GPU:
    """Return the GPU that `estimate.gpu` names. Raises UserError for a name that is not in the table."""
    if name not in GPUS:
        raise UserError(f"estimate.gpu={name}: choose one of {', '.join(GPUS)}")
    return GPUS[name]


def estimate(
    config: GPTConfig,
    *,
    flops: float,
    rows: int,
    gpu: str,
    devices: int,
    mfu: float,
    kept: float,
    activation_checkpointing: bool = False,
) -> dict[str, float | str]:
    """Estimate a run of `flops` on `devices` GPUs at a share `mfu` of the bf16 peak.

    rows: sequences in a micro-batch. kept: as of `memory_bytes`. Returns peak memory of one device in GiB, whether it
    fits, hours and dollars.
    """
    card = named_gpu(gpu)
    hours = flops / (card.flops * devices * mfu) / 3600
    memory = memory_bytes(config, rows, kept, activation_checkpointing) / 2**30
    return {
        "estimate_gpu": f"{devices} x {gpu} at {mfu:.0%} of {card.flops / 1e12:.0f} TFLOP/s",
        "estimate_memory_gib": memory,
        "estimate_fits": "yes"
        if memory < 0.95 * card.memory_gib
        else f"no: {card.memory_gib:g} GiB; lower batch.micro_batch_size",
        "estimate_hours": hours,
        "estimate_dollars": hours * devices * card.dollars_per_hour,
    }


def memory_bytes(config: GPTConfig, rows: int, kept: float, activation_checkpointing: bool = False) -> float:
    """Estimate the peak bytes on one device: what it keeps from step to step, bf16 activations, loss head.

    kept: bytes of weights, gradients and optimizer state.

    Activations kept per token and layer, in units of n_embd values: normed inputs 2, q k v 3, rotated and normed q k 4,
    attention output 1, MLP 4 + 4 (before and after the square), residual stream 2; value embeddings 2 in every other
    layer. With activation checkpointing 2 per layer, and one whole layer at a time.
    """
    layer = 20 + config.value_embeds
    values = 2 * config.n_layer + layer if activation_checkpointing else config.n_layer * layer
    per_token = values * config.n_embd * 2
    return kept + rows * config.seq_len * per_token + CHUNK_BYTES
