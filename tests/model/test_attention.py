"""Windowed attention: every form against the plain masked one, outputs and gradients."""

import socket
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llm.errors import UserError
from llm.model import attention, attention_cpu
from llm.model.attention import attention_masks, banded_attention, causal_attention, choose_backend
from llm.model.cached_attention import attention_with_weight
from llm.model.config import GPTConfig
from llm.model.gpt import GPT

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


def starts_of(length, rows=2):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(length)) < 0.03


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


@pytest.mark.parametrize("kept", [512, 0])  # probabilities kept for the backward pass, or made again in it
@pytest.mark.parametrize("heads_bytes", [1 << 23, 1 << 17])  # all heads at once, or in groups
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("length", "window"), [*CASES, (1, None), (128, None), (300, None)])
def test_blocks_on_the_cpu_equal_a_mask(length, window, apart, heads_bytes, kept, monkeypatch):
    monkeypatch.setattr(attention_cpu, "KEPT_KEYS", kept)
    monkeypatch.setattr(attention_cpu, "HEADS_BYTES", heads_bytes)
    documents = starts_of(length).cumsum(1) if apart else None
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
    """Check what torch.compile relies on: shapes without running, gradients, no hidden writes."""
    q, k, v = inputs(140, torch.float32)[0]
    for window in (None, 16):
        torch.library.opcheck(attention_cpu._attention, (q, k, v, SCALE, window, None, True))


def test_grouped_heads_and_windows_that_reach_everything():
    tensors, _ = inputs(50, torch.float32, kv_heads=2)
    exact = [t.detach().double() for t in tensors]
    torch.testing.assert_close(causal_attention(*tensors, SCALE, 8).double(), masked(*exact, 8), atol=5e-6, rtol=1e-5)
    full = causal_attention(*tensors, SCALE)
    for window in (49, 50, 1000):
        assert torch.equal(causal_attention(*tensors, SCALE, window), full)


@pytest.fixture(params=["as it is written", pytest.param("compiled", marks=pytest.mark.slow)])
def flex(request, monkeypatch):
    """FlexAttention takes seconds to compile for every shape; as it is written it has the same masks to obey."""
    if request.param != "compiled":
        monkeypatch.setattr(attention, "_compiled_flex", lambda: attention.flex_attention)


@pytest.mark.slow
def test_flex_attention_compiled_equals_a_mask():
    """One shape with all that masks can hold."""
    check_backend("flex", 20, True, 2)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("window", [None, 20, 199])
def test_flex_attention_equals_a_mask(flex, window, apart, kv_heads):
    check_backend("flex", window, apart, kv_heads)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("window", [None, 20, 199])
@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
def test_backends_equal_a_mask(backend, window, apart, kv_heads):
    check_backend(backend, window, apart, kv_heads)


def check_backend(backend, window, apart, kv_heads):
    """Forward only: torch has no backward pass of FlexAttention for CPUs."""
    starts = starts_of(200) if apart else None
    tensors, _ = inputs(200, torch.float32, kv_heads)
    q, k, v = (t.detach() for t in tensors)
    mask = attention_masks([window, None], 200, starts, backend, CPU)[window]
    got = causal_attention(q, k, v, SCALE, window, mask, backend)
    want = masked(q, k, v, window, None if starts is None else starts.cumsum(1))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_what_flash_attention_3_is_asked_for(monkeypatch):
    """Its arguments, by a plain function of the same signature: no such GPU is needed."""

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
        assert causal and window_size[1] == 0
        return masked(q, k, v, window_size[0] if window_size[0] >= 0 else None) * (softmax_scale / SCALE)

    monkeypatch.setattr("llm.model.attention.flash_attn_func", flash_attn_func)
    (q, k, v), _ = inputs(60, torch.float32)
    for window in (None, 8, 59):
        got = causal_attention(q, k, v, SCALE, window, backend="flash3")
        torch.testing.assert_close(got, masked(q, k, v, window), atol=1e-5, rtol=1e-5)


def test_flash_attention_3_stays_within_the_compiled_graph(monkeypatch):
    """In the form of its wheels since autumn 2025: an autograd function over two operators whose shapes torch knows."""

    def weights(q, k, window: int):
        distance = torch.arange(q.size(1)).unsqueeze(1) - torch.arange(q.size(1))
        hidden = (distance < 0) | (distance > (window if window >= 0 else q.size(1)))
        scores = SCALE * torch.einsum("bthd,bshd->bhts", q, k)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)

    @torch.library.custom_op("fathom_test::flash_forward", mutates_args=())
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        return torch.einsum("bhts,bshd->bthd", weights(q, k, window), v).contiguous()

    @torch.library.custom_op("fathom_test::flash_backward", mutates_args=("dq", "dk", "dv"))
    def backward(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        window: int,
    ) -> None:
        p, dp = weights(q, k, window), torch.einsum("bthd,bshd->bhts", dout, v)
        ds = SCALE * p * (dp - (p * dp).sum(-1, keepdim=True))
        dq.copy_(torch.einsum("bhts,bshd->bthd", ds, k))
        dk.copy_(torch.einsum("bhts,bthd->bshd", ds, q))
        dv.copy_(torch.einsum("bhts,bthd->bshd", p, dout))

    forward.register_fake(lambda q, k, v, window: torch.empty_like(q))
    backward.register_fake(lambda dout, q, k, v, dq, dk, dv, window: None)

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, window):
            ctx.save_for_backward(q, k, v)
            ctx.window = window
            return torch.ops.fathom_test.flash_forward(q, k, v, window[0])

        @staticmethod
        def backward(ctx, dout):
            grads = [torch.empty_like(t) for t in ctx.saved_tensors]
            torch.ops.fathom_test.flash_backward(dout, *ctx.saved_tensors, *grads, ctx.window[0])
            return *grads, None

    def flash_attn_func(q, k, v, softmax_scale, causal, window_size):
        return Flash.apply(q, k, v, window_size)

    monkeypatch.setattr("llm.model.attention.flash_attn_func", flash_attn_func)
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    for window in (None, 8):
        tensors, grad = inputs(60, torch.float32)
        (compiled(*tensors, SCALE, window, backend="flash3") * grad).sum().backward()
        plain, _ = inputs(60, torch.float32)
        (masked(*plain, window) * grad).sum().backward()
        for got, want in zip(tensors, plain, strict=True):
            torch.testing.assert_close(got.grad, want.grad, atol=1e-5, rtol=1e-5)


CPU, GPU, BF16 = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16


def choose(asked="auto", device=GPU, dtype=BF16, head_dim=128, windows=True, documents=False, **more):
    return choose_backend(asked, device, dtype, head_dim, windows, documents, **more)


@pytest.fixture
def hopper(monkeypatch):
    """Pretend that there is a Hopper GPU, with everything installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("llm.model.attention.flash_attn_func", lambda *args: None)
    monkeypatch.setattr("llm.model.attention.has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("llm.model.attention.hub_answers", lambda: True)


def test_the_backend_is_the_best_that_runs(hopper, monkeypatch):
    assert choose(device=CPU) == choose(device=CPU, windows=False) == "cpu"
    assert choose(device=CPU, dtype=torch.float64) == choose("sdpa", device=CPU) == "sdpa"
    assert choose(device=torch.device("mps"), dtype=torch.float32) == "sdpa"
    assert choose() == choose(windows=False) == choose(fixed_shapes=False) == "flash3"
    assert choose(documents=True) == choose(dtype=torch.float32) == choose(head_dim=260) == "flex"
    assert choose(documents=True, fixed_shapes=False) == choose(dtype=torch.float32, windows=False) == "sdpa"
    assert choose(head_dim=12) == "sdpa" and choose("sdpa") == "sdpa" and choose("flex", windows=False) == "flex"
    monkeypatch.setattr("llm.model.attention.has_triton", lambda: False)
    assert choose(documents=True) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose() == "sdpa"


def test_flash_attention_3_from_the_hub(hopper, monkeypatch):
    def get_kernel(repo_id, *, version):
        assert (repo_id, version) == ("kernels-community/flash-attn3", 1)
        return SimpleNamespace(flash_attn_func=asked.append)

    asked = []
    monkeypatch.setattr("llm.model.attention.flash_attn_func", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "kernels", None)
    assert choose() == "flex"
    with pytest.raises(UserError, match="attention=flash3 needs .* the package flash_attn_3 or kernels"):
        choose("flash3")
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=lambda *_, **__: 1 / 0))  # nothing fits
    assert choose() == "flex"
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    assert choose(documents=True) == "flex"
    with monkeypatch.context() as patch:  # only a hub that answers is asked for a kernel
        patch.setattr("llm.model.attention.hub_answers", lambda: False)
        assert choose() == "flex"
    assert choose() == choose("flash3") == "flash3"
    assert attention.flash_attn_func == asked.append


def test_flash_attention_3_is_looked_for_where_it_may_be_used_only(hopper, monkeypatch):
    """Looking may fetch something: not for another kernel, for a card or for masks that it is not made for."""

    def has_flash3():
        raise AssertionError("was looked for")

    monkeypatch.setattr("llm.model.attention.has_flash3", has_flash3)
    assert choose("sdpa") == "sdpa" and choose("flex") == "flex" and choose(device=CPU) == "cpu"
    assert choose(documents=True) == choose(head_dim=260) == choose(dtype=torch.float32) == "flex"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose() == "flex"


def test_a_wheel_without_a_backward_pass_is_not_taken(hopper, monkeypatch):
    """Those for serving have the same names and none: training would fail at its first step."""
    monkeypatch.setattr("llm.model.attention.flash_attn_func", None)
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=print))
    for disabled, chosen in ((True, "flex"), (False, "flash3")):
        config = {"build_flags": {"FLASHATTENTION_DISABLE_BACKWARD": disabled}}
        monkeypatch.setitem(sys.modules, "flash_attn_config", SimpleNamespace(CONFIG=config))
        assert choose() == chosen


def test_a_hub_that_cannot_be_reached_holds_nothing_up(monkeypatch):
    """It accepts and says nothing, refuses, or is switched off; what answers, if only with an error, is there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not attention.hub_answers.__wrapped__(0.2)
    assert not attention.hub_answers.__wrapped__(30)  # refused at once
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers 501
    Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert attention.hub_answers.__wrapped__(30)
    server.server_close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not attention.hub_answers.__wrapped__(30)


def test_backends_that_cannot_run(hopper):
    with pytest.raises(UserError, match="attention=cpu needs a CPU and .* this is cuda:0 .*: set attention=auto"):
        choose("cpu")
    with pytest.raises(UserError, match="attention=flash3 needs a Hopper GPU"):
        choose("flash3", device=CPU)
    with pytest.raises(UserError, match="attention=flash3 needs .* no document masks"):
        choose("flash3", documents=True)
    with pytest.raises(UserError, match="attention=flex needs a CUDA GPU"):
        choose("flex", device=CPU)
    with pytest.raises(UserError, match="attention=flex needs .* steps of one shape"):
        choose("flex", fixed_shapes=False)


@pytest.mark.parametrize("bos_id", [None, 69])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flex_attention_is_one_graph_with_the_network(checkpointing, bos_id):
    """Compiled as for training, with another compiler behind: nothing of the network may fall out of the graph."""
    torch._dynamo.reset()
    features = {"arch": "modern", "window_pattern": "SL", "window_divisor": 2, "bos_id": bos_id}
    config = GPTConfig(3, 4, 4, 16, 64, 256, 70, **features)
    net = GPT(config).init_weights(0)
    net.activation_checkpointing = checkpointing
    ids = torch.randint(0, 70, (2, 256), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        net(ids)  # evaluation between the steps must leave nothing that training cannot use
    expected = net.hidden(ids)
    net.training_attention = "flex"
    net.training_forward_blocks = torch.compile(net.forward_blocks, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        got = net.hidden(ids, is_training=True)
        again = net.hidden(ids.roll(1, 0), is_training=True)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, expected.roll(1, 0), atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attentions_over_parts_of_the_keys_are_put_together_by_their_weights(dtype):
    q, k, v = (torch.randn(2, n, h, 16, dtype=dtype).transpose(1, 2) for n, h in ((5, 4), (30, 2), (30, 2)))
    seen = torch.rand(2, 5, 30) < 0.5
    seen[1, 3, :12] = False  # a query that sees nothing of the first part
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.unsqueeze(1), scale=0.3, enable_gqa=True)
    parts = [
        attention_with_weight(q.transpose(1, 2), k[:, :, part], v[:, :, part], seen[..., part], 0.3)
        for part in (slice(0, 12), slice(12, 30))
    ]
    weights = torch.stack([weight for _, weight in parts]).softmax(dim=0).unsqueeze(-1)
    got = sum(y * weight for (y, _), weight in zip(parts, weights, strict=True))
    torch.testing.assert_close(got, whole.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert parts[0][1][1, 3].eq(-torch.inf).all()
