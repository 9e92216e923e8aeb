"""Every composition of a batch gives what the plain forward gives: joins, ends, aborts, short budgets, shared texts."""

import random
import threading

import pytest
import torch
from test_engine import BOS, TOKENIZER

from llm.inference import slot_batch
from llm.inference.engine import Engine
from llm.inference.request import Request
from llm.inference.sampling import SamplingParams, draw_keys, uniform_draws
from llm.inference.slot_batch import SlotBatch
from llm.model.config import GPTConfig
from llm.model.gpt import GPT

SEQ_LEN = 96
MODERN = {"value_embeds": True, "residual_scalars": True, "smear": True, "backout": True, "window_pattern": "SSL"}
KINDS = [
    ("classic", 2),
    ("classic", 4),
    ("modern", 2),
    ("modern", 4),
    ("gpt2", 4),
    ("n-grams", 2),
    ("key offset", 2),
    ("paired heads", 2),
    ("all heads paired", 2),
    ("copies", 2),
]  # arch, key/value heads
ARCHS = {"classic": {}, "modern": {**MODERN, "gate_channels": 4}, "gpt2": {"tied": True, "softcap": None}}
ARCHS["n-grams"] = ARCHS["modern"] | {"arch": "modern", "ngrams": (2, 3), "ngram_bos": BOS}
ARCHS["key offset"] = ARCHS["modern"] | {"arch": "modern", "key_offset": True}
ARCHS["paired heads"] = ARCHS["modern"] | {"arch": "modern", "paired_heads": "short"}
ARCHS["all heads paired"] = ARCHS["key offset"] | {"paired_heads": "all"}
ARCHS["copies"] = ARCHS["modern"] | {"arch": "modern", "copy_candidate": True, "copy_bos": BOS}
TIE = 1e-4  # logits nearer to each other are equally right


def sharp_net(arch: str, n_kv_head: int, window: int | None = None) -> GPT:
    """A random network of three layers with sharp logits; window: that of the first two layers."""
    options = (
        {"arch": arch}
        | ARCHS[arch]
        | ({"window_pattern": "SSL", "window_divisor": SEQ_LEN // window} if window else {})
    )
    c = GPTConfig(3, 4, n_kv_head, 8, 32, SEQ_LEN, TOKENIZER.vocab_size, window_multiple=4, **options)
    assert window is None or window == c.window(0) * (2 if c.paired_heads else 1)
    net, generator = GPT(c), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.4)
    return net.eval()


def without_kernel(monkeypatch) -> None:
    """Let torch compute all passes."""
    monkeypatch.setattr("llm.inference.slot_batch.DecodeStep.for_net", lambda net: None)


def drawn_prompts(draw: random.Random) -> list[list[int]]:
    """Prompts of which some are equal, some begin alike, and some are long."""
    shared = [BOS, *draw.choices(range(256), k=draw.randint(18, 40))]
    prompts = [[BOS, *draw.choices(range(256), k=draw.randint(0, 60))] for _ in range(3)]
    prompts += [shared[: draw.randint(10, 60)] + draw.choices(range(256), k=draw.randint(0, 20)) for _ in range(3)]
    return [draw.choice(prompts) for _ in range(draw.randint(3, 8))]


def play(engine: Engine, draw: random.Random) -> list[Request]:
    """Submit drawn requests at drawn steps, abort some; return those that came to an end."""
    todo, requests = drawn_prompts(draw), []
    while todo or engine.has_work:
        while todo and (draw.random() < 0.4 or not engine.has_work):
            temperature = draw.choice((0.0, 0.0, 1.0))
            params = SamplingParams(temperature, max_new_tokens=draw.choice((1, 5, 12, 24)), seed=draw.randint(0, 3))
            requests.append(engine.submit(todo.pop(), params, sample=draw.randint(0, 2)))
        engine.step()
        if len(requests) > 1 and draw.random() < 0.05:
            engine.abort(draw.choice(requests[1:]))
        follow = [r for r in requests if r.finish_reason == "length" and len(r.tokens) < SEQ_LEN - 10]
        if follow and len(requests) < 10 and draw.random() < 0.1:  # the history of a chat, or a part of it
            todo.append(draw.choice(follow).tokens[: draw.choice((None, 15))] + draw.choices(range(256), k=5))
    return [request for request in requests if request.finish_reason != "abort"]


def check(net: GPT, request: Request) -> None:
    """A request's greedy tokens are the largest logits of one plain pass over the whole text, up to ties."""
    with torch.no_grad():
        logits = net(torch.tensor([request.tokens]))[0, len(request.prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(request.ids).unsqueeze(1)).squeeze(1)
    assert (chosen >= logits.amax(dim=1) - TIE).all(), request.prompt


def lone(net: GPT, request: Request) -> list[int]:
    engine = Engine(net, TOKENIZER)
    again = engine.submit(request.prompt, request.params, sample=request.sample)
    while engine.has_work:
        engine.step()
    return again.ids


def is_tie(net: GPT, request: Request, other: list[int]) -> bool:
    """Return whether the first token in which a sample differs from `other` was drawn at the border of the two."""
    n = next(i for i, (a, b) in enumerate(zip(request.ids, other, strict=True)) if a != b)
    with torch.no_grad():
        logits = net(torch.tensor([request.prompt + request.ids[:n]]))[0, -1]
    draw = uniform_draws(draw_keys([request.params.seed], [request.sample]), [n])[0]
    return abs(logits.double().softmax(-1).cumsum(0)[min(request.ids[n], other[n])].item() - draw) < 1e-6


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 60))])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_composition_of_a_batch_gives_what_each_request_gets_alone(kind, seed, monkeypatch):
    draw = random.Random(seed)
    net = sharp_net(*kind, window=draw.choice((None, 8, 16, 24)))
    monkeypatch.setattr("llm.inference.slot_batch.SPARE", draw.choice((1, 3, 32)))
    if seed % 2:
        without_kernel(monkeypatch)
    if seed % 3 == 1:
        monkeypatch.setattr("llm.inference.slot_batch.shares_texts", lambda device: False)  # as on a GPU
    if seed % 6 == 1:
        monkeypatch.setattr("llm.inference.slot_batch.is_used", lambda device: True)  # graphs
        monkeypatch.setattr("llm.inference.step_graph.RECORD_AFTER", draw.choice((1, 2)))
        monkeypatch.setattr("llm.inference.slot_batch.REACHES", (8, 1))
        monkeypatch.setattr("llm.inference.step_graph.REACHES", (8, 1))
    monkeypatch.setattr("llm.inference.slot_batch.CHUNK", draw.choice((8, 24, 512)))
    if draw.random() < 0.3:
        monkeypatch.setattr("llm.inference.slot_batch.keeps_shapes", lambda device, dtype: True)
    options = {"max_rows": draw.choice((1, 3, 16)), "budget": draw.choice((None, 96, 150, 300, 500))}
    engine = Engine(net, TOKENIZER, frozen=draw.random() < 0.7, **options)
    requests = play(engine, draw)
    for request in requests:
        assert request.is_done and len(request.ids) == len(request.mask)
        if request.params.is_greedy:
            check(net, request)
        elif (other := lone(net, request)) != request.ids:
            assert is_tie(net, request, other)
    assert engine.stats()["rows"] == 0
    if engine._batch:
        assert all(entry.uses == 0 for entry in engine._batch.store._entries) and not engine._batch.cache.lengths.any()


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def test_engines_on_one_device_divide_its_free_memory(monkeypatch):
    net = sharp_net("classic", 2)
    alone = 10_000_000
    per_token = 2 * net.config.n_layer * net.config.n_kv_head * net.config.head_dim * net.compute_dtype.itemsize
    monkeypatch.setattr(slot_batch, "free_memory", lambda: 2 * alone * per_token)
    assert slot_batch.default_budget(net, 10**9) == alone
    assert slot_batch.default_budget(net, 10**9, sharers=4) == alone // 4


def test_a_short_budget_is_kept_by_reading_rows_again():
    net, draw = sharp_net("modern", 4), random.Random(0)
    engine = Engine(net, TOKENIZER, max_rows=8, budget=256, frozen=True)
    params = SamplingParams(temperature=0.0, max_new_tokens=40)
    requests = [engine.submit([BOS, *draw.choices(range(256), k=30)], params) for _ in range(6)]
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.stats()["cache_size"])
    assert most <= 256 and engine.stats()["preemptions"] > 0
    for request in requests:
        assert len(request.ids) == 40
        check(net, request)


def test_a_lone_request_comes_to_its_end_whatever_the_budget_is():
    net = sharp_net("classic", 4)
    engine = Engine(net, TOKENIZER, budget=1)
    requests = [engine.submit([BOS, i], SamplingParams(temperature=0.0, max_new_tokens=90)) for i in range(3)]
    run(engine)
    assert [len(request.ids) for request in requests] == [90] * 3
    check(net, requests[2])


def test_samples_of_one_prompt_read_it_once():
    net = sharp_net("classic", 4)
    engine, prompt = Engine(net, TOKENIZER, frozen=True), [BOS, *range(40)]
    engine.generate([prompt, [BOS, 7]], SamplingParams(max_new_tokens=6), num_samples=4)
    stream = engine.stream([prompt], SamplingParams(max_new_tokens=1), num_samples=3)
    assert [request.cached_tokens for request in stream.requests] == [0] * 3
    list(stream)
    assert [request.cached_tokens for request in stream.requests] == [41] * 3
    assert engine.stats()["prefix_hits"] == 3


def test_the_history_of_a_chat_and_a_common_beginning_are_not_read_again():
    net, draw = sharp_net("modern", 4), random.Random(1)
    engine, params = Engine(net, TOKENIZER, frozen=True), SamplingParams(temperature=0.0, max_new_tokens=8)
    system = [BOS, *draw.choices(range(256), k=30)]
    first = engine.submit([*system, 1, 2, 3], params)
    run(engine)
    second = engine.submit([*first.tokens, 4, 5], params)
    other = engine.submit([*system, 9, 9, 9, 9], params)
    run(engine)
    assert second.cached_tokens == len(first.tokens) - 1  # the last token was never fed
    assert other.cached_tokens == len(system)
    for request in (first, second, other):
        check(net, request)


@pytest.mark.parametrize("kernel", [True, False])
def test_behind_a_long_text_windows_are_gone_and_its_beginning_is_kept_from_the_second_time_on(kernel, monkeypatch):
    if not kernel:
        without_kernel(monkeypatch)
    monkeypatch.setattr("llm.inference.slot_batch.SPARE", 1)
    net, draw = sharp_net("modern", 4, window=8), random.Random(1)
    engine, params = Engine(net, TOKENIZER, frozen=True), SamplingParams(temperature=0.0, max_new_tokens=8)
    system, requests = [BOS, *draw.choices(range(256), k=30)], []
    for i in range(4):
        requests.append(engine.submit([*system, *[i] * 20], params))
        run(engine)
    history = engine.submit([*requests[0].tokens, 4, 5], params)
    run(engine)
    assert [request.cached_tokens for request in requests] == [0, len(system), len(system), len(system)]
    assert history.cached_tokens == len(requests[0].tokens) - 1
    for request in (*requests, history):
        check(net, request)


def test_a_window_saves_memory_that_more_rows_may_use(monkeypatch):
    monkeypatch.setattr("llm.inference.slot_batch.SPARE", 8)
    net, draw = sharp_net("classic", 4, window=8), random.Random(0)
    cache = net.new_cache(2, SEQ_LEN, spare=1)
    assert cache.cost(8) == 8 and cache.cost(SEQ_LEN) == (9 + 9 + SEQ_LEN) / 3
    numbers = sum(part.k.numel() + part.v.numel() for part in cache.parts)
    per_token = 2 * net.config.n_layer * net.config.n_kv_head * net.config.head_dim
    assert numbers == 2 * cache.cost(SEQ_LEN) * per_token
    engine = Engine(net, TOKENIZER, max_rows=8, budget=SEQ_LEN)
    requests = [
        engine.submit([BOS, *draw.choices(range(256), k=9)], SamplingParams(temperature=0.0, max_new_tokens=70))
        for _ in range(2)
    ]
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, engine.stats()["cache_size"])
        assert engine.stats()["preemptions"] == 0
    assert most <= SEQ_LEN
    for request in requests:
        check(net, request)


def test_waiting_prompts_with_a_common_beginning_read_it_once():
    net, draw = sharp_net("modern", 2), random.Random(2)
    shots = [BOS, *draw.choices(range(256), k=50)]
    engine = Engine(net, TOKENIZER)
    params = SamplingParams(temperature=0.0, max_new_tokens=4)
    requests = [engine.submit([*shots, *draw.choices(range(256), k=5 + i)], params) for i in range(5)]
    run(engine)
    assert [request.cached_tokens for request in requests] == [len(shots)] * 5
    for request in requests:
        check(net, request)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_prompt_that_is_known_already_may_wait_behind_a_longer_one(kernel, frozen, monkeypatch):
    if not kernel:
        without_kernel(monkeypatch)
    net, prompt, params = sharp_net("classic", 2), [BOS, *range(20)], SamplingParams(0.0, max_new_tokens=6)
    engine = Engine(net, TOKENIZER, frozen=frozen)
    rows = [engine.submit(prompt, params, sample=sample) for sample in range(2)]  # read once, and kept with its logits
    for _ in range(2):
        engine.step()
    longer, same = (engine.submit(text, params) for text in ([*prompt, 5], prompt))
    while engine.has_work:
        engine.step()
    assert same.ids == rows[0].ids and longer.ids == Engine(net, TOKENIZER).generate([[*prompt, 5]], params)[0][0].ids


def test_a_long_prompt_is_read_in_chunks_while_others_go_on(monkeypatch):
    monkeypatch.setattr("llm.inference.slot_batch.CHUNK", 16)
    net = sharp_net("classic", 4)
    engine = Engine(net, TOKENIZER)
    talker = engine.submit([BOS, 1], SamplingParams(temperature=0.0, max_new_tokens=30))
    engine.step()
    reader = engine.submit([BOS, *range(60)], SamplingParams(temperature=0.0, max_new_tokens=3))
    grown = []
    while not reader.ids:
        engine.step()
        grown.append(len(talker.ids))
    assert grown == [2, 2, 3, 3, 4, 4, 5, 5]  # steps of both kinds take turns
    run(engine)
    for request in (talker, reader):
        check(net, request)


def test_the_first_token_is_told_before_the_others_are_computed():
    engine = Engine(sharp_net("classic", 4), TOKENIZER)
    talker = engine.submit([BOS, 1], SamplingParams(temperature=0.0, max_new_tokens=30))
    engine.step(), engine.step()
    newcomer = engine.submit([BOS, 2, 3], SamplingParams(temperature=0.0, max_new_tokens=3))
    assert [event.request for event in engine.step()] == [newcomer]
    assert [event.request for event in engine.step()] == [talker, newcomer]


def test_a_step_that_fails_loses_nothing(monkeypatch):
    net = sharp_net("classic", 4)
    engine = Engine(net, TOKENIZER)
    requests = [engine.submit([BOS, i], SamplingParams(temperature=0.0, max_new_tokens=6)) for i in range(3)]
    engine.step()
    with monkeypatch.context() as broken:
        broken.setattr("llm.inference.slot_batch.SlotBatch.decode", lambda self, waiting: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    run(engine)
    for request in requests:
        assert len(request.ids) == 6
        check(net, request)


def test_in_bf16_the_log_probabilities_stay_close_to_those_of_the_plain_pass():
    net, draw = sharp_net("modern", 4), random.Random(3)
    net.compute_dtype = torch.bfloat16
    engine = Engine(net, TOKENIZER)
    params = SamplingParams(temperature=1.0, max_new_tokens=24, logprobs=0)
    requests = [engine.submit([BOS, *draw.choices(range(256), k=20)], params, sample=i) for i in range(12)]
    run(engine)
    gaps, spread = [], []
    for request in requests:
        with torch.no_grad():
            logits = net(torch.tensor([request.tokens]))[0, len(request.prompt) - 1 : -1]
            exact = sharp_net("modern", 4)(torch.tensor([request.tokens]))[0, len(request.prompt) - 1 : -1]
        ids = torch.tensor(request.ids).unsqueeze(1)
        plain, fp32 = (x.log_softmax(-1).gather(1, ids).squeeze(1) for x in (logits, exact))
        gaps.append(torch.tensor(request.logprobs) - plain)
        spread.append(plain - fp32)
    gap, own = torch.cat(gaps), torch.cat(spread)
    assert abs(float(gap.mean())) < max(1e-3, 4 * float(own.std()) / len(own) ** 0.5)
    assert gap.abs().mean() < 2 * own.abs().mean()


def test_a_row_that_waits_for_a_tool_stalls_no_other(monkeypatch):
    """A call is forced by a bias; its result comes only after the other row has ended."""
    net, come = sharp_net("modern", 4), threading.Event()
    start, end = (TOKENIZER.special_id(f"python_{name}") for name in ("start", "end"))
    calls = []

    def run_code(text: str) -> str:
        calls.append(text)
        assert come.wait(60)
        return "42"

    engine = Engine(net, TOKENIZER, run_code=run_code)
    script = Script([start, ord("h"), ord("i"), end])
    caller = engine.submit([BOS, 5], SamplingParams(temperature=0.0, max_new_tokens=12, logprobs=0), constraint=script)
    other = engine.submit([BOS, 6], SamplingParams(temperature=0.0, max_new_tokens=20))
    while not other.is_done:
        engine.step()
    assert calls == ["hi"] and len(caller.ids) == 4 and engine.has_work and engine.stats()["rows"] == 0
    come.set()
    run(engine)
    forced = [TOKENIZER.special_id("output_start"), *b"42", TOKENIZER.special_id("output_end")]
    assert caller.ids[4:8] == forced and caller.mask == [1] * 4 + [0] * 4 + [1] * 4 and len(caller.ids) == 12
    assert [logprob is None for logprob in caller.logprobs] == [False] * 4 + [True] * 4 + [False] * 4
    rest = Request([*caller.prompt, *caller.ids[:8]], caller.params)
    rest.ids = caller.ids[8:]
    check(net, rest)
    check(net, other)


def test_a_tool_that_fails_has_no_result_and_an_aborted_request_gets_none():
    net = sharp_net("classic", 4)
    start, end = (TOKENIZER.special_id(f"python_{name}") for name in ("start", "end"))
    engine = Engine(net, TOKENIZER, run_code=lambda text: 1 / 0)
    params = SamplingParams(temperature=0.0, max_new_tokens=6)
    kept, gone = (engine.submit([BOS, i], params, constraint=Script([start, ord("h"), end])) for i in range(2))
    while len(gone.ids) < 3:
        engine.step()
    engine.abort(gone)
    run(engine)
    assert kept.mask == [1] * 6 and kept.finish_reason == "length" and len(gone.ids) == 3


class Script:
    """Constraint that lets a row say a script first, then anything but special tokens."""

    def __init__(self, script: list[int]):
        self.left, self.is_done = list(script), False

    def allowed(self) -> torch.Tensor:
        allowed = torch.arange(TOKENIZER.vocab_size) < BOS
        return torch.arange(TOKENIZER.vocab_size) == self.left[0] if self.left else allowed

    def accept(self, token: int) -> None:
        self.left = self.left[1:]


def test_prompts_of_different_lengths_share_a_pass_that_needs_no_padding(monkeypatch):
    monkeypatch.setattr("llm.inference.slot_batch.CHUNK", 64)
    engine = Engine(sharp_net("classic", 4), TOKENIZER)
    if not slot_batch.DecodeStep.for_net(engine.net):
        pytest.skip("our kernel cannot be built here")
    requests = [engine.submit([BOS, *[i] * n], SamplingParams(max_new_tokens=9)) for i, n in enumerate((39, 9, 9))]
    engine.step()
    assert [len(request.ids) for request in requests] == [1, 1, 1]  # 60 tokens; padded they would be 120


@pytest.mark.parametrize("frozen", [False, True])
def test_equal_prompts_are_read_once_however_long_they_are(monkeypatch, frozen):
    monkeypatch.setattr(slot_batch, "CHUNK", 16)
    read, read_chunk = [], SlotBatch._read_chunk

    def counted(batch, reading):
        read.append(sum(min(len(text) - reading.skip - reading.done, batch._chunk) for text in reading.texts))
        return read_chunk(batch, reading)

    monkeypatch.setattr(SlotBatch, "_read_chunk", counted)
    engine = Engine(sharp_net("classic", 4), TOKENIZER, frozen=frozen)
    prompt = [BOS, *range(1, 48)]
    found = engine.generate([prompt], SamplingParams(max_new_tokens=4), num_samples=6)
    assert len(found[0]) == 6 and sum(read) <= len(prompt) + 1
