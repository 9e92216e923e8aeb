"""Bits per byte: the loss of a network in a unit that does not depend on the tokenizer."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from llm.parallel import collectives


@torch.no_grad()
def bits_per_byte(
    net: Callable[..., torch.Tensor],
    batches: Iterable[dict[str, torch.Tensor]],
    token_bytes: np.ndarray | torch.Tensor,
    device: torch.device | str | None = None,
) -> float | None:
    """Return summed nats / (ln 2 x summed bytes), comparable across vocabularies; None if the targets have no bytes.

    All processes call it, each with its share of the batches. net: `(ids (B, T), targets=(B, T), reduction="none") ->
    (B, T)` nats, a GPT or its compiled forward (then give `device`). batches: {"inputs", "targets"}, -1 = ignored.
    token_bytes: (vocab,) bytes per token, specials 0.
    """
    from llm.eval.metrics import BitsPerByte  # torchmetrics takes as long to import as torch

    device = torch.device(device or getattr(net, "device", "cpu"))
    metric = BitsPerByte(token_bytes).to("cpu" if device.type == "mps" else device)  # mps has no fp64
    metric.update(torch.zeros(0), torch.zeros(0, dtype=torch.long))  # a process without batches takes part too
    for batch in batches:
        inputs, targets = batch["inputs"].to(device), batch["targets"].to(device)
        metric.update(net(inputs, targets=targets, reduction="none"), targets)
    value, has_bytes = metric.compute().item(), collectives.all_reduce_sum([metric.bytes.item()])[0]
    return value if has_bytes else None
