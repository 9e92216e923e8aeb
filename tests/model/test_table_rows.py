"""Gradients of rows that are added to one kept gradient: the kernel against float64, and a table against autograd."""

import pytest
import torch

from llm.model import table_rows
from llm.model.linear import Table
from llm.model.table_rows import add_rows, clear_rows

SHAPES = [(1, 1, 3), (7, 5, 40), (50, 64, 300), (300, 37, 9)]  # rows of the table, width, rows added


def drawn(rows: int, width: int, n: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(rows * width + n)
    ids = torch.randint(rows, (n,), generator=draw)
    return torch.randn(rows, width, generator=draw), ids, torch.randn(n, width, generator=draw)


@pytest.mark.skipif(table_rows.load() is None, reason="the kernel cannot be compiled here")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_float64_and_the_same_bits_with_any_number_of_threads(shape, dtype):
    total, ids, grads = drawn(*shape)
    grads, found, used = grads.to(dtype), {}, torch.get_num_threads()
    want = total.double().index_add_(0, ids, grads.double())
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            add_rows(one := total.clone(), ids, grads)
            found[threads] = one
    finally:
        torch.set_num_threads(used)
    torch.testing.assert_close(found[1].double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the second is torch's
def test_rows_are_cleared_and_no_others(shape, dtype):
    total, ids, _ = drawn(*shape)
    want = total.to(dtype).clone()
    want[ids] = 0.0
    clear_rows(total := total.to(dtype), ids)
    assert torch.equal(total, want)


def tables(**options) -> tuple[Table, Table]:
    """Return two tables with the same weights, of which the second keeps its gradient."""
    pair = Table(20, 6), Table(20, 6)
    for table in pair:
        table.weight.data = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), **options)
    pair[1].keeps_gradient = True
    return pair


def test_a_kept_gradient_is_that_of_autograd_step_after_step():
    draw, (plain, kept) = torch.Generator().manual_seed(1), tables(dtype=torch.float64)
    for step in range(3):
        for _ in range(2):  # micro-batches
            ids, grads = torch.randint(20, (3, 5), generator=draw), torch.randn(3, 5, 6, generator=draw).double()
            for table in (plain, kept):
                table(ids).backward(grads)
        torch.testing.assert_close(kept.weight.grad, plain.weight.grad)
        assert kept.weight.grad is kept.kept or step == 0
        plain.weight.grad = kept.weight.grad = None


def test_a_gradient_that_is_there_already_is_added_to():
    """Add rows behind the gradient of a head that shares the table's weights, and comes first."""
    (plain, kept), ids = tables(dtype=torch.float64), torch.tensor([3, 3, 1])
    for table in (plain, kept):
        (table.weight.square().sum() + 0).backward()
        for _ in range(2):
            (table(ids).sum() + table.weight.sum()).backward()
    torch.testing.assert_close(kept.weight.grad, plain.weight.grad)


def test_without_gradients_nothing_is_kept():
    _, kept = tables()
    with torch.no_grad():
        assert torch.equal(kept(torch.tensor([2])), kept.weight[[2]])
    kept.weight.requires_grad_(False)
    assert not kept(torch.tensor([2])).requires_grad and kept.kept is None


def test_rows_are_handed_out_in_bf16_if_asked_and_their_gradients_added_in_fp32():
    (plain, kept), ids = tables(), torch.tensor([4, 4, 4, 7])
    kept.in_bf16 = True
    rows = kept(ids)
    assert rows.dtype == torch.bfloat16 and torch.equal(rows, plain(ids).bfloat16())
    grads = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).bfloat16()
    rows.backward(grads)
    plain(ids).backward(grads.float())
    assert kept.weight.grad.dtype == torch.float32
    torch.testing.assert_close(kept.weight.grad, plain.weight.grad)
