"""Conversations of several turns: what the task says is read and not trained, and all go on together."""

from types import SimpleNamespace

import pytest
from conftest import compose

from llm.eval.task_scores import evaluate_pass_at_k
from llm.inference.engine import Completion, Engine
from llm.inference.sampling import SamplingParams
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.stages.rollouts import answer_of
from llm.stages.turns import answer_in_turns, draw_in_turns, judged
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.chat_format import render_conversation, render_prompt
from tasks.base import dialogue
from tasks.hints import SecondTry

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
END = TOKENIZER.special_id("<|assistant_end|>")
ROW = {"question": "What is 2 and 3?", "answer": "It is 5.\n#### 5"}


class Scripted:
    """An engine that says given answers in order and notes what it was asked."""

    def __init__(self, *batches, seq_len=1000):
        self.batches, self.asked, self.tokenizer = list(batches), [], TOKENIZER
        self.net = SimpleNamespace(config=SimpleNamespace(seq_len=seq_len))

    def generate(self, prompts, params, num_samples=1):
        self.asked.append((prompts, params))
        answers = iter(self.batches.pop(0))
        return [[self.said(next(answers)) for _ in range(num_samples)] for _ in prompts]

    @staticmethod
    def said(text):
        ids = TOKENIZER.encode(text.removesuffix("..."))
        is_cut = text.endswith("...")
        logprobs = [-0.5] * len(ids)
        if is_cut:
            return Completion(ids, [1] * len(ids), "length", None, logprobs)
        return Completion(ids, [1] * len(ids), "stop", END, logprobs, -0.25)


@pytest.fixture
def task():
    return SecondTry([ROW], "sums")


def answers(engine, task, turns, n=1, room=500):
    prompts = [render_prompt(TOKENIZER, task[0])]
    return answer_in_turns(engine, prompts, [task[0]], SamplingParams(max_new_tokens=room), n, task.reply, turns)[0]


def test_turns_are_the_tokens_of_the_conversation_with_the_reply_masked(task):
    engine = Scripted(["#### 4"], ["#### 5"])
    (sample,) = answers(engine, task, 2)
    hint = "That is too low. Try again."
    messages = [*dialogue(ROW["question"], "#### 4"), *dialogue(hint, "#### 5")]
    ids, mask = render_conversation(TOKENIZER, {"messages": messages})
    prompt = render_prompt(TOKENIZER, task[0])
    answer = answer_of(prompt, sample, 500)
    assert answer.ids == ids and answer.mask == mask
    assert engine.asked[1][0] == [ids[: -len("#### 5") - 1]]
    assert sample.earlier == [("#### 4", hint)]
    assert TOKENIZER.decode(sample.ids[sample.last :]) == "#### 5"
    wanted = [0.0] * len(prompt) + [-0.5] * 6 + [-0.25] + [0.0] * (len(hint) + 3) + [-0.5] * 6 + [-0.25]
    assert answer.logprobs == wanted


def test_only_unfinished_conversations_go_on_and_all_of_them_together(task):
    engine = Scripted(["#### 5", "#### 4", "cut off ...", "#### 9", "nothing"], ["#### 5", "#### 8", "#### 5"])
    found = answers(engine, task, 2, n=5)
    assert len(engine.asked) == 2 and len(engine.asked[1][0]) == 3
    assert [len(one.earlier) for one in found] == [0, 1, 0, 1, 1]
    assert [one.finish_reason for one in found] == ["stop", "stop", "length", "stop", "stop"]
    conversations = [judged(task[0], one) for one in found]
    texts = [TOKENIZER.decode(one.ids[one.last :]) for one in found]
    assert task.rewards(conversations, texts) == [1.0, 0.5, 0.0, 0.0, 0.5]


def test_there_are_at_most_so_many_turns(task):
    engine = Scripted(*[["#### 4"]] * 5)
    (sample,) = answers(engine, task, 3)
    assert len(sample.earlier) == 2 and len(engine.batches) == 2
    seeds = [params.seed if isinstance(params, SamplingParams) else params[0].seed for _, params in engine.asked]
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("room", [20, 42, 43, 60])
def test_turns_share_the_room_of_an_answer(task, room):
    engine = Scripted(["#### 4"], ["#### 5"])
    (sample,) = answers(engine, task, 2, room=room)
    before_second = 6 + 1 + len("That is too low. Try again.") + 3
    assert len(engine.asked) == (2 if before_second < room else 1)
    if len(engine.asked) == 2:
        assert engine.asked[1][1][0].max_new_tokens == room - before_second
    else:
        assert sample.finish_reason == "stop" and not sample.earlier


def test_hints_are_given_for_wrong_answers_alone(task):
    replies = {"#### 5": None, "#### 7": "high", "#### 1": "low", "5": "no number", "#### 5 or 6": "no number"}
    for text, words in replies.items():
        reply = task.reply(task[0], text)
        assert reply is None if words is None else words in reply


def test_with_the_real_engine_the_first_turn_is_as_without_turns(task):
    network = GPT(GPTConfig(2, 2, 2, 8, 16, seq_len=160, vocab_size=TOKENIZER.vocab_size)).init_weights(0)
    engine, prompts = Engine(network, TOKENIZER), [render_prompt(TOKENIZER, task[0])]
    params = SamplingParams(max_new_tokens=60, seed=3, logprobs=0, logit_bias=((END, 3.0),))
    plain = engine.generate(prompts, params, 4)[0]
    (turned,) = answer_in_turns(engine, prompts, [task[0]], params, 4, lambda c, text: "Go on.", 3)
    assert any(one.earlier for one in turned)
    for one, other in zip(turned, plain, strict=True):
        assert one.ids[: len(other.ids)] == other.ids
        assert len(one.ids) == len(one.mask) == len(one.logprobs) <= 60
        assert len(one.earlier) <= 2


def test_a_task_that_never_replies_has_one_turn():
    cfg = compose("train", "experiment=tiny", "stage=grpo", "stage.turns=2")
    from llm.errors import UserError
    from llm.stages.grpo import build

    with pytest.raises(UserError, match="stage.turns=2: task arithmetic never replies"):
        build(cfg, None)


def test_pass_at_k_counts_conversations_by_their_last_answers(task):
    engine = Scripted(["#### 4", "#### 5", "#### 6", "nothing"], ["#### 5", "#### 3", "#### 5"])
    draw = draw_in_turns(task.reply, 2)
    found = evaluate_pass_at_k(engine, task, 4, SamplingParams(max_new_tokens=500), ks=(1, 2, 4), draw=draw)
    assert found == pytest.approx({"pass@1": 3 / 4, "pass@2": 1.0, "pass@4": 1.0})  # three of four are right
    one_turn = evaluate_pass_at_k(Scripted(["#### 4", "#### 5", "#### 6", "5"]), task, 4, SamplingParams(), ks=(1, 2))
    assert one_turn == pytest.approx({"pass@1": 1 / 4, "pass@2": 1 - 3 / 6})
