"""The model against published counts, a naive float64 forward, and itself with a cache."""

import math

import pytest
import torch

from llm.attention import KVCache, apply_rotary, rotary_tables
from llm.gpt import GPT, GPTConfig, flops_per_token, num_params
from llm.precision import resolve_compute_dtype

# depth, width, parameters, FLOPs per token (7 digits) for vocabulary 65,536 and 2,048 positions
PUBLISHED = [
    (4, 256, 36_700_160, 1.447035e8),
    (6, 384, 60_948_480, 2.713190e8),
    (8, 512, 92_274_688, 4.529848e8),
    (10, 640, 133_038_080, 7.038566e8),
    (12, 768, 185_597_952, 1.038090e9),
    (16, 1024, 335_544_320, 2.013266e9),
    (20, 1280, 560_988_160, 3.491758e9),
    (24, 1536, 880_803_840, 5.586813e9),
    (26, 1664, 1_081_999_360, 6.900941e9),
    (30, 1920, 1_578_762_240, 1.013318e10),
    (32, 2048, 1_879_048_192, 1.207960e10),
    (34, 2176, 2_217_082_880, 1.426509e10),
]


def config(depth=2, vocab=70, seq_len=32, head_dim=16, n_head=4, n_kv_head=None) -> GPTConfig:
    return GPTConfig(depth, n_head, n_kv_head or n_head, head_dim, n_head * head_dim, seq_len, vocab)


def random_net(c: GPTConfig, seed=0) -> GPT:
    """Every weight random: the zero-initialised projections would hide mistakes."""
    net, g = GPT(c).init_weights(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return net


@pytest.mark.parametrize(("depth", "width", "params", "flops"), PUBLISHED)
def test_published_counts(depth, width, params, flops):
    c = GPTConfig(depth, width // 128, width // 128, 128, width, 2048, 65_536)
    assert num_params(c)["total"] == params
    assert f"{flops_per_token(c):.6e}" == f"{flops:.6e}"


def test_d20_flops_exactly():
    assert flops_per_token(GPTConfig(20, 10, 10, 128, 1280, 2048, 65_536)) == 3_491_758_080


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_counts_are_those_of_the_built_model(n_kv_head):
    c = config(n_kv_head=n_kv_head)
    assert sum(p.numel() for p in GPT(c).parameters()) == num_params(c)["total"]


def naive_forward(net: GPT, ids: torch.Tensor) -> torch.Tensor:
    """One row, float64, loops over heads and positions, written from the formulas alone."""
    c, w = net.config, {k: v.double() for k, v in net.state_dict().items()}

    def rms(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotate(x, t):
        half = c.head_dim // 2
        out = x.clone()
        for i in range(half):
            angle = t * c.rope_base ** (-2 * i / c.head_dim)
            cos, sin = math.cos(angle), math.sin(angle)
            out[i] = x[i] * cos + x[i + half] * sin
            out[i + half] = -x[i] * sin + x[i + half] * cos
        return out

    x = rms(w["transformer.wte.weight"][ids])
    for layer in range(c.n_layer):
        p = f"transformer.h.{layer}."
        h = rms(x)
        q, k, v = (h @ w[f"{p}attn.{name}.weight"].T for name in ("c_q", "c_k", "c_v"))
        out = torch.zeros(len(ids), c.n_head * c.head_dim, dtype=torch.float64)
        for head in range(c.n_head):
            kv = head // (c.n_head // c.n_kv_head)
            s, skv = slice(head * c.head_dim, (head + 1) * c.head_dim), slice(kv * c.head_dim, (kv + 1) * c.head_dim)
            for t in range(len(ids)):
                qt = rms(rotate(q[t, s], t))
                keys = torch.stack([rms(rotate(k[u, skv], u)) for u in range(t + 1)])
                out[t, s] = torch.softmax(keys @ qt / c.head_dim**0.5, 0) @ v[: t + 1, skv]
        x = x + out @ w[f"{p}attn.c_proj.weight"].T
        h = torch.relu(rms(x) @ w[f"{p}mlp.c_fc.weight"].T) ** 2
        x = x + h @ w[f"{p}mlp.c_proj.weight"].T
    logits = (rms(x) @ w["lm_head.weight"].T)[:, : c.vocab_size]
    return c.softcap * torch.tanh(logits / c.softcap)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_forward_equals_the_formulas(n_kv_head):
    net = random_net(config(n_kv_head=n_kv_head))
    ids = torch.randint(0, 70, (11,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(net(ids[None])[0].double(), naive_forward(net, ids), atol=2e-5, rtol=1e-5)


def test_gradients_equal_float64_with_explicit_attention(monkeypatch):
    ids = torch.randint(0, 70, (2, 17), generator=torch.Generator().manual_seed(4))
    net = random_net(config())
    net(ids[:, :-1], ids[:, 1:]).backward()

    def explicit(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        future = torch.ones(q.size(2), q.size(2), dtype=torch.bool).triu(1)
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(future, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setattr("llm.gpt.causal_attention", explicit)
    exact = random_net(config()).double()
    exact.compute_dtype = torch.float64
    logits = exact.lm_head(exact.hidden(ids[:, :-1]))[..., :70]
    logits = 15 * torch.tanh(logits / 15)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for (name, p), q in zip(net.named_parameters(), exact.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name


def test_first_loss_is_ln_vocab_and_padding_is_never_predicted():
    c = config(vocab=70)
    net = GPT(c).init_weights(0)
    ids = torch.randint(0, 70, (2, 16))
    assert c.padded_vocab_size == 128 and net(ids).shape == (2, 16, 70)
    assert net(ids, ids).item() == pytest.approx(math.log(70), abs=1e-5)


def test_init_is_reproducible_and_scaled():
    a, b = GPT(config()).init_weights(3), GPT(config()).init_weights(3)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    c = GPTConfig(1, 4, 4, 64, 256, 32, 1000)
    net = GPT(c).init_weights(0)
    block = net.transformer.h[0]
    assert net.transformer.wte.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert block.attn.c_q.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)  # min(1, sqrt(4)) = 1
    assert block.attn.c_proj.weight.abs().max() == 0 and block.mlp.c_proj.weight.abs().max() == 0
    assert net.lm_head.weight.abs().max() == 0


def test_loss_reductions_and_ignored_targets():
    net = random_net(config())
    ids, targets = torch.randint(0, 70, (3, 8)), torch.randint(0, 70, (3, 8))
    targets[0] = -1
    each = net(ids, targets, reduction="none")
    assert each.shape == (3, 8) and each[0].abs().max() == 0
    torch.testing.assert_close(each.sum(), net(ids, targets, reduction="sum"))
    torch.testing.assert_close(each.sum() / 16, net(ids, targets, reduction="mean"))


@pytest.mark.parametrize("n_kv_head", [4, 1])
def test_cache_equals_full_forward_for_rows_of_different_lengths(n_kv_head):
    c = config(n_kv_head=n_kv_head)
    net, lengths = random_net(c), torch.tensor([3, 9, 6])
    ids = torch.randint(0, 70, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        full = net(ids)
        cache = KVCache(c, 3, 24)
        prompt = torch.stack(
            [torch.where(torch.arange(9) < n, row[:9], 0) for n, row in zip(lengths, ids, strict=True)]
        )
        got = [net(prompt, cache=cache, lengths=lengths, last_only=True)[:, 0]]
        for s in range(6):
            got.append(net(ids.gather(1, (lengths + s).unsqueeze(1)), cache=cache)[:, 0])
    for s, logits in enumerate(got):
        want = torch.stack([full[b, lengths[b] - 1 + s] for b in range(3)])
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


def test_cache_rows_can_be_copied_and_dropped():
    c = config()
    net, ids = random_net(c), torch.randint(0, 70, (2, 6))
    with torch.no_grad():
        cache = KVCache(c, 2, 10)
        net(ids, cache=cache)
        cache.repeat(2)  # rows 0 0 1 1
        cache.keep(torch.tensor([3, 0]))
        new = torch.tensor([[5], [6]])
        got = net(new, cache=cache)[:, 0]
        want = net(torch.cat((ids[[1, 0]], new), 1))[:, -1]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_cache_overflow_and_long_input_are_errors():
    c = config(seq_len=8)
    net = GPT(c).init_weights(0)
    with pytest.raises(ValueError, match="9 tokens do not fit"):
        net(torch.zeros(1, 9, dtype=torch.long))
    cache = KVCache(c, 1, 4)
    net(torch.zeros(1, 4, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="full"):
        net(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_rotation_keeps_length_and_depends_on_distance_only():
    cos, sin = rotary_tables(32, 16, 10_000.0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    at = [apply_rotary(x, cos[t : t + 1], sin[t : t + 1]).flatten() for x in (q, k) for t in (3, 10, 20, 27)]
    torch.testing.assert_close(at[0].norm(), q.norm())
    torch.testing.assert_close(at[1] @ at[4], at[3] @ at[6], atol=1e-5, rtol=1e-5)  # distances 10-3 and 27-20


def test_bf16_stays_close_to_fp32():
    net, ids = random_net(config()), torch.randint(0, 70, (2, 16))
    exact = net(ids)
    net.compute_dtype = torch.bfloat16
    assert (net(ids) - exact).abs().max() < 0.25 and net(ids).dtype == torch.float32


@pytest.mark.parametrize(("values", "match"), [({"n_kv_head": 3}, "n_kv_head"), ({"head_dim": 15}, "even")])
def test_impossible_shapes_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        config(**values)


def test_config_round_trip_refuses_unknown_keys():
    c = config()
    assert GPTConfig.from_dict(c.to_dict()) == c
    with pytest.raises(ValueError, match="flux"):
        GPTConfig.from_dict(c.to_dict() | {"flux": 1})


def test_compute_dtype_choice():
    assert resolve_compute_dtype("fp32", "cpu") == torch.float32
    assert resolve_compute_dtype("bf16", "cpu") == torch.bfloat16
    assert resolve_compute_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="precision.compute=fp8"):
        resolve_compute_dtype("fp8", "cpu")
