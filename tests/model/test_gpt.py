"""The model against published counts, a naive float64 forward, and itself with a cache."""

import json
import math

import pytest
import torch
from conftest import compose
from model.test_copies import naive_copy

from llm.model.attention import apply_rotary, rotary_tables
from llm.model.cached_attention import SlotPass
from llm.model.config import GPTConfig, flops_per_token, num_params
from llm.model.gpt import GPT
from llm.model.kv_cache import SlotCache
from llm.model.linear import choose_fp32_products, resolve_compute_dtype
from llm.model.ngrams import FACTORS
from llm.scaling.rules import model_config

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


MODERN = {
    "arch": "modern",
    "qk_scale": 1.2,
    "window_pattern": "SSSL",
    "window_multiple": 4,
    "value_embeds": True,
    "residual_scalars": True,
    "smear": True,
    "backout": True,
    "resid_init": (1.15, 1.05),
    "x0_init": (0.2, 0.05),
    "gate_init": 0.02,
    "embedding_std": 0.8,
    "head_std": 0.001,
    "fc_scale": 0.4,
}
SWITCHES = {"exclusive_attention": True, "attention_gate": True, "activation": "leaky_relu_squared"}
NGRAMS = {"ngrams": (2, 3), "ngram_bos": 61}
SWITCHES |= {"asymmetric_cap": True, "key_offset": True, "qk_dim": 12}
COPIES = {"copy_candidate": True, "copy_bos": 61}
GPT2 = {"arch": "gpt2", "softcap": None, "vocab_multiple": 1, "tied": True}
ARCHS = {
    "classic": {},
    "modern": MODERN,
    "modern with all switches": MODERN | SWITCHES | NGRAMS | COPIES,
    "n-grams in values": MODERN | NGRAMS | {"ngrams": (3,), "ngram_rows": 2, "ngram_into": "values"},
    "paired heads": MODERN | {"paired_heads": "short", "window_multiple": 2, "window_divisor": 6},
    "all heads paired": MODERN | {"paired_heads": "all", "key_offset": True, "window_pattern": "SL", "qk_dim": 8},
    "gpt2": GPT2,
    "gpt2 untied": GPT2 | {"tied": False},
}


CACHED = (
    "classic",
    "modern",
    "gpt2",
    "modern with all switches",
    "n-grams in values",
    "paired heads",
    "all heads paired",
)


def config(depth=2, vocab=70, seq_len=32, head_dim=16, n_head=4, n_kv_head=None, **more) -> GPTConfig:
    if more.get("paired_heads") and n_kv_head == 1:
        n_kv_head = 2  # one head has no neighbour
    return GPTConfig(depth, n_head, n_kv_head or n_head, head_dim, n_head * head_dim, seq_len, vocab, **more)


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
@pytest.mark.parametrize("arch", ARCHS)
def test_counts_are_those_of_the_built_model(arch, n_kv_head):
    c = config(depth=5, n_kv_head=n_kv_head, **ARCHS[arch])
    assert sum(p.numel() for p in GPT(c).parameters()) == num_params(c)["total"]


def test_gpt2_has_124_million_parameters():
    c = GPTConfig(12, 12, 12, 64, 768, 1024, 50_257, **GPT2)
    assert num_params(c)["total"] == 124_439_808


def test_windows_follow_the_pattern_and_the_last_layer_sees_all():
    c = config(depth=6, seq_len=2048, window_pattern="SSL")
    assert [c.window(layer) for layer in range(6)] == [512, 512, None, 512, 512, None]
    assert config(depth=2, seq_len=2048, window_pattern="S").window(1) is None
    assert config(seq_len=1000, window_pattern="S").window(0) == 256  # 250 rounded up to a multiple of 128
    assert config(seq_len=128, window_pattern="S").window(0) is None  # no shorter than the context
    half = {"window_pattern": "S", "window_divisor": 2, "window_multiple": None}
    assert [config(seq_len=n, **half).window(0) for n in (2048, 1000, 513, 64)] == [1024, 500, 256, 32]  # not rounded
    assert config(seq_len=8, **half | {"window_divisor": 9}).window(0) == 1


def naive_ngrams(c: GPTConfig, w: dict, ids: list[int]) -> torch.Tensor | None:
    """The sum of the rows that the hashed sequences of every token's own document choose, by loops over numbers."""
    found = []
    for t in range(len(ids) if c.ngrams else 0):
        start = max(u for u in range(t + 1) if u == 0 or ids[u] == c.ngram_bos)
        last = [ids[u] if u >= start else c.vocab_size for u in (t, t - 1, t - 2)]
        row = 0
        for n in c.ngrams:
            table, parts = w[f"ngrams.tables.{n}.weight"].view(4, c.ngram_rows * c.vocab_size, -1), []
            for part in range(4):
                mixed = sum(x * a for x, a in zip(last[:n], FACTORS[part], strict=False))
                parts.append(table[part, mixed % (2**31 - 1) % (c.ngram_rows * c.vocab_size)])
            row = row + torch.cat(parts)
        found.append(row)
    return torch.stack(found) if found else None


def naive_forward(net: GPT, ids: torch.Tensor) -> torch.Tensor:
    """One row, float64, loops over heads and positions, written from the formulas alone."""
    c, w = net.config, {k: v.double() for k, v in net.state_dict().items()}

    def rms(x, name=None):
        if c.arch == "gpt2":
            mean = x.mean(-1, keepdim=True)
            y = (x - mean) / ((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
            return y * w[f"{name}.weight"] + w[f"{name}.bias"]
        return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def rotate(x, t):
        half = c.key_dim // 2
        out = x.clone()
        for i in range(half):
            angle = t * c.rope_base ** (-2 * i / c.key_dim)
            cos, sin = math.cos(angle), math.sin(angle)
            out[i] = x[i] * cos + x[i + half] * sin
            out[i + half] = -x[i] * sin + x[i + half] * cos
        return out

    def position(x, t):
        return x if c.arch == "gpt2" else rms(rotate(x, t)) * c.qk_scale

    def key(k, t, window):
        found = position(k[t], t)
        if c.key_offset and window is None and t > 0:
            quarter, before = c.key_dim // 4, position(k[t - 1], t - 1)
            for first in (quarter, 3 * quarter):
                found[first : first + quarter] = before[first : first + quarter]
        return found

    def with_copies(x, place):
        found = [naive_copy(ids.tolist(), t) for t in range(len(ids) * c.copy_candidate)]
        for t, (candidate, n) in enumerate(found):
            if n:
                x[t] += w[f"copies.{place}.scale"][n - 1] * rms(w["transformer.wte.weight"][candidate])
                x[t] += w[f"copies.{place}.bias"][n - 1]
        return x

    x = w["transformer.wte.weight"][ids]
    if c.arch == "gpt2":
        x = x + w["transformer.wpe.weight"][: len(ids)]
    else:
        x = rms(x)
    if c.smear:
        gate = torch.sigmoid(x[1:, :24] @ w["smear_gate.weight"].T)
        x = torch.cat((x[:1], x[1:] + w["smear_scalar"] * gate * x[:-1]))
    x0, grams = with_copies(x, 0), naive_ngrams(c, w, ids.tolist())
    for layer in range(c.n_layer):
        p = f"transformer.h.{layer}."
        if c.residual_scalars:
            x = w["resid_scalars"][layer] * x + w["x0_scalars"][layer] * x0
        if c.ngrams and c.ngram_into == "residual":
            x = x + w["ngrams.scalars"][layer] * grams
        h = rms(x, f"{p}norm_1")
        q, k, v = (linear(h, f"{p}attn.{name}") for name in ("c_q", "c_k", "c_v"))
        if c.value_embeds and layer % 2 == (c.n_layer - 1) % 2:
            gate = 3 * torch.sigmoid(h[:, :12] @ w[f"{p}attn.ve_gate.weight"].T)
            added = w[f"value_embeds.{layer}.weight"][ids]
            if c.ngrams and c.ngram_into == "values":
                added = added + w["ngrams.scalars"][layer] * grams
            v = v + gate.repeat_interleave(c.head_dim, 1) * added
        out = torch.zeros(len(ids), c.n_head * c.head_dim, dtype=torch.float64)
        window = len(ids) if c.window(layer) is None else c.window(layer)
        for head in range(c.n_head):
            kv = head // (c.n_head // c.n_kv_head)
            s, skv = slice(head * c.head_dim, (head + 1) * c.head_dim), slice(kv * c.head_dim, (kv + 1) * c.head_dim)
            own_q, own_k = (slice(i * c.key_dim, (i + 1) * c.key_dim) for i in (head, kv))
            for t in range(len(ids)):
                first = max(0, t - window)
                keys = [key(k[:, own_k], u, c.window(layer)) for u in range(first, t + 1)]
                values = v[first : t + 1, skv]
                if c.paired_heads == "all" or (c.paired_heads and c.window(layer) is not None):
                    is_second = head >= c.n_head // 2  # the first head of a pair sees the other's earlier tokens only
                    other = (head + c.n_head // 2) % c.n_head // (c.n_head // c.n_kv_head)
                    seen = range(max(0, t - window + is_second), t + is_second)
                    slices = (slice(other * size, (other + 1) * size) for size in (c.key_dim, c.head_dim))
                    its_k, its_v = (x[:, at] for x, at in zip((k, v), slices, strict=True))
                    keys += [key(its_k, u, c.window(layer)) for u in seen]
                    values = torch.cat((values, its_v[seen.start : seen.stop]))
                scores = torch.stack(keys) @ position(q[t, own_q], t) / c.key_dim**0.5
                out[t, s] = torch.softmax(scores, 0) @ values
                if c.exclusive_attention:
                    own = v[t, skv] / v[t, skv].norm()
                    out[t, s] -= torch.tanh(w[f"{p}attn.exclusion"][head]) * (out[t, s] @ own) * own
                if c.attention_gate:
                    out[t, s] *= torch.sigmoid(w[f"{p}attn.out_gate.weight"][head] @ h[t, : c.gate_channels])
        x = x + linear(out, f"{p}attn.c_proj")
        h = linear(rms(x, f"{p}norm_2"), f"{p}mlp.c_fc")
        slope = 0.5 if c.activation == "leaky_relu_squared" else 0.0
        h = (
            torch.nn.functional.gelu(h, approximate="tanh")
            if c.arch == "gpt2"
            else torch.where(h > 0, h, slope * h) ** 2
        )
        x = x + linear(h, f"{p}mlp.c_proj")
        if layer == c.n_layer // 2:
            middle = x
    if c.backout:
        x = x - w["backout_scalar"] * middle
    x = with_copies(x, 1)
    head = w["transformer.wte.weight"] if c.tied else w["lm_head.weight"]
    logits = (rms(x, "final_norm") @ head.T)[:, : c.vocab_size]
    if c.asymmetric_cap:
        return 23 * torch.sigmoid((logits + 5) / 7.5) - 11.5
    return logits if c.softcap is None else c.softcap * torch.tanh(logits / c.softcap)


@pytest.mark.parametrize(("depth", "n_kv_head"), [(4, 4), (3, 2), (4, 1)])
@pytest.mark.parametrize("arch", ARCHS)
def test_forward_equals_the_formulas(arch, depth, n_kv_head):
    """An even and an odd number of layers: which of them is the middle one, and which have value embeddings."""
    net = random_net(config(depth=depth, n_kv_head=n_kv_head, **ARCHS[arch]))
    ids = torch.randint(0, 70, (11,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(net(ids[None])[0].double(), naive_forward(net, ids), atol=5e-5, rtol=2e-5)


@pytest.mark.parametrize("n_kv_head", [4, 1])
def test_forward_with_windows_equals_the_formulas(n_kv_head):
    net = random_net(config(depth=3, n_kv_head=n_kv_head, seq_len=32, **MODERN))
    assert [net.config.window(layer) for layer in range(3)] == [8, 8, None]
    ids = torch.randint(0, 70, (32,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(net(ids[None])[0].double(), naive_forward(net, ids), atol=5e-5, rtol=2e-5)


@pytest.mark.parametrize("switch", ["value_embeds", "residual_scalars", "smear", "backout", "ngrams", "copy_candidate"])
def test_every_switch_of_modern_matters(switch):
    on = config(depth=3, **MODERN, **NGRAMS, **COPIES)
    off = config(depth=3, **MODERN | NGRAMS | COPIES | {switch: () if switch == "ngrams" else False})
    net = random_net(on)
    other = GPT(off)
    other.load_state_dict({name: value for name, value in net.state_dict().items() if name in other.state_dict()})
    assert len(other.state_dict()) < len(net.state_dict())
    ids = torch.randint(0, 7, (1, 9), generator=torch.Generator().manual_seed(1))
    assert (net(ids) - other(ids)).abs().max() > 1e-3


def test_modern_init():
    net = GPT(config(depth=3, head_dim=64, vocab=1000, **MODERN)).init_weights(0)
    block, bound = net.transformer.h[0], (3 / 256) ** 0.5
    assert net.transformer.wte.weight.std().item() == pytest.approx(0.8, rel=0.02)
    assert net.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert 0.98 * bound < block.attn.c_q.weight.abs().max() <= bound
    assert 0.98 * 0.4 * bound < block.mlp.c_fc.weight.abs().max() <= 0.4 * bound
    assert 0.98 * bound < net.value_embeds["2"].weight.abs().max() <= bound
    assert 0 <= block.attn.ve_gate.weight.min() and block.attn.ve_gate.weight.max() <= 0.02
    torch.testing.assert_close(net.resid_scalars, torch.tensor([1.15, 1.10, 1.05]))
    torch.testing.assert_close(net.x0_scalars, torch.tensor([0.2, 0.125, 0.05]))
    assert net.smear_scalar.item() == 0 and net.backout_scalar.item() == pytest.approx(0.2)
    assert block.attn.c_proj.weight.abs().max() == 0 and block.mlp.c_proj.weight.abs().max() == 0


RECIPE = {  # what conf/arch must say, as the recipe states it
    "classic": {"rope_base": 10_000, "softcap": 15},
    "modern_2026_02": {
        **{"rope_base": 10_000, "softcap": 15, "qk_scale": 1, "window_pattern": "SSSL", "window_divisor": 2},
        **{"window_multiple": None, "gate_channels": 32, "gate_range": 2, "gate_init": 0, "resid_init": (1, 1)},
        **{"x0_init": (0.1, 0.1), "smear": False, "backout": False, "embedding_std": 1, "head_std": 0.001},
        **{"fc_scale": 1, "value_embeds": True, "residual_scalars": True},
    },
    "modern": {
        **{"rope_base": 100_000, "softcap": 15, "qk_scale": 1.2, "window_pattern": "SSSL", "window_divisor": 4},
        **{"window_multiple": 128, "gate_channels": 12, "gate_range": 3, "gate_init": 0.02, "resid_init": (1.15, 1.05)},
        **{"x0_init": (0.2, 0.05), "smear": True, "backout": True, "backout_init": 0.2, "embedding_std": 0.8},
        **{"head_std": 0.001, "fc_scale": 0.4, "value_embeds": True, "residual_scalars": True},
    },
}


@pytest.mark.parametrize("arch", RECIPE)
def test_the_options_of_an_architecture_are_those_of_the_recipe(arch):
    """A changed number in conf/arch trains another model than the published one, and every other test passes."""
    cfg = compose("train", f"arch={arch}")
    found = model_config(cfg.model, cfg.arch, 32_768).to_dict()
    assert {name: found[name] for name in RECIPE[arch]} == RECIPE[arch]


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_equal_float64_with_explicit_attention(arch, monkeypatch):
    c = config(depth=3, **ARCHS[arch])
    ids = torch.randint(0, 70, (2, 33), generator=torch.Generator().manual_seed(4))
    net = random_net(c)
    net(ids[:, :-1], ids[:, 1:]).backward()

    def explicit(q, k, v, scale, window, mask, backend, paired):
        assert mask is None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        distance = torch.arange(q.size(2)).unsqueeze(1) - torch.arange(q.size(2))
        hidden = (distance < 0) | (distance > (q.size(2) if window is None else window))
        if paired:  # keys of the head itself, then those of the other one
            half = q.size(1) // 2
            k, v = (torch.cat((t, t.roll(half, 1)), dim=2) for t in (k, v))
            reach = q.size(2) if window is None else window
            first = torch.cat((hidden, (distance < 1) | (distance > reach)), dim=1)
            second = torch.cat((hidden, (distance < 0) | (distance > reach - 1)), dim=1)
            hidden = torch.stack([first] * half + [second] * half)
        scores = (scale * (q @ k.mT)).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setattr("llm.model.gpt.causal_attention", explicit)
    exact = random_net(c).double()
    exact.compute_dtype = torch.float64
    logits = (exact.hidden(ids[:, :-1]) @ exact.head_weight.T)[..., :70]
    capped = 23 * torch.sigmoid((logits + 5) / 7.5) if c.asymmetric_cap else 15 * torch.tanh(logits / 15)
    logits = logits if c.softcap is None else capped
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for (name, p), q in zip(net.named_parameters(), exact.parameters(), strict=True):
        floor = 1e-6 * exact.transformer.wte.weight.grad.norm()  # a key's bias cancels: its gradient is rounding alone
        assert (p.grad - q.grad).norm() <= 2e-5 * q.grad.norm() + floor, name


@pytest.mark.parametrize("arch", ["classic", "modern", "paired heads", "all heads paired"])
def test_masked_documents_are_as_if_alone(arch):
    """Losses and gradients of packed documents are those of every document in a row of its own (RoPE is relative)."""
    packed, alone = (random_net(config(depth=3, bos_id=bos, **ARCHS[arch])) for bos in (69, None))
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(0, 69, (n,), generator=generator) for n in (7, 1, 12, 8)]
    documents = [torch.cat((torch.tensor([69]), d)) for d in documents]
    ids = torch.cat(documents).unsqueeze(0)  # (1, 32)
    ends = torch.tensor([len(d) for d in documents]).cumsum(0)
    targets = ids[:, 1:].clone()
    targets[:, ends[:-1] - 1] = -1  # the next document's start
    loss = packed(ids[:, :-1], targets, reduction="sum")
    loss.backward()
    total = sum(alone(d[None, :-1], d[None, 1:], reduction="sum") for d in documents)
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=1e-5)
    for (name, p), q in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=2e-5, msg=name)
    with torch.no_grad():
        together, mixed = packed(ids), alone(ids)
    assert (together[:, : ends[0]] - mixed[:, : ends[0]]).abs().max() < 1e-5  # the first document sees the same
    assert (together[:, ends[0] :] - mixed[:, ends[0] :]).abs().max() > 1e-3


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
@pytest.mark.parametrize("arch", CACHED)
def test_cache_equals_full_forward_for_rows_of_different_lengths(arch, n_kv_head):
    c = config(depth=3, n_kv_head=n_kv_head, **ARCHS[arch])
    net, lengths = random_net(c), torch.tensor([3, 9, 6])
    ids = torch.randint(0, 70, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        full = net(ids)
        cache = SlotCache(c, 3, 24)
        prompt = torch.stack(
            [torch.where(torch.arange(9) < n, row[:9], 0) for n, row in zip(lengths, ids, strict=True)]
        )
        got = [net(prompt, cache=SlotPass(cache, 0, 3), lengths=lengths, last_only=True)[:, 0]]
        for s in range(6):
            cache.lengths = lengths + s
            new = ids.gather(1, (lengths + s).unsqueeze(1))
            got.append(net(new, cache=SlotPass(cache, 0, 3))[:, 0])
    for s, logits in enumerate(got):
        want = torch.stack([full[b, lengths[b] - 1 + s] for b in range(3)])
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("n_kv_head", [4, 1])
@pytest.mark.parametrize("arch", CACHED)
def test_rows_behind_prefixes_moved_and_read_in_chunks_equal_the_full_forward(arch, n_kv_head, is_copied):
    """Rows 0, 2 behind one prefix of 7 tokens, row 1 behind another of 3, row 3 behind none."""
    c = config(depth=3, n_kv_head=n_kv_head, **ARCHS[arch])
    net = random_net(c)
    ids = torch.randint(0, 70, (4, 24), generator=torch.Generator().manual_seed(3))
    ids[2, :7] = ids[0, :7]
    behind = [7, 3, 7, 0]
    with torch.no_grad():
        full = net(ids)
        cache = SlotCache(c, 2, 8)
        for row, (source, n) in enumerate(((0, 7), (1, 3))):
            net(ids[source : source + 1, :n], cache=SlotPass(cache, row, 1))
            cache.lengths[row] = n
        first, second = cache.snapshot(0), cache.snapshot(1)
        cache.resize(6, 32)
        for row, prefix in enumerate((first, second, first, None)):
            cache.start(row, prefix, is_copied)
        for done, n in ((0, 5), (5, 4)):  # chunks of five and four tokens, then one by one
            at = torch.tensor(behind) + done
            chunk = ids.gather(1, at.unsqueeze(1) + torch.arange(n))
            got = net(chunk, cache=SlotPass(cache, 0, 4))
            want = full.gather(1, (at.unsqueeze(1) + torch.arange(n)).unsqueeze(-1).expand(-1, -1, full.size(-1)))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            cache.lengths[:4] += n
        cache.move(3, 4)
        cache.move(1, 3)
        cache.move(4, 1)
        order = [0, 3, 2, 1]
        for s in range(4):
            at = (torch.tensor(behind) + 9 + s)[order]
            padded = torch.cat((ids[order].gather(1, at.unsqueeze(1)), torch.zeros(2, 1, dtype=torch.long)))
            got = net(padded, cache=SlotPass(cache, 0, 6, live=4))[:4, 0]
            torch.testing.assert_close(got, full[torch.tensor(order), at], atol=1e-5, rtol=1e-5)
            cache.lengths[:4] += 1
        assert [cache.prefix_of(row) is None for row in range(6)] == [is_copied, True, is_copied, is_copied, True, True]
        whole = cache.snapshot(2)
        assert whole.length == 7 + 9 + 4


@pytest.mark.parametrize("arch", CACHED)
def test_continuations_of_long_prefixes_equal_the_full_forward_through_small_windows(arch):
    small = {"window_pattern": "SSL", "window_divisor": 8, "window_multiple": 4}
    net = random_net(config(depth=3, **(ARCHS[arch] | small)))
    assert net.windows[0] == (2 if net.config.paired_heads else 4)
    draw = torch.Generator().manual_seed(2)
    prefixes, rest = (torch.randint(0, 70, shape, generator=draw) for shape in ((2, 17), (6, 5)))
    lengths = torch.tensor([17, 6])
    with torch.no_grad():
        got = net.continue_prefixes(prefixes, lengths, 3, rest)
        for i, tail in enumerate(rest):
            n = lengths[i // 3]
            whole = torch.cat((prefixes[i // 3, :n], tail)).unsqueeze(0)
            torch.testing.assert_close(got[i], net.hidden(whole)[0, n - 1 :], atol=1e-5, rtol=1e-5)


def test_cache_overflow_and_long_input_are_errors():
    c = config(seq_len=8)
    net = GPT(c).init_weights(0)
    with pytest.raises(ValueError, match="9 tokens do not fit"):
        net(torch.zeros(1, 9, dtype=torch.long))
    cache = SlotCache(c, 1, 4)
    net(torch.zeros(1, 4, dtype=torch.long), cache=SlotPass(cache, 0, 1))
    cache.lengths[0] = 4
    with pytest.raises(ValueError, match="full"):
        net(torch.zeros(1, 1, dtype=torch.long), cache=SlotPass(cache, 0, 1))


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


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"n_kv_head": 3}, "n_kv_head"),
        ({"head_dim": 15}, "even"),
        ({"key_offset": True, "head_dim": 18}, "head_dim=18 must be divisible by 4"),
        ({"key_offset": True, "qk_dim": 6}, "arch.qk_dim=6 must be divisible by 4"),
        ({"qk_dim": 18}, "arch.qk_dim=18: give an even number from 2 to model.head_dim=16"),
        ({"qk_dim": 7}, "arch.qk_dim=7: give an even number"),
        ({"paired_heads": "all", "n_head": 3}, "arch.paired_heads=all: 3 key/value heads cannot be paired"),
        ({"paired_heads": "short"}, "no layer has one: set arch.paired_heads=all"),
        ({"paired_heads": "long"}, "arch.paired_heads=long: choose one of short, all, or null"),
        ({"window_pattern": "SXL"}, "arch.window_pattern='SXL'"),
        ({"window_pattern": ""}, "arch.window_pattern"),
        ({"value_embeds": True, "gate_channels": 65}, "arch.gate_channels reads 65 channels"),
        ({"smear": True, "head_dim": 4, "arch": "modern"}, "arch.smear reads 24 channels"),
        ({"ngrams": (2, 4)}, r"arch.ngrams=\[2, 4\]"),
        ({"ngrams": (2, 2)}, r"arch.ngrams=\[2, 2\]"),
        ({"ngrams": (2,), "ngram_into": "head"}, "arch.ngram_into=head: choose one of residual, values"),
        ({"ngrams": (2,), "ngram_into": "values"}, "set arch.value_embeds=true"),
    ],
)
def test_impossible_shapes_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        config(**values)


def test_config_round_trip_refuses_unknown_keys():
    c = config(**MODERN, **NGRAMS)
    assert GPTConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    with pytest.raises(ValueError, match="flux"):
        GPTConfig.from_dict(c.to_dict() | {"flux": 1})


def test_compute_dtype_choice():
    assert resolve_compute_dtype("fp32", "cpu") == torch.float32
    assert resolve_compute_dtype("bf16", "cpu") == torch.bfloat16
    assert resolve_compute_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="precision.compute=fp8"):
        resolve_compute_dtype("fp8", "cpu")


def test_answers_are_drawn_in_fp32_on_a_cpu_unless_bf16_is_asked_for(monkeypatch):
    monkeypatch.setattr("llm.model.linear.has_fast_bf16", lambda device: True)
    assert resolve_compute_dtype("auto", "cpu") == torch.bfloat16
    assert resolve_compute_dtype("auto", "cpu", draws_answers=True) == torch.float32
    assert resolve_compute_dtype("bf16", "cpu", draws_answers=True) == torch.bfloat16
    assert resolve_compute_dtype("auto", "cuda", draws_answers=True) == torch.bfloat16


def test_fp32_products_go_through_onednn_only_where_it_rounds_nothing(monkeypatch):
    before, product = torch.get_float32_matmul_precision(), torch.Tensor.__matmul__
    try:
        choose_fp32_products(by_onednn=True)
        x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(x @ x.T, (x.double() @ x.double().T).float(), rtol=0, atol=1e-4)
        choose_fp32_products(by_onednn=False)
        assert torch.get_float32_matmul_precision() == "highest"
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(a.bfloat16(), b.bfloat16()).float())
        choose_fp32_products(by_onednn=True)  # of a processor that makes use of the permission to round
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)
