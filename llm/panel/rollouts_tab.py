"""The Rollouts tab: its components, and the functions behind them, which work without a browser."""

from typing import Any

import gradio as gr

from llm.panel.markup import page
from llm.panel.rollouts_view import ALL, LAST, MIXED, PER_PAGE, SAME, rollouts_page, stamp_of, steps_of, with_rollouts
from llm.panel.runs_tab import CHOSEN, html
from llm.panel.state import Panel


class RolloutsTab:
    """Answers of a step of reinforcement learning."""

    def __init__(self, panel: Panel):
        self.panel = panel
        with gr.Row():
            self.stage = gr.Dropdown([], label="Stage", scale=2, elem_id="panel-rollouts-of", min_width=200)
            self.step = gr.Dropdown([LAST], value=LAST, label="Step", min_width=100)
            self.kind = gr.Dropdown([ALL, MIXED, SAME], value=ALL, label="Questions", min_width=160)
        hint = "Answers that grpo, ppo, best_of_n and distill draw stand here, once such a stage has trained."
        self.shown, self.place = html("panel-rollouts", page(f"<p>{hint}</p>")), gr.State(0)
        self.stamp = gr.State(())
        with gr.Row():
            self.before = gr.Button("Questions before", size="sm", min_width=120)
            self.next = gr.Button("Questions after", size="sm", min_width=120)

    def connect(self, tab: gr.Tab, timer: gr.Timer) -> None:
        """Connect the events."""
        filters, found = [self.stage, self.step, self.kind], [self.shown, self.place]
        ask, told = [*filters, self.place, self.stamp], [*found, self.step, self.stamp]
        tab.select(self.choices, self.stage, self.stage, **CHOSEN).then(self.watch, ask, told, **CHOSEN)
        self.stage.input(self.watch, ask, told, **CHOSEN)
        timer.tick(self.watch, ask, told, **CHOSEN)
        for one in (self.step, self.kind):
            one.input(self.first, filters, found, **CHOSEN)
        for button, step in ((self.before, -PER_PAGE), (self.next, PER_PAGE)):
            button.click(self._turner(step), [*filters, self.place], found, **CHOSEN)

    def choices(self, name: str | None) -> Any:
        """Return the stages that have rollouts; the first is taken where none was."""
        names = with_rollouts(self.panel)
        return gr.update(choices=names, value=name if name in names else next(iter(names), None))

    def watch(self, name: str | None, step: str, kind: str, place: int, stamp: tuple) -> list[Any]:
        """Return questions, place, steps and stamp, where another stage was chosen or its file has changed."""
        now = stamp_of(self.panel, name)
        if not name or now == tuple(stamp):
            return [gr.skip()] * 4
        steps = [LAST, *steps_of(self.panel, name)]
        step = step if step in steps else LAST
        shown, place = rollouts_page(self.panel, name, step, kind, place if now[0] == (*stamp, "")[0] else 0)
        return [shown, place, gr.update(choices=steps, value=step), now]

    def first(self, name: str | None, step: str, kind: str) -> tuple[str, int]:
        """Return the first questions that fit."""
        return rollouts_page(self.panel, name, step or LAST, kind, 0)

    def _turner(self, by: int) -> Any:
        def turn(name: str | None, step: str, kind: str, place: int) -> tuple[str, int]:
            return rollouts_page(self.panel, name, step or LAST, kind, place + by)

        return turn
