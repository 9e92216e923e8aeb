"""Requests that come and go step by step: settings of their own, ends, aborts, log-probabilities."""

import pytest
import torch
from test_engine import BOS, END, GREEDY, TOKENIZER, ScriptNet, plain_greedy, tiny_net

from llm.errors import UserError
from llm.inference.engine import Engine
from llm.inference.logits import adjusted
from llm.inference.request import Request
from llm.inference.sampling import SamplingParams
from llm.inference.text import TextStream


def finish(engine: Engine) -> list:
    """Step until nothing is left to do; all events."""
    events = []
    while engine.has_work:
        events += engine.step()
    return events


def test_requests_with_settings_of_their_own_get_what_they_get_alone():
    net = tiny_net()
    settings = [
        SamplingParams(temperature=0.0, max_new_tokens=5),
        SamplingParams(temperature=1.0, max_new_tokens=9, seed=4),
        SamplingParams(temperature=0.7, top_k=5, max_new_tokens=7, seed=4),
        SamplingParams(temperature=1.3, top_k=5, top_p=0.9, max_new_tokens=7, seed=9),
        SamplingParams(temperature=2.0, top_p=0.5, max_new_tokens=7),
        SamplingParams(temperature=2.0, min_p=0.1, max_new_tokens=7),
    ]
    engine, prompts = Engine(net, TOKENIZER), [[BOS, *b"abc"[: i + 1]] for i in range(len(settings))]
    requests = [engine.submit(prompt, own, sample=3) for prompt, own in zip(prompts, settings, strict=True)]
    events = finish(engine)
    for prompt, own, request in zip(prompts, settings, requests, strict=True):
        alone = Engine(net, TOKENIZER)
        lone = alone.submit(prompt, own, sample=3)
        finish(alone)
        assert request.ids == lone.ids == [e.id for e in events if e.request is request]
        assert len(request.ids) == own.max_new_tokens and request.finish_reason == "length"
    assert requests[0].ids == plain_greedy(net, prompts[0], 5)
    assert engine.step() == [] and engine.stats()["rows"] == 0


def test_the_last_event_says_why_a_request_ended():
    net = ScriptNet([[*b"ab", END], list(b"xyz")])
    engine = Engine(net, TOKENIZER)
    first, second = engine.submit([0], SamplingParams()), engine.submit([1], SamplingParams(max_new_tokens=2))
    full = engine.submit([1] * 64, SamplingParams())
    assert full.finish_reason == "length" and engine.has_work
    events = finish(engine)
    assert [(e.id, e.finish_reason) for e in events if e.request is first] == [(97, None), (98, None), (None, "stop")]
    assert [(e.id, e.finish_reason) for e in events if e.request is second] == [(120, None), (121, "length")]
    assert [(e.id, e.finish_reason) for e in events if e.request is full] == [(None, "length")]
    assert first.stop_id == END


def test_a_request_can_be_aborted_at_any_time():
    net = tiny_net()
    engine, prompt = Engine(net, TOKENIZER), [BOS, *b"abc"]
    gone, kept, late = (engine.submit(prompt, GREEDY) for _ in range(3))
    engine.abort(late)
    engine.step()
    engine.abort(gone)
    engine.abort(gone)
    assert engine.stats()["rows"] == 1
    finish(engine)
    assert (gone.finish_reason, late.finish_reason, kept.finish_reason) == ("abort", "abort", "length")
    assert len(gone.ids) == 1 and late.ids == [] and kept.ids == plain_greedy(net, prompt, 12)


def test_log_probabilities_are_those_of_the_plain_forward():
    net, prompt = tiny_net(), [BOS, *b"hello"]
    params = SamplingParams(temperature=1.5, max_new_tokens=6, logprobs=3, prompt_logprobs=2)
    engine = Engine(net, TOKENIZER)
    request = engine.submit(prompt, params)
    events = finish(engine)
    with torch.no_grad():
        everything = net(torch.tensor([request.tokens]))[0].log_softmax(-1)
    for at, (one, logprob, top) in enumerate(zip(request.ids, request.logprobs, request.top, strict=True)):
        row = everything[len(prompt) + at - 1]
        assert logprob == pytest.approx(float(row[one]), abs=1e-4) and events[at].logprob == logprob
        assert [i for i, _ in top] == row.topk(3).indices.tolist()
    assert request.prompt_logprobs[0] is None and len(request.prompt_logprobs) == len(prompt)
    for at, (logprob, top) in enumerate(request.prompt_logprobs[1:]):
        assert logprob == pytest.approx(float(everything[at, prompt[at + 1]]), abs=1e-4) and len(top) == 2
    scored = engine.score(prompt, request.ids)
    assert scored == pytest.approx(request.logprobs, abs=1e-4)


def test_penalties_biases_and_limits_change_what_is_said():
    net, prompt = tiny_net(), [BOS, *b"hello"]

    def said(**more) -> list[int]:
        params = SamplingParams(temperature=0.0, max_new_tokens=20, **more)
        return Engine(net, TOKENIZER).generate([prompt], params)[0][0].ids

    plain = said()
    assert len(set(said(presence_penalty=1000.0))) == len(set(said(frequency_penalty=1000.0))) == 20 > len(set(plain))
    assert not set(said(repetition_penalty=1e6)) & set(prompt)
    assert said(logit_bias=((7, 1000.0),)) == [7] * 20
    assert plain[0] not in said(logit_bias=((plain[0], -float("inf")),))
    stops = SamplingParams(temperature=0.0, max_new_tokens=20, logit_bias=((END, 1000.0),), min_new_tokens=4)
    ended = Engine(net, TOKENIZER).generate([prompt], stops)[0][0]
    assert len(ended.ids) == 4 and ended.stop_id == END
    assert said(logit_bias=((END, 1000.0),), ignore_eos=True) == [END] * 20


def test_penalties_by_hand():
    """Counts what the prompt says for repetition alone, all along; what the answer says for each of the three."""
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    request = Request([1, 2], params, 0, None, None)
    request.ids += [2, 3, 3]
    (found,) = adjusted(torch.tensor([[4.0, 4.0, -4.0, 4.0, -1.0]]), [request], ())
    assert found.tolist() == [4.0, 4 / 2, -4 * 2 - 0.5 - 0.25, 4 / 2 - 0.5 - 2 * 0.25, -1.0]


def test_requests_of_one_batch_are_told_as_many_likely_tokens_as_each_asks_for():
    engine = Engine(tiny_net(), TOKENIZER)
    few, many, none = (engine.submit([BOS, 7], SamplingParams(max_new_tokens=3, logprobs=n)) for n in (1, 4, 0))
    finish(engine)
    assert [[len(top) for top in request.top] for request in (few, many, none)] == [[1] * 3, [4] * 3, [0] * 3]


def test_many_biases_are_added_together():
    biases = tuple((token, float(token % 7)) for token in range(257)) * 2  # twice: each adds
    params, logits = SamplingParams(logit_bias=biases), torch.randn(1, 265)
    expected = logits.clone()
    for token, bias in biases:
        expected[0, token] += bias
    assert torch.equal(adjusted(logits, [Request([BOS], params)], ()), expected)


def test_a_bias_of_an_unknown_token_is_refused():
    with pytest.raises(UserError, match="^logit_bias: token 99999 is not among"):
        Engine(tiny_net(), TOKENIZER).submit([BOS], SamplingParams(logit_bias=((99999, 1.0),)))


class Counting:
    """Constraint that allows the digits in order and is fulfilled after three."""

    def __init__(self):
        self.accepted = []

    def allowed(self) -> torch.Tensor:
        allowed = torch.zeros(TOKENIZER.vocab_size, dtype=torch.bool)
        if len(self.accepted) < 3:
            allowed[ord("1") + len(self.accepted)] = True
        return allowed

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    @property
    def is_done(self) -> bool:
        return len(self.accepted) == 3


def test_a_constraint_decides_what_may_be_said_in_one_row_only():
    net, prompt = tiny_net(), [BOS, *b"hello"]
    engine = Engine(net, TOKENIZER)
    bound = engine.submit(prompt, SamplingParams(temperature=1.0), constraint=Counting())
    free = engine.submit(prompt, GREEDY)
    finish(engine)
    assert bytes(bound.ids) == b"123" and bound.finish_reason == "stop"
    assert free.ids == plain_greedy(net, prompt, 12)


def test_a_constraint_that_allows_nothing_is_an_error_of_its_request_alone():
    engine, over = Engine(tiny_net(), TOKENIZER), Counting()
    over.accepted = [0] * 5
    stuck, free = engine.submit([BOS], SamplingParams(), constraint=over), engine.submit([BOS], GREEDY)
    events = finish(engine)
    assert stuck.finish_reason == "error" and "no token is allowed" in stuck.error
    assert [e.finish_reason for e in events if e.request is stuck] == ["error"]
    assert len(free.ids) == 12


def test_prompts_that_are_refused_together_leave_nothing_in_the_engine():
    engine, wrong = Engine(tiny_net(), TOKENIZER), SamplingParams(logit_bias=((10**6, 1.0),))
    with pytest.raises(UserError, match="logit_bias"):
        engine.stream([[BOS], [BOS]], [GREEDY, wrong], num_samples=2)
    assert not engine.has_work and engine.stats()["waiting"] == 0


@pytest.mark.parametrize("method", ["allowed", "accept"])
def test_a_constraint_that_fails_ends_its_request_alone(method):
    engine, faulty = Engine(tiny_net(), TOKENIZER), Counting()
    setattr(faulty, method, lambda *args: 1 / 0)
    stuck, free = engine.submit([BOS], SamplingParams(), constraint=faulty), engine.submit([BOS], GREEDY)
    finish(engine)
    assert (stuck.finish_reason, stuck.ids) == ("error", []) and stuck.error == "the constraint fails: division by zero"
    assert len(free.ids) == 12 and free.error is None


def test_stop_texts_are_said_and_kept_or_left_out():
    net = ScriptNet([list(b"one two three")])
    for keep in (True, False):
        params = SamplingParams(stop=("wo", " t", "zz"), keep_stop=keep)
        engine = Engine(net, TOKENIZER)
        request = engine.submit([0], params)
        text, shown = TextStream(TOKENIZER, params.stop, keep), ""
        for event in finish(engine):
            shown += text.push(event.id)
        assert request.stop_text == " t" and bytes(request.ids) == b"one t"
        assert shown + text.flush() == ("one t" if keep else "one")


def test_stop_texts_count_from_min_new_tokens_on():
    engine = Engine(ScriptNet([list(b"one two one two!")]), TOKENIZER)
    params = SamplingParams(stop=("two", "e", "two one two?"), keep_stop=False, min_new_tokens=5)
    request = engine.submit([0], params)
    text = TextStream(TOKENIZER, params.stop, params.keep_stop)
    shown = [text.push(event.id, n >= 5) for n, event in enumerate(finish(engine), 1)]
    assert bytes(request.ids) == b"one two" and request.stop_text == "two"
    assert "".join(shown) + text.flush() == "one " and text.is_cut


def test_text_streams_hold_back_what_is_not_certain():
    text = TextStream(TOKENIZER, ("STOP",), keep_stop=False)
    shown = [text.push(one) for one in "aé SSTx".encode()]
    assert shown == ["a", "", "é", " ", "", "S", "", "STx"] and text.flush() == ""
    text = TextStream(TOKENIZER)
    assert [text.push(one) for one in b"a\xe2\x82"] == ["a", "", ""] and text.flush() == "\ufffd"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("nan")),
        ("logprobs", -1),
        ("prompt_logprobs", 1.5),
        ("min_new_tokens", 300),
    ],
)
def test_settings_name_the_wrong_value(key, value):
    with pytest.raises(UserError, match=f"^{key}={value}"):
        SamplingParams(**{key: value})
