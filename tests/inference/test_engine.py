"""Sampling and the engine: equal to the plain forward, independent of the batch, stops, limits, calculator calls."""

import numpy as np
import pytest
import torch

from llm.errors import UserError
from llm.inference.engine import Engine
from llm.inference.sampling import BROKEN, SamplingParams, draw_keys, sample, uniform_draws
from llm.inference.weights import LENGTHS, ROWS, in_compute_dtype, round_up
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])  # ids 0..255 are the bytes
END, BOS = TOKENIZER.special_id("assistant_end"), TOKENIZER.bos_id
PYTHON, PYTHON_END = TOKENIZER.special_id("python_start"), TOKENIZER.special_id("python_end")
OUTPUT, OUTPUT_END = TOKENIZER.special_id("output_start"), TOKENIZER.special_id("output_end")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)


def tiny_net(n_kv_head: int = 2, seq_len: int = 48) -> GPT:
    """A random two-layer model with sharp, varied logits; it never says its stop tokens."""
    config = GPTConfig(2, 2, n_kv_head, 8, 16, seq_len, TOKENIZER.vocab_size)
    net, generator = GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
        net.lm_head.weight[256:] = 0  # special tokens: logit 0, far below the largest of 256
    return net


def plain_greedy(net: GPT, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(net(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


class ScriptCache:
    """Cache of rows that begin together: of each row the first token, the prompt's length, and all tokens' number."""

    def __init__(self):
        self.used, self.rows = 0, torch.zeros(0, 2, dtype=torch.long)
        self.lengths = torch.zeros(0, dtype=torch.long)

    def repeat(self, n: int) -> None:
        self.keep(torch.arange(len(self.lengths)).repeat_interleave(n))

    def keep(self, rows: torch.Tensor) -> None:
        self.rows, self.lengths = self.rows[rows], self.lengths[rows]


class ScriptNet(torch.nn.Module):
    """Says `scripts[first token of the prompt]`, whatever is sampled, and records what it is fed.

    Like a model of others it keeps all it knows of a row in a cache whose rows begin together.
    """

    def __init__(self, scripts: list[list[int]], seq_len: int = 64):
        super().__init__()
        self.config = GPTConfig(1, 1, 1, 2, 2, seq_len, TOKENIZER.vocab_size)
        self.compute_dtype, self.device = torch.float32, torch.device("cpu")
        self.scripts, self.fed = scripts, []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def new_cache(self, batch, max_len):
        return ScriptCache()

    def forward(self, ids, cache, lengths=None, last_only=False):
        assert last_only and not torch.is_grad_enabled() and not self.training
        if len(cache.lengths) == 0:
            cache.rows, cache.lengths = torch.stack((ids[:, 0], lengths), dim=1), lengths
        else:
            self.fed.append(ids[:, 0].tolist())
            cache.lengths = cache.lengths + 1
        logits = torch.zeros(len(ids), 1, self.config.vocab_size)
        for row, (first, length) in enumerate(cache.rows.tolist()):
            script, at = self.scripts[first], int(cache.lengths[row]) - length
            logits[row, 0, script[at] if 0 <= at < len(script) else END] = 100.0
        return logits


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_draws_depend_on_seed_row_and_step_only():
    def drawn(seed, n_steps, n_rows):
        return uniform_draws(draw_keys([seed] * n_rows, range(n_rows)), np.arange(n_steps)[:, None])

    draws = drawn(7, n_steps=50, n_rows=40)
    assert (drawn(7, n_steps=10, n_rows=8) == draws[:10, :8]).all()
    assert len(set(draws.ravel())) == draws.size
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.02
    assert (drawn(8, 50, 40) != draws).all()
    assert drawn(-1, 2, 2).shape == drawn(2**80, 2, 2).shape == (2, 2)  # any whole number is a seed
    assert drawn(3, 2, 2).ravel().tolist() == [  # whatever else changes
        0.35250333470841544,
        0.284979128439496,
        0.9868697100661743,
        0.21630845634958806,
    ]


def test_sample_follows_the_distribution():
    logits = torch.tensor([1.0, 3.0, -2.0, 2.0, 0.0])
    draws = torch.from_numpy(uniform_draws(draw_keys([0] * 50_000, range(50_000)), 0))
    for temperature in (1.0, 0.5):
        ids = sample(logits.expand(50_000, -1), SamplingParams(temperature=temperature), draws)
        shares = torch.bincount(ids, minlength=5) / 50_000
        assert torch.allclose(shares, (logits / temperature).softmax(-1), atol=0.01)


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log().expand(5_000, -1)
    draws = torch.from_numpy(uniform_draws(draw_keys([0] * 5_000, range(5_000)), 0))

    def drawn(**params) -> set[int]:
        return set(sample(logits, SamplingParams(**params), draws).tolist())

    assert drawn(top_k=0) == drawn(top_k=5) == drawn(top_k=99) == {0, 1, 2, 3, 4}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_k=1) == drawn(temperature=0.0) == {1}
    assert drawn(top_p=0.69) == {1, 3}
    assert drawn(top_p=0.71) == {1, 3, 4}  # the token that crosses the share still belongs
    assert drawn(top_p=1e-9) == {1}
    assert drawn(top_k=3, top_p=0.8) == {1, 3}  # shares count within what top_k left: .47, .35, .18
    shares = torch.bincount(sample(logits, SamplingParams(top_k=2), draws), minlength=5) / 5_000
    assert abs(shares[1] - 4 / 7) < 0.03


def test_extreme_draws_hit_tokens_with_probability():
    logits = torch.full((2, 300), float("-inf"))
    logits[:, [5, 200]] = 0.0
    draws = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert sample(logits, SamplingParams(), draws).tolist() == [5, 200]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-45, 1e-40, 1e-38, 1e-20, 1e-7, 1e-6, 1e-4])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_every_small_temperature_is_greedy(dtype, temperature, cut):
    logits = torch.tensor([[1.0, 5.0, -3.0, 4.5], [-9.0, -8.0, float("-inf"), -7.0]]).to(dtype)
    for draw in (0.0, 0.5, 1 - 2.0**-53):
        ids = sample(logits, SamplingParams(temperature, **cut), torch.full((2,), draw, dtype=torch.float64))
        assert ids.tolist() == [1, 3]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.9}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_give_no_token(params, bad):
    logits = torch.tensor([[1.0, bad, 2.0, 0.0], [0.0, 1.0, 90.0, float("-inf")], [float("-inf")] * 4])
    draws = torch.full((3,), 0.5, dtype=torch.float64)
    assert sample(logits, SamplingParams(**params), draws).tolist() == [BROKEN, 2, BROKEN]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", -1e-40),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", 5.0),
        ("top_k", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("max_new_tokens", 0),
    ],
)
def test_params_name_the_wrong_value(key, value):
    with pytest.raises(UserError, match=f"^{key}={value}"):
        SamplingParams(**{key: value})


# ---------------------------------------------------------------------------------------------------------------------
# Generation with a real network


@pytest.mark.parametrize("n_kv_head", [2, 1])
def test_greedy_equals_plain_forward_for_mixed_lengths(n_kv_head):
    net = tiny_net(n_kv_head)
    prompts = [[BOS, *b"hello"], [BOS], [BOS, *b"a longer prompt than the others"], [BOS, *b"hi"]]
    completions = Engine(net, TOKENIZER).generate(prompts, GREEDY)
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        assert completion.ids == plain_greedy(net, prompt, 12)
        assert completion.mask == [1] * 12 and completion.finish_reason == "length"
    assert len({tuple(c.ids) for (c,) in completions}) == 4


def test_greedy_equals_plain_forward_up_to_the_end_of_the_context():
    net = tiny_net(seq_len=24)
    prompts = [[BOS, *b"0123456789012345678"], *([BOS, 97 + i] for i in range(5))]  # 20 tokens, and 2 in five rows
    params = SamplingParams(temperature=0.0, max_new_tokens=100)
    (long,), *short = Engine(net, TOKENIZER).generate(prompts, params)  # one of six is done early, and stays as a slot
    assert long.ids == plain_greedy(net, prompts[0], 4) and long.finish_reason == "length"
    for prompt, (completion,) in zip(prompts[1:], short, strict=True):
        assert completion.ids == plain_greedy(net, prompt, 22) and completion.finish_reason == "length"


def test_a_row_does_not_depend_on_its_batch():
    engine = Engine(tiny_net(), TOKENIZER)
    params = SamplingParams(temperature=1.0, max_new_tokens=20, seed=3)
    first, second = [BOS, *b"one"], [BOS, *b"number two"]
    alone = engine.generate([first, second], params)
    others = [[BOS, 60 + i] * (1 + i) for i in range(14)]
    together = engine.generate([first, second, *others], params)
    assert [c[0].ids for c in alone] == [c[0].ids for c in together[:2]]


def test_samples_differ_from_the_first_token_on_and_repeat_with_the_seed():
    engine = Engine(tiny_net(), TOKENIZER)
    prompts = [[BOS, *b"one"], [BOS, *b"two"]]
    params = SamplingParams(temperature=2.0, max_new_tokens=8, seed=1)
    drawn = engine.generate(prompts, params, num_samples=16)
    assert [len(samples) for samples in drawn] == [16, 16]
    assert all(len({tuple(c.ids[:1]) for c in samples}) > 3 for samples in drawn)
    assert [c.ids for c in drawn[0]] != [c.ids for c in drawn[1]]
    again = engine.generate(prompts, params, num_samples=16)
    assert again == drawn
    other = engine.generate(prompts, SamplingParams(temperature=2.0, max_new_tokens=8, seed=2), num_samples=16)
    assert other != drawn


def test_stream_gives_the_same_tokens_step_by_step():
    engine = Engine(tiny_net(), TOKENIZER)
    prompts, params = [[BOS, *b"one"], [BOS, *b"two"]], SamplingParams(max_new_tokens=6)
    stream = engine.stream(prompts, params)
    rows: dict[int, list[int]] = {0: [], 1: []}
    for step, events in enumerate(stream):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert [event.row for event in events] == [0, 1] and step < 6
        for event in events:
            rows[event.row].append(event.id)
    assert [rows[0], rows[1]] == [c[0].ids for c in engine.generate(prompts, params)]
    assert stream.finish_reasons == ["length", "length"]


def test_closing_a_stream_frees_the_cache_and_training_goes_on():
    net = tiny_net().train()
    engine = Engine(net, TOKENIZER)
    stream = engine.stream([[BOS, *b"one"]], SamplingParams(max_new_tokens=6))
    next(stream)
    assert not net.training and engine.stats()["cached_tokens"] > 0
    stream.close()
    assert net.training and engine.stats()["cached_tokens"] == 0
    assert list(stream) == []
    ids = torch.tensor([[BOS, *b"text"]])
    net(ids[:, :-1], targets=ids[:, 1:]).backward()  # nothing of inference mode is left in the network
    assert net.lm_head.weight.grad.abs().sum() > 0


def test_bf16_twin_computes_the_same_and_follows_the_weights():
    net = tiny_net()
    net.compute_dtype = torch.bfloat16
    ids = torch.tensor([[BOS, *b"some text"]])
    with torch.no_grad():
        assert torch.equal(in_compute_dtype(net)(ids), net(ids))
    engine, prompts = Engine(net, TOKENIZER), [[BOS, *b"one"]]
    before = engine.generate(prompts, GREEDY)
    assert len(before[0][0].ids) == 12
    with torch.no_grad():
        net.lm_head.weight.neg_()
    assert engine.generate(prompts, GREEDY) != before
    assert all(weight.dtype == torch.float32 for weight in net.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Few shapes


def test_sizes_are_few_and_close():
    assert [round_up(n, *LENGTHS) for n in (1, 32, 33, 128, 129, 257, 1000)] == [32, 32, 64, 128, 160, 320, 1024]
    assert [round_up(n, *ROWS) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17, 60)] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 64]
    sizes = {round_up(n, *LENGTHS) for n in range(1, 4097)}
    assert len(sizes) == 24 and all(round_up(n, *LENGTHS) < max(n + 32, 1.25 * n) for n in range(1, 4097))


@pytest.mark.parametrize("arch", ["classic", "modern", "gpt2"])
def test_sizes_change_no_token(monkeypatch, arch):
    """Prompts of other lengths than the sizes, some near the end of the context, rows that end one by one."""
    monkeypatch.setattr("llm.inference.slot_batch.DecodeStep.for_net", lambda net: None)
    config = GPTConfig(2, 2, 2, 16, 32, 90, TOKENIZER.vocab_size, arch=arch, smear=arch == "modern")
    net, generator = GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    prompts = [[BOS, *b"x" * n] for n in (0, 4, 30, 31, 32, 50, 70, 84, 88, 90)]
    found = []
    for params in (GREEDY, SamplingParams(temperature=1.0, max_new_tokens=60, seed=1)):
        for keeps in (False, True):
            monkeypatch.setattr("llm.inference.slot_batch.keeps_shapes", lambda device, dtype, keeps=keeps: keeps)
            found.append(Engine(net, TOKENIZER).generate(prompts, params, num_samples=2))
    assert found[0] == found[1] and found[2] == found[3]
    assert len({len(completion.ids) for samples in found[2] for completion in samples}) > 3


def test_half_precision_on_a_cpu_meets_few_shapes(monkeypatch):
    """Every shape that a product meets leaves code in memory: conversations of 90 lengths have three."""
    monkeypatch.setattr("llm.inference.slot_batch.DecodeStep.for_net", lambda net: None)  # torch's own products
    net = tiny_net(seq_len=100)
    shapes = {torch.bfloat16: set(), torch.float32: set()}
    for dtype, met in shapes.items():
        net.compute_dtype = dtype
        net.to(dtype)
        hook = net.transformer.h[0].register_forward_pre_hook(lambda _, inputs, met=met: met.add(inputs[0].shape[:2]))
        for n in range(1, 91):
            Engine(net, TOKENIZER).generate([[BOS, *b"x" * n]], SamplingParams(max_new_tokens=2))
        hook.remove()
    assert shapes[torch.bfloat16] == {(1, 1), (1, 32), (1, 64), (1, 96)}
    assert len(shapes[torch.float32]) == 91  # which keeps nothing


# ---------------------------------------------------------------------------------------------------------------------
# Stops, limits and calculator calls, with a scripted network


@pytest.mark.parametrize("stop", [END, BOS])
def test_stop_tokens_end_a_row_and_are_not_part_of_it(stop):
    net = ScriptNet([[*b"ok", stop, *b"never"]])
    ((completion,),) = Engine(net, TOKENIZER).generate([[0, 1]], SamplingParams(max_new_tokens=9))
    assert completion.ids == list(b"ok") and completion.finish_reason == "stop" and completion.stop_id == stop


def test_each_completion_keeps_the_token_that_ended_it():
    net = ScriptNet([[*b"a", END], [*b"bcd", BOS], list(b"efghij")])
    params = SamplingParams(max_new_tokens=5, stop=("fg",))
    drawn = Engine(net, TOKENIZER).generate([[0], [1], [2]], params)
    assert [samples[0].stop_id for samples in drawn] == [END, BOS, None]
    assert [samples[0].finish_reason for samples in drawn] == ["stop"] * 3


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1.0])
def test_a_network_that_gives_no_numbers_is_noticed(temperature):
    net = tiny_net()
    with torch.no_grad():
        net.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="the network gives NaN"):
        Engine(net, TOKENIZER).generate([[BOS, *b"abc"]], SamplingParams(temperature))


def test_a_whole_number_is_a_temperature():
    net = tiny_net()
    whole, point = (
        Engine(net, TOKENIZER).generate([[1, 2, 3]], SamplingParams(temperature=number, seed=3)) for number in (1, 1.0)
    )
    assert whole[0][0].ids == point[0][0].ids


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-40, 1e-12])
def test_the_smallest_temperatures_write_what_greedy_decoding_does(temperature):
    net, prompts = tiny_net(), [[BOS, *b"abc"], [BOS, *b"the"]]
    greedy = [c[0].ids for c in Engine(net, TOKENIZER).generate(prompts, GREEDY)]
    params = SamplingParams(temperature, top_k=50, max_new_tokens=12)
    assert [c[0].ids for c in Engine(net, TOKENIZER).generate(prompts, params)] == greedy


def test_max_new_tokens_ends_a_row():
    net = ScriptNet([[*b"abcdef", END]])
    for limit, reason in ((3, "length"), (6, "length"), (7, "stop")):
        ((completion,),) = Engine(net, TOKENIZER).generate([[0]], SamplingParams(max_new_tokens=limit))
        assert completion.ids == list(b"abcdef")[:limit] and completion.finish_reason == reason


def test_a_prompt_without_room_gets_an_empty_completion_and_the_others_their_own():
    net = ScriptNet([list(b"aaa"), list(b"bbb"), list(b"ccc")], seq_len=8)
    prompts = [[0] * 8, [1, 1], [2] * 9]
    drawn = Engine(net, TOKENIZER).generate(prompts, SamplingParams(), num_samples=2)
    assert [[bytes(c.ids) for c in samples] for samples in drawn] == [[b"", b""], [b"bbb", b"bbb"], [b"", b""]]
    assert [samples[0].finish_reason for samples in drawn] == ["length", "stop", "length"]
    assert Engine(net, TOKENIZER).generate([], SamplingParams()) == []


def test_an_empty_prompt_and_no_samples_are_errors():
    engine = Engine(ScriptNet([[END]]), TOKENIZER)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate([[0], []], SamplingParams())
    with pytest.raises(ValueError, match="num_samples=0"):
        engine.generate([[0]], SamplingParams(), num_samples=0)


def test_finished_rows_leave_the_batch():
    scripts = [[65 + i] * (2 * i + 1) for i in range(16)]
    net = ScriptNet(scripts)
    completions = Engine(net, TOKENIZER).generate([[i] for i in range(16)], SamplingParams(max_new_tokens=40))
    assert [c[0].ids for c in completions] == scripts
    widths = [len(ids) for ids in net.fed]
    assert widths[0] == 16 and widths[-1] == 1 and widths == sorted(widths, reverse=True)
    live = [sum(step < len(script) for script in scripts) for step in range(31)]
    assert sum(widths) < sum(live) / 0.74  # at no time more than a quarter of the batch is done


def test_batches_that_rows_leave_have_few_sizes(monkeypatch):
    monkeypatch.setattr("llm.inference.static_batch.keeps_shapes", lambda device, dtype: True)
    scripts = [[65 + i % 26] * (2 * i + 1) for i in range(30)]
    net = ScriptNet(scripts)
    completions = Engine(net, TOKENIZER).generate([[i] for i in range(30)], SamplingParams(max_new_tokens=60))
    assert [c[0].ids for c in completions] == scripts
    widths = [len(ids) for ids in net.fed[1:]]
    assert {30, 1} < set(widths) <= {30, 24, 16, 12, 8, 6, 4, 3, 2, 1} and widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(
    ("call", "output"),
    [(b"12*3", b"36"), (b"'banana'.count('a')", b"3"), (b"1,000/8", b"125"), (b"-7+2", b"-5")],
)
def test_calculator_result_is_forced_into_the_row(call, output):
    # The model's own idea of what follows its call ("9") is replaced while forced tokens are written.
    forced = [OUTPUT, *output, OUTPUT_END]
    script = [*b"x=", PYTHON, *call, PYTHON_END, *[ord("9")] * len(forced), *b"ok", END]
    net = ScriptNet([script])
    ((completion,),) = Engine(net, TOKENIZER).generate([[0, 1, 2]], SamplingParams())
    said = [*b"x=", PYTHON, *call, PYTHON_END]
    assert completion.ids == [*said, *forced, *b"ok"]
    assert completion.mask == [1] * len(said) + [0] * len(forced) + [1, 1]
    assert completion.finish_reason == "stop"
    assert [ids[0] for ids in net.fed] == completion.ids  # and the model is fed what stands in the text


def test_calculator_calls_of_rows_do_not_mix():
    calls = [b"1+1", b"20*3", b"7-10"]
    pads = [[], list(b"ab"), list(b"abcd")]
    scripts = [[*pad, PYTHON, *call, PYTHON_END, *[0] * 4, END] for pad, call in zip(pads, calls, strict=True)]
    stream = Engine(ScriptNet(scripts), TOKENIZER).stream([[0], [1], [2]], SamplingParams())
    forced: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for events in stream:
        for event in events:
            if event.forced:
                forced[event.row].append(event.id)
    assert forced == {i: [OUTPUT, *text, OUTPUT_END] for i, text in enumerate((b"2", b"60", b"-3"))}


@pytest.mark.parametrize("call", [b"1/0", b"2**9", b"open('x')", b""])
def test_a_call_that_cannot_be_calculated_forces_nothing(call):
    script = [PYTHON, *call, PYTHON_END, *b"hm", END]
    ((completion,),) = Engine(ScriptNet([script]), TOKENIZER).generate([[0]], SamplingParams())
    assert completion.ids == script[:-1] and set(completion.mask) == {1}


def test_tools_can_be_switched_off():
    script = [PYTHON, *b"1+1", PYTHON_END, END]
    ((completion,),) = Engine(ScriptNet([script]), TOKENIZER).generate([[0]], SamplingParams(use_tools=False))
    assert completion.ids == script[:-1] and set(completion.mask) == {1}


def test_forced_tokens_count_towards_the_limit():
    script = [PYTHON, *b"9*9", PYTHON_END, *[0] * 4, *b"done", END]
    ((completion,),) = Engine(ScriptNet([script]), TOKENIZER).generate([[0]], SamplingParams(max_new_tokens=7))
    assert completion.ids == [*script[:5], OUTPUT, ord("8")] and completion.finish_reason == "length"
    assert completion.mask == [1] * 5 + [0, 0]


def test_an_unpaired_python_end_is_ordinary():
    script = [PYTHON_END, *b"1", PYTHON, *b"3", PYTHON, *b"2+2", PYTHON_END, 0, 0, 0, END]
    ((completion,),) = Engine(ScriptNet([script]), TOKENIZER).generate([[0]], SamplingParams())
    assert completion.ids[-3:] == [OUTPUT, ord("4"), OUTPUT_END]  # the last start counts
