"""The Rollouts tab: answers of a step by question, rewards by source, and what is coloured."""

import json
from pathlib import Path

import gradio as gr
import pytest
from experiment_runs import add_run

from llm.panel.rollouts_tab import RolloutsTab
from llm.panel.rollouts_view import ALL, LAST, MIXED, SAME, rollouts_page, steps_of, with_rollouts
from llm.panel.state import Panel

PIECES = [["Ava has <|python_start|>1+2<|python_end|>", 1], ["<|output_start|>3<|output_end|>", 0], ["3.\n<b>", 1]]


def row(step, question, reward, advantage, **more):
    prompt = f"<|bos|><|user_start|>How many <{question}>?<|user_end|><|assistant_start|>"
    facts = {"step": step, "prompt": prompt, "pieces": PIECES, "question": question, "reward": reward}
    return facts | {"rewards": {"task": reward}, "advantage": advantage, "length": 9, "finish": "stop"} | more


@pytest.fixture
def panel(tmp_path):
    root = tmp_path / "runs"
    rows = [row(3, 1, 0.0, 0.0), row(4, 7, 1.0, 0.5), row(4, 7, 0.0, -0.5), row(4, 8, 1.0, 0.0), row(4, 8, 1.0, 0.0)]
    rows[1] |= {"rewards": {"task": 1.0, "short": 0.25}, "finish": "length"}
    write(add_run(root, "mine"), rows)
    add_run(root, "bare")
    return Panel(root, root / "queue.sqlite", (root,))


def write(folder: Path, rows) -> None:
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


def test_the_last_step_is_shown_by_question_with_coloured_advantages(panel):
    assert with_rollouts(panel) == ["mine/pretrain"] and steps_of(panel, "mine/pretrain") == ["5", "4"]
    shown, place = rollouts_page(panel, "mine/pretrain", LAST, ALL, 0)
    assert "step 5: 2 of 2 questions, 1 to 2" in shown and place == 0
    assert shown.count('class="rollout"') == 3 and shown.count("<b>× 2</b>") == 1 and "\n" not in shown
    assert '<span class="tint good" style="--much: 45%">advantage +0.5</span>' in shown
    assert '<span class="tint bad" style="--much: 45%">advantage -0.5</span>' in shown
    assert "<span>task 1</span><span>short 0.25</span><span>9 tokens</span><span>ended by length</span>" in shown
    assert "How many &lt;7&gt;?" in shown and "user_start" not in shown and "<b>\n" not in shown
    assert 'Ava has ⟨python: 1+2<span class="forced"> = 3⟩</span>3.' in shown


def test_rewards_by_source_have_mean_and_error(panel):
    shown, _ = rollouts_page(panel, "mine/pretrain", LAST, ALL, 0)
    together = '<td>all together</td><td class="n">0.75</td><td class="n">0.25</td><td class="n">0</td>'
    assert together + '<td class="n">1</td><td class="n">4</td>' in shown
    assert '<td>short</td><td class="n">0.25</td><td class="n">-</td>' in shown


def test_the_error_of_rewards_is_that_of_questions(panel):
    rows = [row(9, question, float(question % 2), 0.0) for question in range(4) for _ in range(16)]
    write(panel.runs / "mine/pretrain", rows)
    shown, _ = rollouts_page(panel, "mine/pretrain", LAST, ALL, 0)
    assert '<td>task</td><td class="n">0.5</td><td class="n">0.289</td>' in shown  # not 0.063, of 64 answers


def test_questions_without_a_signal_can_be_told_from_others(panel):
    asked = (panel, "mine/pretrain")
    assert "question 7" in rollouts_page(*asked, LAST, MIXED, 0)[0]
    assert "question 8" not in rollouts_page(*asked, LAST, MIXED, 0)[0]
    assert "question 7" not in rollouts_page(*asked, LAST, SAME, 9)[0]
    assert "step 4: 1 of 1 questions" in rollouts_page(*asked, "4", ALL, 0)[0]
    assert "step 9: 0 of 0 questions" in rollouts_page(*asked, "9", ALL, 0)[0]


def test_what_is_missing_or_damaged_is_said(panel):
    assert "Choose a stage" in rollouts_page(panel, None, LAST, ALL, 0)[0]
    for name in ("no/where", "bare/pretrain", "../mine/pretrain"):
        assert "problem" in rollouts_page(panel, name, LAST, ALL, 0)[0] and steps_of(panel, name) == []
    folder = panel.runs / "mine/pretrain"
    write(folder, [{"step": 1}])
    assert "cannot be read" in rollouts_page(panel, "mine/pretrain", LAST, ALL, 0)[0]
    write(folder, [])
    assert "No step has been kept yet" in rollouts_page(panel, "mine/pretrain", LAST, ALL, 0)[0]


def test_the_tab_follows_the_file_and_draws_only_what_changed(panel):
    with gr.Blocks():
        tab = RolloutsTab(panel)
    assert tab.choices(None)["value"] == "mine/pretrain"
    shown, place, steps, stamp = tab.watch("mine/pretrain", LAST, ALL, 0, ())
    assert "step 5" in shown and steps["choices"] == [LAST, "5", "4"]
    assert tab.watch("mine/pretrain", LAST, ALL, place, stamp) == [gr.skip()] * 4 == tab.watch(None, LAST, ALL, 0, ())
    with (panel.runs / "mine/pretrain/rollouts.jsonl").open("a") as file:
        file.write(json.dumps(row(5, 1, 1.0, 0.0)) + "\n" + '{"half a line": ')
    again, _, _, later = tab.watch("mine/pretrain", LAST, ALL, place, stamp)
    assert "step 6: 1 of 1 questions" in again and later != stamp
    assert "step 5" in tab.first("mine/pretrain", "5", ALL)[0]
