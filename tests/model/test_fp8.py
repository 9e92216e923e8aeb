"""fp8 products against exact ones: the kernel call of a GPU, which the CPU runs slowly but in the same formats."""

import pytest
import torch
from conftest import compose

from llm.errors import UserError
from llm.model import cross_entropy
from llm.model.config import GPTConfig
from llm.model.cross_entropy import Products, linear_cross_entropy
from llm.model.fp8 import HeadProducts, can_fp8, fp8_linear, takes_fp8
from llm.model.gpt import GPT
from llm.model.linear import enable_fp8
from llm.stages import device
from llm.stages.device import use_fp8
from llm.stages.plan import check_fp8, check_switches


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def test_product_and_gradients_are_close():
    g = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(s, generator=g) for s in ((2, 48, 64), (32, 64), (2, 48, 32)))
    x, w = x.bfloat16().requires_grad_(), w.requires_grad_()
    y = fp8_linear(x, w)
    assert y.shape == (2, 48, 32) and y.dtype == torch.bfloat16
    dx, dw = torch.autograd.grad(y, (x, w), grad.bfloat16())
    assert dx.dtype == torch.bfloat16 and dw.dtype == torch.float32 and dw.shape == w.shape
    exact_x, exact_w, exact_grad = x.detach().double(), w.detach().double(), grad.double()
    assert relative(y, exact_x @ exact_w.T) < 0.05
    assert relative(dx, exact_grad @ exact_w) < 0.08  # e5m2 has two bits of fraction
    assert relative(dw, exact_grad.flatten(0, 1).T @ exact_x.flatten(0, 1)) < 0.08


def test_numbers_of_tokens_that_the_kernels_refuse_stay_in_bf16():
    assert takes_fp8(torch.zeros(2, 48, 64)) and not takes_fp8(torch.zeros(1, 17, 64))


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e4])
def test_any_size_of_values(size):
    x, w = torch.full((16, 16), size).bfloat16(), torch.eye(16)
    torch.testing.assert_close(fp8_linear(x, w), x, rtol=0.07, atol=0)


def test_a_network_trains_in_fp8_and_evaluates_without():
    """Gradients of every parameter are those of bf16 up to rounding: a product that is left out of the backward pass,
    transposed or scaled wrongly gives finite gradients too.
    """
    net = GPT(GPTConfig(2, 1, 1, 32, 32, 16, 100, arch="modern", value_embeds=True)).init_weights(0)
    net.compute_dtype = torch.bfloat16
    ids = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
        before = net(ids[:, :-1])
    plain = net(ids[:, :-1], ids[:, 1:])
    plain.backward()
    want = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    assert enable_fp8(net) == 2 * 6  # all but the gates
    rounded = net(ids[:, :-1], ids[:, 1:])
    assert rounded != plain and abs(rounded - plain) < 0.05 * plain
    rounded.backward()
    for name, p in net.named_parameters():
        limit = 0.3 if len(p) > 1 else 0.6  # a gate's gradient is a small difference of large numbers
        assert want[name].norm() > 0 and relative(p.grad, want[name]) < limit, name
    with torch.no_grad():
        assert torch.equal(net(ids[:, :-1]), before)


@pytest.mark.parametrize("many", [False, True])
def test_a_heads_losses_and_gradients_are_close_in_several_chunks(many, monkeypatch):
    """Losses come from logits in fp8, and both gradients from fp8 products: 768 tokens, 256 at a time."""
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", (1, 1))
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn((768, 64), generator=g).bfloat16(), torch.randn((96, 64), generator=g) / 8
    targets = torch.randint(0, 96, (768, 2) if many else (768,), generator=g)
    factors = torch.rand((768, 2), generator=g) if many else None
    found = []
    for products in (Products, HeadProducts):
        hidden, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = linear_cross_entropy(hidden, weight, targets, 15.0, factors, products=products)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    (loss, dx, dw), (loss8, dx8, dw8) = found
    assert loss8 != loss and loss8.item() == pytest.approx(loss.item(), rel=0.01)
    assert dx8.dtype == torch.bfloat16 and 0 < relative(dx8, dx) < 0.1
    assert dw8.dtype == torch.float32 and 0 < relative(dw8, dw) < 0.1


@pytest.mark.parametrize(("tokens", "vocab"), [(32, 90), (17, 96)])
def test_sizes_that_the_kernels_refuse_leave_the_head_in_bf16(tokens, vocab):
    x, w, targets = torch.ones(tokens, 64).bfloat16(), torch.eye(vocab, 64), torch.zeros(tokens, dtype=torch.long)
    losses = [linear_cross_entropy(x, w, targets, None, products=kind) for kind in (Products, HeadProducts)]
    assert losses[0] == losses[1]


def test_a_network_trains_its_head_in_fp8_and_evaluates_without(monkeypatch):
    net = GPT(GPTConfig(2, 1, 1, 32, 32, 16, 96, arch="modern")).init_weights(0)
    net.compute_dtype = torch.bfloat16
    ids = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(net.lm_head.weight, generator=torch.Generator().manual_seed(1))
    plain = net(ids[:, :-1], ids[:, 1:])
    monkeypatch.setattr(device, "can_fp8", lambda device: True)
    assert use_fp8(net, torch.device("cpu"), with_head=True) == "fp8: 12 matrices and the head"
    for layer in net.modules():
        layer.fp8 = False
    rounded = net(ids[:, :-1], ids[:, 1:])
    assert rounded != plain and rounded.item() == pytest.approx(plain.item(), rel=0.02)
    with torch.no_grad():
        assert net(ids[:, :-1], ids[:, 1:]) == plain


def test_a_head_in_fp8_goes_with_matrices_in_fp8_only():
    check_switches(compose("train", "precision.fp8=true", "gpu.fp8_head=true"))
    with pytest.raises(UserError, match="gpu.fp8_head=true: goes with precision.fp8=true only"):
        check_switches(compose("train", "gpu.fp8_head=true"))


def test_elsewhere_it_says_so_and_changes_nothing():
    net, cpu = GPT(GPTConfig(1, 1, 1, 16, 16, 8, 70)).init_weights(0), torch.device("cpu")
    with pytest.raises(UserError, match="precision.fp8=true: works beside bf16 only"):
        check_fp8(net.compute_dtype, is_fsdp=False)
    with pytest.raises(UserError, match="precision.fp8=true: not tested with strategy=fsdp"):
        check_fp8(torch.bfloat16, is_fsdp=True)
    net.compute_dtype = torch.bfloat16
    assert not can_fp8(cpu) and "cpu has no fp8" in use_fp8(net, cpu)
    assert not any(getattr(m, "fp8", False) for m in net.modules())
