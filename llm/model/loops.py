"""Blocks that run several times: `arch.loops` (weight sharing as in Universal Transformers, arXiv 1807.03819)."""

from collections.abc import Sequence

from torch import nn

SHARED = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def share_matrices(blocks: Sequence[nn.Module], places: Sequence[int]) -> None:
    """Give all blocks whose `places` hold one number the matrices of the first of them.

    What is a number or a gate, and the window, stays a place's own. `parameters()` has each matrix once, `state_dict()`
    at every place.
    """
    first: dict[int, nn.Module] = {}
    for block, number in zip(blocks, places, strict=True):
        owner = first.setdefault(number, block)
        for name in SHARED if owner is not block else ():
            block.get_submodule(name).weight = owner.get_submodule(name).weight
