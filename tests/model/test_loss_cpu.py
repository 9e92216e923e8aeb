"""The C++ kernel of the loss: losses and gradients against float64, any number of threads, and rows of any length."""

import pytest
import torch

from llm.model import loss_cpu
from llm.model.cross_entropy import linear_cross_entropy
from llm.model.logit_bound import ASYMMETRIC, Bound

pytestmark = pytest.mark.skipif(loss_cpu.load() is None, reason="the kernel cannot be compiled here")

ROWS = 21  # more than one item of work, and not a whole number of them


def exact(logits: torch.Tensor, goal: torch.Tensor, scale: torch.Tensor, cap: float | Bound | None):
    """Return losses (n,) and the gradient of sum(losses * scale), by autograd in float64."""
    x = logits.double().requires_grad_()
    z = 23 * torch.sigmoid((x + 5) / 7.5) if cap == ASYMMETRIC else x
    if isinstance(cap, float):
        z = cap * torch.tanh(x / cap)
    losses = torch.nn.functional.cross_entropy(z, goal.squeeze(1), reduction="none")
    (losses * scale.squeeze(1)).sum().backward()
    return losses.detach(), x.grad


def drawn(vocab: int, dtype: torch.dtype, spread: float = 4.0):
    """Return logits (ROWS, vocab), goals (ROWS, 1) and scales (ROWS, 1), one of them 0."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(ROWS, vocab, generator=generator) * spread).to(dtype)
    scale = torch.rand(ROWS, 1, generator=generator)
    scale[3] = 0
    return logits, torch.randint(vocab, (ROWS, 1), generator=generator), scale


@pytest.mark.parametrize("vocab", [1, 3, 16, 17, 1000])
@pytest.mark.parametrize("cap", [15.0, 95.0, ASYMMETRIC, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_float64(vocab, cap, dtype):
    logits, goal, scale = drawn(vocab, dtype)
    losses, gradient = exact(logits, goal, scale, cap)
    ours = logits.clone()
    torch.testing.assert_close(loss_cpu.row_losses(ours, goal, scale, cap).double(), losses, rtol=2e-6, atol=1e-5)
    rounding = 4e-3 if dtype == torch.bfloat16 else 4e-6
    torch.testing.assert_close(ours.double(), gradient, rtol=rounding, atol=2e-6)


def test_losses_alone_leave_the_logits_and_are_the_same():
    logits, goal, scale = drawn(1000, torch.float32)
    before = logits.clone()
    losses = loss_cpu.row_losses(logits, goal, None, 15.0)
    assert torch.equal(logits, before)
    assert torch.equal(losses, loss_cpu.row_losses(logits, goal, scale, 15.0))


@pytest.mark.parametrize("cap", [15.0, 95.0, ASYMMETRIC, None])
def test_large_logits_stay_finite_and_nan_stays_nan(cap):
    logits, goal, scale = drawn(40, torch.float32, spread=300.0)
    losses, gradient = exact(logits, goal, scale, cap)
    ours = logits.clone()
    torch.testing.assert_close(loss_cpu.row_losses(ours, goal, scale, cap).double(), losses, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.double(), gradient, rtol=1e-4, atol=2e-5)
    logits[0, 7] = torch.nan
    found = loss_cpu.row_losses(logits, goal, scale, cap)
    assert found[0].isnan() and found[1:].isfinite().all() and logits[0].isnan().all()


@pytest.mark.parametrize("goal", [-1, 1000])
def test_a_target_that_is_no_token_reads_no_foreign_memory(goal):
    logits, goals, scale = drawn(1000, torch.float32)
    goals[3] = goal
    with pytest.raises(IndexError, match=f"targets .*{goal}.* for a vocabulary of 1000"):
        loss_cpu.row_losses(logits, goals, scale, 15.0)


def test_threads_do_not_change_a_bit():
    results = []
    for threads in (1, 3):
        logits, goal, scale = drawn(1000, torch.bfloat16)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append((loss_cpu.row_losses(logits, goal, scale, 15.0), logits))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_head_uses_the_kernel_and_agrees_with_torch(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (50, 33))
    targets = torch.randint(-1, 33, (50,), generator=generator)

    def run() -> list[torch.Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(h, w, targets, 15.0)
        loss.backward()
        return [loss.detach(), h.grad, w.grad]

    calls = []
    kernel = loss_cpu.row_losses
    monkeypatch.setattr(loss_cpu, "row_losses", lambda *args: calls.append(1) or kernel(*args))
    ours = run()
    assert calls
    monkeypatch.setattr(loss_cpu, "computes", lambda logits: False)
    for a, b in zip(ours, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
