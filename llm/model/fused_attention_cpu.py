"""Causal bf16 attention on a CPU by our own C++ kernel, fused_attention_cpu.cpp: scores never leave the cache.

It takes processors that multiply pairs of bf16 numbers (AVX512-BF16), heads of a multiple of 64 channels, windows and
document masks; elsewhere `llm.model.attention_cpu` computes attention by torch's matrix products. Scores and sums are
fp32; probabilities and their gradients are rounded to bf16 for the products. What is kept for the backward pass is the
output and one number per query. Numbers: docs/lab_notebook.md.
"""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch

from llm.model import native

SOURCE = Path(__file__).with_name("fused_attention_cpu.cpp")
HEADERS = tuple(SOURCE.with_name(f"cpu_{name}.h") for name in ("team", "vector"))
SHAPE = [*[c_int64] * 5, c_float]  # rows, length, heads, dim, window, scale


def load() -> ctypes.CDLL | None:
    """Return the kernel's library, compiled if need be; None where it cannot be had."""
    lib = native.library(SOURCE, *HEADERS)
    if lib is not None and lib.attend.argtypes is None:  # ctypes keeps what is set here
        lib.attend.argtypes = [*SHAPE, *[c_void_p] * 6, c_int64]
        lib.attend_backward.argtypes = [*SHAPE, *[c_void_p] * 10, c_int64]
        lib.attend.restype = lib.attend_backward.restype = None
        lib.columns_of_panels.restype = c_int64
    return lib


@torch.compiler.assume_constant_result
def panel_columns() -> int:
    """Return what the channels of a head must be a multiple of; 0 where the kernel cannot be had."""
    lib = load()
    return 0 if lib is None else lib.columns_of_panels()


def computes(q: torch.Tensor) -> bool:
    """Return whether the kernel is there and takes queries (B, T, H, D) like these. May compile for some seconds."""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return False
    columns = panel_columns()
    return columns > 0 and q.size(-1) % columns == 0


def attention(q, k, v, scale: float, window: int | None = None, documents=None) -> torch.Tensor:
    """Return softmax(scale * q k^T) v; a position sees itself and the `window` positions before it (None: all).

    q, k, v: (B, T, H, D) bf16, with equal numbers of heads; documents: (B, T) int64 numbers that grow along a row, a
    position sees positions of its own document only. Returns (B, T, H, D).
    """
    return _attention(q, k, v, scale, window, documents)[0]


# One operator each for forward and backward: torch.compile takes them as they are.


@torch.library.custom_op("fathom::fused_attention_on_cpu", mutates_args=(), device_types="cpu")
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, documents: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (B, T, H, D) and the logarithms (B, H, T) of the softmax's sums."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, logs = torch.empty_like(q), q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32)
    documents = None if documents is None else documents.contiguous()
    load().attend(*_shape(q, window, scale), *_addresses(q, k, v, documents, out, logs), torch.get_num_threads())
    return out, logs


@_attention.register_fake
def _(q, k, v, scale, window, documents):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((q.size(0), q.size(2), q.size(1)), dtype=torch.float32)


@torch.library.custom_op("fathom::fused_attention_on_cpu_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logs: torch.Tensor,
    scale: float,
    window: int | None,
    documents: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v (B, T, H, D)."""
    grad, q, k, v, out = (t.contiguous() for t in (grad, q, k, v, out))
    documents = None if documents is None else documents.contiguous()
    gradients = tuple(torch.empty_like(t) for t in (q, k, v))
    tensors = (grad, q, k, v, out, logs, documents, *gradients)
    load().attend_backward(*_shape(q, window, scale), *_addresses(*tensors), torch.get_num_threads())
    return gradients


@_attention_backward.register_fake
def _(grad, q, k, v, out, logs, scale, window, documents):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, ctx.window, documents = inputs
    ctx.save_for_backward(q, k, v, *output, documents)


def _backward(ctx, grad, _):
    *saved, documents = ctx.saved_tensors
    return *_attention_backward(grad, *saved, ctx.scale, ctx.window, documents), *(None,) * 3


_attention.register_autograd(_backward, setup_context=_setup)


def _shape(q: torch.Tensor, window: int | None, scale: float) -> tuple:
    """Return the arguments that describe queries (B, T, H, D)."""
    return (*q.shape, -1 if window is None else window, scale)


def _addresses(*tensors: torch.Tensor | None) -> tuple:
    """Return where the numbers of tensors lie; None for None."""
    return tuple(None if t is None else t.data_ptr() for t in tensors)
