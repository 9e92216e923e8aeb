"""The Runs tab: its components, and the functions behind them, which work without a browser."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from llm.errors import UserError
from llm.panel import exports, jobs, shelf
from llm.panel.markup import page, problem
from llm.panel.notes import Note
from llm.panel.runs_view import HEADER, NUMERIC, live_page, name_of, rest_page, run_table, states_of
from llm.panel.state import Panel, file_stamps
from llm.run.stage_folder import RunDir

STATES = ("all", "running", "interrupted", "finished")
NONE = "none"
WATCHED = ("run.json", "metrics.csv", "eval.json", "samples.jsonl")  # files of an open stage
MOST_REPORT = 400_000  # letters
PICTURE = re.compile(r"!\[[^\]]*\]\([^)]*\)\n*")  # of a report: the page draws these curves itself
QUIET = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
# For lists whose names come and go. Gradio refuses what is chosen and not in its list any more, after a run was deleted
# or the server began anew, at every tick of a timer; the functions of the tabs say in their place what there is not.
CHOSEN = {**QUIET, "preprocess": False}


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Show a mistake of the user as a message of the page; what would have followed does not happen."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), duration=12, print_exception=False, title="Not done") from None


def html(elem_id: str, value: str = "") -> gr.Markdown:
    """Return a component for HTML that the panel has written and escaped itself."""
    return gr.Markdown(value, elem_id=elem_id, sanitize_html=False, latex_delimiters=[], container=False)


class RunsTab:
    """Table of stages, and the page of the one that is open."""

    def __init__(self, panel: Panel):
        self.panel, may = panel, not panel.readonly
        with gr.Row():
            self.query = gr.Textbox(
                label="Search",
                placeholder="words, or a condition: bpb<1.5",
                scale=4,
                min_width=260,
            )
            self.state = gr.Dropdown(list(STATES), value="all", label="State", filterable=False, min_width=120)
            self.refresh = gr.Button("Refresh", min_width=100, size="sm")
        self.table = gr.Dataframe(
            headers=list(HEADER),
            interactive=False,
            label="Stages; a click opens one, a click on a title sorts",
            max_height=360,
            elem_id="panel-table",
            buttons=[],
        )
        self.said, self.states = html("panel-runs-problems"), gr.State(None)
        with gr.Row():
            self.open = gr.Dropdown([], label="Open", scale=2, elem_id="panel-open", min_width=260)
            self.other = gr.Dropdown([NONE], value=NONE, label="Configuration compared with", scale=2, min_width=260)
        self.shown, self.rest, self.stamp = html("panel-run"), html("panel-rest"), gr.State(())
        with gr.Accordion("Report", open=False):
            self.load = gr.Button("Show the report of this run", size="sm")
            self.report = gr.Markdown(elem_id="panel-report", latex_delimiters=[])
        with gr.Accordion("Export", open=False, visible=may):
            with gr.Row():
                self.to = gr.Dropdown(
                    [("a folder for transformers", "hf"), ("a file for llama.cpp (arch=qwen3)", "gguf")],
                    value=exports.TO[0],
                    label="As",
                    elem_id="panel-export-to",
                    min_width=220,
                )
                self.replace = gr.Checkbox(False, label="Replace what an earlier export wrote", min_width=220)
            self.export = gr.Button("Start the export", size="sm")
            self.exported, self.exported_stamp = html("panel-exported"), gr.State(())
            self.export_job = gr.State(None)
        with gr.Accordion("Tags and notes", open=False, visible=may):
            self.tags = gr.Textbox(label="Tags", placeholder="separated by blanks")
            self.note = gr.Textbox(label="Note", lines=3, max_lines=12)
            self.save = gr.Button("Save", size="sm")
        with gr.Accordion("Stop, put away, delete", open=False, visible=may):
            self.stop = gr.Button("Stop: save and end, as Ctrl-C does", size="sm")
            self.confirm = gr.Textbox(label="Name of the run, to confirm")
            with gr.Row():
                self.archive = gr.Button("Put away", size="sm", min_width=120)
                self.delete = gr.Button("Delete for good", size="sm", variant="stop", min_width=120)
            self.away = gr.Dropdown([], label="Put away before")
            self.back = gr.Button("Bring back", size="sm")

    def connect(self, tab: gr.Tab, timer: gr.Timer, slow: gr.Timer) -> None:
        """Connect the events. The table is looked at by the slow timer: a look at 500 runs costs milliseconds."""
        listed = [self.table, self.said, self.open, self.other, self.away, self.states]
        query, opened = [self.query, self.state], [self.open, self.other]
        whole = [self.shown, self.rest, self.stamp, self.tags, self.note, self.report]
        for event in (tab.select, slow.tick):  # the page selects its first tab
            event(self.watch_table, [*query, self.states], listed, **QUIET)
        self.refresh.click(self.fill, query, listed, **QUIET)
        self.query.submit(self.fill, query, listed, **QUIET)
        self.state.input(self.fill, query, listed, **QUIET)
        self.table.select(self.pick, None, self.open, **QUIET)
        self.open.change(self.show, opened, whole, **CHOSEN)
        self.other.input(self.show, opened, whole, **CHOSEN)
        self.load.click(self.read_report, self.open, self.report, **CHOSEN)
        self.save.click(self.write_note, [self.open, self.tags, self.note], None, **CHOSEN).then(
            self.fill, query, listed, **QUIET
        )
        job = [self.export_job, self.exported_stamp]
        self.export.click(self.start_export, [self.open, self.to, self.replace], [self.exported, *job], **CHOSEN)
        exported = [self.exported, self.exported_stamp]
        timer.tick(self.watch_both, [self.open, self.stamp, *job], [self.shown, self.stamp, *exported], **CHOSEN)
        self.stop.click(self.stop_training, self.open, None, **CHOSEN)
        for button, act in ((self.archive, shelf.archive), (self.delete, shelf.delete)):
            button.click(self._moving(act), [self.open, self.confirm], self.confirm, **CHOSEN).then(
                self.fill, query, listed, **QUIET
            )
        self.back.click(self.bring_back, self.away, None, **CHOSEN).then(self.fill, query, listed, **QUIET)

    def fill(self, query: str, state: str) -> list[Any]:
        """Return the table, what could not be read, the choices of the lists, and the states of all stages."""
        rows, (notes, wrong) = self.panel.index.rows(), self._notes()
        problems = [problem(line) for line in [*self.panel.index.problems, *wrong]]
        try:
            header, lines = run_table(rows, notes, query or "", state)
        except UserError as error:
            header, lines = run_table(rows, notes)
            problems.append(problem(str(error)))
        kinds = ["number" if name in NUMERIC or name not in HEADER else "str" for name in header]
        names = [name_of(row) for row in rows]
        said = page(*problems) if problems else ""
        table = {"headers": header, "data": lines}
        away = gr.update(choices=shelf.archived(self.panel))
        return [
            gr.update(value=table, datatype=kinds),
            said,
            gr.update(choices=names),
            gr.update(choices=[NONE, *names]),
            away,
            states_of(rows),
        ]

    def _notes(self) -> tuple[dict[str, Note], list[str]]:
        """Return the notes, {} where their file cannot be read, and a line that says why it cannot."""
        try:
            return self.panel.notes.all(), []
        except UserError as error:
            return {}, [str(error)]

    def first_view(self) -> dict[str, Any]:
        """Return the properties of the table, filled, as the page has them in its own text."""
        filled = self.fill("", "all")[0]
        return {"value": self.table.postprocess(filled["value"]).model_dump(), "datatype": filled["datatype"]}

    def watch_table(self, query: str, state: str, states: tuple | None) -> list[Any]:
        """Return what `fill` does, where a stage has come, gone, begun or ended since `states` (None: never filled)."""
        known = states is not None and states_of(self.panel.index.rows()) == states
        return [gr.skip()] * 6 if known else self.fill(query, state)

    def pick(self, event: gr.SelectData) -> str:
        """Return the stage in the line that was chosen."""
        return event.row_value[0]

    def show(self, name: str | None, other: str | None) -> list[Any]:
        """Return the two parts of the page of a stage, its stamp, its tags and note, and an empty report."""
        if not name:
            return ["", "", (), "", "", ""]
        note, stamp = self._notes()[0].get(name, ("", "")), self._stamp(name)
        rest = rest_page(self.panel, name, None if other in (None, NONE) else other)
        return [live_page(self.panel, name), rest, stamp, *note, ""]

    def watch(self, name: str | None, stamp: tuple) -> list[Any]:
        """Return what changes on the page of the open stage, where its files have changed since `stamp`."""
        if not name or (now := self._stamp(name)) == tuple(stamp):
            return [gr.skip(), gr.skip()]
        return [live_page(self.panel, name), now]

    def watch_both(self, name: str | None, stamp: tuple, number: int | None, exported: tuple) -> list[Any]:
        """Return what `watch` and `watch_export` do: one event costs half of two."""
        return [*self.watch(name, stamp), *self.watch_export(number, exported)]

    def _stamp(self, name: str) -> tuple:
        return file_stamps(self.panel.runs / name / file for file in WATCHED)

    def read_report(self, name: str | None) -> str:
        """Return report.md of the run without its pictures, whose curves stand above."""
        if not name:
            return "Open a stage first."
        with told():
            path = Path(RunDir(self.panel.runs, name.partition("/")[0]).path) / "report.md"
        try:
            content = path.read_text(encoding="utf-8", errors="replace")[:MOST_REPORT]
        except OSError:
            return "This run has no report yet: it is written at the end of a stage."
        return PICTURE.sub("", content)

    def write_note(self, name: str | None, tags: str, note: str) -> None:
        """Keep tags and note of the open stage."""
        with told():
            self.panel.check_may_change()
            if not name:
                raise UserError("open a stage first")
            self.panel.index.row(name)  # refuses a name that is none
            self.panel.notes.write(name, tags or "", note or "")
        gr.Info("saved", duration=3)

    def start_export(self, name: str | None, to: str, replace: bool) -> list[Any]:
        """Put the export of the open stage into the queue. Returns what is shown of the job, its number, its stamp."""
        with told():
            if not name:
                raise UserError("open a stage first")
            number = exports.start(self.panel, name, to, bool(replace))
        return [jobs.job_page(self.panel, number), number, jobs.stamp(self.panel, number)]

    def watch_export(self, number: int | None, stamp: tuple) -> list[Any]:
        """Return state and log of the export that was started here, where something has changed since `stamp`."""
        if number is None or (now := jobs.stamp(self.panel, number)) == tuple(stamp):
            return [gr.skip(), gr.skip()]
        return [jobs.job_page(self.panel, number), now]

    def stop_training(self, name: str | None) -> None:
        """Ask the training of the open stage to save and end."""
        with told():
            if not name:
                raise UserError("open a stage first")
            gr.Info(jobs.stop_process(self.panel, name), duration=8)

    def _moving(self, act: Any) -> Any:
        def move(name: str | None, confirmed: str) -> str:
            with told():
                gr.Info(act(self.panel, (name or "").partition("/")[0], confirmed or ""), duration=8)
            return ""

        return move

    def bring_back(self, run: str | None) -> None:
        """Bring a run back that was put away."""
        with told():
            gr.Info(shelf.bring_back(self.panel, run or ""), duration=8)
