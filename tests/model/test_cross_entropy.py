"""The chunked loss head and the one-node elementwise parts against their plain forms, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from llm.model import cross_entropy
from llm.model.cross_entropy import linear_cross_entropy
from llm.model.fused_ops import NORM_EPS, relu_squared, rms_norm
from llm.model.logit_bound import ASYMMETRIC

TOKENS, WIDTH, VOCAB = (3, 50), 24, 70


def inputs(dtype=torch.float32, masked=0.3):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*TOKENS, WIDTH, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=g).requires_grad_()
    targets = torch.randint(0, VOCAB, TOKENS, generator=g)
    targets[torch.rand(TOKENS, generator=g) < masked] = -1
    return hidden, weight, targets, torch.randn(TOKENS, generator=g)


def plain(hidden, weight, targets, cap, token_weights, reduction):
    logits = hidden.double() @ weight.double().T
    if cap is not None:
        logits = 23 * torch.sigmoid((logits + 5) / 7.5) if cap == ASYMMETRIC else cap * torch.tanh(logits / cap)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none").view(TOKENS)
    losses = losses if token_weights is None else losses * token_weights
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (targets >= 0).sum()}[reduction]


def gradients(loss, *leaves):
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view_as(loss) + 0.1
    return torch.autograd.grad(loss, leaves, upstream)


@pytest.mark.parametrize("kernel", ["our own", "chunk_loss", "fused_chunk_loss"])
@pytest.mark.parametrize("cap", [15.0, ASYMMETRIC])
@pytest.mark.parametrize("masked", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_equals_the_plain_form_in_float64(monkeypatch, reduction, weighted, masked, cap, kernel):
    if kernel != "our own":
        monkeypatch.setattr(cross_entropy.loss_cpu, "computes", lambda logits: False)
    monkeypatch.setattr(cross_entropy, "MIN_TOKENS", 8)  # several tiles and chunks, the last ones short
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {})
    monkeypatch.setattr(cross_entropy, "OTHER_CHUNK_ELEMENTS", (32 * len(inputs()[1]), 1))
    hidden, weight, targets, factors = inputs(masked=masked)
    token_weights = factors if weighted else None
    run = cross_entropy.fused_chunk_loss if kernel == "fused_chunk_loss" else cross_entropy.chunk_loss
    loss = linear_cross_entropy(hidden, weight, targets, cap, token_weights, reduction, run)
    exact = plain(hidden, weight, targets, cap, token_weights, reduction)
    torch.testing.assert_close(loss.double(), exact, atol=1e-5, rtol=1e-5)
    for got, want in zip(gradients(loss, hidden, weight), gradients(exact, hidden, weight), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["our own", "chunk_loss"])
@pytest.mark.parametrize("cap", [15.0, ASYMMETRIC, None])
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_several_goals_equal_the_sum_of_their_plain_forms(monkeypatch, masked, cap, kernel):
    """Goals that are none, and goals of one token that are equal, among them."""
    monkeypatch.setattr(cross_entropy, "MIN_TOKENS", 8)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {})
    monkeypatch.setattr(cross_entropy, "OTHER_CHUNK_ELEMENTS", (32 * len(inputs()[1]), 1))
    if kernel != "our own":
        monkeypatch.setattr(cross_entropy.loss_cpu, "computes", lambda logits: False)
    hidden, weight, targets, factors = inputs(masked=masked)
    goals = torch.stack([targets, targets.roll(1, 1), inputs(masked=0.9)[2].roll(2, 0)], dim=-1)
    goals[:, ::3, 1], goals[:, ::4, 2] = goals[:, ::3, 0], 0
    shares = torch.tensor([1.0, 0.5, 0.3]) * factors.abs().unsqueeze(-1)
    exact = 0.0
    for k in range(3):
        goal = torch.where(targets >= 0, goals[..., k], -1)
        exact = exact + plain(hidden, weight, goal, cap, shares[..., k].double(), "sum")
    loss = linear_cross_entropy(hidden, weight, goals, cap, shares)
    torch.testing.assert_close(loss.double(), exact, atol=1e-5, rtol=1e-5)
    for got, want in zip(gradients(loss, hidden, weight), gradients(exact, hidden, weight), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_all_tokens_masked_gives_zeros():
    hidden, weight, targets, _ = inputs(masked=1.1)
    loss = linear_cross_entropy(hidden, weight, targets, 15.0)
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_bf16_multiplies_in_bf16_and_keeps_fp32_losses():
    hidden, weight, targets, _ = inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets, 15.0)
    exact = plain(hidden, weight.bfloat16(), targets, 15.0, None, "sum")
    assert loss.dtype == torch.float32 and abs(loss.item() / exact.item() - 1) < 2e-3
    for got, want in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        assert got.dtype == want.dtype and (got - want).norm() < 1e-2 * want.norm()


def test_without_gradients_none_are_computed(monkeypatch):
    hidden, weight, targets, _ = inputs()
    seen, run = [], cross_entropy._run
    monkeypatch.setattr(cross_entropy, "_run", lambda *a, **kw: seen.append(run(*a, **kw)) or seen[-1])
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets, 15.0)
    assert seen[0][1] is None and seen[0][2] is None


@pytest.mark.parametrize(
    ("ours", "formula"),
    [
        (rms_norm, lambda x: x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()),
        (relu_squared, lambda x: torch.relu(x) ** 2),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_elementwise_parts_equal_their_formulas(ours, formula, dtype, tolerance):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 3, 16, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    upstream = torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype)
    y, exact = ours(x), formula(x.double())
    torch.testing.assert_close(y.double(), exact, atol=tolerance, rtol=tolerance)
    got, want = torch.autograd.grad(y, x, upstream)[0], torch.autograd.grad(exact, x, upstream.double())[0]
    torch.testing.assert_close(got.double(), want.double(), atol=2 * tolerance, rtol=2 * tolerance)


def test_norm_of_zeros_is_zero():
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x)
    y.sum().backward()
    assert not y.any() and x.grad.isfinite().all()
