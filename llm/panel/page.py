"""The page of the panel (Gradio): its tabs, and the timers that keep what the open one shows up to date.

Charts and tables are HTML that the server writes (`llm.panel.markup`): gr.HTML and gr.Plot need `eval` or code from
outside, which the guard's Content-Security-Policy forbids.
"""

from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from llm.panel.compare_tab import CompareTab
from llm.panel.data_tab import DataTab
from llm.panel.evaluate_tab import EvaluateTab
from llm.panel.inside_tab import InsideTab
from llm.panel.models import PanelModels
from llm.panel.preferences_tab import PreferencesTab
from llm.panel.rollouts_tab import RolloutsTab
from llm.panel.runs_tab import QUIET, RunsTab
from llm.panel.state import Panel
from llm.panel.train_tab import TrainTab
from llm.serving.browser import queued
from llm.serving.guard import MAX_UPLOAD

HERE = Path(__file__).parent
PATH = "/panel"
API = ("api_info", "api_info_as_input", "api_info_as_output", "example_inputs")  # only Gradio's page of its API has it
SECONDS = 1.9  # between two looks at what is running
SLOW_SECONDS = 15.0  # between two looks at the table of all stages
ONE_BY_ONE = {**QUIET, "concurrency_limit": 1, "concurrency_id": "tabs"}  # who goes through tabs fast ends in the last
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
COLOURS = {  # each at least 4.5 times as bright or dark as its ground (WCAG 2.2, 1.4.3)
    **{"block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300"},
    **{"input_placeholder_color": "*neutral_500", "input_placeholder_color_dark": "*neutral_400"},
    **{"body_text_color_subdued": "*neutral_500"},
    **{"color_accent": "*primary_700", "button_primary_background_fill": "*primary_600"},
}
PAGE = {
    "theme": gr.themes.Default(primary_hue="blue", neutral_hue="slate", **FONTS).set(**COLOURS),
    "css": (HERE / "page.css").read_text(encoding="utf-8"),
    "head": f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
    "footer_links": [],
    "run_history": False,
    "ssr_mode": False,
}


def mount(app: FastAPI, panel: Panel) -> None:
    """Put the panel at `/panel` of an application."""
    page, runs = build(panel)
    gr.mount_gradio_app(app, page, path=PATH, max_file_size=MAX_UPLOAD, **PAGE)
    for component in page.config["components"]:
        for name in API:
            component.pop(name, None)
    app.add_middleware(FilledPage, page=page, runs=runs)


class FilledPage:
    """ASGI middleware that fills the table of runs in the page that is sent, so that it waits for no event.

    Gradio sends the configuration that it made when it was mounted; the table of now is written into that.
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks, runs: RunsTab):
        self.app, self.page, self.runs = app, page, runs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["path"].rstrip("/") == PATH:
            await run_in_threadpool(self.fill)
        await self.app(scope, receive, send)

    def fill(self) -> None:
        """Write the table of now into the page."""
        [table] = [one for one in self.page.config["components"] if one["id"] == self.runs.table._id]
        table["props"].update(self.runs.first_view())


def build(panel: Panel) -> tuple[gr.Blocks, RunsTab]:
    """Build the page. Returns it and its first tab."""
    models = PanelModels(panel)
    with gr.Blocks(title="Fathom: panel", analytics_enabled=False) as demo:
        chat = " · [Chat with the model that is served](/)" if panel.chat else ""
        gr.Markdown(f"## Fathom\n\nRuns in `{panel.runs}`{', only to be looked at' if panel.readonly else ''}{chat}")
        with gr.Tabs():
            with gr.Tab("Runs") as listed:
                runs = RunsTab(panel)
            with gr.Tab("Compare") as compared:
                compare = CompareTab(panel, models)
            with gr.Tab("Train") as trained:
                train = TrainTab(panel)
            with gr.Tab("Data") as shown:
                data = DataTab(panel)
            with gr.Tab("Evaluate") as evaluated:
                evaluate = EvaluateTab(panel)
            with gr.Tab("Rollouts") as rolled:
                rollouts = RolloutsTab(panel)
            with gr.Tab("Preferences") as labelled:
                preferences = PreferencesTab(models)
            with gr.Tab("Inside") as opened:
                inside = InsideTab(models)
        watching = [listed, trained, shown, evaluated, rolled]
        timers = [gr.Timer(SECONDS, active=tab is listed) for tab in watching]
        slow = gr.Timer(SLOW_SECONDS)
        timer = dict(zip(watching, timers, strict=True))
        for tab in (*watching, compared, labelled, opened):
            tab.select(_only_timers_of(tab, [*watching, listed]), None, [*timers, slow], **ONE_BY_ONE)
        runs.connect(listed, timer[listed], slow)
        compare.connect(compared)
        train.connect(trained, timer[trained])
        data.connect(shown, timer[shown], train)
        evaluate.connect(evaluated, timer[evaluated])
        rollouts.connect(rolled, timer[rolled])
        preferences.connect(labelled)
        inside.connect(opened)
    return queued(demo, 64), runs


def _only_timers_of(tab: gr.Tab, watching: list[gr.Tab]) -> Any:
    """Return the function that lets the timers of a tab run, of those that watch, and no other."""
    return lambda: [gr.Timer(active=one is tab) for one in watching]
