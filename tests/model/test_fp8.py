"""fp8 products against exact ones: the kernel call of a GPU, which the CPU runs slowly but in the same formats."""

import pytest
import torch

from llm.errors import UserError
from llm.model.config import GPTConfig
from llm.model.fp8 import can_fp8, fp8_linear, takes_fp8
from llm.model.gpt import GPT
from llm.model.linear import enable_fp8
from llm.stages.device import use_fp8
from llm.stages.plan import check_fp8


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


def test_elsewhere_it_says_so_and_changes_nothing():
    net, cpu = GPT(GPTConfig(1, 1, 1, 16, 16, 8, 70)).init_weights(0), torch.device("cpu")
    with pytest.raises(UserError, match="precision.fp8=true: works beside bf16 only"):
        check_fp8(net.compute_dtype, is_fsdp=False)
    with pytest.raises(UserError, match="precision.fp8=true: not tested with strategy=fsdp"):
        check_fp8(torch.bfloat16, is_fsdp=True)
    net.compute_dtype = torch.bfloat16
    assert not can_fp8(cpu) and "cpu has no fp8" in use_fp8(net, cpu)
    assert not any(getattr(m, "fp8", False) for m in net.modules())
