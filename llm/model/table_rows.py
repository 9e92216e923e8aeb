"""Rows of a table whose gradients are added, row by row, to one gradient that is kept for a whole training.

Autograd makes a dense gradient of every micro-batch anew, zeros nearly everywhere, and adds it to that of the step. On
a CPU our own C++ kernel adds the rows, table_rows_cpu.cpp.
"""

import ctypes
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
import torch.nn.functional as F

from llm.model import native

SOURCE = Path(__file__).with_name("table_rows_cpu.cpp")
HEADERS = tuple(SOURCE.with_name(f"cpu_{name}.h") for name in ("team", "vector"))


def load() -> ctypes.CDLL | None:
    """Return the kernel's library, compiled if need be; None where it cannot be had."""
    lib = native.library(SOURCE, *HEADERS)
    if lib is not None and lib.add_rows.argtypes is None:  # ctypes keeps what is set here
        lib.add_rows.argtypes = [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64]
        lib.clear_rows.argtypes = lib.add_rows.argtypes[:4]
        lib.add_rows.restype = lib.clear_rows.restype = None
    return lib


def computes(total: torch.Tensor) -> bool:
    """Return whether the kernel is there and takes a table's gradient like this. May compile for some seconds."""
    plain = total.device.type == "cpu" and total.dtype == torch.float32 and total.is_contiguous()
    return plain and load() is not None


def add_rows(total: torch.Tensor, ids: torch.Tensor, grads: torch.Tensor) -> None:
    """Add grads (n, C) to the rows ids (n,) of total (V, C), in place. An id may come several times."""
    if grads.dtype not in (torch.float32, torch.bfloat16) or not computes(total):
        total.index_add_(0, ids, grads.to(total.dtype))
        return
    ids, grads = ids.contiguous(), grads.contiguous()
    is_bf16 = grads.dtype == torch.bfloat16
    sizes = (total.size(1), ids.data_ptr(), len(ids), grads.data_ptr(), is_bf16, torch.get_num_threads())
    load().add_rows(total.data_ptr(), *sizes)


def clear_rows(total: torch.Tensor, ids: torch.Tensor) -> None:
    """Fill the rows ids (n,) of total (V, C) with zeros, in place."""
    if not computes(total):
        total.index_fill_(0, ids, 0.0)
        return
    ids = ids.contiguous()
    load().clear_rows(total.data_ptr(), total.size(1), ids.data_ptr(), len(ids))


class KeptRows(torch.autograd.Function):
    """Rows (..., C) of a `Table` for ids (...) in a dtype; their gradient goes to its `add_gradient`."""

    @staticmethod
    def forward(ctx, weight, ids, table, dtype):
        ctx.table = table
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        ctx.table.add_gradient(ctx.saved_tensors[0].flatten(), grad.flatten(0, -2))
        return None, None, None, None
