"""Weights as generation multiplies them, and the few sizes of batches that keep a server's memory flat.

On a CPU, half precision keeps 0.7 MB of generated code for every shape of a product that it has met. There lengths and
batches are rounded up to a few sizes.
"""

import torch

from llm.model.gpt import with_weights
from llm.model.lora import merged

LENGTHS = (32, 8)  # sizes of prompts, for `round_up`: 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, ...
ROWS = (1, 4)  # sizes of batches: 1, 2, 3, 4, 6, 8, 12, 16, 24, ...


def keeps_shapes(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True where every new shape of a product leaves generated code in memory: half precision on a CPU."""
    return device.type == "cpu" and dtype != torch.float32


def round_up(n: int, least: int, parts: int) -> int:
    """Round n up to one of few sizes: a multiple of `least` or of 1/parts of the next power of two, the larger one."""
    step = max(least, (1 << (n - 1).bit_length()) // parts)
    return -(-n // step) * step


def in_compute_dtype(net):
    """Return the net, or a copy with weights in its compute dtype, so that no pass casts all weights again.

    The results are equal, because the net casts each weight before it multiplies. An adapter is merged before.
    """
    net = merged(net)
    if next(net.parameters()).dtype == net.compute_dtype:
        return net
    return with_weights(net, {name: weight.to(net.compute_dtype) for name, weight in net.state_dict().items()})
