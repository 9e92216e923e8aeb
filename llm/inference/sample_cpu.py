"""The draw of the next token of every row as one call into our own C++ kernel, sample_cpu.cpp.

It gives the ids that `llm.inference.sampling.sample` gives, each row with settings of its own, in a fraction of the
time: torch needs several passes over doubles, and for top_p a sort of the whole vocabulary.
"""

import ctypes
from ctypes import POINTER, Structure, c_int64, c_void_p
from pathlib import Path

import torch

from llm.model import native

SOURCE = Path(__file__).with_name("sample_cpu.cpp")
HEADERS = tuple(SOURCE.parent.with_name("model") / name for name in ("cpu_team.h", "cpu_vector.h"))
TEAM_FROM = 1 << 16  # logits from which several threads share the rows


class _Settings(Structure):
    _fields_ = [(name, c_void_p) for name in ("temperature", "top_k", "top_p", "min_p", "draws")]


def is_available() -> bool:
    """Return whether the kernel is there; the first call may compile it for some seconds."""
    return native.library(SOURCE, *HEADERS) is not None


def sample_rows(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    draws: torch.Tensor,
) -> torch.Tensor:
    """Return one token id (B,) per row of fp32 `logits` (B, V) on the CPU, by inversion at `draws` (B,) in [0, 1).

    temperature: (B,) fp32, 0 = the most likely token; top_k: (B,) int64, 0 = all; top_p, min_p, draws: (B,) fp64. min_p
    leaves the tokens that are at least so many times as likely as the best one. A row whose logits hold NaN or no
    largest number gets -1. Raises ValueError for other shapes or dtypes.
    """
    n, vocab = logits.shape
    rows = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "draws": draws}
    for (name, tensor), dtype in zip(rows.items(), (torch.float32, torch.int64, *[torch.float64] * 3), strict=True):
        if tensor.shape != (n,) or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} instead of ({n},) {dtype}, contiguous")
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or logits.device.type != "cpu":
        raise ValueError(f"logits must be fp32 on the CPU, row by row, not {logits.dtype} on {logits.device}")
    lib = native.library(SOURCE, *HEADERS)
    lib.sample.argtypes = [c_void_p, *[c_int64] * 3, POINTER(_Settings), c_void_p, c_int64]
    lib.sample.restype = None
    ids = torch.empty(n, dtype=torch.int64)
    settings = _Settings(*(tensor.data_ptr() for tensor in rows.values()))
    threads = torch.get_num_threads() if n > 1 and n * vocab >= TEAM_FROM else 1
    address = logits.data_ptr()
    lib.sample(address, n, vocab, logits.stride(0), ctypes.byref(settings), ids.data_ptr(), threads)
    return ids
