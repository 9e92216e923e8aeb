"""Queries and keys with fewer channels than values: counts in closed form, the config, the optimizer's heads."""

import torch
from conftest import compose
from model.test_gpt import MODERN, config, random_net

from llm.model.config import flops_per_token, num_params
from llm.optim.build import by_heads
from llm.scaling.rules import model_config


def test_counts_are_those_of_the_narrow_products():
    cfg = compose("train", "model=d4", "arch.qk_dim=64")
    narrow = model_config(cfg.model, cfg.arch, 8192)
    cfg.arch.qk_dim = None
    whole = model_config(cfg.model, cfg.arch, 8192)
    assert (narrow.n_embd, narrow.n_head, narrow.head_dim, narrow.key_dim, whole.key_dim) == (256, 2, 128, 64, 128)
    saved = 4 * 2 * 256 * 2 * (128 - 64)  # layers, two matrices, inputs, heads, channels
    assert num_params(whole)["blocks"] - num_params(narrow)["blocks"] == saved
    keys = sum(whole.window(layer) or whole.seq_len for layer in range(4))
    attention = 6 * 2 * (128 - 64) * keys  # of 12 H D T the half that multiplies queries by keys
    assert flops_per_token(whole) - flops_per_token(narrow) == 6 * saved + attention


def test_a_width_that_is_that_of_values_changes_nothing():
    ids = torch.randint(0, 70, (2, 11), generator=torch.Generator().manual_seed(0))
    nets = [random_net(config(depth=3, **MODERN, qk_dim=qk_dim)) for qk_dim in (None, 16)]
    assert torch.equal(*(net(ids) for net in nets))


def test_heads_of_the_optimizer_are_as_narrow():
    net = random_net(config(n_kv_head=2, qk_dim=12))
    params = [p for p in net.transformer.h.parameters() if p.ndim == 2]
    groups = by_heads(net, {"params": params})
    rows = {group["head_rows"]: {id(p) for p in group["params"]} for group in groups}
    blocks = list(net.transformer.h)
    assert rows[12] == {id(layer.weight) for block in blocks for layer in (block.attn.c_q, block.attn.c_k)}
    assert rows[16] == {id(block.attn.c_v.weight) for block in blocks}
