"""Queries, keys and values of a layer by one matrix product: `gpu.joint_qkv=true`, untested on a GPU.

The three weights stay parameters of their own, so checkpoints, optimizer and adapters know nothing of it. They are laid
end to end where they are cast to the compute dtype anyway; in a compiled step that is one pass, as the three casts are.
Backward, the gradient of the layer's input comes from one product and not from three that are then added.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from llm.model.fp8 import fp8_linear, takes_fp8
from llm.model.linear import Linear


def enable_joint_qkv(net) -> int:
    """Let layers multiply their input once while training; return how many do: those without biases or adapters."""
    layers = [layer for layer in (getattr(block, "attn", None) for block in net.transformer.h) if joins(layer)]
    for layer in layers:
        layer.joint_qkv = True
    return len(layers)


def joins(attention: nn.Module | None) -> bool:
    """Return whether an attention layer is one of ours, and its three projections nothing but their weights."""
    if not hasattr(attention, "joint_qkv"):
        return False
    layers = (attention.c_q, attention.c_k, attention.c_v)
    return all(layer.bias is None and layer.lora_A is None and layer.by_row is None for layer in layers)


def joint_product(x: torch.Tensor, layers: Sequence[Linear]) -> tuple[torch.Tensor, ...]:
    """Return what each of `layers` makes of x (..., K): views (..., N of the layer) of one product.

    Where the layers are in fp8, the weights have one scale together.
    """
    widths = [layer.out_features for layer in layers]
    if all(layer.fp8 for layer in layers) and takes_fp8(x):
        y = fp8_linear(x, torch.cat([layer.weight for layer in layers]))
    else:
        y = F.linear(x, torch.cat([layer.weight.to(x.dtype) for layer in layers]))
    return y.split(widths, dim=-1)
