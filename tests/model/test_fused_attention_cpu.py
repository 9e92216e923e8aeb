"""The C++ kernel of attention: outputs and gradients against float64, masks, threads and compiled graphs."""

import pytest
import torch

from llm.model import attention_cpu, fused_attention_cpu
from llm.model.attention import causal_attention

pytestmark = pytest.mark.skipif(
    fused_attention_cpu.panel_columns() == 0, reason="this processor or machine cannot have the kernel"
)

SCALE = 0.3
CASES = [(1, None), (63, None), (64, None), (130, None), (600, None), (300, 64), (130, 128), (129, 1), (700, 255)]


def inputs(length: int, dim: int = 64, heads: int = 3, spread: float = 1.0):
    """Return queries, keys and values (2, length, heads, dim) in bf16, and a gradient of their output."""
    g = torch.Generator().manual_seed(length)
    q, k, v, grad = (torch.randn(2, length, heads, dim, generator=g).mul(spread).bfloat16() for _ in range(4))
    return (q, k, v), grad


def documents_of(length: int) -> torch.Tensor:
    """Return document numbers (2, length) that grow now and then."""
    return (torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.02).cumsum(1)


def exact(q, k, v, scale: float, window: int | None, documents) -> torch.Tensor:
    """Compute attention with a mask, in the dtype of the inputs."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    distance = torch.arange(q.size(2)).unsqueeze(1) - torch.arange(q.size(2))
    sees = (distance >= 0) & (distance <= (q.size(2) if window is None else window))
    if documents is not None:
        sees = (sees & (documents.unsqueeze(2) == documents.unsqueeze(1))).unsqueeze(1)
    return ((scale * q @ k.mT).masked_fill(~sees, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def results(form, tensors, grad, *options, dtype=torch.bfloat16) -> list[torch.Tensor]:
    """Return the output of a form of attention and the gradients of q, k and v."""
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    out = form(*tensors, SCALE, *options)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(dtype))]


def errors(ours: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    """Return the relative error of each tensor."""
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, want, strict=True)]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("length", "window"), CASES)
def test_outputs_and_gradients_are_as_exact_as_those_of_large_products(length, window, apart, dim):
    options = (window, documents_of(length) if apart else None)
    tensors, grad = inputs(length, dim)
    want = results(exact, tensors, grad, *options, dtype=torch.float64)
    ours = results(fused_attention_cpu.attention, tensors, grad, *options)
    assert all(t.dtype == torch.bfloat16 for t in ours)
    theirs = results(attention_cpu.attention, tensors, grad, *options)
    if length == 1:  # nothing to choose from: the gradients of q and k are rounding
        want, ours, theirs = ([of[0], of[3]] for of in (want, ours, theirs))
    for error, reference in zip(errors(ours, want), errors(theirs, want), strict=True):
        assert error < max(1.2 * reference, 2e-3)


def test_large_scores_keep_their_order():
    tensors, grad = inputs(300, spread=4.0)
    want = results(exact, tensors, grad, None, None, dtype=torch.float64)
    assert max(errors(results(fused_attention_cpu.attention, tensors, grad), want)) < 0.01


def test_threads_do_not_change_a_bit():
    tensors, grad = inputs(200)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(results(fused_attention_cpu.attention, tensors, grad, 50))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_comes_later_changes_nothing():
    tensors, _ = inputs(200)
    whole = fused_attention_cpu.attention(*tensors, SCALE)
    for t in tensors:
        t[:, 150:] *= 50
    assert torch.equal(fused_attention_cpu.attention(*tensors, SCALE)[:, :150], whole[:, :150])


def test_the_operators_are_well_formed():
    (q, k, v), _ = inputs(70)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    for options in ((None, None), (16, documents_of(70))):
        torch.library.opcheck(fused_attention_cpu._attention, (*tensors, SCALE, *options))


def test_attention_takes_the_kernel_also_within_a_compiled_graph(monkeypatch):
    (q, k, v), grad = inputs(70)
    grouped = (q, k[:, :, :1], v[:, :, :1])
    repeated = (q, *(t[:, :, :1].expand_as(q) for t in (k, v)))
    want = fused_attention_cpu.attention(*repeated, SCALE, 16)
    monkeypatch.setattr(attention_cpu, "attention", None)  # would fail
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    for form in (causal_attention, compiled):
        assert torch.equal(form(*grouped, SCALE, 16, None, "cpu"), want)
