"""Bits per byte, task accuracy, pass@k, samples, and evaluate.py's eval.json, with small real models."""

import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from callbacks.chat_eval import ChatEval
from callbacks.samples import Samples
from llm.errors import UserError
from llm.eval.bits_per_byte import bits_per_byte
from llm.eval.metrics import pass_at_k
from llm.eval.samples import draw_samples, given_prompts, text_prompts
from llm.eval.task_scores import (
    batches_by_length,
    chat_core,
    evaluate_pass_at_k,
    evaluate_task,
    score,
    spread,
)
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.chat_format import readable, render_prompt


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat. - cat=A - dog=B which one? " * 20], vocab_size=285)


@pytest.fixture(scope="module")
def engine(tokenizer):
    """A model with random weights everywhere, so that its answers vary with the question."""
    config = GPTConfig(2, 2, 1, 16, 32, seq_len=96, vocab_size=tokenizer.vocab_size)
    net = GPT(config).init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return Engine(net, tokenizer)


class Choices:
    """Multiple-choice items of very different lengths."""

    name, kind = "choices", "categorical"

    def __init__(self, n, long=0):
        self.n, self.long = n, long

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        words = " cat" * (400 if i < self.long else i * 7 % 30)
        letters = ("A", "B", "C", "D")
        messages = [
            {"role": "user", "content": f"which one {i}?{words}"},
            {"role": "assistant", "content": "ABCD"[i % 4]},
        ]
        return {"messages": messages, "letters": letters}


def passed(result):
    return [record["verdict"] == "pass" for record in result["records"]]


class Written(Choices):
    """Generative: right if the completion holds the letter e; keeps what it was given."""

    name, kind = "written", "generative"

    def __init__(self, n, long=0):
        super().__init__(n, long)
        self.seen = {}

    def verdicts(self, conversations, completions):
        return [
            "pass" if self.evaluate(c, text) else "fail" for c, text in zip(conversations, completions, strict=True)
        ]

    def evaluate(self, conversation, completion):
        self.seen.setdefault(conversation["messages"][0]["content"], []).append(completion)
        return "e" in completion


# ----- bits per byte


def test_bpb_counts_bytes_and_nats_of_ordinary_targets_only():
    """By hand: nats 1, 2, 3, 4; the third target is ignored, the fourth is a special token of 0 bytes."""
    nats = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    batch = {"inputs": torch.zeros(1, 4, dtype=torch.long), "targets": torch.tensor([[1, 2, -1, 0]])}

    def net(ids, targets, reduction):
        assert reduction == "none"
        return nats

    token_bytes = torch.tensor([0, 3, 5])
    assert bits_per_byte(net, [batch, batch], token_bytes) == pytest.approx(6.0 / (math.log(2) * 16))
    assert bits_per_byte(net, [], token_bytes) is None  # not measured


def test_bpb_of_a_model_equals_the_sum_over_single_tokens(engine, tokenizer):
    net, ids = engine.net, torch.tensor([tokenizer.bos_id, *tokenizer.encode("the cat sat on the mat. the dog")])
    batch = {"inputs": ids[:-1].unsqueeze(0), "targets": ids[1:].unsqueeze(0)}
    with torch.no_grad():
        logprobs = net(ids[:-1].unsqueeze(0)).log_softmax(-1)[0]
    nats = -sum(logprobs[i, token].item() for i, token in enumerate(ids[1:]))
    n_bytes = len("the cat sat on the mat. the dog")
    bpb = bits_per_byte(net, [batch], tokenizer.token_bytes())
    assert bpb == pytest.approx(nats / (math.log(2) * n_bytes), rel=1e-5)


def test_untrained_model_has_uniform_bpb(tokenizer):
    net = GPT(GPTConfig(1, 1, 1, 16, 16, seq_len=32, vocab_size=tokenizer.vocab_size)).init_weights(0)
    ids = torch.tensor([tokenizer.encode("abc dog the")])
    bpb = bits_per_byte(net, [{"inputs": ids[:, :-1], "targets": ids[:, 1:]}], tokenizer.token_bytes())
    n_bytes = int(tokenizer.token_bytes()[ids[0, 1:].numpy()].sum())
    assert bpb == pytest.approx((ids.size(1) - 1) * math.log2(tokenizer.vocab_size) / n_bytes, rel=1e-5)


# ----- tasks


def test_categorical_batches_judge_like_one_plain_forward_per_item(engine, tokenizer):
    task = Choices(23)
    expected = []
    for i in range(len(task)):
        with torch.no_grad():
            logits = engine.net(torch.tensor([render_prompt(tokenizer, task[i])]))[0, -1]
        best = max("ABCD", key=lambda letter: logits[tokenizer.encode(letter)[0]].item())
        expected.append(best == task[i]["messages"][-1]["content"])
    assert 0 < sum(expected) < len(expected)
    for batch_size in (1, 4, 32):
        result = evaluate_task(engine, task, batch_size=batch_size)
        assert passed(result) == expected and result["too_long"] == 0
    p = sum(expected) / 23
    assert (result["accuracy"], result["n"]) == (p, 23)
    assert result["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 23))


def test_generative_completions_are_greedy_and_independent_of_batching(engine, tokenizer):
    def greedy(ids, n):
        new = []
        while len(new) < n and len(ids) + len(new) < engine.net.config.seq_len:
            with torch.no_grad():
                token = engine.net(torch.tensor([[*ids, *new]]))[0, -1].argmax().item()
            if token in (tokenizer.bos_id, tokenizer.special_id("<|assistant_end|>")):
                break
            new.append(token)
        return tokenizer.decode(new)

    task = Written(9)
    result = evaluate_task(engine, task, max_new_tokens=6, batch_size=4)
    texts = [greedy(render_prompt(tokenizer, task[i]), 6) for i in range(9)]
    assert [task.seen[task[i]["messages"][0]["content"]][0] for i in range(9)] == texts
    assert passed(result) == ["e" in text for text in texts]
    assert evaluate_task(engine, Written(9), max_new_tokens=6, batch_size=1)["records"] == result["records"]


@pytest.mark.parametrize("kind", [Choices, Written])
def test_prompts_beyond_the_context_count_as_wrong(engine, kind):
    result = evaluate_task(engine, kind(6, long=2), max_new_tokens=4)
    assert result["too_long"] == 2 and result["n"] == 6 and passed(result)[:2] == [False, False]
    assert evaluate_task(engine, kind(3, long=3), max_new_tokens=4)["verdicts"] == {"too_long": 3}


def test_limit_spreads_over_the_task():
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 10) == spread(3, None) == [0, 1, 2]
    assert spread(0, None) == []
    with pytest.raises(UserError, match="eval.max_per_task=0"):
        spread(3, 0)


def test_batches_go_from_long_to_short_and_cover_each_row_once():
    prompts = [[0] * n for n in (3, 9, 1, 9, 5)]
    assert list(batches_by_length([0, 1, 2, 3, 4], prompts, 2)) == [[1, 3], [4, 0], [2]]


def test_bad_tasks_are_named(engine):
    with pytest.raises(UserError, match="choices has no items"):
        evaluate_task(engine, Choices(0))
    task = Choices(2)
    task.kind = "chat"
    with pytest.raises(UserError, match="only for training"):
        evaluate_task(engine, task)


def test_evaluation_keeps_training_mode_and_weights(engine):
    before = {name: weight.clone() for name, weight in engine.net.named_parameters()}
    engine.net.train()
    evaluate_task(engine, Choices(3))
    evaluate_task(engine, Written(3), max_new_tokens=3)
    assert engine.net.training
    assert all(torch.equal(weight, before[name]) for name, weight in engine.net.named_parameters())
    loss = engine.net(torch.zeros(1, 4, dtype=torch.long), targets=torch.zeros(1, 4, dtype=torch.long))
    loss.backward()  # nothing of the evaluation is left in the way of training
    engine.net.zero_grad()


def test_score_of_a_proportion():
    assert score([True, True, False, False]) == {"accuracy": 0.5, "n": 4, "stderr": 0.25}
    assert score([True] * 3)["stderr"] == 0.0


def test_the_chance_of_guessing_is_that_of_most_questions(engine):
    """Takes one in four, though the first question has two choices only."""

    class Uneven(Choices):
        def __getitem__(self, i):
            item = super().__getitem__(4 * i)
            return item | {"letters": item["letters"][: 2 if i == 0 else 4]}

    assert evaluate_task(engine, Uneven(4))["baseline"] == 0.25


def test_every_batch_draws_by_a_seed_of_its_own(engine):
    """Asks one question again and again: equal draws would count one answer as many."""

    class Again(Written):
        def __getitem__(self, i):
            return super().__getitem__(0)

    params = SamplingParams(1.0, max_new_tokens=12, seed=3)
    outputs = [one["output"] for one in evaluate_task(engine, Again(4), batch_size=1, sampling=params)["records"]]
    assert len(set(outputs)) == 4


def test_training_asks_as_many_items_as_it_is_told_to(engine, tokenizer, monkeypatch):
    """Logs the accuracy of these items of every task, and the mean over guessing of those that have a baseline."""
    asked, evaluate = [], evaluate_task

    def counted(*args, **options):
        asked.append(evaluate(*args, **options))
        return asked[-1]

    monkeypatch.setattr("callbacks.chat_eval.evaluate_task", counted)
    context = SimpleNamespace(tokenizer=tokenizer, eval_tasks={"a": Choices(9), "b": Written(9)})
    module = SimpleNamespace(net=engine.net, context=context, row={})
    ChatEval(1, max_per_task=4, max_new_tokens=2).act(None, module, 1)
    engine.net.eval()
    assert [one["n"] for one in asked] == [4, 4]
    assert asked[1]["records"] == evaluate(engine, context.eval_tasks["b"], 4, 2)["records"]
    accuracies = {f"chat/{name}": one["accuracy"] for name, one in zip("ab", asked, strict=True)}
    chance = ((accuracies["chat/a"] - 0.25) / 0.75 + accuracies["chat/b"]) / 2
    assert module.row == accuracies | {"chatcore": pytest.approx(chance)}


def test_samples_while_training_are_as_long_as_they_are_told_to_be(engine, tokenizer, monkeypatch):
    told = []
    monkeypatch.setattr("callbacks.samples.log_table", lambda loggers, name, columns, rows, step: told.extend(rows))
    prompts = ["the cat", "the mat"]
    module = SimpleNamespace(net=engine.net, context=SimpleNamespace(tokenizer=tokenizer, prompts=prompts))
    Samples(1, max_new_tokens=3).act(SimpleNamespace(is_global_zero=True, loggers=[]), module, 1)
    engine.net.eval()
    wanted = draw_samples(engine, prompts, 3)
    assert told == [(one["prompt"], readable(one["completion"])) for one in wanted]
    assert told[0][1] != readable(draw_samples(engine, prompts, 48)[0]["completion"])


def test_chat_core_is_the_mean_over_guessing():
    results = {"quiz": {"accuracy": 0.625, "baseline": 0.25}, "code": {"accuracy": 0.1, "baseline": 0.0}}
    assert chat_core(results) == pytest.approx((0.5 + 0.1) / 2)
    assert chat_core({}) is None and chat_core({"old": {"accuracy": 0.5}}) is None


def test_several_samples_are_recorded_one_by_one(engine):
    sampling, task = SamplingParams(temperature=1.0, max_new_tokens=5, seed=3), Written(5, long=1)
    result = evaluate_task(engine, task, batch_size=8, sampling=sampling, num_samples=4, ks=(1, 2, 4))
    assert [record["index"] for record in result["records"]] == [i for i in range(5) for _ in range(4)]
    assert result["pass@1"] == pytest.approx(result["accuracy"]) and result["too_long"] == 1
    assert result["pass@1"] <= result["pass@2"] <= result["pass@4"] <= 0.8
    same = evaluate_pass_at_k(engine, Written(5, long=1), 4, sampling, ks=(2,), batch_size=2)
    assert same == {"pass@2": result["pass@2"]}
    shares = [sum(passed(result)[i : i + 4]) / 4 for i in range(0, 20, 4)]
    assert result["stderr"] == pytest.approx(statistics.pstdev(shares) / math.sqrt(5))


# ----- pass@k


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    assert pass_at_k(8, 2, 1) == pytest.approx(2 / 8)
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)  # of 6 pairs only the two wrong ones fail
    assert (pass_at_k(5, 0, 5), pass_at_k(5, 1, 5)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="pass@9"):
        pass_at_k(8, 1, 9)


def test_pass_at_k_of_a_task(engine):
    params = SamplingParams(temperature=1.0, max_new_tokens=5, seed=3)
    task = Written(5, long=1)
    scores = evaluate_pass_at_k(engine, task, 4, params, ks=(1, 2, 4), batch_size=2)
    assert list(scores) == ["pass@1", "pass@2", "pass@4"] and list(task.seen.values())
    assert all(len(samples) == 4 and len(set(samples)) > 1 for samples in task.seen.values())
    right = [sum("e" in text for text in samples) for samples in task.seen.values()] + [0]  # one prompt is too long
    assert scores["pass@1"] == pytest.approx(sum(right) / 20)
    assert scores["pass@4"] == pytest.approx(sum(c > 0 for c in right) / 5)
    assert evaluate_pass_at_k(engine, Written(5, long=1), 4, params, batch_size=2)["pass@1"] == scores["pass@1"]


# ----- samples


def test_samples_continue_text_and_answer_questions(engine, tokenizer):
    question = {"messages": [{"role": "user", "content": "which one?"}, {"role": "assistant", "content": "A"}]}
    samples = draw_samples(engine, ["the cat", question, "cat " * 300], max_new_tokens=8)
    assert [sample["prompt"] for sample in samples] == ["the cat", "which one?"]  # the third does not fit
    prompt = [tokenizer.bos_id, *tokenizer.encode("the cat")]
    expected = engine.generate([prompt], SamplingParams(temperature=0, max_new_tokens=8))[0][0]
    assert samples[0]["completion"] == tokenizer.decode(expected.ids)


def test_given_prompts_are_continued_or_asked(tokenizer):
    assert given_prompts(["the cat"], tokenizer, 64, is_chat=False) == ["the cat"]
    (asked,) = given_prompts(["the cat"], tokenizer, 64, is_chat=True)
    assert asked == {"messages": [{"role": "user", "content": "the cat"}]}
    for texts, says in (
        ([], r"stage\.prompts=\[\]: holds no prompt"),
        (["the cat", " \n"], r"stage\.prompts\.1=' \\n': is blank"),
        (["the cat", "cat " * 300], r"stage\.prompts\.1=cat cat .* leaves no room in the context, model\.seq_len=64"),
    ):
        with pytest.raises(UserError, match=says):
            given_prompts(texts, tokenizer, 64, is_chat=True)


def test_text_prompts_are_unfinished_beginnings_of_documents():
    documents = [
        "too short",
        "one two three four five",
        "No! Yes. Oh? And more",
        "six seven. Eight nine.",
        "unused a b c",
    ]
    assert text_prompts(documents, n=2, n_words=3) == ["one two three", "six seven. Eight"]
    assert text_prompts(["\n one\n\ntwo  three four"], n_words=3) == ["one\n\ntwo  three"]
    assert text_prompts(["एक दो। तीन चार", "هل هذا؟ نعم لا"], n_words=2) == ["एक", "هل"]
    first = "今天天气很好，我们一起去公园散步去吧"
    chinese = first + "！看到很多人在湖边钓鱼。" * 9
    assert text_prompts([chinese, "一二" + chinese, chinese[:20]]) == [first + "！看到", "一二" + first[:-1]]
    assert text_prompts(["half \ud83d a pair"], n_words=3) == ["half \ufffd a"]  # UTF-8 cannot hold it


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_sample(n):
    from itertools import combinations

    for right in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([True] * right + [False] * (n - right), k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)
