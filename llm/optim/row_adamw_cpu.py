"""Lazy AdamW on a CPU by our own C++ kernel, row_adamw_cpu.cpp: one pass over the rows with a gradient.

PyTorch makes about twenty passes over copies of them.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch

from llm.model import native

SOURCE = Path(__file__).with_name("row_adamw_cpu.cpp")
HEADERS = tuple(Path(native.__file__).with_name(f"cpu_{name}.h") for name in ("team", "vector"))


def load() -> ctypes.CDLL | None:
    """Return the kernel's library, compiled if need be; None where it cannot be had."""
    lib = native.library(SOURCE, *HEADERS)
    if lib is not None and lib.row_adamw.argtypes is None:  # ctypes keeps what is set here
        lib.row_adamw.argtypes = [*[c_void_p] * 5, c_int64, c_int64, *[c_float] * 7, c_int64]
        lib.row_adamw.restype = None
    return lib


def computes(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether the kernel is there and takes tensors like these. May compile for some seconds."""
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    return plain and load() is not None


def update(group: dict, tensors: Sequence[torch.Tensor], rows: torch.Tensor | None, step: float) -> None:
    """Update by AdamW, in place, the numbers of a table (r, c) whose gradient is not 0.

    tensors: gradient, weight, mean and mean square, of one shape, which may be any without rows. rows: (n,) those to
    look at, each once; None = all. step: steps with this one.
    """
    (beta1, beta2), lr = group["betas"], group["lr"]
    size = (tensors[0].numel(), 1) if rows is None else (len(rows), tensors[0].size(1))
    load().row_adamw(
        *(t.data_ptr() for t in tensors),
        None if rows is None else rows.data_ptr(),
        *size,
        1 - lr * group["weight_decay"],
        lr,
        beta1,
        beta2,
        group["eps"],
        1 - beta1**step,
        1 - beta2**step,
        torch.get_num_threads(),
    )
