"""Paired heads: places of tokens, causality, kernels, masks of layers, counts, a pass that is looked into, the config.

Formulas, gradients, documents and caches are compared in test_gpt, the engine's batches in tests/inference.
"""

import pytest
import torch
from conftest import compose
from model.test_gpt import ARCHS, config, random_net

from llm.errors import UserError
from llm.inference.inside import Recorder
from llm.model.attention import attention_masks, causal_attention, layer_masks, pair_heads
from llm.model.config import flops_per_token
from llm.model.gpt import GPT
from llm.scaling.rules import model_config
from llm.stages.ramps import short_windows

PAIRED, CPU = ARCHS["paired heads"], torch.device("cpu")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(0, 70, shape, generator=torch.Generator().manual_seed(1))


def test_tokens_of_two_heads_lie_one_behind_the_other():
    x = torch.randn(2, 5, 4, 3)
    pairs = pair_heads(x)
    assert pairs.shape == (2, 10, 2, 3) and pairs.data_ptr() == x.data_ptr()
    for token in range(5):
        for head in range(4):
            assert torch.equal(pairs[:, 2 * token + head // 2, head % 2], x[:, token, head])


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it_and_the_token_itself_counts():
    net, ids = random_net(config(depth=3, **PAIRED)), drawn(1, 20)
    assert [net.config.pairs_heads(layer) for layer in range(3)] == [True, True, False]
    before = net(ids)
    for at in (0, 7, 19):
        changed = ids.clone()
        changed[0, at] = (ids[0, at] + 1) % 70
        after = net(changed)
        assert torch.equal(after[:, :at], before[:, :at]) and (after[0, at] - before[0, at]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_kv_head", "window"), [(4, 5), (2, 5), (2, 1), (2, 100)])
def test_every_kernel_gives_what_torchs_own_does(n_kv_head, window, dtype):
    """Heads of 64 channels, which our own bf16 kernel takes where there is one."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 40, heads, 64, generator=draw).to(dtype) for heads in (4, n_kv_head, n_kv_head))
    got = causal_attention(q, k, v, 0.125, window, None, "cpu", True)
    apart = torch.arange(80).unsqueeze(1) - torch.arange(80)
    bias = torch.zeros(80, 80).masked_fill((apart < 0) | (apart > 2 * window), -torch.inf)
    pairs = (torch.stack(x.float().chunk(2, 2), 2).flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*pairs, attn_mask=bias, scale=0.125, enable_gqa=True)
    want = want.transpose(1, 2).unflatten(1, (40, 2)).flatten(2, 3)
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}
    torch.testing.assert_close(got.float(), want, **near)


@pytest.mark.parametrize("bos_id", [None, 69])
def test_flex_attention_gives_the_same_as_one_graph(bos_id):
    torch._dynamo.reset()
    shape = {"paired_heads": "all", "window_pattern": "SL", "window_divisor": 2, "bos_id": bos_id, "arch": "modern"}
    net, ids = random_net(config(depth=3, seq_len=256, **shape)), drawn(2, 256)
    expected = net.hidden(ids)
    net.training_attention = "flex"
    net.training_forward_blocks = torch.compile(net.forward_blocks, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(net.hidden(ids, is_training=True), expected, atol=1e-5, rtol=1e-5)


def test_a_layer_with_paired_heads_has_a_mask_of_its_own_beside_one_with_the_same_window():
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[:, 3] = True
    plain, pairs = layer_masks([2, 2], [False, True], 6, starts, "cpu", CPU)
    assert torch.equal(plain, starts.cumsum(1)) and torch.equal(pairs, plain.repeat_interleave(2, 1))
    shown = layer_masks([2, None], [True, False], 6, starts, "sdpa", CPU)
    assert [mask.size(-1) for mask in shown] == [12, 6]
    assert torch.equal(shown[1], attention_masks([None], 6, starts, "sdpa", CPU)[None])


def test_windows_that_grow_keep_heads_paired():
    net, shorter = (
        random_net(config(depth=3, **PAIRED | {"window_multiple": None, "window_divisor": part})) for part in (6, 12)
    )
    assert (net.windows, shorter.windows) == ([2, 2, None], [1, 1, None])
    ids = drawn(1, 16)
    with short_windows(net, 0.5):
        assert net.windows == [1, 1, 16]
        torch.testing.assert_close(net(ids), shorter(ids))
    assert not torch.allclose(net(ids), shorter(ids), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("paired_heads", ["short", "all"])
def test_a_pass_that_is_looked_into_pairs_heads_too(paired_heads):
    net, ids = random_net(config(depth=2, n_kv_head=2, **PAIRED | {"paired_heads": paired_heads})), drawn(1, 12)
    recorder = Recorder(net)
    torch.testing.assert_close(net(ids, cache=recorder), net(ids), atol=1e-5, rtol=1e-5)
    window, weights = net.windows[0], recorder.weights[0]
    assert weights.shape == (4, 12, 12) and weights.triu(1).abs().max() == 0 == weights.tril(-window - 1).abs().max()
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 12))
    assert weights[:, 11, 11 - window :].min() > 0


def test_the_work_of_a_short_layer_stays_what_it_was():
    cfg = compose("train", "model=d4", "model.seq_len=512")
    plain = model_config(cfg.model, cfg.arch, 8192)
    cfg.arch.paired_heads = "short"
    paired = model_config(cfg.model, cfg.arch, 8192)
    cfg.arch.paired_heads = "all"
    everywhere = model_config(cfg.model, cfg.arch, 8192)
    assert [plain.window(layer) for layer in range(4)] == [128, 128, 128, None]
    assert [paired.window(layer) for layer in range(4)] == [64, 64, 64, None]
    assert flops_per_token(paired) == flops_per_token(plain)
    assert flops_per_token(everywhere) - flops_per_token(plain) == 12 * 2 * 128 * 512  # twice the keys of the last one
    assert sum(p.numel() for p in GPT(paired).parameters()) == sum(p.numel() for p in GPT(plain).parameters())


@pytest.mark.parametrize("settings", [("model=d6",), ("model=d4", "model.n_kv_head=1")])
def test_heads_without_a_neighbour_are_refused(settings):
    cfg = compose("train", *settings, "arch.paired_heads=short")
    with pytest.raises(UserError, match="arch.paired_heads=short: . key/value heads cannot be paired"):
        model_config(cfg.model, cfg.arch, 8192)
