"""The Compare tab: its components, and the functions behind them, which work without a browser."""

from typing import Any

import gradio as gr

from llm.panel.compare_view import AXIS_NAMES, comparison_page, metrics_of, verdict_page
from llm.panel.runs_tab import QUIET, html
from llm.panel.runs_view import name_of
from llm.panel.state import Panel


class CompareTab:
    """Charts of chosen stages, and the verdict on two sides."""

    def __init__(self, panel: Panel):
        self.panel = panel
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

    def connect(self, tab: gr.Tab) -> None:
        """Connect the events."""
        settings = [self.stages, self.metrics, self.axis, self.share, self.seeds]
        tab.select(self.choices, None, self.stages, **QUIET)
        self.stages.input(self.choose, [self.stages, self.metrics], self.metrics, **QUIET).then(
            self.draw, settings, self.shown, **QUIET
        )
        for one in (self.metrics, self.axis, self.seeds):
            one.input(self.draw, settings, self.shown, **QUIET)
        self.share.release(self.draw, settings, self.shown, **QUIET)
        sides = [self.a, self.b, self.metric, self.margin]
        self.judge.click(self.decide, sides, self.verdict, **QUIET)

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
