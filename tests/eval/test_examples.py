"""Example questions of a chat: which ones are chosen, and the file in model/ that holds them."""

import json
from types import SimpleNamespace

import pytest

from llm.checkpoint.examples import EXAMPLES_FILE, load_examples, save_examples
from llm.errors import UserError
from llm.eval.examples import LONGEST, MOST, TIMES, choose_examples
from llm.inference.engine import Completion
from llm.run.content import read_content, write_content, wrong_file
from llm.tokenizer.bpe import Tokenizer

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])


def asked(question: str, answer: str = "yes", *before: dict) -> dict:
    return {"messages": [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


class KnowingEngine:
    """Answers the questions of `known` as it says there, one answer after the other; others without an end."""

    def __init__(self, known: dict[str, list[str]]):
        self.known, self.tokenizer = known, TOKENIZER
        self.net = SimpleNamespace(config=SimpleNamespace(seq_len=1024))

    def generate(self, prompts, params, num_samples):
        texts = [TOKENIZER.decode(prompt) for prompt in prompts]
        return [self._answers(next((k for k in self.known if k in text), None), num_samples) for text in texts]

    def _answers(self, key, n: int) -> list[Completion]:
        if key is None:
            return [Completion(ids=[65] * 9)] * n
        answers = self.known[key]
        texts = [answers[i % len(answers)] for i in range(n)]
        return [Completion(ids=TOKENIZER.encode(text), finish_reason="stop") for text in texts]


class Judging(list):
    kind = "generative"

    def verdicts(self, conversations, texts):
        answers = [conversation["messages"][-1]["content"] for conversation in conversations]
        return ["pass" if answer in text else "fail" for answer, text in zip(answers, texts, strict=True)]


class Letters(list):
    kind = "categorical"


def test_only_questions_that_are_always_answered_right_are_chosen():
    engine = KnowingEngine(
        {"q1": ["yes"], "q2": ["no"], "q3": ["yes"] * (TIMES - 1) + ["no"], "l1": ["B"], "l2": ["B"]}
    )
    judged = Judging([asked("q1"), asked("q2"), asked("q3"), asked("q4")])
    letters = Letters([asked("l1", "A"), asked("l2", "B")])
    assert choose_examples(engine, {"a": judged, "b": letters}) == ["q1", "l2"]


def test_tasks_take_turns_and_long_questions_and_those_with_a_past_are_left_out():
    engine = KnowingEngine({"q": ["yes"]})
    long, later = "q" * (LONGEST + 1), asked("q9", "yes", {"role": "system", "content": "Be brief."})
    first = Judging([asked(long), later, asked("q1"), asked("q2"), asked("q3")])
    second = Judging([asked("q1"), asked("q4"), asked("q5")])
    assert choose_examples(engine, {"a": first, "b": second}) == ["q1", "q2", "q4", "q3"][:MOST]


def test_open_questions_stand_in_where_no_task_judges():
    engine = KnowingEngine({"q1": ["anything"], "q2": [" "], "judged": ["yes"]})
    others = [{"messages": [{"role": "user", "content": q}]} for q in ("q1", "q2", "q3")]
    assert choose_examples(engine, {}, others) == ["q1"]
    assert choose_examples(engine, {"a": Judging([asked("judged 1"), asked("judged 2")])}, others) == [
        "judged 1",
        "judged 2",
    ]


def test_the_manifest_covers_the_examples(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_content(tmp_path)
    assert load_examples(tmp_path) == []
    save_examples(tmp_path, ["Wie heißt du?"])
    assert load_examples(tmp_path) == ["Wie heißt du?"] and wrong_file(tmp_path) is None
    assert set(read_content(tmp_path)) == {"config.json", EXAMPLES_FILE}
    (tmp_path / EXAMPLES_FILE).write_text('{"questions": ["Who?"]}')
    assert EXAMPLES_FILE in wrong_file(tmp_path)


@pytest.mark.parametrize("content", [{}, {"questions": "a"}, {"questions": [1]}, {"questions": ["a"] * 21}, []])
def test_examples_of_another_form_are_refused(tmp_path, content):
    (tmp_path / EXAMPLES_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=EXAMPLES_FILE):
        load_examples(tmp_path)
