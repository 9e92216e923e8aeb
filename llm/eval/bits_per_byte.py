"""Bits per byte: the loss of a network in a unit that does not depend on the tokenizer."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from llm.parallel import collectives


@torch.no_grad()
def nats_and_bytes(
    net: Callable[..., torch.Tensor],
    batches: Iterable[dict[str, torch.Tensor]],
    token_bytes: np.ndarray | torch.Tensor,
    device: torch.device | str | None = None,
) -> tuple[float, int]:
    """Return the summed loss in nats and the summed bytes of the targets; ranks add both up before dividing.

    net: `(ids (B, T), targets=(B, T), reduction="none") -> (B, T)` nats, a GPT or its compiled forward
    (then give `device`). batches: {"inputs", "targets"}, -1 = ignored. token_bytes: (vocab,) bytes per token, specials
    0: targets without bytes count on neither side.
    """
    device = device or getattr(net, "device", "cpu")
    sizes = torch.as_tensor(token_bytes, device=device)
    sums = []  # one small tensor per batch, copied to the host once at the end
    for batch in batches:
        inputs, targets = batch["inputs"].to(device), batch["targets"].to(device)
        nats = net(inputs, targets=targets, reduction="none")
        n_bytes = sizes[targets.clamp(min=0)] * (targets >= 0)  # (B, T)
        sums.append(torch.stack((torch.where(n_bytes > 0, nats, 0.0).sum(), n_bytes.sum().float())))
    if not sums:
        return 0.0, 0
    nats_sum, bytes_sum = torch.stack(sums).cpu().double().sum(0).tolist()
    return nats_sum, int(bytes_sum)


def bits_per_byte(
    net: Callable[..., torch.Tensor],
    batches: Iterable[dict[str, torch.Tensor]],
    token_bytes: np.ndarray | torch.Tensor,
    device: torch.device | str | None = None,
) -> float | None:
    """Return summed nats / (ln 2 x summed bytes), comparable across vocabularies; None if the targets have no bytes.

    All processes call it, each with its share of the batches. net, batches, token_bytes and device are those of
    `nats_and_bytes`.
    """
    nats, n_bytes = collectives.all_reduce_sum(nats_and_bytes(net, batches, token_bytes, device))
    return nats / (math.log(2) * n_bytes) if n_bytes else None
