"""The C++ kernel of lazy AdamW: against float64, by rows and over all numbers, with any number of threads."""

import pytest
import torch

from llm.optim import row_adamw_cpu
from llm.optim.other_rules import lazy_adamw

pytestmark = pytest.mark.skipif(row_adamw_cpu.load() is None, reason="the kernel cannot be compiled here")

GROUP = {"betas": (0.8, 0.95), "eps": 1e-10, "lr": 0.1, "weight_decay": 0.3}


def drawn(rows: int, width: int) -> list[torch.Tensor]:
    """Return gradient, weight, mean and mean square of a table; two of three rows have a gradient, not everywhere."""
    draw = torch.Generator().manual_seed(rows * width)
    grad, weight, mean, square = torch.randn(4, rows, width, generator=draw).unbind(0)
    grad[::3] = 0.0
    grad[:, ::4] = 0.0
    return [grad, weight, mean, square.square()]


@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (300, 3), (700, 64)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", ["rows", "all", "flat"])
def test_a_step_is_that_of_float64_and_leaves_the_rest_alone(shape, threads, form):
    tensors, step = drawn(*shape), torch.tensor(7.0)
    wide, still = [t.double() for t in tensors], tensors[0] == 0
    before, used = [t.clone() for t in tensors], torch.get_num_threads()
    lazy_adamw(GROUP, *wide, step)
    rows = torch.arange(shape[0])[torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))]
    torch.set_num_threads(threads)
    try:
        kernels = [t.flatten() for t in tensors] if form == "flat" else tensors
        row_adamw_cpu.update(GROUP, kernels, rows if form == "rows" else None, step.item())
    finally:
        torch.set_num_threads(used)
    for name, new, want, old in zip(("grad", "weight", "mean", "square"), tensors, wide, before, strict=True):
        torch.testing.assert_close(new.double(), want, rtol=2e-6, atol=1e-6, msg=name)
        assert torch.equal(new[still], old[still]), name


def test_rows_that_are_not_named_stay():
    tensors, before = drawn(9, 20), drawn(9, 20)
    row_adamw_cpu.update(GROUP, tensors, torch.tensor([4, 1]), 1.0)
    moved = (tensors[1] != before[1]).any(1).nonzero().flatten()
    assert moved.tolist() == [1, 4]
