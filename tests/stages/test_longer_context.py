"""A context longer than the parent's: same weights, other rotary tables, and training that makes use of it."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import compose

from llm.errors import UserError
from llm.model.attention import rotary_tables
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.stages.common import load_tokenizer, with_context

VOCAB, PERIOD = 32, 5
SHAPE = GPTConfig(n_layer=2, n_head=2, n_kv_head=2, head_dim=16, n_embd=32, seq_len=64, vocab_size=VOCAB)


def rows(n: int, length: int, seed: int) -> torch.Tensor:
    """(n, length + 1) ids: five random ones, again and again."""
    block = torch.randint(VOCAB, (n, PERIOD), generator=torch.Generator().manual_seed(seed))
    return block.repeat(1, length // PERIOD + 2)[:, : length + 1]


def train(net: GPT, steps: int, length: int, lr: float) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for step in range(steps):
        x = rows(8, length, step)
        loss = net(x[:, :-1].contiguous(), x[:, 1:].contiguous(), reduction="sum") / (8 * length)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def loss(net: GPT, begin: int, end: int) -> float:
    """Loss in nats at the positions `begin` to `end` of rows that were not trained on."""
    x = rows(16, 256, 10_000)
    logits = net(x[:, :-1].contiguous())[:, begin:end, :VOCAB]
    return F.cross_entropy(logits.reshape(-1, VOCAB), x[:, 1 + begin : 1 + end].reshape(-1)).item()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"rope_scaling": "yarn"}, {"rope_base": 100_000.0}])
def test_training_goes_on_beyond_the_old_context(options):
    """A model trained at 64 knows nothing of positions up to 256; a few steps at 256 teach it those."""
    net = GPT(SHAPE).init_weights(0)
    train(net, 200, 64, 1e-2)
    longer = with_context(net, replace(SHAPE, seq_len=256, **options))
    before = loss(longer, 128, 256)
    train(longer, 80, 256, 5e-3)
    after = loss(longer, 128, 256)
    assert after < before - 1 and after < math.log(VOCAB) - 1, (before, after)


def test_weights_stay_and_positions_of_the_old_context_too_without_scaling():
    net = GPT(SHAPE).init_weights(0)
    torch.nn.init.normal_(net.lm_head.weight)
    longer = with_context(net, replace(SHAPE, seq_len=256))
    ids = torch.arange(64)[None] % VOCAB
    assert torch.equal(longer(ids), net(ids)) and longer(torch.zeros(1, 256, dtype=torch.long)).shape[1] == 256
    assert longer.config.rope_original == 64 and longer.config.rope_factor == 1.0


def test_short_windows_follow_the_context():
    modern = replace(SHAPE, arch="modern", window_pattern="SL", seq_len=512)
    longer = with_context(GPT(modern).init_weights(0), replace(modern, seq_len=2048, rope_scaling="yarn"))
    assert (modern.window(0), longer.config.window(0), longer.transformer.h[0].attn.window) == (128, 512, 512)


def test_made_longer_twice_counts_from_the_first_context():
    once = with_context(GPT(SHAPE).init_weights(0), replace(SHAPE, seq_len=128, rope_scaling="yarn"))
    twice = with_context(once, replace(once.config, seq_len=256)).config
    assert (twice.rope_original, twice.rope_factor) == (64, 4.0)


def test_yarn_keeps_the_fast_channels_and_slows_the_slow_ones():
    """Compare with transformers, for a head of 128 channels made longer from 2,048 to 8,192 tokens."""
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    rope = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 2048}
    config = pytest.importorskip("transformers").NanoChatConfig(
        hidden_size=256, num_attention_heads=2, head_dim=128, max_position_embeddings=8192, rope_parameters=rope
    )
    expected, _ = utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    cos, sin = rotary_tables(8192, 128, 10_000.0, 2048)
    angles = torch.outer(torch.arange(8192.0), expected)
    torch.testing.assert_close(cos, angles.cos(), atol=2e-3, rtol=0)
    torch.testing.assert_close(sin, angles.sin(), atol=2e-3, rtol=0)
    plain = 10_000.0 ** (-torch.arange(0, 128, 2) / 128)
    assert torch.allclose(expected[:10], plain[:10]) and torch.allclose(expected[-10:], plain[-10:] / 4)


def test_scaling_a_fresh_network_is_refused(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(tmp_path, max_length=64)
    with pytest.raises(UserError, match="arch.rope_scaling=yarn: a fresh network"):
        load_tokenizer(tmp_path, compose("train", "experiment=tiny", "arch.rope_scaling=yarn"))
