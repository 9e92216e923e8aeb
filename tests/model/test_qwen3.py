"""arch=qwen3 against transformers' Qwen3 and Llama: logits, gradients, cache, folders both ways."""

import pytest
import torch
from conftest import compose
from safetensors.torch import load_file

from llm.checkpoint.model_folder import load_model_folder, save_model_folder
from llm.checkpoint.names import file_name
from llm.errors import UserError
from llm.inference import Engine, SamplingParams
from llm.model import decode_cpu
from llm.model.cached_attention import SlotPass
from llm.model.config import flops_per_token, num_params
from llm.model.lora import DEFAULT_TARGETS, LoRA, targeted
from llm.model.qwen3 import Qwen3
from llm.model.qwen3_config import Qwen3Config
from llm.optim.build import build_optimizer
from llm.scaling.rules import model_config
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.compression import SAMPLE_TEXTS

transformers = pytest.importorskip("transformers")
FORMS = {
    "tied": {"tied": True},
    "untied": {},
    "one key head": {"n_kv_head": 1},
    "wide heads": {"n_embd": 48},
    "llama": {"qk_norm": False, "norm_eps": 1e-5, "rope_base": 10_000.0},
}


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(SAMPLE_TEXTS.values(), 333)


def random_net(**changes) -> Qwen3:
    """Every weight random, norms too: weights of 1 would hide where they are missing."""
    shape = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_embd": 64, "seq_len": 96, "mlp_width": 80}
    net = Qwen3(Qwen3Config(**(shape | {"vocab_size": 333} | changes))).init_weights(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return net


@pytest.fixture(params=FORMS)
def pair(request, tok, tmp_path):
    """Our network, and what transformers makes of its folder."""
    net = random_net(**FORMS[request.param])
    save_model_folder(tmp_path / "model", net, tok)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(theirs).__name__ == ("LlamaForCausalLM" if request.param == "llama" else "Qwen3ForCausalLM")
    assert not any(info.values()), info
    return net, theirs.eval(), tmp_path / "model"


def test_logits_and_gradients_are_those_of_transformers(pair):
    net, theirs, folder = pair
    ids = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(1))  # not the token that pads
    ours = net(ids)
    expected = theirs(ids).logits
    assert torch.allclose(ours, expected, atol=1e-5), (ours - expected).abs().max()
    loss = net(ids[:, :-1], ids[:, 1:])
    loss.backward()
    theirs(ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in net.named_parameters():
        grad = grads[file_name(name, net.config)]
        assert (p.grad[: len(grad)] - grad).abs().max() <= 1e-4 * grad.abs().max(), name
    assert len(grads) == len(list(net.parameters()))


@torch.no_grad()
def test_a_folder_is_read_again(pair):
    net, _, folder = pair
    ids = torch.randint(333, (1, 40))
    loaded, _ = load_model_folder(folder)
    assert type(loaded) is Qwen3 and loaded.config == net.config and torch.equal(loaded(ids), net(ids))
    names = set(load_file(folder / "model.safetensors"))
    assert "model.layers.2.mlp.gate_proj.weight" in names and ("lm_head.weight" in names) is not net.config.tied


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_decoding_with_a_cache_is_the_full_pass(form):
    net = random_net(**FORMS[form])
    ids, cache = torch.randint(333, (2, 30)), net.new_cache(2, 30)
    full, parts = net(ids), []
    for start, stop in ((0, 11), (11, 12), (12, 30)):
        one_pass = SlotPass(cache, 0, 2)
        parts.append(net(ids[:, start:stop], cache=one_pass))
        cache.lengths += stop - start
    assert torch.allclose(torch.cat(parts, dim=1), full, atol=1e-5)


@torch.no_grad()
def test_the_engine_draws_what_transformers_does_and_the_kernel_stays_out(pair, tok):
    net, theirs, _ = pair
    assert not decode_cpu.supports(net)
    prompt = torch.randint(300, (9,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    found = Engine(net, tok).generate([prompt], SamplingParams(temperature=0.0, max_new_tokens=12))[0][0]
    assert found.ids == expected


@pytest.mark.parametrize("form", FORMS)
def test_counts_are_those_of_the_network(form):
    net = random_net(**FORMS[form])
    c = net.config
    assert num_params(c)["total"] == sum(p.numel() for p in net.parameters())
    blocks = sum(p.numel() for p in net.transformer.h.parameters())
    head = c.padded_vocab_size * c.n_embd
    assert flops_per_token(c) == 6 * (blocks + head) + 12 * c.n_layer * c.n_head * c.head_dim * c.seq_len


def test_published_size():
    """Qwen3-0.6B: 596,049,920 parameters in its model.safetensors."""
    c = Qwen3Config(28, 16, 8, 128, 1024, 40_960, 151_936, tied=True, mlp_width=3072)
    assert num_params(c)["total"] == 596_049_920


def test_optimizer_groups_and_adapters_know_all_weights():
    net = random_net()
    groups = {g["name"]: g for g in build_optimizer(net, compose("train", "arch=qwen3").optim).param_groups}
    assert set(groups) == {"head", "embedding", "vectors", "matrices"}
    assert len(groups["matrices"]["params"]) == 7 * 3 and len(groups["vectors"]["params"]) == 4 * 3 + 1
    optim = compose("train", "arch=qwen3").optim
    (embedding,) = (g for g in build_optimizer(random_net(tied=True), optim).param_groups if g["name"] == "embedding")
    assert embedding["lr"] == groups["head"]["lr"] < groups["embedding"]["lr"]  # of a tied one, which is the head too
    names = {name for name, _ in targeted(net, LoRA(4, targets=DEFAULT_TARGETS))}
    assert "transformer.h.0.mlp.c_gate" in names and len(names) == 7 * 3


def test_keys_of_the_preset_change_the_shape():
    def shape(*overrides):
        cfg = compose("train", "arch=qwen3", "model=d2", "model.head_dim=64", *overrides)
        return model_config(cfg.model, cfg.arch, 333)

    assert (shape().inner, shape().n_embd, shape().tied, shape().qk_norm) == (384, 128, False, True)
    assert shape("arch.mlp_width=100").inner == 100 and shape("arch.width=96").n_embd == 96
    assert shape("arch.qk_norm=false").qk_norm is False and shape("arch.norm_eps=0.1").norm_eps == 0.1
    assert shape("arch.tied=true").tied and shape("arch.rope_base=5").rope_base == 5
    with pytest.raises(UserError, match="arch.mlp_width"):
        shape("arch.mlp_width=0")
    with pytest.raises(ValueError, match="smear=True is no part of arch=qwen3"):
        random_net(smear=True)


def test_first_loss_is_that_of_a_uniform_guess():
    """Untied the head begins at zero, tied at so small a size that the loss is near ln(V)."""
    ids = torch.randint(333, (2, 33))
    for tied, margin in ((False, 1e-5), (True, 0.2)):
        c = Qwen3Config(2, 2, 2, 16, 32, 64, 333, tied=tied)
        loss = Qwen3(c).init_weights(1)(ids[:, :-1], ids[:, 1:])
        assert abs(float(loss.detach()) - torch.tensor(333.0).log()) < margin
