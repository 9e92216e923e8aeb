"""Muon's passes over memory on a CPU by our own C++ kernel, muon_cpu.cpp: four instead of about thirty.

They are what Muon does around its matrix products: momentum and row equilibration, sums of squares, the factors of
NorMuon, cautious decay. Numbers of a row are summed in one fixed order, so that a result depends neither on the number
of threads nor on which matrices are updated together.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch

from llm.model import native

SOURCE = Path(__file__).with_name("muon_cpu.cpp")
HEADERS = tuple(Path(native.__file__).with_name(f"cpu_{name}.h") for name in ("team", "vector"))
SHAPE = [c_int64] * 3  # n, rows, columns


def load() -> ctypes.CDLL | None:
    """Return the kernel's library, compiled if need be; None where it cannot be had."""
    lib = native.library(SOURCE, *HEADERS)
    if lib is not None and lib.muon_apply.argtypes is None:  # ctypes keeps what is set here
        lib.muon_look_ahead.argtypes = [*[c_void_p] * 3, c_int64, *SHAPE, c_float, c_float, c_int64]
        lib.muon_mean_squares.argtypes = [c_void_p, c_int64, c_void_p, *SHAPE, c_int64, c_int64]
        lib.muon_scaled.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, *SHAPE, c_int64, c_int64]
        lib.muon_apply.argtypes = [c_void_p, c_void_p, *SHAPE, c_float, c_int64]
        for name in ("look_ahead", "mean_squares", "scaled", "apply"):
            getattr(lib, f"muon_{name}").restype = None
    return lib


def computes(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype] = (torch.float32,)) -> bool:
    """Return whether the kernel is there and takes tensors like these. May compile for some seconds."""
    plain = all(t.device.type == "cpu" and t.dtype in dtypes and t.is_contiguous() for t in tensors)
    return plain and load() is not None


def look_ahead(
    grads: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], momentum: float, length: float, dtype: torch.dtype
) -> torch.Tensor:
    """Update the momentum of n matrices (r, c) in place; return Nesterov's update with rows of norm 1 / length.

    dtype: bf16 or fp32, of what is returned, (n, r, c).
    """
    update = torch.empty((len(grads), *grads[0].shape), dtype=dtype)
    load().muon_look_ahead(
        _addresses(grads), _addresses(buffers), *_stack(update), *update.shape, momentum, length, _threads()
    )
    return update


def row_mean_square(update: torch.Tensor, of_rows: bool) -> torch.Tensor:
    """Return the mean squares of the rows of a contiguous stack (n, r, c), as (n, r, 1), or of its columns, (n, 1, c).

    update: bf16 or fp32. Returns fp32.
    """
    n, rows, cols = update.shape
    means = torch.empty((n, rows, 1) if of_rows else (n, 1, cols))
    load().muon_mean_squares(*_stack(update), means.data_ptr(), *update.shape, of_rows, _threads())
    return means


def scaled(update: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return a contiguous stack (n, r, c), bf16 or fp32, times factors (n, r, 1) or (n, 1, c), in fp32."""
    step, factors = torch.empty(update.shape), factors.contiguous()
    of_rows = factors.shape[1:] == (update.size(1), 1)
    load().muon_scaled(*_stack(update), factors.data_ptr(), step.data_ptr(), *update.shape, of_rows, _threads())
    return step


def apply(params: Sequence[torch.Tensor], step: torch.Tensor, decay: float) -> None:
    """Add step (n, r, c) to n matrices in place; those numbers that it does not move away from 0 lose `decay` times."""
    load().muon_apply(_addresses(params), step.data_ptr(), *step.shape, decay, _threads())


def _stack(update: torch.Tensor) -> tuple[int, bool]:
    return update.data_ptr(), update.dtype == torch.bfloat16


def _addresses(tensors: Sequence[torch.Tensor]) -> ctypes.Array:
    return (c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _threads() -> int:
    return torch.get_num_threads()
