"""The Compare tab on answers: two stages asked the same, and items that one alone has right."""

import json
import time

import gradio as gr
import pytest
from scipy import stats
from test_inside_tab import save_stage

from llm.inference.sampling import SamplingParams
from llm.panel.compare_tab import CompareTab
from llm.panel.differences_view import answers_page, items_page, shared_parts
from llm.panel.models import PanelModels
from llm.panel.records import read_items, sign_test
from llm.panel.state import Panel
from llm.tokenizer.chat_format import readable

A, B = "tiny/sft", "tiny/pretrain"


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("differences") / "runs"
    for stage, verdicts in (("sft", "ppff"), ("pretrain", "pfpf")):
        folder = save_stage(root, tiny_tokenizer, stage, seed=len(stage)) / "records"
        folder.mkdir()
        rows = [
            {"index": n, "prompt": f"q{n} <b>", "output": f"{stage} {n}", "verdict": "pass" if one == "p" else "fail"}
            for n, one in enumerate(verdicts)
        ]
        (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tiny/sft/records/alone.jsonl").write_text("")
    return PanelModels(Panel(root, root / "queue.sqlite", (root,)))


def test_items_that_one_alone_has_right_are_shown_with_both_answers(models):
    panel = models.panel
    assert shared_parts(panel, A, B) == ["records/choice"] and shared_parts(panel, A, None) == []
    shown = items_page(panel, A, B, "records/choice")
    for who in ("both", f"only {A}", f"only {B}", "none of them"):
        assert f'<td>{who}</td><td class="n">1</td>' in shown
    assert "1 and 1 would differ as much with p = 1 (exact" in shown
    first, second = shown.index(f"Only {A} is right: 1"), shown.index(f"Only {B} is right: 1")
    assert "sft 1" in shown[first:second] and "pretrain 1" in shown[first:second]
    assert "sft 2" in shown[second:] and "pretrain 2" in shown[second:]
    assert "q1 &lt;b&gt;" in shown and "q0" not in shown and "\n" not in shown
    assert "Choose two stages" in items_page(panel, A, None, "records/choice")
    assert "no such records" in items_page(panel, A, B, "records/alone")


def test_an_item_of_lm_eval_counts_once_for_each_filter(models):
    panel, part = models.panel, "lm_eval/gsm8k"
    for stage, strict, flexible in (("sft", "110", "111"), ("pretrain", "100", "000")):
        folder = panel.runs / "tiny" / stage / "lm_eval"
        folder.mkdir()
        rows = [
            {"index": n, "arguments": [[f"q{n}", {}]], "responses": ["7"], "filter": name, "exact_match": float(right)}
            for name, verdicts in (("strict-match", strict), ("flexible-extract", flexible))
            for n, right in enumerate(verdicts)
        ]
        (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = items_page(panel, A, B, part)
    first, second = shown.index("Answers read by strict-match"), shown.index("Answers read by flexible-extract")
    assert "1 and 0 would differ" in shown[first:second] and "3 and 0 would differ" in shown[second:]
    assert '<td>both</td><td class="n">1</td>' in shown[first:second]
    assert "have no verdict" not in shown
    assert {one.subject for one in read_items(panel.runs / A, part)} == {"strict-match", "flexible-extract"}


def test_the_sign_test_is_that_of_a_fair_coin():
    for a, b in ((0, 0), (6, 25), (25, 6), (3, 3), (0, 5), (3400, 3600)):
        assert sign_test(a, b) == pytest.approx(stats.binomtest(a, a + b).pvalue if a + b else 1.0)


def test_the_sign_test_of_many_items_takes_no_time():
    start = time.perf_counter()
    assert sign_test(3500, 3500) == 1
    assert time.perf_counter() - start < 1  # 0.01 s; 5 s where every binomial is computed anew


def test_both_answer_the_same_question(models):
    shown = answers_page(models, A, B, "Who are <you>?", 0.0, 8, 1)
    assert shown.count('class="side"') == 2 and A in shown and B in shown and "\n" not in shown
    params = SamplingParams(temperature=0.0, max_new_tokens=8)
    for name in (A, B):
        ((content,),) = models.texts(name, ["Who are <you>?"], params)
        assert readable(content).strip()[:3].replace("<", "&lt;").replace("\n", "&#10;") in shown
    assert "mean logprob" in shown and "tokens, ended by " in shown
    for wrong in ((None, B, "x"), (A, B, " "), (A, "no/where", "x")):
        assert "problem" in answers_page(models, *wrong, 0.0, 8, 1)


def test_the_tab_offers_what_both_have(models):
    with gr.Blocks():
        tab = CompareTab(models.panel, models)
    one, other = tab.answering(A, None)
    assert set(one["choices"]) == {A, B} and one["value"] == A and other["value"] is None
    assert tab.parts(A, B, None)["value"] == "records/choice" == tab.parts(A, B, "records/choice")["value"]
    assert "Only" in tab.differ(A, B, "records/choice")
    assert tab.answer(A, B, "Hi", 0, 4, 1).count('class="side"') == 2
