"""Muon's passes over memory on a GPU by Triton kernels of our own: `gpu.muon_kernels=true`, untested on a GPU.

They are what `llm.optim.muon_cpu` computes on a CPU, by functions of the same names. Around its matrix products an
update moves about 34 bytes a weight by them, where single operations of torch move 130.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType

import torch

from llm.optim.update_rules import unwaited

DEVICES = ("cuda",)
_is_on = False


@cache
def load() -> ModuleType | None:
    """Return the module of the kernels; None where Triton is missing, without which torch for CPUs comes."""
    if find_spec("triton") is None:
        return None
    from llm.optim import muon_gpu_kernels  # takes half a second that only trainings with the kernels should wait

    return muon_gpu_kernels


def turn_on(wanted: bool) -> None:
    """Let Muon use the kernels from now on, or not, in this process."""
    global _is_on
    _is_on = wanted


def computes(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype] = (torch.float32,)) -> bool:
    """Return whether the kernels are wanted and there, and take tensors like these."""
    plain = all(t.device.type in DEVICES and t.dtype in dtypes and t.is_contiguous() for t in tensors)
    return _is_on and plain and load() is not None


def look_ahead(
    grads: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], momentum: float, length: float, dtype: torch.dtype
) -> torch.Tensor:
    """Update the momentum of n matrices (r, c) in place; return Nesterov's update with rows of norm 1 / length.

    dtype: bf16 or fp32, of what is returned, (n, r, c).
    """
    update = torch.empty((len(grads), *grads[0].shape), dtype=dtype, device=grads[0].device)
    n, rows, cols = update.shape
    lists = _addresses(grads), _addresses(buffers)
    options = {"ALIGNMENT": _alignment([*grads, *buffers])} | _of_rows(cols)
    load().look_ahead[(n * rows,)](*lists, update, rows, cols, momentum, length, **options)
    return update


def row_mean_square(update: torch.Tensor, of_rows: bool) -> torch.Tensor:
    """Return the mean squares of the rows of a contiguous stack (n, r, c), as (n, r, 1), or of its columns, (n, 1, c).

    update: bf16 or fp32. Returns fp32.
    """
    n, rows, cols = update.shape
    means = torch.empty((n, rows, 1) if of_rows else (n, 1, cols), dtype=torch.float32, device=update.device)
    if of_rows:
        load().mean_squares_of_rows[(n * rows,)](update, means, cols, **_of_rows(cols))
    else:
        tile = {"ROWS": 32, "COLUMNS": 64}
        load().mean_squares_of_columns[(n, -(-cols // tile["COLUMNS"]))](update, means, rows, cols, **tile)
    return means


def scaled(update: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return a contiguous stack (n, r, c), bf16 or fp32, times factors (n, r, 1) or (n, 1, c), in fp32."""
    n, rows, cols = update.shape
    step, by_rows = torch.empty_like(update, dtype=torch.float32), factors.shape[1:] == (rows, 1)
    load().scaled[(n * rows,)](update, factors.contiguous(), step, rows, cols, BY_ROWS=by_rows, **_of_rows(cols))
    return step


def apply(params: Sequence[torch.Tensor], step: torch.Tensor, decay: float) -> None:
    """Add step (n, r, c) to n matrices in place; those numbers that it does not move away from 0 lose `decay` times."""
    n, rows, cols = step.shape
    options = {"ALIGNMENT": _alignment(params)} | _of_rows(cols)
    load().apply[(n * rows,)](_addresses(params), step, rows, cols, decay, **options)


def _of_rows(cols: int) -> dict[str, int]:
    """Return the options of a kernel whose programs have a whole row each: at most 16 numbers a thread up to 8,192."""
    block = 1 << max(cols - 1, 1).bit_length()
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _alignment(tensors: Sequence[torch.Tensor]) -> int:
    """Return 16 where all addresses are multiples of that, else 4; parts of a matrix may begin anywhere."""
    return 4 if any(t.data_ptr() % 16 for t in tensors) else 16


def _addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return _on_device(tensors[0].device, *[t.data_ptr() for t in tensors])


@lru_cache(256)  # those of weights and momentum stay, those of gradients come again
def _on_device(device: torch.device, *addresses: int) -> torch.Tensor:
    """Return addresses as a tensor (n,) on the device, which is not waited for."""
    return unwaited(torch.tensor(addresses, dtype=torch.int64), device)
