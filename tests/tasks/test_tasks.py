"""Tasks: formats, scoring, local files with their errors, mixtures, and HumanEval in its sandbox."""

import json
import random
import tracemalloc
import unicodedata
from functools import partial
from pathlib import Path

import pytest
from conftest import SHARED, needs_shared

from llm.errors import UserError
from llm.inference.calculator import calculate
from llm.tokenizer.chat_format import content_text, validate_conversation
from tasks import Mixture, build_mixture, build_task
from tasks.base import Task, dialogue
from tasks.execution import Limits
from tasks.gsm8k import answer_parts, extract_answer
from tasks.humaneval import extract_code, program
from tasks.multiple_choice import render_question
from tasks.spelling import ALL_LANGUAGES, TEST_OFFSET, SpellingBee, count_by_hand, spelled

DATA = SHARED / "data"
needs_data = needs_shared("data")

ARC = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
MMLU = {"question": "Q?", "choices": ["w", "x", "y", "z"], "answer": 2}
GSM = {"question": "How many?", "answer": "She has 3*4 = <<3*4=12>>12 figs.\n#### 12"}
CHAT = {"messages": dialogue("Hi!", "Hello!")}
EMBEDDED_TYPES = ("multiple_choice", "gsm8k", "humaneval", "identity", "chat", "simple_spelling", "spelling_bee")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Programs may take longer than 5 s on a machine that is busy; none here is meant to be stopped."""
    monkeypatch.setattr("tasks.execution.Limits", partial(Limits, seconds=300.0))


def local(kind: str, **keys) -> dict:
    return {"type": kind, "source": "local", **keys}


def embedded(kind: str, **keys) -> dict:
    return {"type": kind, "source": "embedded", "size": 200, "test_size": 50, **keys}


def write(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def test_multiple_choice_puts_the_letter_after_the_choice_without_a_space():
    assert render_question("Why?", ["heat", "cold"], "AB").splitlines() == [
        "Why?",
        "- heat=A",
        "- cold=B",
        "Answer with the letter only.",
    ]


def test_arc_and_mmlu_rows_become_the_same_form(tmp_path):
    path = write(tmp_path / "rows.jsonl", ARC, MMLU)
    arc, mmlu = build_task("quiz", local("multiple_choice", test=path), "test")
    assert arc["letters"] == ("A", "B") and arc["messages"][-1]["content"] == "B"
    assert mmlu["letters"] == ("A", "B", "C", "D") and mmlu["messages"][-1]["content"] == "C"
    assert "- y=C\n" in mmlu["messages"][0]["content"]


def test_gsm8k_marks_become_calculator_parts():
    assert answer_parts("So 3*4 = <<3*4=12>>12.\n#### 12") == [
        {"type": "text", "text": "So 3*4 = "},
        {"type": "python", "text": "3*4"},
        {"type": "python_output", "text": "12"},
        {"type": "text", "text": "12.\n#### 12"},
    ]
    assert answer_parts("#### 5") == [{"type": "text", "text": "#### 5"}]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 12", 12),
        ("x\n#### 1,234.", 1234),
        ("#### -3.5", -3.5),
        ("First #### 3, then\n#### 5\nSo it is.", 5),
        ("#### <|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>5", 5),
        ("#### 5 <<2+3=5>>", 5),
        ("#### 5 <|python_start|>2+", 5),
        ("#### 12 or 13", None),
        ("12", None),
        ("#### ", None),
        ("#### ,", None),
    ],
)
def test_the_answer_is_the_number_after_the_marks(text, answer):
    found = extract_answer(text)
    assert (found and found.value) == (answer if answer is None else (answer,))


def test_gsm8k_scores_and_rewards(tmp_path):
    task = build_task("sums", local("gsm8k", test=write(tmp_path / "a.jsonl", GSM)), "test")
    assert task.kind == "generative"
    assert task.evaluate(task[0], "blah\n#### 12.0") and not task.evaluate(task[0], "12")
    assert task.rewards([task[0]] * 2, ["#### 12", "#### 13"]) == [1.0, 0.0]


def test_spelling_bee_item_is_spelled_counted_and_checked():
    assert count_by_hand("kiki", "k") == (
        "kiki:k,i,k,i\n1:k hit! count=1\n2:i\n3:k hit! count=2\n4:i\nThis gives us 2."
    )
    task = SpellingBee(["kiki", "mola"], "bee", 50)
    for item in task:
        text, python, output, end = item["messages"][1]["content"]
        assert [text["type"], python["type"], output["type"], end["type"]] == [
            "text",
            "python",
            "python_output",
            "text",
        ]
        assert eval(python["text"]) == int(output["text"]) and end["text"].endswith(f"\n#### {output['text']}")
        assert text["text"].count("hit!") == int(output["text"])
        assert task.evaluate(item, content_text(item["messages"][1]["content"]))
        assert not task.evaluate(item, "#### 99")


def test_spelling_bee_questions_vary_as_the_rules_say():
    assert len(ALL_LANGUAGES) == len(set(ALL_LANGUAGES)) == 51
    task = SpellingBee(["Mola"], "bee", 4000)
    questions = [item["messages"][0]["content"] for item in task]
    n = len(questions)
    assert 0.45 < sum(q.endswith("?") for q in questions) / n < 0.55
    assert sum("'Mola'" in q for q in questions) / n == pytest.approx(1 / 3, abs=0.05)
    english = [q for q in questions if q.lower().startswith("how many")]
    assert sum(q.startswith("how") for q in english) / len(english) == pytest.approx(0.3, abs=0.07)
    drawn = [item["messages"][1]["content"][1]["text"] for item in task]
    assert sum(d.split("'")[3] in "Mola" for d in drawn) / n == pytest.approx(0.9 + 0.1 * 3 / 26, abs=0.03)


def test_spelling_bee_seeds_of_the_splits_never_meet():
    words = [f"w{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
    train, test = SpellingBee(words, "bee", 300), SpellingBee(words, "bee", 300, "test")
    assert train.rows.stop < TEST_OFFSET == test.rows.start
    assert [train[i] for i in range(20)] != [test[i] for i in range(20)]
    assert train[7] == SpellingBee(words, "bee", 10)[7]  # an item does not depend on the size


def test_simple_spelling_needs_every_letter(tmp_path):
    (tmp_path / "words.txt").write_text("mola\nkiki\ndon't\nno2\n\nkiki\n", encoding="utf-8")
    path = str(tmp_path / "words.txt")
    task = build_task("spell", local("simple_spelling", train=path, test=str(tmp_path / "w*.txt"), test_size=4), "test")
    assert sorted({c["messages"][0]["content"] for c in task}) == ["Spell the word: kiki", "Spell the word: mola"]
    item = next(c for c in task if "mola" in c["messages"][0]["content"])
    assert task.evaluate(item, "mola:m,o,l,a\n") and not task.evaluate(item, "mola:m,o,a,l")


MARKED = "नमस्ते किताब लड़का कक्का น้ำ กรุงเทพ বাংলা שָׁלוֹם п'ять м’ята می\u200cروم 苹果 한국어 größe".split()


def test_words_of_every_script_are_read_and_spelled_by_the_letters_that_a_reader_sees(tmp_path, capsys):
    """Keep letters with their marks, in one spelling; entries with more than letters are counted."""
    lines = [*MARKED, unicodedata.normalize("NFD", "größe"), "no2", "don't", ""]
    (tmp_path / "words.txt").write_text("\n".join(lines), encoding="utf-8")
    spec = local("spelling_bee", train=str(tmp_path / "words.txt"), size=400)
    task = build_task("bee", {**spec, "test": str(tmp_path / "words.txt")}, "test")
    assert sorted(task.words) == sorted(MARKED)
    assert "data.tasks.bee.test: 2 of 17 words are left out" in capsys.readouterr().out
    assert spelled("किताब") == "किताब:कि,ता,ब" and spelled("größe") == "größe:g,r,ö,ß,e"
    for item in task:
        by_hand, python, output, _ = (part["text"] for part in item["messages"][1]["content"])
        assert calculate(python) == output and by_hand.count("hit!") == int(output)


def test_identity_wants_all_keywords(tmp_path):
    row = {"messages": dialogue("Who?", "I am Fathom, a language model."), "keywords": ["Fathom", "language model"]}
    task = build_task("me", local("identity", test=write(tmp_path / "i.jsonl", row)), "test")
    assert task.evaluate(task[0], "fathom, a small LANGUAGE MODEL") and not task.evaluate(task[0], "I am Fathom.")


def test_identity_from_templates_takes_the_options_of_a_composed_configuration():
    from omegaconf import OmegaConf

    spec = {"type": "identity", "source": "template", "size": 1500, "test_size": 60}
    spec = OmegaConf.create(spec | {"options": {"name": "Lumen", "facts": {"born": 1815}, "seed": 7}})
    train, test = (build_task("me", spec, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1500, 60)
    for conversation in test:
        validate_conversation(conversation)
        assert test.evaluate(conversation, conversation["messages"][-1]["content"])
        assert not test.evaluate(conversation, "I am ChatGPT.")
    assert any("1815" in m["content"] for c in train for m in c["messages"])


def test_chat_tasks_cannot_score():
    task = build_task("talk", embedded("chat"), "test")
    with pytest.raises(TypeError, match="training only"):
        task.evaluate(task[0], "Hello!")


@pytest.mark.parametrize("kind", EMBEDDED_TYPES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_type_has_embedded_rows_whose_own_answers_are_right(kind, split):
    task = build_task("t", embedded(kind), split)
    assert len(task) == (200 if split == "train" else 50) and task.kind in ("categorical", "generative", "chat")
    for i in range(0, len(task), 40):
        validate_conversation(task[i])
        if task.kind == "categorical":
            assert task[i]["messages"][-1]["content"] in task[i]["letters"]
        if task.kind != "chat":
            own = content_text(task[i]["messages"][-1]["content"])
            assert task.evaluate(task[i], own) and task.rewards([task[i]], [own]) == [1.0]
            assert not task.evaluate(task[i], "I do not know.")


def test_embedded_options_reach_the_generator():
    task = build_task("t", embedded("gsm8k", options={"steps": [0, 0, 1], "distractors": 0}), "train")
    parts = [sum(p["type"] == "python" for p in task[i]["messages"][1]["content"]) for i in range(50)]
    assert set(parts) == {3}
    with pytest.raises(UserError, match=r"data.tasks.t: .*no option colour"):
        build_task("t", embedded("gsm8k", options={"colour": 1}), "train")


# ---------------------------------------------------------------------------------------------------------------------
# Slices and mixtures


class Numbers(Task):
    def conversation(self, row, index):
        return {"messages": dialogue(str(index), str(row))}


def number(conversation: dict) -> int:
    return int(conversation["messages"][1]["content"])


def test_slices_are_lazy_and_follow_python():
    assert [number(c) for c in Numbers(range(100, 120), "n", start=2, stop=10, step=3)] == [102, 105, 108]
    assert len(Numbers(range(5), "n", stop=99)) == 5
    with pytest.raises(IndexError):
        Numbers(range(5), "n", stop=2)[2]


def test_limit_takes_the_first_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"messages": dialogue(str(i), "x")} for i in range(9)])
    assert len(build_task("c", local("chat", train=path, limit=4), "train")) == 4
    assert len(build_task("c", embedded("chat", limit=7), "train")) == 7


def test_a_mixture_repeats_whole_and_part_of_tasks():
    a, b, c = (Numbers(range(start, start + 10), name) for name, start in (("a", 0), ("b", 100), ("c", 200)))
    mixture = Mixture([(a, 2), (b, 0.3), (c, 0)], seed=1)
    got = sorted(number(x) for x in mixture)
    assert got == sorted([*range(10), *range(10), 100, 101, 102]) and len(mixture) == 23
    assert sorted(number(x) for x in Mixture([(a, 1.5)])) == sorted([*range(10), *range(5)])


def test_the_order_of_a_mixture_is_global_and_depends_on_the_seed_alone():
    entries = [(Numbers(range(500), "a"), 1), (Numbers(range(500, 1000), "b"), 1)]
    orders = [[number(x) for x in Mixture(entries, seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert 200 < sum(x < 500 for x in orders[0][:500]) < 300  # the tasks are mixed, not one after the other


def test_a_mixture_of_a_million_rows_is_cheap():
    """It must not read its rows, nor keep an object for each: what is built is 8 bytes of order per row, no more."""

    class Counted(Numbers):
        made = 0

        def conversation(self, row, index):
            Counted.made += 1
            return super().conversation(row, index)

    tasks = [(Counted(range(600_000), "a"), 1), (Counted(range(1_000_000, 1_100_000), "b"), 4)]
    tracemalloc.start()
    try:
        mixture = Mixture(tasks)
        assert len(mixture) == 1_000_000 and tracemalloc.get_traced_memory()[1] < 2 * 8 * 1_000_000
    finally:
        tracemalloc.stop()
    assert Counted.made == 0
    assert number(mixture[999_999]) in range(1_100_000) and Counted.made == 1


def test_build_mixture_skips_weight_zero_and_names_unknown_tasks():
    tasks = {"talk": embedded("chat"), "absent": local("chat", train="no/such/file.jsonl")}
    assert len(build_mixture(tasks, {"talk": 0.5, "absent": 0}, "train")) == 100
    with pytest.raises(UserError, match="'sums'"):
        build_mixture(tasks, {"sums": 1}, "train")
    with pytest.raises(UserError, match="negative"):
        build_mixture(tasks, {"talk": -1}, "train")


# ---------------------------------------------------------------------------------------------------------------------
# Local files


def test_a_bare_array_per_line_is_a_conversation_and_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n" + json.dumps(CHAT["messages"]) + "\n\n" + json.dumps(CHAT), encoding="utf-8")
    task = build_task("c", local("chat", train=str(path)), "train")
    assert [task[0], task[1]] == [CHAT, CHAT]


def test_rows_are_read_back_from_several_files_by_glob_and_list(tmp_path):
    for name in "ba":
        write(tmp_path / f"{name}.jsonl", *[{"messages": dialogue(f"{name}{i} é", "x")} for i in range(3)])
    want = ["a0 é", "a1 é", "a2 é", "b0 é", "b1 é", "b2 é"]
    for paths in (str(tmp_path / "*.jsonl"), [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]):
        task = build_task("c", local("chat", train=paths), "train")
        assert [c["messages"][0]["content"] for c in task] == want


def test_a_test_file_that_the_training_pattern_matches_is_left_out(tmp_path):
    write(tmp_path / "a.jsonl", CHAT)
    write(tmp_path / "val.jsonl", CHAT, CHAT)
    spec = local("chat", train=str(tmp_path / "*.jsonl"), test=str(tmp_path / "val.jsonl"))
    assert (len(build_task("c", spec, "train")), len(build_task("c", spec, "test"))) == (1, 2)
    spec["train"] = spec["test"]
    with pytest.raises(UserError, match=r"data\.tasks\.c\.train.*not also a test file"):
        build_task("c", spec, "train")


def test_one_word_list_is_divided_between_the_splits(tmp_path):
    words = ["".join(random.Random(i).choices("abcdefgh", k=7)) for i in range(400)]
    (tmp_path / "words.txt").write_text("\n".join(words), encoding="utf-8")
    spec = local("simple_spelling", train=str(tmp_path / "words.txt"), size=1000, test_size=1000)
    train, test = ({c["messages"][0]["content"] for c in build_task("s", spec, split)} for split in ("train", "test"))
    assert train and test and not train & test and len(train | test) == len(set(words))


ROWS = {"multiple_choice": ARC, "gsm8k": GSM, "chat": CHAT}
BROKEN = [
    ("chat", b"", "no rows"),
    ("chat", b"{nonsense\n", "row 1.*not valid JSON"),
    ("chat", b'{"messages": []}\n', "row 1"),
    ("chat", b'{"text": "x"}\n', "row 1.*no conversation"),
    ("chat", b'"text"\n', "row 1.*JSON object"),
    ("chat", '[{"role": "user", "content": "caf\u00e9"}]'.encode("latin-1"), "row 1.*UTF-8"),
    ("chat", json.dumps({"messages": dialogue("a", "b")[::-1]}).encode(), "row 1.*user"),
    ("chat", json.dumps({"messages": dialogue("a", "b")[:1]}).encode(), "row 1.*assistant"),
    ("chat", json.dumps({"messages": [*dialogue("a", "b"), {"role": "bot", "content": "c"}]}).encode(), "row 1.*bot"),
    ("gsm8k", b'{"question": "x"}\n', "row 1.*'answer' is missing"),
    ("gsm8k", b'{"question": "x", "answer": "12"}\n', "row 1.*####"),
    ("multiple_choice", json.dumps({**ARC, "answerKey": "E"}).encode(), "row 1.*answerKey 'E'"),
    ("multiple_choice", json.dumps({**MMLU, "answer": 4}).encode(), "row 1.*answer 4"),
    ("multiple_choice", json.dumps({**MMLU, "choices": ["a"], "answer": 0}).encode(), "row 1.*two choices"),
    ("identity", json.dumps(CHAT).encode(), "row 1.*keywords"),
    ("humaneval", b'{"prompt": "def f():"}\n', "row 1.*'entry_point' is missing"),
]


@pytest.mark.parametrize(("kind", "content", "message"), BROKEN)
def test_broken_files_name_task_file_and_row_before_anything_runs(tmp_path, kind, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"(?s)data\.tasks\.mine\.test: .*rows\.jsonl.*{message.removeprefix('row 1.*')}"
    ) as error:
        build_task("mine", local(kind, test=str(path)), "test")
    if message.startswith("row 1"):
        assert "rows.jsonl row 1:" in str(error.value)


def test_the_row_number_is_the_line_in_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(CHAT)}\n\n{json.dumps(CHAT)}\n[]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl row 4: "):
        build_task("mine", local("chat", train=str(path)), "train")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "riddle", "source": "local"}, "type=riddle"),
        ({"type": "chat", "source": "moon"}, "source=moon"),
        (local("chat"), r"data\.tasks\.mine\.train is null"),
        (local("chat", train="no/such/*.jsonl"), r"data\.tasks\.mine\.train: no file matches no/such"),
        (local("chat", train=[]), "names no file"),
        (local("spelling_bee"), r"data\.tasks\.mine\.train"),
        (local("chat", train="x.jsonl", options={"steps": [1]}), "files take no options"),
        ({"type": "chat", "source": "template"}, "source=template: only type=identity is made from templates"),
        ({"type": "identity", "source": "template", "options": {"nme": "x"}}, "takes no option nme"),
        (embedded("identity", size=10**6), "lower the task's size"),
    ],
)
def test_wrong_specs_name_the_key(spec, message):
    with pytest.raises(UserError, match=message):
        build_task("mine", spec, "train")


# ---------------------------------------------------------------------------------------------------------------------
# HumanEval

PROGRAM = {
    "prompt": "import math\n\ndef area(r):\n    '''Area.'''\n",
    "entry_point": "area",
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(candidate):\n    assert candidate(1) == math.pi\n",
}


def test_code_is_the_first_fenced_block_or_the_whole_text():
    assert extract_code("Here:\n```python\nx = 1\n```\n```\ny\n```") == "x = 1\n"
    assert extract_code("```\nx = 1") == "x = 1"
    assert extract_code("x = 1") == "x = 1"


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("```python\ndef area(r):\n    return math.pi * r ** 2\n```", True),
        ("    return math.pi * r * r\n", True),
        ("```python\ndef area(r):\n    return 3\n```", False),
        ("def area(r) return", False),
        ("import sys\ndef area(r):\n    sys.exit(0)\n", False),
        ("import os\nos._exit(0)\ndef area(r):\n    return 3\n", False),
    ],
)
def test_humaneval_runs_the_tests(tmp_path, completion, right):
    task = build_task("code", local("humaneval", test=write(tmp_path / "h.jsonl", PROGRAM)), "test")
    assert task.evaluate(task[0], completion) is right


def test_imports_of_the_prompt_are_put_first_and_tests_may_use_what_it_defines(tmp_path):
    assert program(PROGRAM, "def area(r):\n    return 1").code.startswith("import math\n")
    row = PROGRAM | {"prompt": "def double(x):\n    return 2 * x\n\ndef area(r):\n    '''Area.'''\n"}
    row["test"] = "def check(candidate):\n    assert candidate(3) == double(3) == area(3)\n"
    row["canonical_solution"] = "    return 2 * r\n"
    task = build_task("code", local("humaneval", test=write(tmp_path / "h.jsonl", row)), "test")
    texts = ["def area(r):\n    return r + r", "def area(r):\n    return 1", "def area(r): 1 / 0", "def area("]
    assert task.verdicts([task[0]] * 4, texts) == ["pass", "fail", "error", "error"]


# ---------------------------------------------------------------------------------------------------------------------
# The real data sets, where they are


@needs_data
@pytest.mark.parametrize(
    ("kind", "train", "test", "sizes"),
    [
        ("multiple_choice", "arc/ARC-*-train.jsonl", "arc/ARC-Easy-test.jsonl", (3370, 2376)),
        ("multiple_choice", "mmlu/dev.jsonl", "mmlu/test.jsonl", (285, 14042)),
        ("gsm8k", "gsm8k/train.jsonl", "gsm8k/test.jsonl", (7473, 1319)),
        ("chat", "chat/*.jsonl", "chat/val.jsonl", (22593, 500)),
    ],
)
def test_real_files_are_read_completely(kind, train, test, sizes):
    spec = local(kind, train=str(DATA / train), test=str(DATA / test))
    for split, size in zip(("train", "test"), sizes, strict=True):
        task = build_task("real", spec, split)
        assert len(task) == size
        for i in (0, size // 2, size - 1):
            validate_conversation(task[i])
            if task.kind != "chat":
                assert task.evaluate(task[i], content_text(task[i]["messages"][-1]["content"]))


@needs_data
@pytest.mark.parametrize("step", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_real_reference_programs_pass_their_tests(step):
    task = build_task("code", local("humaneval", test=str(DATA / "humaneval/HumanEval.jsonl")), "test")
    assert len(task) == 164
    conversations = [task[i] for i in range(0, 164, step)]
    verdicts = task.verdicts(conversations, [c["messages"][-1]["content"] for c in conversations])
    assert set(verdicts) == {"pass"}
    swapped = [c["messages"][-1]["content"] for c in conversations[1:] + conversations[:1]]
    assert "pass" not in task.verdicts(conversations, swapped)


@needs_data
def test_real_word_list_gives_both_splits():
    spec = local("spelling_bee", train=str(DATA / "words/words.txt"), size=300, test_size=300)
    train, test = (build_task("bee", spec, split) for split in ("train", "test"))
    assert len(train.words) + len(test.words) == 104864 and not set(train.words) & set(test.words)
    assert train.evaluate(train[5], content_text(train[5]["messages"][-1]["content"]))


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Q\n\nmore"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "input": "more", "output": "A"},
        {"prompt": "Q\n\nmore", "completion": "A"},
        {"question": "Q\n\nmore", "response": "A"},
        {"messages": [{"role": "user", "content": "Q\n\nmore"}, {"role": "assistant", "content": "A"}], "id": 3},
    ],
)
def test_conversations_of_every_common_format_are_read(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    spec = {"type": "chat", "source": "local", "train": str(tmp_path / "rows.jsonl")}
    messages = build_task("talk", spec, "train")[0]["messages"]
    assert [(m["role"], m["content"]) for m in messages] == [("user", "Q\n\nmore"), ("assistant", "A")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "no talk"}, r"no conversation \(found: text\); needed: messages, conversations"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "message 1 has role 'assistant', expected 'user'"),
        ({"conversations": [{"from": "narrator", "value": "A"}]}, "message 1 has role 'narrator'"),
        ({"instruction": 3, "output": "A"}, "'instruction' must be text, found int 3"),
    ],
)
def test_rows_that_are_no_conversation_are_named(tmp_path, row, problem):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"rows.jsonl row 1: .*{problem}"):
        build_task("talk", {"type": "chat", "source": "local", "train": str(tmp_path / "rows.jsonl")}, "train")
