"""The Evaluate tab: its components, and the functions behind them, which work without a browser."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from llm.errors import UserError
from llm.panel import evaluations, jobs
from llm.panel.eval_view import ANY, PER_PAGE, choices, evaluated, parts, records_page, scores_page
from llm.panel.markup import page, problem
from llm.panel.records import RIGHT
from llm.panel.runs_tab import CHOSEN, QUIET, html, told
from llm.panel.state import Panel, file_stamps

SHOWN_FIRST = ("eval.max_per_task", "eval.num_samples", "eval.max_new_tokens", "eval.tokens")
PARTS_FIRST = ["bpb", "chat", "samples"]  # as conf/evaluate.yaml chooses


class EvaluateTab:
    """Scores of chosen stages, the start of an evaluation, and records of single items."""

    def __init__(self, panel: Panel):
        self.panel, may = panel, not panel.readonly
        self.stages = gr.Dropdown([], multiselect=True, label="Stages", elem_id="panel-evaluated")
        self.scores = html("panel-scores")
        with gr.Accordion("Evaluate the chosen stages", open=False, visible=may):
            self.chosen = gr.CheckboxGroup(list(evaluations.PARTS), value=PARTS_FIRST, label="Parts")
            self.names = sorted(evaluations.keys(), key=lambda name: name not in SHOWN_FIRST)
            self.boxes = self._boxes(self.names[: len(SHOWN_FIRST)])
            with gr.Accordion("Further keys", open=False):
                self.boxes += self._boxes(self.names[len(SHOWN_FIRST) :])
            self.wrong = html("panel-eval-wrong")
            self.line = gr.Textbox(label="Command for the first of them", interactive=False, buttons=["copy"], lines=2)
            self.start = gr.Button("Start", variant="primary", min_width=120)
        self.job, self.stamp, self.shown = gr.State(None), gr.State(()), html("panel-eval-job")
        gr.Markdown("### Records")
        with gr.Row():
            self.one = gr.Dropdown([], label="Of", scale=2, elem_id="panel-records-of", min_width=220)
            self.part = gr.Dropdown([], label="Task", scale=2, elem_id="panel-records-part", min_width=220)
            self.verdict = gr.Dropdown([ANY], value=ANY, label="Verdict", min_width=120)
            self.subject = gr.Dropdown([ANY], value=ANY, label="Subject", min_width=120)
            self.words = gr.Textbox(label="Search", placeholder="words of question or answer", scale=2, min_width=160)
        self.records, self.place = html("panel-records"), gr.State(0)
        with gr.Row():
            self.before = gr.Button("Records before", size="sm", min_width=120)
            self.next = gr.Button("Records after", size="sm", min_width=120)

    @staticmethod
    def _boxes(names: Sequence[str]) -> list[gr.Textbox]:
        boxes = []
        with gr.Row():
            for name in names:
                about, default = evaluations.about(name)
                boxes.append(gr.Textbox(label=name, info=about, placeholder=default, max_lines=2, min_width=260))
        return boxes

    def connect(self, tab: gr.Tab, timer: gr.Timer) -> None:
        """Connect the events."""
        tab.select(self.stage_choices, None, [self.stages, self.one], **QUIET)
        typed = [self.stages, self.chosen, *self.boxes]
        told = [self.wrong, self.line]
        self.stages.change(scores_of(self.panel), self.stages, self.scores, **CHOSEN)
        left = [event for box in self.boxes for event in (box.submit, box.blur)]
        left += [self.stages.input, self.chosen.input]
        gr.on(left, self.check, typed, told, trigger_mode="always_last", **CHOSEN)
        watched = [self.job, self.stamp, self.shown, self.scores]
        self.start.click(self.begin, typed, watched, **CHOSEN)
        timer.tick(self.watch, [self.job, self.stamp, self.stages], watched, **CHOSEN)
        found, filters = [self.records, self.place], [self.one, self.part, self.verdict, self.subject, self.words]
        listed = [self.verdict, self.subject]
        self.one.change(self.part_choices, [self.one, self.part], self.part, **CHOSEN)
        self.part.change(self.filter_choices, [self.one, self.part], listed, **CHOSEN).then(
            self.first, filters, found, **CHOSEN
        )
        for one in listed:
            one.input(self.first, filters, found, **CHOSEN)
        self.words.submit(self.first, filters, found, **CHOSEN)
        for button, step in ((self.before, -PER_PAGE), (self.next, PER_PAGE)):
            button.click(self._turner(step), [*filters, self.place], found, **CHOSEN)

    def stage_choices(self) -> list[Any]:
        """Return the stages that can be evaluated."""
        names = evaluated(self.panel)
        return [gr.update(choices=names), gr.update(choices=[name for name in names if parts(self.panel, name)])]

    def check(self, names: list[str], chosen: list[str], *typed: str) -> list[str]:
        """Return the first mistake in what was typed, and the command."""
        if not names:
            return ["", ""]
        try:
            words = evaluations.settings(self.panel, names[0], chosen or [], dict(zip(self.names, typed, strict=True)))
        except UserError as error:
            return [page(problem(str(error))), ""]
        return ["", evaluations.line(words)]

    def begin(self, names: list[str], chosen: list[str], *typed: str) -> list[Any]:
        """Start what was chosen, and watch the first of the jobs."""
        with told():
            values = dict(zip(self.names, typed, strict=True))
            numbers = evaluations.start(self.panel, names or [], chosen or [], values)
        gr.Info(f"job {', '.join(map(str, numbers))} is in the queue", duration=6)
        return self.watch(numbers[0], (), names)

    def watch(self, number: int | None, stamp: tuple, names: list[str]) -> list[Any]:
        """Return job, stamp, page of the job, and scores, where something has changed since `stamp`."""
        scored = file_stamps(self.panel.runs / name / "eval.json" for name in names or [])
        now = (jobs.stamp(self.panel, number) if number is not None else (), scored)
        if now == stamp:
            return [gr.skip()] * 4
        page_of_job = "" if number is None else jobs.job_page(self.panel, number)
        return [number, now, page_of_job, scores_page(self.panel, names or [])]

    def part_choices(self, name: str | None, part: str | None) -> Any:
        """Return the tasks that a stage has records of; the chosen one stays where there is one."""
        there = parts(self.panel, name)
        return gr.update(choices=there, value=part if part in there else next(iter(there), None))

    def filter_choices(self, name: str | None, part: str | None) -> list[Any]:
        """Return verdicts and subjects of the records."""
        return [gr.update(choices=names, value=ANY) for names in choices(self.panel, name, part)]

    def first(self, name: str | None, part: str | None, verdict: str, subject: str, words: str) -> tuple[str, int]:
        """Return the first records that fit."""
        return self.turn(name, part, verdict, subject, words, 0)

    def turn(
        self, name: str | None, part: str | None, verdict: str, subject: str, words: str, place: int
    ) -> tuple[str, int]:
        """Return the records that fit from a place on, and the place."""
        verdict = verdict if verdict in RIGHT.values() else ANY
        return records_page(self.panel, name, part, verdict, subject or ANY, words or "", int(place or 0))

    def _turner(self, step: int) -> Any:
        def turn(name, part, verdict, subject, words, place) -> tuple[str, int]:
            return self.turn(name, part, verdict, subject, words, place + step)

        return turn


def scores_of(panel: Panel) -> Any:
    """Return the function that shows the scores of chosen stages."""
    return lambda names: scores_page(panel, names or [])
