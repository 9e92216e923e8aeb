"""The Data tab: its components, and the functions behind them, which work without a browser."""

from typing import Any

import gradio as gr

from llm.errors import UserError
from llm.panel.data_view import MOST_ROWS, cut, tokenizers, training_rows
from llm.panel.form import Form
from llm.panel.markup import page, problem
from llm.panel.own_tab import OwnTab
from llm.panel.runs_tab import CHOSEN, NONE, QUIET, html
from llm.panel.state import Panel
from llm.panel.train_tab import TrainTab


class DataTab:
    """A first run with own text, training rows of the form of the Train tab, and two tokenizers side by side."""

    def __init__(self, panel: Panel):
        self.panel, may = panel, not panel.readonly
        with gr.Tabs():
            with gr.Tab("First run", visible=may):
                self.own = OwnTab(panel)
            with gr.Tab("Training rows", visible=may):
                gr.Markdown("The first rows of what the form of *Train* would train on.")
                with gr.Row():
                    self.rows = gr.Slider(1, MOST_ROWS, 4, step=1, label="Rows")
                    self.make = gr.Button("Show rows", size="sm", min_width=120)
                self.shown = html("panel-rows")
            with gr.Tab("Tokens"):
                with gr.Row():
                    self.one = gr.Dropdown([], label="Tokenizer of", elem_id="panel-tokenizer", min_width=260)
                    self.other = gr.Dropdown([NONE], value=NONE, label="Beside that of", min_width=260)
                self.text = gr.Textbox(
                    label="Text to cut", lines=4, max_lines=16, value="The quick brown fox has 12 apples."
                )
                self.cut = gr.Button("Cut into tokens", size="sm")
                with gr.Row():
                    self.left, self.right = html("panel-tokens-0"), html("panel-tokens-1")

    def connect(self, tab: gr.Tab, timer: gr.Timer, train: TrainTab) -> None:
        """Connect the events, after those of the Train tab, whose form is built here."""
        self.own.connect(tab, timer, train)
        tab.select(self.choices, None, [self.one, self.other], **QUIET)
        self.make.click(lambda: page("<p>The stage is being built…</p>"), None, self.shown, **QUIET).then(
            self.show, [train.form, self.rows], self.shown, **QUIET
        )
        chosen = [self.one, self.other, self.text]
        for event in (self.cut.click, self.one.input, self.other.input):
            event(self.tokens, chosen, [self.left, self.right], **CHOSEN)

    def choices(self) -> list[Any]:
        """Return the stages that have a tokenizer."""
        names = tokenizers(self.panel)
        return [gr.update(choices=names), gr.update(choices=[NONE, *names])]

    def show(self, form: Form, rows: float) -> str:
        """Return the rows, or the mistake in the form."""
        try:
            return training_rows(self.panel, form, int(rows))
        except UserError as error:
            return page(problem(str(error)))

    def tokens(self, one: str | None, other: str | None, content: str) -> list[str]:
        """Return the text as tokens of both tokenizers."""
        right = "" if other in (None, NONE) else cut(self.panel, other, content or "")
        return [cut(self.panel, one or "", content or ""), right]
