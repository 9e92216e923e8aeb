"""Windowed attention: every form against the plain masked one, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F

from llm.attention import banded_attention, cached_attention, causal_attention

SCALE = 0.3


def masked(q, k, v, window):
    """Plain attention (B, T, H, D) with the window as a (T, T) mask."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    distance = torch.arange(q.size(2)).unsqueeze(1) - torch.arange(q.size(2))
    mask = (distance >= 0) & (distance <= window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True).transpose(1, 2)


def inputs(length, dtype=torch.float64, kv_heads=4):
    g = torch.Generator().manual_seed(length)
    shapes = [(2, length, heads, 16) for heads in (4, kv_heads, kv_heads, 4)]
    q, k, v, grad = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return [t.requires_grad_() for t in (q, k, v)], grad


def banded(q, k, v, scale, window):
    return banded_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale, window).transpose(1, 2)


# lengths that are and are not multiples of the window, windows of odd size, a window just shorter than the text
CASES = [(40, 8), (40, 7), (300, 64), (130, 128), (129, 127), (513, 128), (9, 1)]


@pytest.mark.parametrize("form", [banded, causal_attention])
@pytest.mark.parametrize(("length", "window"), CASES)
def test_windows_equal_a_mask(form, length, window):
    dtype = torch.float64 if form is banded else torch.float32
    tensors, grad = inputs(length, dtype)
    exact, exact_grad = inputs(length)
    want = masked(*exact, window)
    got = form(*tensors, SCALE, window)
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 5e-6, "rtol": 1e-5}
    torch.testing.assert_close(got.double(), want, **tolerance)
    ours, theirs = torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, exact, exact_grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_windows_in_low_precision(dtype):
    tensors, grad = inputs(300, dtype)
    exact, exact_grad = inputs(300)
    got, want = causal_attention(*tensors, SCALE, 64), masked(*exact, 64)
    assert got.dtype == dtype and (got - want).abs().max() < 0.02
    for a, b in zip(torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, exact, exact_grad), strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_grouped_heads_and_windows_that_reach_everything():
    tensors, _ = inputs(50, torch.float32, kv_heads=2)
    exact = [t.detach().double() for t in tensors]
    torch.testing.assert_close(causal_attention(*tensors, SCALE, 8).double(), masked(*exact, 8), atol=5e-6, rtol=1e-5)
    full = causal_attention(*tensors, SCALE)
    for window in (49, 50, 1000):
        assert torch.equal(causal_attention(*tensors, SCALE, window), full)


def test_a_window_keeps_less_memory_than_a_mask():
    """Saved for the backward pass: nothing that grows with T x T."""

    def saved(call, length):
        tensors, _ = inputs(length, torch.float32)
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.nbytes) or t, lambda t: t):
            call(*tensors)
        return sum(held)

    def windowed(q, k, v):
        return causal_attention(q, k, v, SCALE, 64)

    assert saved(windowed, 1024) == pytest.approx(2 * saved(windowed, 512), rel=0.03)
    assert saved(windowed, 1024) < 0.7 * saved(lambda q, k, v: masked(q, k, v, 64), 1024)


def test_cached_attention_sees_the_window_only():
    tensors, _ = inputs(30, torch.float32)
    q, k, v = (t.detach() for t in tensors)
    whole = masked(q, k, v, 8)
    at = torch.tensor([[29], [17]])
    query = q[torch.arange(2).unsqueeze(1), at]
    got = cached_attention(query, k, v, at, SCALE, 8)
    torch.testing.assert_close(got[:, 0], torch.stack([whole[0, 29], whole[1, 17]]), atol=1e-5, rtol=1e-5)
