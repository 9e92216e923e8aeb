"""Looking inside: attention, the stream between blocks and the logits of a pass, against the formulas written out."""

import pytest
import torch

from llm.errors import UserError
from llm.inference.inside import look_inside, token_text
from llm.model.config import GPTConfig
from llm.model.gpt import GPT

ARCHS = {
    "classic": {},
    "gpt2": {"arch": "gpt2", "tied": True},
    "modern": {
        "arch": "modern",
        "window_pattern": "SL",
        "value_embeds": True,
        "residual_scalars": True,
        "smear": True,
        "backout": True,
    },
}


def network(tokenizer, arch="classic") -> GPT:
    """Two layers and heads that share keys, all weights random: a fresh network attends to nothing in particular."""
    options = ARCHS[arch] | ({} if arch == "gpt2" else {"bos_id": tokenizer.bos_id})
    heads = (2, 2) if arch == "gpt2" else (2, 1)
    net = GPT(
        GPTConfig(2, *heads, 16, 32, 256 if arch == "modern" else 64, tokenizer.vocab_size, **options)
    ).init_weights(0)
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=drawn) * 0.2)
    return net


def written_out(net: GPT, layer: int, x: torch.Tensor) -> torch.Tensor:
    """Attention weights (H, T, T) of a block for its input (T, E): no window, rotary positions, keys for two heads."""
    attn, T = net.transformer.h[layer].attn, len(x)
    x = torch.nn.functional.rms_norm(x, x.shape[-1:])

    def heads(weight):
        y = (x @ weight.T).view(T, -1, attn.head_dim)
        a, b = y.chunk(2, -1)
        cos, sin = net.cos[:T, None], net.sin[:T, None]
        y = torch.cat((a * cos + b * sin, b * cos - a * sin), -1)
        return torch.nn.functional.rms_norm(y, y.shape[-1:])

    q, k = heads(attn.c_q.weight), heads(attn.c_k.weight)
    weights = torch.zeros(q.size(1), T, T)
    for head in range(q.size(1)):
        for t in range(T):
            scores = torch.stack([q[t, head] @ k[s, head * k.size(1) // q.size(1)] for s in range(t + 1)])
            weights[head, t, : t + 1] = (scores * attn.scale).softmax(0)
    return weights


@pytest.mark.parametrize("arch", ARCHS)
def test_a_pass_that_is_looked_into_gives_the_networks_own_logits(tiny_tokenizer, arch):
    net = network(tiny_tokenizer, arch).train()
    ids = tiny_tokenizer.encode_prompt("The red fox of Ember Hill has 12 apples")
    inside = look_inside(net, tiny_tokenizer, ids)
    with torch.no_grad():
        expected = net(torch.tensor([ids]))[0]
    torch.testing.assert_close(inside.logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inside.lens(2), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(inside.lens(0), expected, atol=0.1)
    assert inside.stream.shape == (3, len(ids), 32) and inside.attention.shape == (2, 2, len(ids), len(ids))
    torch.testing.assert_close(inside.attention.sum(-1), torch.ones(2, 2, len(ids)))
    assert inside.attention.triu(1).abs().max() == 0
    assert net.training and not net.transformer.h[0]._forward_hooks and not net.final_norm._forward_pre_hooks


@torch.no_grad()
def test_attention_is_that_of_the_formula(tiny_tokenizer):
    net = network(tiny_tokenizer)
    inside = look_inside(net, tiny_tokenizer, tiny_tokenizer.encode_prompt("The red fox"))
    for layer in range(2):
        expected = written_out(net, layer, inside.stream[layer])
        torch.testing.assert_close(inside.attention[layer], expected, rtol=1e-4, atol=1e-5)


def test_a_window_hides_what_lies_before(tiny_tokenizer):
    net = network(tiny_tokenizer, "modern")
    window = net.windows[0]
    assert window == 128 and net.windows[1] is None
    inside = look_inside(net, tiny_tokenizer, tiny_tokenizer.encode_prompt("0 1 " * 50)[:180])
    assert inside.attention[0, :, -1, : -window - 1].max() == 0 < inside.attention[0, :, -1, -window - 1 :].min()
    assert inside.attention[1, :, -1].min() > 0


def test_tokens_are_readable_and_the_likeliest_come_first(tiny_tokenizer):
    inside = look_inside(network(tiny_tokenizer), tiny_tokenizer, tiny_tokenizer.encode_prompt("fox é"))
    assert "".join(inside.tokens[1:-2]) == "fox " and inside.tokens[0] == "<|bos|>"
    assert inside.tokens[-2:] == ["\\xc3", "\\xa9"] and token_text(tiny_tokenizer, 65) == "A"
    best = inside.likeliest(inside.logits[-1], 3)
    shares = inside.logits[-1].softmax(-1)
    assert [share for _, share in best] == shares.sort(descending=True).values[:3].tolist()
    assert best[0][0] == token_text(tiny_tokenizer, int(shares.argmax()))
    with pytest.raises(ValueError, match="layer=3 must be between 0 and 2"):
        inside.lens(3)


def test_what_cannot_be_looked_into_is_one_line(tiny_tokenizer):
    net = network(tiny_tokenizer)
    with pytest.raises(UserError, match="65 tokens: there must be 1 to 64"):
        look_inside(net, tiny_tokenizer, [1] * 65)
    with pytest.raises(UserError, match="only models that Fathom has trained"):
        look_inside(torch.nn.Linear(1, 1), tiny_tokenizer, [1])
    for block in net.transformer.h:
        block.attn.forward = lambda x, *rest: x
    with pytest.raises(UserError, match="do not attend"):
        look_inside(net, tiny_tokenizer, [1, 2])
