"""Queries, keys and values by one product: the same network, and where it is left alone."""

import pytest
import torch
from conftest import compose

from llm.errors import UserError
from llm.model.config import GPTConfig
from llm.model.fp8 import fp8_linear
from llm.model.gpt import GPT
from llm.model.joint_qkv import enable_joint_qkv, joint_product
from llm.model.linear import Linear, enable_fp8
from llm.model.lora import LoRA, add_adapter
from llm.model.qwen3 import Qwen3
from llm.model.qwen3_config import Qwen3Config
from llm.stages.device import DeviceOptions
from llm.stages.plan import check_switches

CPU = torch.device("cpu")
IDS = torch.randint(0, 100, (2, 33), generator=torch.Generator().manual_seed(0))


def network(arch: str = "modern") -> GPT:
    """Two layers with grouped heads, of which nothing is zero."""
    features = {"value_embeds": True, "residual_scalars": True} if arch.startswith("modern") else {}
    features |= {"qk_dim": 8} if arch.endswith("narrow keys") else {}
    build, shape = (Qwen3, Qwen3Config) if arch == "qwen3" else (GPT, GPTConfig)
    net = build(shape(2, 2, 1, 16, 32, 64, 100, arch=arch.split()[0], **features)).init_weights(0)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    return net


def gradients(net: GPT) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    net.zero_grad()
    loss = net(IDS[:, :-1], IDS[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("arch", ["modern", "modern with narrow keys", "classic", "qwen3"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_loss_and_every_gradient_are_those_of_three_products(arch, again):
    net = network(arch).double()
    net.compute_dtype, net.activation_checkpointing = torch.float64, again
    names, before = list(net.state_dict()), net(IDS)
    loss, want = gradients(net)
    assert enable_joint_qkv(net) == 2 and list(net.state_dict()) == names
    joint_loss, got = gradients(net)
    torch.testing.assert_close(joint_loss, loss, atol=1e-12, rtol=0)
    for name, grad in want.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(got[name], grad, atol=1e-12, rtol=1e-9, msg=name)
    with torch.no_grad():
        assert torch.equal(net(IDS), before.detach())


def test_one_product_is_made_where_three_were(monkeypatch):
    net, shapes = network(), []
    plain = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return plain(x, weight, bias)

    monkeypatch.setattr("torch.nn.functional.linear", linear)
    net(IDS[:, :-1], IDS[:, 1:])
    assert shapes.count((32, 32)) == 2 * 2 and shapes.count((16, 32)) == 2 * 2  # q and c_proj, k and v
    shapes.clear()
    enable_joint_qkv(net)
    net(IDS[:, :-1], IDS[:, 1:])
    assert shapes.count((64, 32)) == 2 and shapes.count((32, 32)) == 2 and (16, 32) not in shapes


def test_in_fp8_it_is_one_product_too():
    layers, x = (
        [Linear(32, n) for n in (32, 16, 16)],
        torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)),
    )
    for i, layer in enumerate(layers):
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(i))
        layer.fp8 = True
    got, x = joint_product(x.bfloat16(), layers), x.bfloat16()
    assert torch.equal(torch.cat(got, -1), fp8_linear(x, torch.cat([layer.weight for layer in layers])))
    short = joint_product(x[:, :3], layers)  # 6 tokens, which the kernels refuse
    torch.testing.assert_close(short[1], torch.nn.functional.linear(x[:, :3], layers[1].weight.bfloat16()))
    layers[1].fp8 = False  # as one whose sides the kernels refuse
    plain = torch.nn.functional.linear(x, layers[0].weight.bfloat16())
    torch.testing.assert_close(joint_product(x, layers)[0], plain)
    net = network()
    net.compute_dtype = torch.bfloat16
    plain = net(IDS[:, :-1], IDS[:, 1:])
    enable_fp8(net)
    enable_joint_qkv(net)
    assert abs(net(IDS[:, :-1], IDS[:, 1:]) - plain) < 0.05 * plain


def test_layers_with_biases_or_adapters_are_left_alone():
    assert enable_joint_qkv(network("gpt2")) == 0
    net = network()
    add_adapter(net, LoRA(2), 0)
    assert enable_joint_qkv(net) == 0 and not any(block.attn.joint_qkv for block in net.transformer.h)


def prepared(net: GPT, draws_answers: bool = False, **switches) -> str:
    options = DeviceOptions("fp32", False, "auto", False, False, True, draws_answers, **switches)
    return options.prepare(net, CPU, False, "pretrain", 1)


def test_the_switch_reaches_the_network_and_not_where_an_engine_draws():
    net = network()
    assert "one product" not in prepared(net) and not net.transformer.h[0].attn.joint_qkv
    prepared(net, draws_answers=True, joint_qkv=True)
    assert not net.transformer.h[0].attn.joint_qkv
    assert "q, k, v in one product: 2 layers" in prepared(net, joint_qkv=True)
    assert all(block.attn.joint_qkv for block in net.transformer.h)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["arch=gpt2", "gpu.joint_qkv=true"], "gpu.joint_qkv=true: arch=gpt2 has biases"),
        (["model.lora.rank=4", "gpu.joint_qkv=true"], "gpu.joint_qkv=true: not made for adapters"),
        (["compile=false", "gpu.tuned_products=true"], "gpu.tuned_products=true: compile=false compiles no product"),
    ],
)
def test_a_switch_without_effect_is_refused(settings, message):
    check_switches(compose("train", *settings[:-1]))
    with pytest.raises(UserError, match=message):
        check_switches(compose("train", *settings))
