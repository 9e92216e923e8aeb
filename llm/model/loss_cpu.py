"""The loss of rows of logits on a CPU by our own C++ kernel, loss_cpu.cpp: two passes over a row in the cache.

torch.compile's code takes about four times as long: it keeps no row in the cache between its passes.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch

from llm.model import native
from llm.model.logit_bound import Bound, bound_of

SOURCE = Path(__file__).with_name("loss_cpu.cpp")
HEADERS = tuple(SOURCE.with_name(f"cpu_{name}.h") for name in ("team", "vector"))


def load() -> ctypes.CDLL | None:
    """Return the kernel's library, compiled if need be; None where it cannot be had."""
    lib = native.library(SOURCE, *HEADERS)
    if lib is not None and lib.row_losses.argtypes is None:  # ctypes keeps what is set here
        bound = [c_float] * 3
        places = [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, *bound, c_void_p, c_int64]
        lib.row_losses.argtypes = places
        lib.row_losses.restype = None
    return lib


def computes(hidden: torch.Tensor) -> bool:
    """Return whether the kernel is there and takes logits of this dtype and device. May compile for some seconds."""
    return hidden.device.type == "cpu" and hidden.dtype in (torch.bfloat16, torch.float32) and load() is not None


def row_losses(
    logits: torch.Tensor, goal: torch.Tensor, scale: torch.Tensor | None, cap: float | Bound | None
) -> torch.Tensor:
    """Compute `llm.model.cross_entropy.chunk_loss` of contiguous logits (n, V), bf16 or fp32.

    goal: (n, 1) long; scale: (n, 1) fp32 or None. Returns losses (n,) in nats; with `scale`, `logits` is overwritten
    with the gradient of sum(losses * scale). Raises IndexError for a target that is no token.
    """
    if len(goal) and not 0 <= int(goal.min()) <= int(goal.max()) < logits.size(1):
        raise IndexError(f"targets {int(goal.min())} to {int(goal.max())} for a vocabulary of {logits.size(1)}")
    losses = torch.empty(len(logits))
    goal, scale = goal.contiguous(), None if scale is None else scale.contiguous()
    load().row_losses(
        logits.data_ptr(),
        logits.dtype == torch.bfloat16,
        *logits.shape,
        goal.data_ptr(),
        None if scale is None else scale.data_ptr(),
        *(bound_of(cap) or (0.0, 1.0, 0.0)),
        losses.data_ptr(),
        torch.get_num_threads(),
    )
    return losses
