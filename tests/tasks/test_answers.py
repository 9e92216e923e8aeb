"""Rows that nobody can answer rightly, types for any question, columns as templates, and parts of files as splits."""

import json
from typing import ClassVar

import pytest
from conftest import SHARED, needs_shared

from llm.cli import overrides
from llm.cli.options import CONF, Sources
from llm.errors import UserError
from llm.eval.task_scores import evaluate_task
from llm.tokenizer.chat_format import content_text
from tasks import Task, build_task, dialogue, need
from tasks.answers import plain_answer


def local(kind: str, **keys) -> dict:
    return {"_target_" if "." in kind else "type": kind, "source": "local", **keys}


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def own(conversation: dict) -> str:
    return content_text(conversation["messages"][-1]["content"])


# ---------------------------------------------------------------------------------------------------------------------
# A check accepts what the scorer can mark right


@pytest.mark.parametrize(
    "answer", ["1/2", "3:30", "1e6", "$1,234.50", "5 <<2+3=5>>", "<<2+3=5>>5", "5\nCheck: <<2+3=5>>"]
)
def test_a_word_problem_that_is_accepted_can_be_answered(tmp_path, answer):
    row = {"question": "How many?", "answer": f"So.\n#### {answer}"}
    task = build_task("sums", local("gsm8k", test=write(tmp_path / "a.jsonl", row)), "test")
    assert task.evaluate(task[0], own(task[0])) and task.evaluate(task[0], row["answer"])
    assert not task.evaluate(task[0], "So.\n#### 99") and not task.evaluate(task[0], "So.")


@pytest.mark.parametrize("answer", ["#### 12 or 13", "#### 1/2/2024", "#### five", "####", "12", "#### <<2+3=5>>"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_word_problem_without_one_whole_number_is_refused(tmp_path, split, answer):
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "#### 5"}, {"question": "q", "answer": answer})
    with pytest.raises(UserError, match=r"a\.jsonl row 2: the answer does not end with '#### <number>' and one number"):
        build_task("sums", local("gsm8k", **{split: path}), split)


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ("北京", "北京。"),
        ("北京", "「北京」"),
        ("दिल्ली", "दिल्ली।"),
        ("القاهرة", "\u200fالقاهرة؟"),
        ("Paris", "«Paris»"),
        ("Paris", "„Paris“"),
        ("パリ", "「パリ。」"),
        ("Paris", '"Paris."'),
    ],
)
def test_ends_of_sentences_and_quotes_of_every_language_do_not_matter(wanted, given):
    assert plain_answer(wanted) == plain_answer(given) and plain_answer(given) != plain_answer(given + "x")


class Strict(Task):
    """A task of a user whose scorer is stricter than its check."""

    kind = "generative"

    @classmethod
    def check_row(cls, row, where):
        need(row, where, q=str, a=str)

    def conversation(self, row, index):
        return {"messages": dialogue(row["q"], row["a"])}

    def evaluate(self, conversation, completion):
        return int(completion) == int(conversation["messages"][-1]["content"])


class Loose(Strict):
    """A task of a user that says by a verdict what is right."""

    def evaluate(self, conversation, completion):
        return completion == "7"

    def verdicts(self, conversations, completions):
        return ["pass" if text == "7" else "wrong number" for text in completions]


@pytest.mark.parametrize(
    ("kind", "answer", "message"),
    [
        ("Strict", "seven", r"row 2: its answer cannot be judged \(ValueError: invalid literal"),
        ("Loose", "8", "row 2: its own answer, '8', is not marked right by Loose, so no answer ever could be"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_types_of_users_are_checked_by_their_own_scorer(tmp_path, split, kind, answer, message):
    path = write(tmp_path / "a.jsonl", {"q": "x", "a": "7"}, {"q": "x", "a": answer})
    with pytest.raises(UserError, match=message):
        build_task("mine", local(f"{__name__}.{kind}", **{split: path}), split)


def test_a_type_without_a_scorer_of_its_own_is_rewarded_elsewhere(tmp_path):
    class Unscored(Strict):
        evaluate = Task.evaluate

    Unscored.check({"q": "x", "a": "seven"}, "row 1", "train")


def test_keywords_that_the_own_answer_lacks_are_refused_and_training_rows_need_none(tmp_path):
    good, bad = ({"messages": dialogue("Who?", "I am Lumen."), "keywords": [word]} for word in ("lumen", "Fathom"))
    bare = {"messages": dialogue("Who?", "I am Lumen.")}
    assert len(build_task("me", local("identity", train=write(tmp_path / "a.jsonl", good, bare)), "train")) == 2
    assert build_task("me", local("identity", train=str(tmp_path / "a.jsonl")), "train").unscored() == 1
    assert build_task("sums", {"type": "gsm8k", "source": "embedded", "size": 9}, "train").unscored() == 0
    for split in ("train", "test"):
        with pytest.raises(UserError, match="row 2: its own answer, 'I am Lumen.', is not marked right"):
            build_task("me", local("identity", **{split: write(tmp_path / "b.jsonl", good, bad)}), split)


ARC = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
MANY = [str(i) for i in range(27)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ARC | {"choices": {"text": ["x", "y", "z"], "label": ["A", "B", "B"]}}, "labels are there twice"),
        (ARC | {"choices": {"text": ["x", "y"], "label": ["A", "B "]}, "answerKey": "B "}, "without space around them"),
        (ARC | {"choices": {"text": ["x", "y"], "label": ["", "B"]}}, "labels must be texts"),
        (ARC | {"choices": {"text": ["x", "y", "z"], "label": ["A", "B"]}}, "has 3 choices and 2 labels"),
        (ARC | {"choices": {"text": MANY, "label": MANY}, "answerKey": "3"}, "26 at most, found 27"),
        ({"question": "Q?", "choices": MANY, "answer": 2}, "26 at most, found 27"),
        ({"question": "Q?", "choices": MANY, "answer": 26}, "26 at most, found 27"),
        ({"question": "Q?", "choices": ["x", 3], "answer": 0}, "a choice is no text"),
    ],
)
def test_choices_that_cannot_be_told_apart_are_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=rf"row 1: .*{message}"):
        build_task("quiz", local("multiple_choice", test=write(tmp_path / "a.jsonl", row)), "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"canonical_solution": "    return (\n"}, "'canonical_solution' is no Python program"),
        ({"entry_point": "substract"}, "'canonical_solution' defines no function 'substract'"),
        ({"test": "def check(f:\n"}, "'test' is no Python program"),
        ({"test": "assert add(1, 2) == 3"}, "'test' defines no function 'check'"),
    ],
)
def test_programs_that_cannot_run_are_refused(tmp_path, change, message):
    row = {"prompt": "def add(a, b):\n", "entry_point": "add", "canonical_solution": "    return a + b\n"}
    row |= {"test": "def check(f):\n    assert f(1, 2) == 3\n"}
    assert len(build_task("code", local("humaneval", test=write(tmp_path / "a.jsonl", row)), "test")) == 1
    with pytest.raises(UserError, match=f"row 1: {message}"):
        build_task("code", local("humaneval", test=write(tmp_path / "b.jsonl", row | change)), "test")


# ---------------------------------------------------------------------------------------------------------------------
# Types for any question


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("Paris", ["paris", " Paris.\n", "**Paris**", "'Paris'"], ["Paris, France", "Lyon", ""]),
        (145.0, ["145", "145.0", "$145", "The answer is 145."], ["14", "1450", "145 or 146", ""]),
        ("3 Musketeers", ["3 musketeers"], ["3"]),
        ("5 km", ["5", "5 kilometres"], ["5 m", "50 km"]),
        ("yes", ["Yes!", "<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>yes"], ["yes and no"]),
    ],
)
def test_exact_compares_the_whole_answer(tmp_path, answer, right, wrong):
    row = {"question": "Q?", "answer": answer, "subject": "x"}
    task = build_task("t", local("exact", test=write(tmp_path / "a.jsonl", row)), "test")
    assert [task.evaluate(task[0], text) for text in right] == [True] * len(right)
    assert [task.evaluate(task[0], text) for text in wrong] == [False] * len(wrong)
    assert task.rewards([task[0]], [own(task[0])]) == [1.0]


@pytest.mark.parametrize(
    "row", [{"question": "Q?", "answer": " ."}, {"question": " ", "answer": "x"}, {"question": "Q?"}]
)
def test_exact_refuses_empty_rows(tmp_path, row):
    with pytest.raises(UserError, match="row 1: .*(empty|missing)"):
        build_task("t", local("exact", test=write(tmp_path / "a.jsonl", row)), "test")


def test_keywords_is_a_type_for_any_question(tmp_path):
    row = {"question": "Which colours?", "answer": "Red and blue.", "keywords": ["red", "blue"]}
    task = build_task("t", local("keywords", test=write(tmp_path / "a.jsonl", row)), "test")
    assert task.evaluate(task[0], "Blue, then RED") and not task.evaluate(task[0], "Blue")
    with pytest.raises(UserError, match="source=embedded"):
        build_task("t", {"type": "keywords", "source": "embedded"}, "test")


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("exact", {"question": "Q?", "answer": "x"}),
        ("keywords", {"question": "Q?", "answer": "x", "keywords": ["x"]}),
        ("gsm8k", {"question": "Q?", "answer": "#### 1"}),
        ("multiple_choice", ARC),
        (f"{__name__}.Strict", {"q": "Q?", "a": "1"}),
    ],
)
def test_every_type_keeps_the_subject(tmp_path, kind, row):
    rows = [row | {"subject": subject} for subject in ("law", 7)] + [row]
    task = build_task("t", local(kind, test=write(tmp_path / "a.jsonl", *rows)), "test")
    assert [conversation.get("subject") for conversation in task] == ["law", "7", None]


def test_scores_are_given_by_subject_for_generated_answers(tmp_path, monkeypatch):
    rows = [{"question": f"Q{i}?", "answer": str(i), "subject": "abc"[i % 3]} for i in range(6)]
    task = build_task("t", local("exact", test=write(tmp_path / "a.jsonl", *rows)), "test")
    monkeypatch.setattr(
        "llm.eval.task_scores._judged_completions",
        lambda engine, task, conversations, *rest: [
            [("", "pass" if c["subject"] == "a" else "fail")] for c in conversations
        ],
    )
    subjects = evaluate_task(None, task)["subjects"]
    assert {name: score["accuracy"] for name, score in subjects.items()} == {"a": 1.0, "b": 0.0, "c": 0.0}


# ---------------------------------------------------------------------------------------------------------------------
# Rows of other columns, parts of files

PROBLEMS = [
    {"Body": f"Ann has {n} figs.", "Question": "She eats one. How many are left?", "Answer": n - 1.0, "Type": "minus"}
    for n in range(1, 11)
]
TEMPLATES = {"question": "{Body} {Question}", "answer": "{Answer}"}


def test_columns_become_questions_and_answers_and_one_file_both_splits(tmp_path):
    path = write(tmp_path / "problems.jsonl", *PROBLEMS)
    spec = local("exact", train=f"{path}[:7]", test=f"{path}[7:]", **TEMPLATES)
    train, test = (build_task("sums", spec, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7, 3)
    assert train[0]["messages"] == dialogue("Ann has 1 figs. She eats one. How many are left?", "0")
    assert [own(conversation) for conversation in test] == ["7", "8", "9"]
    assert test.evaluate(test[0], "7 figs") and not test.evaluate(test[0], "17")
    assert len(build_task("sums", spec | {"limit": 2}, "test")) == 2


def test_templates_take_nested_columns_braces_and_formats_and_serve_every_type(tmp_path):
    rows = [{"doc": {"q": "Q?", "a": [{"t": "x"}]}, "n": 2.5, "subject": "law", "keywords": ["x"], "noise": None}]
    path = write(tmp_path / "a.jsonl", *rows)
    spec = local("exact", test=path, question="{{{doc.q}}}", answer="{doc.a.0.t} {n:.2f}")
    task = build_task("t", spec, "test")
    assert task[0]["messages"] == dialogue("{Q?}", "x 2.50") and task[0]["subject"] == "law"
    spec = local("gsm8k", test=path, question="{doc.q}", answer="It is so.\n#### {n}")
    task = build_task("t", spec, "test")
    assert task.evaluate(task[0], "#### 5/2")
    for kind in ("chat", "identity", "keywords"):
        task = build_task("t", local(kind, test=path, question="{doc.q}", answer="{doc.a.0.t}"), "test")
        assert task[0]["messages"] == dialogue("Q?", "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, r"data\.tasks\.t\.question=\{Body\} \{Question\}: give data\.tasks\.t\.answer too"),
        ({"answer": "{Result}"}, r"row 1: data\.tasks\.t\.answer names 'Result', which is not there \(Body, Question"),
        ({"answer": "5"}, r"data\.tasks\.t\.answer=5: names no column"),
        ({"answer": "{Answer"}, r"data\.tasks\.t\.answer=\{Answer: expected '}'"),
        ({"answer": "{Body:d}"}, r"row 1: data\.tasks\.t\.answer: \{Body:d\}: Unknown format code"),
        ({"type": "chat", "source": "embedded"}, "only rows of files and of the hub have columns"),
    ],
)
def test_templates_that_do_not_fit_name_key_and_row(tmp_path, change, message):
    spec = local("exact", test=write(tmp_path / "a.jsonl", *PROBLEMS), **TEMPLATES) | change
    with pytest.raises(UserError, match=message):
        build_task("t", spec, "test")


@pytest.mark.parametrize("value", [None, True, ["x"], {"y": 1}])
def test_a_column_without_text_or_number_is_named(tmp_path, value):
    path = write(tmp_path / "a.jsonl", {"Body": "b", "Question": "q", "Answer": value})
    with pytest.raises(UserError, match=r"row 1: data\.tasks\.t\.answer: 'Answer' must be text or a number, found"):
        build_task("t", local("exact", test=path, **TEMPLATES), "test")


@pytest.mark.parametrize(
    ("train", "test", "sizes"),
    [
        ("[:7]", "[7:]", (7, 3)),
        ("[:-2]", "[-2:]", (8, 2)),
        ("[:80%]", "[80%:]", (8, 2)),
        ("[3:]", "[:3]", (7, 3)),
        ("[2:4]", "[5:99]", (2, 5)),
    ],
)
def test_parts_are_counted_as_in_python(tmp_path, train, test, sizes):
    path = write(tmp_path / "rows.jsonl", *PROBLEMS)
    spec = local("exact", train=path + train, test=path + test, **TEMPLATES)
    assert tuple(len(build_task("t", spec, split)) for split in ("train", "test")) == sizes


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("{}[:8]", "{}[7:]", "share rows, which would be trained on"),
        ("{}", "{}[7:]", "share rows"),
        ("{}[10:]", "{}[:3]", r"train=.*rows\.jsonl\[10:\]: there is no such row among the 10"),
        (["{}[:3]"], "{}[3:]", "a part such as .* is taken of one entry, not within a list"),
    ],
)
def test_parts_that_share_rows_or_have_none_are_refused(tmp_path, train, test, message):
    path = write(tmp_path / "rows.jsonl", *PROBLEMS)
    train = [entry.format(path) for entry in train] if isinstance(train, list) else train.format(path)
    with pytest.raises(UserError, match=message):
        build_task("t", local("exact", train=train, test=test.format(path), **TEMPLATES), "train")


def test_rows_outside_the_part_are_not_checked_and_a_file_of_that_name_is_a_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", *PROBLEMS[:2], {"Body": "no answer"})
    assert len(build_task("t", local("exact", test=f"{path}[:2]", **TEMPLATES), "test")) == 2
    with pytest.raises(UserError, match=r"rows\.jsonl row 3: "):
        build_task("t", local("exact", test=f"{path}[2:]", **TEMPLATES), "test")
    odd = write(tmp_path / "odd[1:2]", *PROBLEMS)
    assert len(build_task("t", local("exact", test=odd, **TEMPLATES), "test")) == 10


def test_a_task_of_other_columns_is_written_in_the_configuration_alone(tmp_path):
    path = write(tmp_path / "problems.jsonl", *PROBLEMS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(
        f"""
defaults: [embedded, _self_]
tasks:
  sums:
    type: exact
    source: local
    train: {path}[:7]
    test: {path}[7:]
    question: "{{Body}} {{Question}}"
    answer: "{{Answer}}"
eval: [sums]
"""
    )
    cfg = overrides.compose("train", ["stage=sft", "data=mine"], Sources((CONF, tmp_path)))
    assert len(build_task("sums", cfg.data.tasks.sums, "train")) == 7


@needs_shared("data/gsm8k")
@pytest.mark.parametrize(("split", "size"), [("train", 7473), ("test", 1319)])
def test_every_verdict_on_the_answers_of_gsm8k_stays(split, size):
    path = SHARED / "data" / "gsm8k" / f"{split}.jsonl"
    task = build_task("g", local("gsm8k", **{split: str(path)}), split)
    assert len(task) == size
    with open(path, encoding="utf-8") as file:
        answers = [json.loads(line)["answer"].rpartition("####")[2].strip() for line in file]
    for i, conversation in enumerate(task):
        plain, other = answers[i].replace(",", ""), answers[(i + 1) % size].replace(",", "")
        assert task.evaluate(conversation, f"#### {plain}") and task.evaluate(conversation, f"#### {float(plain)}")
        assert task.evaluate(conversation, f"#### {other}") == (float(plain) == float(other))


# ---------------------------------------------------------------------------------------------------------------------
# Types that judge slowly: the first own answers at the start


class Slow(Strict):
    """A task whose judging takes long; it keeps the answers that it has judged."""

    judges_slowly = True
    judged: ClassVar[list[str]] = []

    def verdicts(self, conversations, completions):
        self.judged.extend(completions)
        if completions[0] == "broken":
            raise UserError("no sandbox here")
        return [text if text == "timeout" else "fail" if text == "wrong" else "pass" for text in completions]


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(Slow, "judged", [])
    return local(f"{__name__}.Slow")


def test_the_first_own_answers_are_judged_at_the_start(tmp_path, slow):
    rows = [{"q": "q", "a": f"a{number}"} for number in range(30)]
    build_task("slow", slow | {"test": write(tmp_path / "a.jsonl", *rows)}, "test")
    assert Slow.judged == [f"a{number}" for number in range(20)]
    path = write(tmp_path / "b.jsonl", *rows[:5], {"q": "q", "a": "wrong"})
    with pytest.raises(UserError, match="row 6: its own answer, 'wrong', is not marked right by Slow"):
        build_task("slow", slow | {"test": path}, "test")


def test_judging_at_the_start_ends_in_time_and_drops_no_row(tmp_path, slow, monkeypatch):
    path = write(tmp_path / "a.jsonl", *[{"q": "q", "a": "wrong"}] * 3)
    assert len(build_task("slow", slow | {"test": path}, "test", bad_rows="skip")) == 3 and not Slow.judged
    monkeypatch.setattr("tasks.rows.SECONDS", -1.0)
    rows = [{"q": "q", "a": "fine"}, {"q": "q", "a": "wrong"}]
    build_task("slow", slow | {"test": write(tmp_path / "b.jsonl", *rows)}, "test")
    assert Slow.judged == ["fine"]


@pytest.mark.parametrize("answer", ["timeout", "broken"])
def test_what_a_busy_machine_may_say_is_not_held_against_a_row(tmp_path, slow, answer):
    path = write(tmp_path / "a.jsonl", {"q": "q", "a": answer})
    assert len(build_task("slow", slow | {"test": path}, "test")) == 1 and Slow.judged == [answer]
    with pytest.raises(UserError, match="its own answer|its answer cannot be judged"):
        Slow.check_reference({"q": "q", "a": answer}, "row 1")


def test_an_answer_form_changes_rows_prompt_and_reward_together():
    spec = {"type": "gsm8k", "source": "embedded", "size": 20, "answer_form": "think"}
    task, plain = build_task("sums", spec, "train"), build_task("sums", spec | {"answer_form": None}, "train")
    for ours, theirs in zip(task, plain, strict=True):
        question, answer = (content_text(message["content"]) for message in ours["messages"])
        working, _, number = content_text(theirs["messages"][1]["content"]).rpartition("\n#### ")
        assert question.startswith(theirs["messages"][0]["content"]) and "<think>" in question
        assert answer == f"<think>{working}</think><answer>{number}</answer>"
        assert task.evaluate(ours, answer) and not plain.evaluate(theirs, answer)
        assert task.rewards([ours], [answer]) == pytest.approx([1.2])


def test_hints_name_the_place_of_the_answer():
    spec = {"type": "second_try", "source": "embedded", "size": 1, "answer_form": "think"}
    task = build_task("sums", spec, "train")
    assert "<answer>" in task.reply(task[0], "#### 5") and "####" not in task.reply(task[0], "#### 5")
    assert "low" in task.reply(task[0], "<answer>-1</answer>")


@pytest.mark.parametrize(
    ("kind", "form", "words"),
    [("gsm8k", "tink", "type=gsm8k has no such form of answers; choose think"), ("identity", "think", "leave it out")],
)
def test_forms_that_a_type_does_not_have_are_refused(kind, form, words):
    with pytest.raises(UserError, match=f"data.tasks.sums.answer_form={form}: .*{words}"):
        build_task("sums", {"type": kind, "source": "embedded", "answer_form": form}, "train")
