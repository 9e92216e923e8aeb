"""The Compare tab: its components, and the functions behind them, which work without a browser."""

from typing import Any

import gradio as gr

from llm.panel.compare_view import AXIS_NAMES, comparison_page, metrics_of, verdict_page
from llm.panel.differences_view import answers_page, items_page, shared_parts
from llm.panel.eval_view import evaluated
from llm.panel.markup import page
from llm.panel.models import MOST_TOKENS, PanelModels
from llm.panel.runs_tab import CHOSEN, QUIET, html
from llm.panel.runs_view import name_of
from llm.panel.state import Panel


class CompareTab:
    """Charts of chosen stages, the verdict on two sides, and the answers of two stages."""

    def __init__(self, panel: Panel, models: PanelModels):
        self.panel, self.models = panel, models
        self.stages = gr.Dropdown([], multiselect=True, label="Stages", elem_id="panel-stages")
        self.metrics = gr.Dropdown([], multiselect=True, label="Metrics", elem_id="panel-metrics")
        with gr.Row():
            self.axis = gr.Radio([(name, axis) for axis, name in AXIS_NAMES.items()], value="step", label="By")
            self.share = gr.Slider(0, 0.99, 0, step=0.01, label="Smoothing: weight of the past")
            self.seeds = gr.Checkbox(False, label="Mean and band over seeds")
        self.shown = html("panel-comparison")
        with gr.Accordion("Is B better than A?", open=True):
            with gr.Row():
                self.a = gr.Textbox(label="A: runs of the baseline", placeholder="base or base-seed=1,base-seed=2")
                self.b = gr.Textbox(label="B: runs with the change", placeholder="faster-*")
                self.metric = gr.Textbox("bpb", label="Metric", min_width=100)
                self.margin = gr.Textbox(label="Margin", placeholder="0.01 or 0.5%", min_width=100)
            self.judge = gr.Button("Compare", size="sm")
            self.verdict = html("panel-verdict")
        with gr.Accordion("Answers of two stages", open=False):
            with gr.Row():
                self.one = gr.Dropdown([], label="One stage", elem_id="panel-one", min_width=160)
                self.other = gr.Dropdown([], label="The other stage", elem_id="panel-other", min_width=160)
            with gr.Column(visible=not panel.readonly):
                self.question = gr.Textbox(label="Question, or text for a base model to continue", lines=2, max_lines=8)
                with gr.Row():
                    self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", min_width=140)
                    self.length = gr.Slider(1, MOST_TOKENS, 128, step=1, label="Most tokens", min_width=140)
                    self.seed = gr.Number(1, label="Seed", precision=0, minimum=0, min_width=90)
                self.ask = gr.Button("Ask both", size="sm")
                self.answers = html("panel-answers")
            self.part = gr.Dropdown([], label="Items of", elem_id="panel-items-of")
            self.items = html("panel-items")

    def connect(self, tab: gr.Tab) -> None:
        """Connect the events."""
        settings = [self.stages, self.metrics, self.axis, self.share, self.seeds]
        tab.select(self.choices, None, self.stages, **QUIET)
        two = [self.one, self.other]
        tab.select(self.answering, two, two, **CHOSEN)
        self.stages.input(self.choose, [self.stages, self.metrics], self.metrics, **CHOSEN).then(
            self.draw, settings, self.shown, **CHOSEN
        )
        for one in (self.metrics, self.axis, self.seeds):
            one.input(self.draw, settings, self.shown, **CHOSEN)
        self.share.release(self.draw, settings, self.shown, **CHOSEN)
        sides = [self.a, self.b, self.metric, self.margin]
        self.judge.click(self.decide, sides, self.verdict, **QUIET)
        for one in two:
            one.change(self.parts, [*two, self.part], self.part, **CHOSEN).then(
                self.differ, [*two, self.part], self.items, **CHOSEN
            )
        self.part.input(self.differ, [*two, self.part], self.items, **CHOSEN)
        asked = [*two, self.question, self.temperature, self.length, self.seed]
        self.ask.click(lambda: page("<p>The answers are being written…</p>"), None, self.answers, **QUIET).then(
            self.answer, asked, self.answers, **QUIET
        )

    def choices(self) -> Any:
        """Return the stages that can be chosen."""
        return gr.update(choices=[name_of(row) for row in self.panel.index.rows()])

    def choose(self, names: list[str], metrics: list[str]) -> Any:
        """Return the metrics of the chosen stages; the first is taken where none was."""
        rows = [row for row in self.panel.index.rows() if name_of(row) in (names or ())]
        there = metrics_of(self.panel.columns, rows)
        kept = [name for name in metrics or () if name in there]
        return gr.update(choices=there, value=kept or there[:1])

    def draw(self, names: list[str], metrics: list[str], axis: str, share: float, seeds: bool) -> str:
        """Return the charts."""
        return comparison_page(self.panel, names or [], metrics or [], axis, share, seeds)

    def decide(self, a: str, b: str, metric: str, margin: str) -> str:
        """Return the verdict."""
        return verdict_page(self.panel, a or "", b or "", metric or "", margin or "")

    def answering(self, one: str | None, other: str | None) -> list[Any]:
        """Return the stages whose answers and items can be compared."""
        names = evaluated(self.panel)
        return [gr.update(choices=names, value=name if name in names else None) for name in (one, other)]

    def parts(self, one: str | None, other: str | None, part: str | None) -> Any:
        """Return the tasks of which both stages have records; the first is taken where none was."""
        there = shared_parts(self.panel, one, other)
        return gr.update(choices=there, value=part if part in there else next(iter(there), None))

    def differ(self, one: str | None, other: str | None, part: str | None) -> str:
        """Return the items that one of two stages has right and the other wrong."""
        return items_page(self.panel, one, other, part)

    def answer(
        self, one: str | None, other: str | None, question: str, temperature: float, length: float, seed: float
    ) -> str:
        """Return what two stages say to one question."""
        return answers_page(self.models, one, other, question or "", float(temperature), int(length), int(seed or 0))
