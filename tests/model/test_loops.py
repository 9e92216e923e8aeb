"""Blocks that run several times: one set of matrices, cached and exported as the network of all places."""

from dataclasses import replace

import pytest
import torch
from conftest import compose
from test_gpt import MODERN, config, random_net

from llm.checkpoint.model_folder import load_model_folder, save_model_folder
from llm.errors import UserError
from llm.model.cached_attention import SlotPass
from llm.model.config import depth_of, flops_per_token, num_params
from llm.model.gpt import GPT
from llm.model.lora import LoRA, add_adapter
from llm.scaling.rules import model_config
from llm.stages.plan import check_same_model, check_whole
from llm.stages.pretrain import derived_without_tokenizer
from llm.tokenizer.bpe import Tokenizer

LOOPED = MODERN | {"loops": 2, "n_kv_head": 2}


def looped(depth=6, **more) -> GPT:
    return random_net(config(depth=depth, **LOOPED | more))


def test_the_middle_half_of_the_blocks_runs_again():
    assert config(depth=6, **LOOPED).places == [0, 1, 2, 1, 2, 3]
    assert config(depth=8, **LOOPED | {"loops": 3}).places == [0, 1, 2, 1, 2, 1, 2, 3]
    assert config(depth=4, **LOOPED).places == [0, 1, 1, 2]
    assert config(depth=4).places == [0, 1, 2, 3]
    for loops in (1, 2, 5):
        sizes = [n + (loops - 1) * (n // 2) for n in range(1, 30)]
        assert [depth_of(size, loops) for size in sizes] == list(range(1, 30))
    with pytest.raises(ValueError, match="n_layer=5: no number of blocks makes it with arch.loops=2"):
        config(depth=5, **LOOPED)


def test_depth_is_the_number_of_blocks_and_flops_are_those_of_all_places():
    cfg = compose("train", "model=d4", "arch.loops=3")
    c = model_config(cfg.model, cfg.arch, 300)
    assert (c.n_layer, c.n_blocks, c.n_embd) == (8, 4, 256)
    cfg.arch.loops = 1
    plain = model_config(cfg.model, cfg.arch, 300)
    assert num_params(c)["blocks"] - num_params(plain)["blocks"] == 2 * c.n_kv_head * c.gate_channels
    assert num_params(c)["total"] == sum(p.numel() for p in GPT(c).parameters())
    whole = replace(c, loops=1)
    assert flops_per_token(c) == flops_per_token(whole) and num_params(whole)["blocks"] > num_params(c)["blocks"]
    with pytest.raises(UserError, match="arch.loops=2: model.depth=1 has no middle blocks"):
        model_config(compose("train", "model=d1").model, compose("train", "arch.loops=2").arch, 300)


def test_a_contradiction_with_a_parent_names_keys_that_can_be_set():
    def shape(*words):
        cfg = compose("train", "model=d4", *words)
        return model_config(cfg.model, cfg.arch, 300)

    both = "arch.loops=2", "arch.ngrams=[2]", "arch.copy_candidate=true"
    with pytest.raises(UserError) as caught:
        check_same_model(shape(), shape(*both), "runs/a/pretrain/model")
    named = str(caught.value).partition("(")[2].partition(": leave these keys out")[0]
    keys = {part.split(":")[0].strip() for part in named.split(";")}
    assert keys == {"arch.loops", "arch.ngrams", "arch.copy_candidate"}
    check_same_model(shape(*both), shape(*both), "runs/a/pretrain/model")


def test_it_computes_what_a_network_with_copies_does_and_their_gradients_add_up():
    net, ids = looped().double(), torch.randint(0, 70, (2, 17), generator=torch.Generator().manual_seed(3))
    copies = GPT(replace(net.config, loops=1)).double()
    copies.load_state_dict(net.state_dict())
    net.compute_dtype = copies.compute_dtype = torch.float64
    for one in (net, copies):
        one(ids[:, :-1], ids[:, 1:]).backward()
    torch.testing.assert_close(net(ids), copies(ids), atol=0, rtol=0)
    ours, theirs = (one.transformer.h for one in (net, copies))
    for name in ("attn.c_q", "mlp.c_proj"):
        found, parts = (
            ours[1].get_submodule(name).weight.grad,
            [theirs[i].get_submodule(name).weight.grad for i in (1, 3)],
        )
        torch.testing.assert_close(found, sum(parts))
        assert ours[1].get_submodule(name).weight is ours[3].get_submodule(name).weight
    assert ours[1].attn.window == 8 and ours[3].attn.window is None


def test_a_saved_model_is_read_with_shared_matrices(tmp_path):
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    net = random_net(config(depth=6, vocab=tokenizer.vocab_size, **LOOPED))
    save_model_folder(tmp_path / "model", net, tokenizer)
    again, _ = load_model_folder(tmp_path / "model")
    assert again.config == net.config and len(list(again.parameters())) == len(list(net.parameters()))
    ids = torch.tensor([tokenizer.encode("abcabd")])
    assert torch.equal(again(ids), net(ids))


def test_every_place_has_its_own_keys_and_values_in_the_cache():
    net, ids = looped(), torch.randint(0, 70, (2, 12), generator=torch.Generator().manual_seed(4))
    cache, at = net.new_cache(2, 12), 0
    for part in ids.split([5, 1, 1, 5], dim=1):
        cache.lengths = torch.full((2,), at)
        logits, at = net(part, cache=SlotPass(cache, 0, 2)), at + part.size(1)
        torch.testing.assert_close(logits, net(ids[:, :at])[:, -part.size(1) :], atol=1e-5, rtol=1e-5)


def test_what_is_not_made_for_it_is_refused(monkeypatch):
    with pytest.raises(UserError, match="model.lora.rank=4: not made for arch.loops=2"):
        add_adapter(looped(), LoRA(4))
    monkeypatch.setattr("llm.stages.plan.processes", lambda cfg: 2)
    with pytest.raises(UserError, match="arch.loops=2: strategy=fsdp gathers each block by itself"):
        check_whole(compose("train", "arch.loops=2", "strategy=fsdp"))
    check_whole(compose("train", "arch.loops=2", "strategy=ddp"))


def test_depth_is_the_number_of_blocks():
    lines = ("model=d4", "arch.loops=2", "model.vocab_size=300", "dry_run=true")
    told = derived_without_tokenizer(compose("train", *lines))
    assert told["depth"] == 4 and len(told["windows"].split()) == 6
