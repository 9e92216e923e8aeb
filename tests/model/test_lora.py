"""Low-rank adapters: nothing changes at first, gradients are those of the full matrices, merging changes nothing."""

import pytest
import torch
from test_gpt import ARCHS, config, random_net

from llm.errors import UserError
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.inference.weights import in_compute_dtype
from llm.model import decode_cpu
from llm.model.adapters import with_adapters
from llm.model.lora import LoRA, adapter_weights, add_adapter, base_weights, merged, targeted
from llm.optim.build import build_optimizer

IDS = torch.arange(24).view(2, 12) * 7 % 70
ALL = ("attention", "mlp", "head", "embedding", "value_embeds")


def targets_of(arch: str) -> tuple[str, ...]:
    lacking = {"classic": {"value_embeds"}, "gpt2": {"head", "value_embeds"}, "gpt2 untied": {"value_embeds"}}
    return tuple(target for target in ALL if target not in lacking.get(arch, ()))


def adapted(arch: str, rank=3, targets=None):
    """A network of random weights with an adapter whose B is not zero."""
    net = random_net(config(**ARCHS[arch]))
    add_adapter(net, LoRA(rank, 6.0, targets or targets_of(arch)), seed=1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in adapter_weights(net).items():
            if name.endswith("lora_B"):
                weight.add_(torch.randn(weight.shape, generator=g) * 0.05)
    return net


def test_a_scalar_head_is_trained_beside_an_adapter():
    net = add_adapter(random_net(config(**ARCHS["modern"], scalar_head=True)), LoRA(2))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {*adapter_weights(net), "scalar_head.weight"}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_new_adapter_changes_nothing(arch):
    net = random_net(config(**ARCHS[arch]))
    names, before = set(net.state_dict()), net(IDS)
    add_adapter(net, LoRA(4, targets=targets_of(arch)))
    assert torch.equal(net(IDS), before)
    assert set(base_weights(net)) == names
    assert {p.requires_grad for p in net.parameters()} == {True, False}


@pytest.mark.parametrize("int8", [False, True])
def test_a_copy_with_an_adapter_computes_in_the_same_format(int8):
    """Keeps 8 bits where they were asked for: one that is forgotten costs the speed that they are for."""
    net = adapted("classic")
    net.compute_dtype, net.int8 = torch.bfloat16, int8
    for copy in (merged(net), with_adapters(merged(net), {}, torch.float32), in_compute_dtype(merged(net))):
        assert copy is not net and (copy.compute_dtype, copy.int8) == (torch.bfloat16, int8)


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_are_those_of_the_full_matrices(arch):
    """With W' = W + s B A the chain rule gives dA = s B^T dW' and dB = s dW' A^T."""
    net, whole = adapted(arch), merged(adapted(arch))
    for p in whole.parameters():
        p.requires_grad_(True)
    net(IDS, IDS.roll(-1, 1), reduction="sum").backward()
    whole(IDS, IDS.roll(-1, 1), reduction="sum").backward()
    full = dict(whole.named_modules())
    for name, module in targeted(net, net.lora):
        d_weight, scale = full[name].weight.grad, net.lora.scale
        for found, wanted in (
            (module.lora_A.grad, scale * module.lora_B.detach().T @ d_weight),
            (module.lora_B.grad, scale * d_weight @ module.lora_A.detach().T),
        ):
            torch.testing.assert_close(found, wanted, atol=2e-5 * wanted.abs().max().item(), rtol=1e-4, msg=name)
    assert all(p.grad is None for p in net.parameters() if not p.requires_grad)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_merged_network_computes_the_same(arch):
    net = adapted(arch)
    one = merged(net)
    torch.testing.assert_close(one(IDS), net(IDS), atol=2e-5, rtol=1e-4)
    assert one.lora is None and not adapter_weights(one)
    norms = [name for name, p in net.named_parameters() if p.ndim == 1]
    assert all(one.state_dict()[n].data_ptr() == net.state_dict()[n].data_ptr() for n in norms)  # shared
    assert merged(one) is one


def test_bf16_computes_nearly_the_same():
    net = adapted("modern")
    exact = net(IDS)
    net.compute_dtype = torch.bfloat16
    assert (net(IDS) - exact).abs().mean() < 0.05
    assert (in_compute_dtype(net)(IDS) - exact).abs().mean() < 0.05


class Words:
    """Tokenizer of a vocabulary without tools."""

    has_tools, stop_ids, vocab_size = False, (), 70


def test_generation_takes_the_merged_weights():
    """The decoding kernel reads matrices as they are, so it gets a network without an adapter."""
    net = adapted("modern")
    assert not decode_cpu.supports(net) and decode_cpu.supports(merged(net))
    prompt = IDS[0, :5].tolist()
    answer = Engine(net, Words()).generate([prompt], SamplingParams(0.0, max_new_tokens=6), 1)[0][0].ids
    ids = list(prompt)
    for _ in range(6):
        ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()))
    assert answer == ids[5:]


def test_the_optimizer_keeps_state_of_the_adapter_alone():
    net = adapted("modern", targets=("attention",))
    optimizer = build_optimizer(net, None, lr_scale=0.02)
    (group,) = optimizer.param_groups
    assert group["kind"] == "adamw" and group["lr"] == net.lora.lr and group["weight_decay"] == 0
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    net(IDS, IDS.roll(-1, 1)).backward()
    optimizer.step()
    after = net.state_dict()
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(adapter_weights(net))
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert held == 2 * sum(weight.numel() for weight in adapter_weights(net).values())


def test_targets_that_the_model_lacks_are_refused():
    for arch, target in (("gpt2", "head"), ("classic", "value_embeds")):
        with pytest.raises(UserError, match=f"model.lora.targets: {target} has no matrices"):
            add_adapter(random_net(config(**ARCHS[arch])), LoRA(2, targets=(target,)))
