"""The decode kernel against the network's plain forward, and a row alone against itself in a batch, bit for bit."""

import random
from collections.abc import Sequence

import pytest
import torch

from llm.model import decode_cpu, native
from llm.model.config import GPTConfig
from llm.model.decode_cpu import DecodeStep
from llm.model.gpt import GPT
from llm.model.kv_cache import Prefix, PrefixPart, SlotCache

pytestmark = pytest.mark.skipif(decode_cpu.load() is None, reason="there is no C++ compiler")

SHAPE = dict(n_layer=3, n_head=4, n_kv_head=4, head_dim=16, n_embd=64, seq_len=256, vocab_size=301)
SHAPE |= dict(window_multiple=4)
MODERN = dict(
    arch="modern", qk_scale=1.2, value_embeds=True, residual_scalars=True, smear=True, backout=True, gate_channels=12
)
FORMS = {
    "classic": {},
    "classic GQA": {"n_kv_head": 2},
    "modern": MODERN,
    "modern windows": MODERN | {"window_pattern": "SSL", "seq_len": 512, "n_kv_head": 1},
    "modern small windows": MODERN | {"window_pattern": "SSL", "window_divisor": 16, "n_kv_head": 2},
    "modern loops": MODERN | {"loops": 2, "n_layer": 6},
    "modern n-grams": MODERN | {"ngrams": (2, 3), "ngram_bos": 2, "ngram_rows": 1},
    "modern key offset": MODERN | {"key_offset": True, "window_pattern": "SL", "window_divisor": 16},
    "modern triples": MODERN | {"ngrams": (3,), "ngram_bos": 2, "ngram_rows": 2},
    "modern long context": MODERN | {"rope_scaling": "yarn", "rope_original": 64},
    "gpt2": {"arch": "gpt2", "tied": True, "softcap": None},
    "gpt2 untied GQA": {"arch": "gpt2", "n_kv_head": 2},
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seed():
    """Draw equal token ids in every run."""
    torch.manual_seed(0)


def make_cache(net: GPT, rows: int, room: int, behind: Sequence[Prefix | None] = ()) -> SlotCache:
    """Return a cache whose free places hold NaN, which nobody may read; row i stands behind the prefix `behind[i]`."""
    cache = SlotCache(net.config, rows, room, dtype=net.compute_dtype, spare=decode_cpu.SPARE)
    for part in cache.parts:
        part.k.fill_(float("nan"))
        part.v.fill_(float("nan"))
    for row, prefix in enumerate(behind):
        cache.start(row, prefix)
    return cache


def make_net(options: dict, dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT:
    """Return a network whose every weight has an effect, with logits as wide as a trained one's."""
    net = GPT(GPTConfig(**(SHAPE | options))).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn(p.shape, generator=generator)
        else:
            scale = 0.15 if "wte" in name or "wpe" in name else p.size(1) ** -0.5
            p.data = scale * torch.randn(p.shape, generator=generator)
    net.compute_dtype = dtype
    return net


def logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the logprobs of tokens 1.. of ids (B, T) by the logits (B, T, V) before them."""
    return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])


def write(step: DecodeStep, cache: SlotCache, ids: torch.Tensor) -> torch.Tensor:
    """Feed ids (B, T) token by token; return logits (B, T, V)."""
    logits = []
    for column in ids.T:
        logits.append(step(cache, column.contiguous()))
        cache.lengths[: len(ids)] += 1
    return torch.stack(logits, dim=1)


def feed(step: DecodeStep, cache: SlotCache, row: int, ids: torch.Tensor) -> torch.Tensor:
    """Feed one row some tokens (T,) at once; return their logits (T, V)."""
    at = cache.lengths[row] + torch.arange(len(ids))
    logits = step.extend(cache, ids, at, rows=torch.full_like(at, row))
    cache.lengths[row] += len(ids)
    return logits


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_decode_in_fp32_gives_the_logprobs_of_the_training_forward(form):
    net = make_net(FORMS[form])
    length = 250 if net.windows[0] else 150
    ids = torch.randint(0, 301, (2, length))
    gap = (
        logprobs(write(DecodeStep.for_net(net), make_cache(net, 2, length), ids), ids) - logprobs(net(ids), ids)
    ).abs()
    assert gap.max() < 5e-5 and gap.mean() < 1e-5


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_decode_in_bf16_rounds_as_the_training_forward_does(form):
    net = make_net(FORMS[form], torch.bfloat16)
    ids = torch.randint(0, 301, (8, 200))
    step, cache, plain = DecodeStep.for_net(net), make_cache(net, 8, 200), logprobs(net(ids), ids)
    ours = logprobs(torch.stack([feed(step, cache, row, ids[row]) for row in range(8)]), ids)
    net.compute_dtype = torch.float32
    exact = logprobs(net(ids), ids)
    assert (ours - plain).mean().abs() < 1e-3
    assert (ours - exact).abs().mean() < 1.1 * (plain - exact).abs().mean()  # the error of bf16 and no other


@pytest.mark.parametrize("seed", range(20))
@torch.inference_mode()
def test_random_shapes_prefixes_and_chunks_give_the_plain_logits(seed):
    draw = random.Random(seed)
    heads = draw.randint(1, 3)
    options = dict(FORMS[draw.choice(list(FORMS))])
    options |= dict(n_layer=draw.randint(1, 4), n_kv_head=heads, n_head=heads * draw.randint(1, 3))
    options |= dict(window_pattern=draw.choice(("L", "SL", "SSL")), window_divisor=draw.choice((8, 32)))
    quarter = 2 if options.get("key_offset") else 1  # of the sizes that a head may have
    options |= dict(
        head_dim=2 * quarter * draw.randint(1, 30 // quarter),
        n_embd=draw.randint(24, 150),
        vocab_size=draw.randint(3, 400),
    )
    net = make_net(options, seed=seed)
    step, vocab = DecodeStep.for_net(net), options["vocab_size"]
    n_prefixes, rows = draw.randint(1, 3), draw.randint(1, 9)
    shared = [torch.randint(0, vocab, (draw.randint(1, 140),)) for _ in range(n_prefixes)]
    first = make_cache(net, n_prefixes, 140)
    for i, ids in enumerate(shared):
        half = draw.randint(0, len(ids))
        for part in (ids[:half], ids[half:]):
            if len(part):
                feed(step, first, i, part)
    prefixes = [None, *map(first.snapshot, range(n_prefixes))]
    choice = [draw.randint(0, n_prefixes) for _ in range(rows)]
    cache = make_cache(net, rows, 90, [prefixes[i] for i in choice])
    ids = torch.randint(0, vocab, (rows, 80))
    logits = write(step, cache, ids)
    for row, i in enumerate(choice):
        whole = torch.cat((shared[i - 1], ids[row])) if i else ids[row]
        torch.testing.assert_close(logits[row], net(whole[None])[0, -80:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["modern windows", "modern small windows", "classic GQA", "gpt2"])
@torch.inference_mode()
def test_a_row_alone_has_the_bits_that_it_has_in_a_batch_of_64(form, dtype):
    net = make_net(FORMS[form], dtype)
    step, shared = DecodeStep.for_net(net), make_cache(net, 2, 200)
    for row, length in enumerate((150, 70)):
        feed(step, shared, row, torch.randint(0, 301, (length,)))
    behind = [shared.snapshot(0)] * 20 + [shared.snapshot(1)] * 20 + [None] * 24
    ids = torch.randint(0, 301, (64, 70))
    together = write(step, make_cache(net, 64, 80, behind), ids)
    for row in (0, 19, 33, 63):
        alone = make_cache(net, 1, 70, behind[row : row + 1])
        assert torch.equal(write(step, alone, ids[row : row + 1])[0], together[row])
    at_once = make_cache(net, 1, 70)
    assert torch.equal(feed(step, at_once, 0, ids[63]), together[63])


@torch.inference_mode()
def test_the_number_of_threads_changes_no_bit(monkeypatch):
    net = make_net(MODERN)
    step, ids, results = DecodeStep.for_net(net), torch.randint(0, 301, (7, 12)), []
    for n in (1, 2, 3):
        monkeypatch.setattr(decode_cpu.THREADS, "run", lambda work, call, n=n: call(n))
        results.append(write(step, make_cache(net, 7, 12), ids))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@torch.inference_mode()
def test_only_the_asked_for_tokens_have_logits():
    net = make_net(MODERN)
    step, ids = DecodeStep.for_net(net), torch.randint(0, 301, (30,))
    at, rows = torch.arange(30) % 15, torch.arange(30) // 15  # two rows, 15 tokens each
    every = step.extend(make_cache(net, 2, 15), ids, at, rows)
    some = step.extend(make_cache(net, 2, 15), ids, at, rows, torch.tensor([29, 14, 29]))
    none = step.extend(make_cache(net, 2, 15), ids, at, rows, torch.tensor([], dtype=torch.int64))
    assert torch.equal(some, every[[29, 14, 29]]) and none.shape == (0, 301)


@torch.inference_mode()
def test_weights_in_bf16_give_the_bits_of_weights_in_fp32_that_are_rounded_when_used():
    net = make_net(MODERN, torch.bfloat16)
    ids = torch.randint(0, 301, (2, 9))
    rounded_when_used = write(DecodeStep.for_net(net), make_cache(net, 2, 9), ids)
    net.to(torch.bfloat16)
    assert torch.equal(write(DecodeStep.for_net(net), make_cache(net, 2, 9), ids), rounded_when_used)


def matrices(net: GPT) -> list[torch.nn.Module]:
    """Return the layers whose weights the kernel packs, of a network with a head of its own."""
    names = {"lm_head", *(name.split(".")[1] for name in decode_cpu.THIN)}
    return [module for name, module in net.named_modules() if name.split(".")[-1] in names]


def test_int8_is_off_by_at_most_half_a_scale():
    weight = torch.randn(50, 37)
    weight[3], weight[4] = 0.0, 1e-30
    numbers, scales = decode_cpu.in_int8(weight)
    assert torch.equal(numbers, numbers.round()) and torch.equal(scales, weight.abs().amax(1) / 127)
    assert torch.equal(numbers.abs().amax(1), 127 * (scales > 0).float())
    error = (weight - scales[:, None] * numbers).abs() / scales[:, None]
    assert error[scales > 0].max() <= 0.50001 and error[:3].max() > 0.4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["modern windows", "gpt2 untied GQA"])
@torch.inference_mode()
def test_weights_that_int8_holds_exactly_give_the_same_bits(form, dtype):
    net = make_net(FORMS[form], dtype)
    for layer in matrices(net):
        whole = torch.randint(-127, 128, layer.weight.shape)
        whole[:, 0] = 127
        layer.weight.data = whole / 1024
    ids = torch.randint(0, 301, (9, 5))
    plain = write(DecodeStep.for_net(net), make_cache(net, 9, 5), ids)
    net.int8 = True
    step = DecodeStep.for_net(net)
    assert torch.equal(write(step, make_cache(net, 9, 5), ids), plain)
    assert {packed.dtype for packed in step._packed} == {torch.int8}


@pytest.mark.parametrize("form", ["modern windows", "gpt2 untied GQA"])
@torch.inference_mode()
def test_int8_in_fp32_is_torch_with_weights_rounded_before(form):
    net, ids = make_net(FORMS[form]), torch.randint(0, 301, (2, 30))
    net.int8 = True
    found = write(DecodeStep.for_net(net), make_cache(net, 2, 30), ids)
    plain = net(ids)
    for layer in matrices(net):
        numbers, scales = decode_cpu.in_int8(layer.weight)
        layer.weight.data = scales[:, None] * numbers
    size = plain.abs().max()
    assert (found - net(ids)).abs().max() < 1e-5 * size < 1e-3 * size < (found - plain).abs().max() < 0.1 * size


@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_nan_reaches_the_logits(int8):
    net = make_net({})
    net.int8 = int8
    net.transformer.h[0].mlp.c_fc.weight.data[5, 5] = float("nan")
    assert DecodeStep.for_net(net)(make_cache(net, 1, 4), torch.tensor([3])).isnan().all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"ids": torch.tensor([1, 320])},
        {"ids": torch.tensor([1, -1])},
        {"ids": torch.tensor([1, 1], dtype=torch.int32)},
        {"ids": torch.tensor([[1, 1]])},
        {"at": torch.tensor([0, 8])},
        {"at": torch.tensor([0, -1])},
        {"at": torch.tensor([0, 3, 4])},
        {"rows": torch.tensor([0, 2])},
        {"rows": torch.tensor([-1, 0])},
        {"adapters": torch.tensor([1, 0])},
        {"adapters": torch.tensor([0, -1])},
        {"adapters": torch.tensor([1])},
        {"outputs": torch.tensor([2])},
        {"outputs": torch.tensor([-1])},
        {"prefix": torch.tensor([0, 1])},
        {"prefix": torch.tensor([-2, 0])},
        {"prefix": torch.tensor([0])},
        {"prefix": torch.tensor([1, 0])},  # a free place in the list of prefixes
        {"length": 254},  # position 256 lies behind the context
        {"length": 300},  # more than the prefix has room for
        {"first": 1},  # a layer without a window needs all tokens
        {"dtype": torch.bfloat16},
        {"k": torch.zeros(3, 2, 4, 8, 12)},
        {"places": 7},
    ],
    ids=str,
)
def test_what_lies_outside_of_memory_is_refused_before_anything_is_written(wrong):
    net = make_net(MODERN)
    cache, shape = make_cache(net, 2, 8), (3, 4, 256, 16)
    cache.prefix = wrong.get("prefix", torch.tensor([0, -1]))
    part, shared = cache.parts[0], PrefixPart(torch.zeros(shape), torch.zeros(shape), wrong.get("first", 0), None)
    cache.prefixes = [Prefix([shared], wrong.get("length", 5)), None]
    part.k = wrong.get("k", part.k[:, :, :, : wrong.get("places", 8)].to(wrong.get("dtype", torch.float32)))
    given = {"ids": torch.tensor([1, 2]), "at": torch.tensor([2, 3])} | wrong
    given = {name: given.get(name) for name in ("ids", "at", "rows", "outputs", "adapters")}
    with pytest.raises(ValueError):
        DecodeStep.for_net(net).extend(cache, **given)
    assert part.v.isnan().all() and not cache.last_embed.any()


class OtherNetwork(GPT):
    """A network of someone else's making."""


def test_what_the_kernel_does_not_compute_is_left_to_torch(monkeypatch):
    net = make_net({})
    assert decode_cpu.supports(net)
    assert not decode_cpu.supports(OtherNetwork(net.config).init_weights())
    pairs = FORMS["modern small windows"] | {"paired_heads": "short"}
    assert not decode_cpu.supports(make_net(pairs)) and decode_cpu.supports(make_net(pairs | {"paired_heads": None}))
    switches = {"exclusive_attention": True, "attention_gate": True, "activation": "leaky_relu_squared"}
    switches |= {"asymmetric_cap": True, "qk_dim": 8, "copy_candidate": True}
    for name, value in switches.items():
        assert not decode_cpu.supports(make_net(MODERN | {name: value}))
    assert not decode_cpu.supports(make_net(FORMS["modern n-grams"] | {"ngram_into": "values"}))
    net.compute_dtype = torch.float16
    assert DecodeStep.for_net(net) is None
    net.compute_dtype = torch.float32
    net.lm_head.to(torch.bfloat16)
    assert DecodeStep.for_net(net) is None
    monkeypatch.setenv("FATHOM_KERNELS", "off")
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    assert DecodeStep.for_net(make_net({})) is None


@pytest.mark.parametrize("lengths", [(100, 30), (30, 100), (5, 60, 100, 1), (64, 64)])
@pytest.mark.parametrize("form", ["modern", "modern windows", "modern small windows", "modern key offset"])
def test_rows_behind_one_prefix_are_read_together_as_each_alone(form, lengths):
    net = make_net(FORMS[form])
    step = DecodeStep.for_net(net)
    shared, *texts = (torch.randint(net.config.vocab_size, (n,)) for n in (40, *lengths))
    with torch.inference_mode():
        first = make_cache(net, 1, 140)
        feed(step, first, 0, shared)
        prefix = first.snapshot(0)
        cache = make_cache(net, len(texts), 140, behind=[prefix] * len(texts))
        at = torch.cat([torch.arange(len(text)) for text in texts])
        rows = torch.cat([torch.full((len(text),), row) for row, text in enumerate(texts)])
        together = step.extend(cache, torch.cat(texts), at, rows=rows)
        plain = torch.cat([net(torch.cat((shared, text))[None])[0, len(shared) :] for text in texts])
    torch.testing.assert_close(together, plain, rtol=1e-4, atol=1e-4)
