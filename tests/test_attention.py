"""Windowed attention: every form against the plain masked one, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F

from llm import attention_cpu
from llm.attention import banded_attention, cached_attention, causal_attention, choose_backend, flash3, flex
from llm.errors import UserError

SCALE = 0.3


def masked(q, k, v, window=None, documents=None):
    """Plain attention (B, T, H, D) with a mask of window and documents."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    distance = torch.arange(q.size(2)).unsqueeze(1) - torch.arange(q.size(2))
    mask = (distance >= 0) & (distance <= (q.size(2) if window is None else window))
    if documents is not None:
        mask = (mask & (documents.unsqueeze(2) == documents.unsqueeze(1))).unsqueeze(1)
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


def documents_of(length, rows=2):
    starts = torch.rand(rows, length, generator=torch.Generator().manual_seed(length)) < 0.03
    return starts.cumsum(1)


@pytest.mark.parametrize("kept", [512, 0])  # probabilities kept for the backward pass, or made again in it
@pytest.mark.parametrize("heads_bytes", [1 << 23, 1 << 17])  # all heads at once, or in groups
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("length", "window"), [*CASES, (1, None), (128, None), (300, None)])
def test_blocks_on_the_cpu_equal_a_mask(length, window, apart, heads_bytes, kept, monkeypatch):
    monkeypatch.setattr(attention_cpu, "KEPT_KEYS", kept)
    monkeypatch.setattr(attention_cpu, "HEADS_BYTES", heads_bytes)
    documents = documents_of(length) if apart else None
    tensors, grad = inputs(length, torch.float32)
    exact, exact_grad = inputs(length)
    got = causal_attention(*tensors, SCALE, window, documents, backend="cpu")
    want = masked(*exact, window, documents)
    torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=1e-5)
    ours, theirs = torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, exact, exact_grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_torch(dtype, window):
    """Large scores, where a softmax of rounded products would lose three times as much."""
    tensors, grad = inputs(300, dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    theirs = [t.detach().clone().requires_grad_() for t in tensors]

    def errors(call, of):
        got = call(*of)
        values = [got, *torch.autograd.grad(got, of, grad)]
        assert all(value.dtype == dtype for value in values)
        return [(a.double() - b).norm() / b.norm() for a, b in zip(values, want, strict=True)]

    y = masked(*exact, window)
    want = [y, *torch.autograd.grad(y, exact, grad.double())]
    torchs = errors(lambda q, k, v: masked(q, k, v, window), theirs)
    ours = errors(lambda q, k, v: causal_attention(q, k, v, SCALE, window), tensors)
    for error, reference in zip(ours, torchs, strict=True):
        assert error < 1.5 * reference < 0.02


def test_the_operator_is_well_formed():
    """What torch.compile relies on: shapes without running, gradients, no hidden writes."""
    q, k, v = (
        t.detach().flatten(0, 1).transpose(0, 1).contiguous().requires_grad_() for t in inputs(140, torch.float32)[0]
    )
    for window in (None, 16):
        torch.library.opcheck(attention_cpu._attention, (q, k, v, SCALE, window, None))


def test_grouped_heads_and_windows_that_reach_everything():
    tensors, _ = inputs(50, torch.float32, kv_heads=2)
    exact = [t.detach().double() for t in tensors]
    torch.testing.assert_close(causal_attention(*tensors, SCALE, 8).double(), masked(*exact, 8), atol=5e-6, rtol=1e-5)
    full = causal_attention(*tensors, SCALE)
    for window in (49, 50, 1000):
        assert torch.equal(causal_attention(*tensors, SCALE, window), full)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_flex_attention_equals_a_mask(window, apart, kv_heads):
    """Forward only: torch has no backward pass of it for CPUs."""
    documents = documents_of(200) if apart else None
    tensors, _ = inputs(200, torch.float32, kv_heads)
    q, k, v = (t.detach() for t in tensors)
    got = flex(*(t.transpose(1, 2) for t in (q, k, v)), SCALE, window, documents).transpose(1, 2)
    torch.testing.assert_close(got, masked(q, k, v, window, documents), atol=1e-5, rtol=1e-5)


def test_what_flash_attention_3_is_asked_for(monkeypatch):
    """Its arguments, by a plain function of the same signature: no such GPU is needed."""

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
        assert causal and window_size[1] == 0
        return masked(q, k, v, window_size[0] if window_size[0] >= 0 else None) * (softmax_scale / SCALE)

    monkeypatch.setattr("llm.attention.flash3", lambda: flash_attn_func)
    (q, k, v), _ = inputs(60, torch.float32)
    for window in (None, 8, 59):
        got = causal_attention(q, k, v, SCALE, window, backend="flash3")
        torch.testing.assert_close(got, masked(q, k, v, window), atol=1e-5, rtol=1e-5)


def test_the_backend_is_the_best_that_runs():
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    assert choose_backend(cpu, bf16, special=True) == choose_backend(cpu, bf16, special=False) == "cpu"
    assert choose_backend(cpu, torch.float64, special=True) == "sdpa"
    assert choose_backend(cpu, bf16, special=True, asked="sdpa") == "sdpa"
    with pytest.raises(UserError, match="attention=flash3 needs a Hopper GPU"):
        choose_backend(cpu, bf16, special=True, asked="flash3")
    with pytest.raises(UserError, match="attention=flex needs a CUDA GPU"):
        choose_backend(cpu, bf16, special=True, asked="flex")
    assert flash3() is None or callable(flash3())


def test_a_window_keeps_less_memory_than_a_mask():
    """Saved for the backward pass: nothing that grows with T x T."""

    def saved(call, length):
        tensors, _ = inputs(length, torch.float32)
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.nbytes) or t, lambda t: t):
            call(*tensors)
        return sum(held)

    def windowed(q, k, v):
        return causal_attention(q, k, v, SCALE, 512)

    assert saved(windowed, 4096) == pytest.approx(2 * saved(windowed, 2048), rel=0.03)
    assert saved(windowed, 4096) < 0.2 * saved(lambda q, k, v: masked(q, k, v, 512), 4096)


def test_cached_attention_sees_the_window_only():
    tensors, _ = inputs(30, torch.float32)
    q, k, v = (t.detach() for t in tensors)
    whole = masked(q, k, v, 8)
    at = torch.tensor([[29], [17]])
    query = q[torch.arange(2).unsqueeze(1), at]
    got = cached_attention(query, k, v, at, SCALE, 8)
    torch.testing.assert_close(got[:, 0], torch.stack([whole[0, 29], whole[1, 17]]), atol=1e-5, rtol=1e-5)
