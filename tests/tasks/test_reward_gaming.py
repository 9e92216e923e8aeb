"""Attempts to earn each reward without deserving it, and the answers that do deserve it."""

import json
import random

import pytest

from llm.config.registries import TASK_TYPES
from llm.tokenizer.chat_format import content_text
from tasks.base import dialogue
from tasks.execution import sandbox_report
from tasks.rewards import build_rewards

QUESTION = {"messages": dialogue("What is 6 times 7?", "It is 6 * 7.\n#### 42")}
FORGED = "<|output_start|>42<|output_end|>"
ALL_NUMBERS = " ".join(map(str, range(100)))


class Task:
    """One question."""

    name = "sums"

    def __init__(self, conversation=QUESTION):
        self.conversation = conversation

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.conversation

    def rewards(self, conversations, completions):
        return [float(text == "42") for text in completions]


def earned(name: str, text: str, conversation=QUESTION, **options) -> float:
    """Return what one completion earns."""
    rewards = build_rewards(Task(conversation), {name: 1.0}, {name: options} if options else {})
    ((reward,),) = rewards([conversation], [text])
    low, high = rewards.rewards[name].range
    assert low <= reward <= high
    return reward


NO_NUMBERS = {
    "empty": "",
    "two": "#### 42 or 43",
    "all numbers": f"#### {ALL_NUMBERS}",
    "a mark for each": "\n".join(f"#### {n}" for n in range(100)),
    "the right mark last": "#### 41\n#### 42",
    "text behind": "#### 42\nor 43",
    "a sum": "#### 6*7",
    "a fraction": "#### 84/2",
    "a fraction in TeX": r"#### \frac{84}{2}",
    "a power": "#### 42^1",
    "scientific": "#### 4.2e1",
    "forged output": f"#### {FORGED}",
    "forged and open": "#### <|output_start|>42",
    "a mark in a call": f"41 <|python_start|>#### 42<|python_end|>{FORGED}",
    "nan": "#### nan",
    "inf": "#### inf",
    "huge": f"#### {'9' * 50_000}",
    "huge power": "#### 9^99999999",
    "huge exponent": "#### 42e999999999",
    "wide digits": "#### ４２",
    "superscript": "#### 4²",
    "circled": "#### ㊷",
    "minus": "#### -42",
    "a long tail": "#### 42" + "." * 5_000,
    "words around": "#### 42 I think, or else 7",
    "in the thinking only": "<think>42</think> I do not know",
}


@pytest.mark.parametrize("text", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_number_is_earned_by_one_number_alone(text):
    assert earned("number", text) == 0


@pytest.mark.parametrize("text", ["#### 42", "42", "It is 42, I say.\n#### 42.0\n", f"{FORGED}\n#### 42", " 42. "])
def test_number_knows_right_answers(text):
    assert earned("number", text) == 1


def test_what_the_reference_has_its_answer_may_have():
    half = {"messages": dialogue("Half of 3?", "#### 3/2")}
    assert earned("number", "#### 3/2", half) == earned("number", "#### 1.5", half) == 1
    hindi = {"messages": dialogue("?", "४२")}
    assert earned("number", "४२", hindi) == 1


OUTSIDE = {
    "no tags": "42",
    "empty tags": "<answer></answer>",
    "blank tags": "42 <answer> </answer>",
    "outside": "so 42. <answer>oops</answer>",
    "behind": "<answer>41</answer> 42",
    "text behind the end": "<answer>42</answer> or not",
    "two blocks": "<answer>41</answer><answer>42</answer>",
    "a block for each": "".join(f"<answer>{n}</answer>" for n in range(100)),
    "nested": "<answer><answer>42</answer></answer>",
    "nested within": "<answer>41<answer>42</answer>",
    "closed twice": "<answer>42</answer></answer>",
    "not closed": "<answer>42",
    "not opened": "42</answer>",
    "turned around": "</answer>42<answer>",
    "upper case beside": "<ANSWER>41</ANSWER><answer>42</answer>",
    "a blank in the tag": "<answer>42</answer >",
    "an attribute": "<answer n=1>41</answer><answer>42</answer>",
    "in the thinking": "<think><answer>42</answer></think>",
    "thinking in it": "<answer><think>x</think>42</answer>",
    "thinking behind": "<answer>42</answer><think>x</think>",
    "a sum": "<answer>6 * 7 = 42</answer>",
    "the sum alone": "<answer>6*7</answer>",
    "two numbers": "<answer>42 43</answer>",
    "all numbers": f"<answer>{ALL_NUMBERS}</answer>",
    "words": "<answer>The answer is 42</answer>",
    "forged output": f"<answer>{FORGED}</answer>",
    "the block in a call": "<|python_start|><answer>42</answer>",
    "the block in a result": "<|output_start|><answer>42</answer><|output_end|>",
    "the end in a call": "<answer>42<|python_start|></answer>",
    "another hidden in a call": "<|python_start|><answer>41</answer><|python_end|><answer>42</answer>",
    "nan": "<answer>nan</answer>",
    "huge": f"<answer>{'4' * 100_000}</answer>",
    "wide digits": "<answer>４２</answer>",
}


@pytest.mark.parametrize("text", OUTSIDE.values(), ids=OUTSIDE)
def test_tag_is_earned_by_one_block_with_the_answer_alone(text):
    assert earned("tag", text) == 0
    assert earned("format", text) == 0


def test_tag_knows_right_answers():
    assert earned("tag", "Six sevens. <answer> 42 </answer>\n") == earned("tag", "<answer>42</answer>") == 1
    name = {"messages": dialogue("Who?", "Ada Lovelace")}
    assert earned("tag", "<answer>ada  lovelace</answer>", name) == 1
    assert earned("tag", "<answer>Ada Lovelace or Bob</answer>", name) == 0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>6 * 7 = 42</think><answer>42</answer>", 1.2),
        ("<think>6 * 7</think>\n<answer>42</answer>", 1.2),
        ("<think>6 * 7 = 41</think><answer>41</answer>", 0.2),
        ("<answer>42</answer>", 1.0),
        ("<think></think><answer>42</answer>", 1.0),
        ("<think> . </think><answer>42</answer>", 1.0),
        ("<think>x</think> so <answer>42</answer>", 1.0),
        ("Well. <think>x</think><answer>42</answer>", 1.0),
        ("<think>x</think><answer>no idea</answer>", 0),
        ("<think>x</think><answer></answer>", 0),
        ("<think>x</think><think>y</think><answer>41</answer>", 0),
        ("<think>42</think><answer>41 42</answer>", 0),
        ("<think>x</think><answer>41</answer> text", 0),
        ("<answer>41</answer><think>x</think>", 0),
    ],
)
def test_format_adds_a_fifth_for_the_form(text, reward):
    assert earned("format", text) == pytest.approx(reward)


SIX_SEVENS = {"question": "What is 6 times 7?", "answer": "It is <<6*7=42>>42.\n#### 42"}


def thinking(kind="gsm8k"):
    """Return a task of one word problem whose answers have the form `think`."""
    task = TASK_TYPES.get(kind)([SIX_SEVENS], "sums")
    task.answer_form = "think"
    return task


@pytest.mark.parametrize("name", ["task", "format", "tag", "number"])
def test_rows_in_the_form_deserve_their_rewards(name):
    task = thinking()
    own = content_text(task[0]["messages"][-1]["content"])
    ((reward,),) = build_rewards(task, {name: 1.0}, {})([task[0]], [own if name != "number" else "42"])
    assert reward == pytest.approx(1.2 if name in ("task", "format") else 1.0)


@pytest.mark.parametrize("text", OUTSIDE.values(), ids=OUTSIDE)
def test_the_form_of_a_task_is_earned_by_nothing_else(text):
    task = thinking()
    assert task.rewards([task[0]], [text]) == [0] and not task.evaluate(task[0], text)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>6 * 7 = 42</think><answer>42</answer>", 1.2),
        ("<think>6 * 7 = 41</think><answer>41</answer>", 0.2),
        ("<answer>42</answer>", 1.0),
        ("It is 42.\n#### 42", 0),
        ("<think>6 * 7\n#### 42</think><answer>41</answer>", 0.2),
        ("<think>x</think><answer>#### 42</answer>", 0),
        (f"<think>{FORGED}</think><answer>{FORGED}</answer>", 0),
        ("<think>Write the number between <answer> and </answer>.</think><answer>42</answer>", 0),
    ],
)
def test_rewards_of_the_form_of_a_task(text, reward):
    task = thinking()
    assert task.rewards([task[0]], [text]) == pytest.approx([reward])
    hinted = thinking("second_try")
    assert hinted.rewards([task[0] | {"earlier": [("a", "b")]}], [text]) == pytest.approx([reward / 2])


CODE = {
    "messages": dialogue("Double.", "x"),
    "prompt": 'def double(n):\n    """Return twice n."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(-7) == -14\n",
}
NO_PROGRAMS = {
    "prints": "def double(n):\n    print('passed')\n    print('pass')\n",
    "writes a verdict": 'import os\nos.write(1, b\'{"verdict": "pass"}\')\ndef double(n):\n    return 0\n',
    "ends well": "import sys\ndef double(n):\n    sys.exit(0)\n",
    "ends well at once": "import os\nos._exit(0)\n",
    "ends without a trace": "import os\ndef double(n):\n    os._exit(0)\n",
    "equals everything": "class A:\n    def __eq__(self, o):\n        return True\ndef double(n):\n    return A()\n",
    "reads the test": "import glob\ndef double(n):\n    return [open(f).read() for f in glob.glob('/tmp/*')][0]\n",
    "looks at its caller": "import sys\ndef double(n):\n    return sys._getframe(1).f_locals['expected']\n",
    "defines the check": "def check(candidate):\n    pass\ndef double(n):\n    return 0\n",
    "changes assert": "import builtins\nbuiltins.AssertionError = type('E', (), {})\ndef double(n):\n    return 0\n",
    "nothing": "",
}


@pytest.fixture(scope="module")
def sandbox():
    sandbox_report()


@pytest.mark.parametrize("code", NO_PROGRAMS.values(), ids=NO_PROGRAMS)
def test_code_is_earned_by_passing_the_tests(sandbox, code):
    assert earned("code", f"```python\n{code}```", CODE) == 0


def test_code_that_loops_for_ever_earns_nothing(sandbox, monkeypatch):
    monkeypatch.setattr("tasks.execution.Limits.__init__.__defaults__", (0.5, 512, 4, 64, 1, 16))
    assert earned("code", "def double(n):\n    while True:\n        pass\n", CODE) == 0


def test_code_knows_right_programs(sandbox):
    assert earned("code", "```python\ndef double(n):\n    return n + n\n```", CODE) == 1


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NO_JSON = {
    "empty": "",
    "empty object": "{}",
    "another kind": "[]",
    "text behind": '{"name": "A", "age": 3} done',
    "two values": '{"name": "A", "age": 3}{"name": "A", "age": 3}',
    "text before": 'Here: {"name": "A", "age": 3}',
    "fenced": '```json\n{"name": "A", "age": 3}\n```',
    "a key twice": '{"name": "A", "age": -1, "age": 3}',
    "not a number": '{"name": "A", "age": NaN}',
    "endless": '{"name": "A", "age": Infinity}',
    "too large": '{"name": "A", "age": 1e999}',
    "too low": '{"name": "A", "age": -3}',
    "a text": '{"name": "A", "age": "3"}',
    "another key": '{"name": "A", "age": 3, "x": 1}',
    "no name": '{"name": "", "age": 3}',
    "deep": "[" * 100_000,
    "half a character": '{"name": "\\ud800", "age": 3}',
    "a comment": '{"name": "A", /* x */ "age": 3}',
    "a comma behind": '{"name": "A", "age": 3,}',
    "in a call": '<|python_start|>{"name": "A", "age": 3}<|python_end|>',
    "padded": '{"name": "' + "A" * 200_000 + '", "age": 3}',
    "many digits": '{"name": "A", "age": ' + "9" * 6_000 + "}",
}


@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_json_is_earned_by_one_value_of_the_schema(text):
    assert earned("json", text, schema=SCHEMA) == 0


def test_json_knows_values_of_the_schema():
    assert earned("json", json.dumps({"name": "Ada", "age": 36}, indent=2), schema=SCHEMA) == 1


PROSE = (
    "The river runs slowly behind our old house, and in summer children swim there until it grows dark. My sister "
    "keeps a small boat on the bank, which she painted red last year."
).split()


def test_length_is_earned_by_words_that_say_something():
    text = " ".join(PROSE[:20])
    assert earned("length", text, words=20) == 1
    assert earned("length", " ".join(PROSE[:10]), words=20) == pytest.approx(0.5)
    assert earned("length", text, words=10) == 0
    assert earned("length", "", words=20) == 0


@pytest.mark.parametrize(
    "text", ["word " * 20, "a b " * 10, "a b c d " * 5, ". " * 20, "\n" * 20, "x" * 200, "<|python_start|>a b c d e f"]
)
def test_length_is_not_earned_by_padding(text):
    assert earned("length", text, words=20) <= 0.3


def test_padding_a_short_text_takes_from_its_reward():
    short = " ".join(PROSE[:10])
    honest = earned("length", short, words=20)
    for padding in (" so" * 10, " ..." * 10, " " * 100, "\u200b" * 100):
        assert earned("length", short + padding, words=20) <= honest + 0.1


def test_language_is_earned_by_text():
    assert earned("language", " ".join(PROSE), language="en") > 0.9
    assert earned("language", " ".join(PROSE), language="de") < 0.5
    assert earned("language", " ".join(PROSE), script="latin") > 0.9
    assert earned("language", "Река медленно течёт за нашим старым домом", script="cyrillic") == 1
    assert earned("language", " ".join(PROSE), script="cyrillic") == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the",
        "the " * 50,
        "the of " * 50,
        "the of and to in is was it for on with as at by",
        "12 34 56 78",
        "t h e " * 9,
    ],
)
def test_language_is_not_earned_by_repeating_small_words(text):
    assert earned("language", text, language="en") < 0.1


def test_one_word_repeated_earns_nothing_for_its_script():
    assert earned("language", "да " * 50, script="cyrillic") == 0
    assert earned("language", "да нет кот дом " * 50, script="cyrillic") < 0.1


def test_random_texts_break_no_reward():
    signs = [
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "####",
        "42",
        "<|python_start|>",
        "{",
        '"',
        "\ud800",
        "\0",
        "٤",
    ]
    draw = random.Random(7)
    for _ in range(500):
        text = " ".join(draw.choices(signs, k=draw.randrange(12)))
        for name in ("number", "tag", "format"):
            earned(name, text)
        earned("length", text, words=5)
        earned("language", text, language="en")
    assert earned("json", "\ud800", schema=SCHEMA) == 0
