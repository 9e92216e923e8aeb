"""`gpu.bf16_tables`: the same numbers to the bit on a CPU, where sums are in fp32, and half the bytes."""

import pytest
import torch
from conftest import compose

from llm.errors import UserError
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.model.linear import enable_bf16_tables
from llm.model.lora import LoRA, add_adapter
from llm.model.qwen3 import Qwen3
from llm.model.qwen3_config import Qwen3Config
from llm.stages.device import DeviceOptions
from llm.stages.plan import check_switches

CPU = torch.device("cpu")
SHAPE = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "head_dim": 8, "n_embd": 32, "seq_len": 32, "vocab_size": 61}
MODERN = {"arch": "modern", "value_embeds": True, "residual_scalars": True, "smear": True, "backout": True}
FORMS = {
    "classic": {"arch": "classic"},
    "modern": MODERN,
    "n-grams and copies": MODERN | {"ngrams": (2,), "ngram_bos": 60, "copy_candidate": True, "copy_bos": 60},
}
IDS = torch.randint(61, (3, 33), generator=torch.Generator().manual_seed(0))


def network(form: str = "modern") -> GPT:
    net = Qwen3(Qwen3Config(**SHAPE)) if form == "qwen3" else GPT(GPTConfig(**SHAPE | FORMS[form]))
    net.init_weights(0)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):  # nothing stays zero
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    net.compute_dtype = torch.bfloat16
    return net


@pytest.mark.parametrize("form", [*FORMS, "qwen3"])
def test_loss_and_gradients_are_the_same_bits(form):
    losses, nets = [], [network(form), network(form)]
    found = enable_bf16_tables(nets[1])
    assert found == (1 if form in ("classic", "qwen3") else 2)
    for net in nets:
        for row in IDS:  # micro-batches, whose gradients are added in fp32
            losses.append(net(row[None, :-1], row[None, 1:]))
            losses[-1].backward()
    assert torch.equal(torch.stack(losses[:3]), torch.stack(losses[3:]))
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert q.grad.dtype == torch.float32 and torch.equal(p.grad, q.grad), name


def test_rows_are_in_bf16_while_gradients_are_on_only():
    net = network()
    enable_bf16_tables(net)
    table = net.value_embeds[next(iter(net.value_embeds))]
    assert table(IDS).dtype == torch.bfloat16 and table.weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(table(IDS), table.weight[IDS])


def test_tables_that_do_not_learn_stay():
    net = network()
    net.value_embeds.requires_grad_(False)
    assert enable_bf16_tables(net) == 1
    adapted = network()
    add_adapter(adapted, LoRA(2), 0)
    assert enable_bf16_tables(adapted) == 0


def prepared(net: GPT, compute: str, on: bool = True) -> str:
    options = DeviceOptions(compute, False, "auto", False, False, True, False, bf16_tables=on)
    return options.prepare(net, CPU, False, "pretrain", 1)


def test_the_switch_reaches_the_network_or_is_refused():
    net = network()
    assert "rows in bf16" not in prepared(net, "bf16", on=False) and not net.transformer.wte.in_bf16
    assert "rows in bf16: 2 tables" in prepared(net, "bf16") and net.transformer.wte.in_bf16
    with pytest.raises(UserError, match="gpu.bf16_tables=true: this trains in float32"):
        prepared(net, "fp32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["precision.compute=fp32"], "gpu.bf16_tables=true: goes with bf16, not with precision.compute=fp32"),
        (["arch=gpt2"], "gpu.bf16_tables=true: arch=gpt2 adds rows of two tables"),
        (["arch.ngrams=[2]", "arch.ngram_into=values"], "gpu.bf16_tables=true: arch.ngram_into=values adds rows"),
        (["model.lora.rank=4"], "gpu.bf16_tables=true: not made for adapters"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_switches(compose("train", "gpu.bf16_tables=true", *settings))
