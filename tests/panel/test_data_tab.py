"""The Data tab: texts as tokens, and the rows of a stage."""

import gradio as gr
import pytest

from llm.errors import UserError
from llm.panel.data_tab import DataTab
from llm.panel.data_view import from_page, training_rows
from llm.panel.form import Form
from llm.panel.runs_tab import NONE
from llm.panel.state import Panel
from llm.run.stage_folder import RunDir, write_manifest
from llm.stages.show_batch import for_page


@pytest.fixture
def panel(tmp_path, tiny_tokenizer):
    root = tmp_path / "runs"
    folder = RunDir(root, "mine").path / "tokenizer"
    write_manifest(folder, {"stage": "tokenizer", "status": "finished", "config": {"stage": {"name": "tokenizer"}}})
    tiny_tokenizer.save(folder / "model")
    return Panel(root, root / "queue.sqlite", (root,))


@pytest.fixture
def tab(panel):
    with gr.Blocks():
        return DataTab(panel)


def test_a_text_is_cut_into_the_tokens_of_the_tokenizer(tab, tiny_tokenizer):
    assert tab.choices()[0]["choices"] == ["mine/tokenizer"]
    content = "The red fox\n<b> ü"
    left, right = tab.tokens("mine/tokenizer", NONE, content)
    ids = tiny_tokenizer.encode(content)
    assert left.count('class="token"') == len(ids) and right == ""
    size = len(content.encode())
    assert f"{len(ids)} tokens for {size} bytes, {size / len(ids):.2f} bytes per token" in left
    assert "<b> ü" not in left and "\n" not in left
    assert tab.tokens("mine/tokenizer", "mine/tokenizer", content) == [left, left]
    assert tab.tokens("mine/tokenizer", NONE, "")[0].count('class="token"') == 0
    assert "20,000 are cut at most" in tab.tokens("mine/tokenizer", NONE, "x" * 20_001)[0]
    for name in ("../mine/tokenizer", "mine/nothing", "none/tokenizer"):
        assert "problem" in tab.tokens(name, NONE, content)[0]


def test_rows_have_the_colours_of_the_panel_and_stay_one_block():
    rows = [[("context", "a <b>\n\n"), ("trained", "yes"), ("special trained", "<|end|>")]]
    shown = from_page(for_page(rows, "run/sft, first step"))
    assert '<span class="trained">yes</span><span class="special trained">&lt;|end|&gt;</span>' in shown
    assert "run/sft, first step" in shown and "\n" not in shown and "style=" not in shown


def test_mistakes_stop_the_rows_before_anything_is_built(panel, tab):
    assert "must be at least 1" in tab.show(Form({"experiment": "tiny"}, {"max_steps": "0"}), 4)
    fixed = Panel(panel.runs, panel.queue_file, panel.folders, readonly=True)
    with pytest.raises(UserError, match="panel.readonly=true"):
        training_rows(fixed, Form(), 4)


@pytest.mark.slow
def test_the_rows_of_a_stage_are_those_that_it_would_train_on(panel):
    form = Form({"experiment": "tiny", "stage": "pretrain"}, {"run": "mine"})
    shown = training_rows(Panel(panel.runs, panel.queue_file, panel.folders), form, 2)
    assert shown.count("<pre") == 2 and 'class="trained"' in shown
