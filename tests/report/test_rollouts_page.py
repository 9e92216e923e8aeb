"""The log of rollouts and its page: bounded, resumable, and safe with hostile answers."""

import re

import pytest

from llm.errors import UserError
from llm.report.rollouts_page import page_of, write_page
from llm.stages.rollout_log import RolloutLog
from llm.tokenizer.bpe import Tokenizer
from llm.utils.files import parse_json

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def row(text="yes", reward=1.0, advantage=0.5):
    ids = TOKENIZER.encode("Why?" + text + "tool")
    mask = [0] * 4 + [1] * len(TOKENIZER.encode(text)) + [0] * 4
    numbers = {"question": 3, "reward": reward, "advantage": advantage, "length": 3, "finish": "stop"}
    return {"ids": ids, "mask": mask, "n_prompt": 4, "rewards": {"task": reward}} | numbers


def steps_in(folder):
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    return [parse_json(line.encode(), "x")["step"] for line in lines]


def test_the_log_keeps_the_last_steps(tmp_path):
    log = RolloutLog(tmp_path, 3, TOKENIZER)
    for step in range(20):
        log.add(step, [row()] * 2)
        assert steps_in(tmp_path)[-1] == step and len(set(steps_in(tmp_path))) <= 6
    assert len(set(steps_in(tmp_path))) >= 3


def test_a_resumed_log_leaves_out_steps_that_come_again_and_cut_lines(tmp_path):
    log = RolloutLog(tmp_path, 5, TOKENIZER)
    for step in range(4):
        log.add(step, [row()])
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 4, "pro')
    RolloutLog(tmp_path, 5, TOKENIZER).add(2, [row("new")])
    assert steps_in(tmp_path) == [0, 1, 2]
    (tmp_path / "rollouts.jsonl").write_text("damaged\n")
    RolloutLog(tmp_path, 5, TOKENIZER).add(2, [row("new")])
    assert steps_in(tmp_path) == [2]
    (tmp_path / "rollouts.jsonl").unlink()
    one = RolloutLog(tmp_path, 1, TOKENIZER)
    for step in range(5):
        one.add(step, [row()])
    assert len(steps_in(tmp_path)) <= 2


def test_the_page_shows_answers_with_their_masks_and_numbers(tmp_path):
    folder = tmp_path / "demo" / "grpo"
    folder.mkdir(parents=True)
    assert write_page(folder) is None
    RolloutLog(folder, 3, TOKENIZER).add(0, [row(), row("no", 0.0, -0.5)])
    page = write_page(folder).read_text()
    assert page.count("<article") == 2 and "Rollouts of demo/grpo" in page
    assert '<span>yes</span><span class="written">tool</span>' in page and '<pre class="prompt">Why?</pre>' in page
    assert "advantage -0.5" in page and "task 1" in page and "http" not in page.replace("http-equiv", "")
    good, bad = re.findall(r"hsl\(var\((--\w+)\)[^>]*>reward", page)
    assert (good, bad) == ("--good", "--bad")


def test_no_answer_is_hidden_before_a_reader_chooses(tmp_path):
    rewards = [-1.2345649, 0.5, 2.3456749]
    RolloutLog(tmp_path, 3, TOKENIZER).add(0, [row(reward=reward) for reward in rewards])
    page = write_page(tmp_path).read_text()
    low, high = (float(number) for number in re.findall(r'type="number" step="any" value="([^"]*)"', page))
    assert all(low <= float(number) <= high for number in re.findall(r'data-reward="([^"]*)"', page))


def test_hostile_answers_are_text(tmp_path):
    RolloutLog(tmp_path, 3, TOKENIZER).add(0, [row(HOSTILE)])
    page = write_page(tmp_path).read_text()
    assert page.count("<script") == 1 and "<img" not in page and "&lt;img" in page
    log = [{"step": 0, "prompt": HOSTILE, "pieces": [[HOSTILE, 1]], "rewards": {HOSTILE: 1}, "finish": HOSTILE}]
    log[0] |= {"reward": 1, "advantage": 1, "length": 1, "question": 1}
    page = page_of(HOSTILE, log)
    assert page.count("<script") == 1 and "<img" not in page


@pytest.mark.parametrize("content", ['{"step": 1}\n', "[1]\n", "no\n", '{"step": "<b>"}\n'])
def test_a_damaged_log_is_one_line(tmp_path, content):
    (tmp_path / "rollouts.jsonl").write_text(content)
    with pytest.raises(UserError, match="rollouts.jsonl cannot be read"):
        write_page(tmp_path)


def test_calls_of_the_calculator_are_readable():
    asked, got = "So <|python_start|>2*3<|python_end|>", "<|output_start|>6<|output_end|>"
    numbers = {"question": 1, "reward": 1.0, "advantage": 1.0, "length": 3, "finish": "stop", "rewards": {"task": 1.0}}
    cut = [["<|python_start|>1/0<|python_end|> is", 1]]
    rows = [
        {"step": 0, "prompt": "?", "pieces": pieces, **numbers} for pieces in ([[asked, 1], [got, 0], ["6.", 1]], cut)
    ]
    page = page_of("demo", rows)
    assert '<span>So ⟨python: 2*3</span><span class="written"> = 6⟩</span><span>6.</span>' in page
    assert "<span>⟨python: 1/0⟩ is</span>" in page and "python_" not in page and "output_" not in page
