"""The Train tab: the form, the queue, the job that is watched. The functions behind it work without a browser."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from llm.errors import UserError
from llm.panel import jobs
from llm.panel.form import GROUPS, Entry, Form, entries, options_of, problems_of, sections
from llm.panel.markup import block, page, problem, text
from llm.panel.runs_tab import CHOSEN, QUIET, html, told
from llm.panel.state import Panel

ROWS = 12  # keys that are shown at once
DEFAULT = "default"
IN_TURN = {**QUIET, "concurrency_limit": 1, "concurrency_id": "form"}  # a click that leaves a box finds what it held


class TrainTab:
    """Form, command, start, queue."""

    def __init__(self, panel: Panel):
        self.panel, may = panel, not panel.readonly
        with gr.Column(visible=may):
            with gr.Row():
                self.groups = [
                    gr.Dropdown(
                        [DEFAULT, *options_of(group)],
                        value="pretrain" if group == "stage" else DEFAULT,
                        label="experiment (preset)" if group == "experiment" else group,
                        min_width=150,
                    )
                    for group in GROUPS
                ]
            with gr.Accordion("Presets: this form under a name", open=False):
                with gr.Row():
                    self.preset = gr.Dropdown(
                        [], value="", label="Preset", allow_custom_value=True, elem_id="panel-preset", scale=2
                    )
                    self.keep = gr.Button("Save the form", size="sm", min_width=120)
                    self.bring = gr.Button("Load", size="sm", min_width=90)
                    self.drop = gr.Button("Delete", size="sm", min_width=90)
            self.form = gr.State(Form({"stage": "pretrain"}))
            self.shown_keys, self.place = gr.State([]), gr.State(0)
            with gr.Row():
                self.search = gr.Textbox(
                    label="Search keys", placeholder="words of the key or its help", scale=3, min_width=260
                )
                self.section = gr.Dropdown(["main", "all"], value="main", label="Section", min_width=160)
            with gr.Row():
                self.changed = gr.Checkbox(False, label="Only changed keys")
                self.sweep = gr.Checkbox(False, label="Several values, as 1,2,3, make several jobs")
            self.boxes, self.wrong = [], []
            with gr.Row():
                for number in range(ROWS):
                    with gr.Column(min_width=280):
                        self.boxes.append(gr.Textbox(visible=False, elem_id=f"panel-key-{number}", max_lines=4))
                        self.wrong.append(html(f"panel-wrong-{number}"))
            with gr.Row():
                self.before = gr.Button("Keys before", size="sm", min_width=120)
                self.count = gr.Markdown()
                self.next = gr.Button("Keys after", size="sm", min_width=120)
            self.other = html("panel-wrong")
            self.line = gr.Textbox(
                label="Command", interactive=False, buttons=["copy"], elem_id="panel-command", lines=2
            )
            with gr.Row():
                self.after = gr.Textbox(label="After jobs", placeholder="3, 4", min_width=120)
                self.attempts = gr.Number(1, label="Attempts", precision=0, minimum=1, maximum=20, min_width=120)
                self.try_it = gr.Button("Dry run: time, memory, tokens", min_width=180)
                self.start = gr.Button("Start", variant="primary", min_width=120)
            self.dry = html("panel-dry")
        gr.Markdown("### Queue")
        self.queue, self.stamp = html("panel-queue"), gr.State(())
        with gr.Row():
            self.job = gr.Dropdown([], label="Job", scale=3, elem_id="panel-job")
        with gr.Row(visible=may):
            self.acts = {name: gr.Button(name.capitalize(), size="sm", min_width=90) for name in jobs.ACTIONS}
            self.up = gr.Button("Earlier", size="sm", min_width=90)
            self.work = gr.Button("Work on the queue", size="sm", min_width=140)
        self.machine = html("panel-machine")
        self.shown = html("panel-job-page")

    @property
    def whole(self) -> list[Any]:
        """Components that `opened` fills."""
        return [self.form, *self.groups, self.sweep]

    def connect(self, tab: gr.Tab, timer: gr.Timer) -> None:
        """Connect the events. Nothing is filled before the tab is opened: the first view of the page waits for less."""
        keys = [*self.boxes, *self.wrong]
        filled = [self.form, self.shown_keys, self.place, self.section, self.count, self.other, self.line, *keys]
        filters = [self.form, self.search, self.section, self.changed, self.place]
        watched = [self.queue, self.shown, self.stamp, self.job]
        self.refill = {"fn": self.fill, "inputs": filters, "outputs": filled, **IN_TURN}
        tab.select(self.fill, filters, filled, **IN_TURN)
        tab.select(self.watch, [self.job, gr.State(())], watched, **CHOSEN)
        gr.on(
            [group.input for group in self.groups], self.choose, [self.form, *self.groups], self.form, **IN_TURN
        ).then(self.fill, filters, filled, **IN_TURN)
        for one in (self.section, self.changed):
            one.input(self.first, filters, filled, **IN_TURN)
        self.search.change(self.first, filters, filled, trigger_mode="always_last", **IN_TURN)
        self.sweep.input(self.several, [self.form, self.sweep], self.form, **IN_TURN).then(
            self.fill, filters, filled, **IN_TURN
        )
        left = [event for box in self.boxes for event in (box.submit, box.blur)]
        typed = [self.form, self.shown_keys, *self.boxes]
        gr.on(left, self.put, typed, self.form, trigger_mode="always_last", **IN_TURN).success(
            self.fill, [*filters, self.shown_keys], filled, **IN_TURN
        )
        for button, step in ((self.before, -ROWS), (self.next, ROWS)):
            button.click(self._turner(step), filters, filled, **IN_TURN)
        self.try_it.click(lambda: page("<p>A dry run is under way…</p>"), None, self.dry, **IN_TURN).then(
            self.dry_run, self.form, self.dry, **QUIET
        )
        self.start.click(self.begin, [self.form, self.after, self.attempts], watched, **IN_TURN)
        for name, button in self.acts.items():
            button.click(self._acting(name), self.job, watched, **CHOSEN)
        self.up.click(self._acting("up"), self.job, watched, **CHOSEN)
        self.work.click(self.go_on, self.job, watched, **CHOSEN)
        tab.select(self.preset_names, None, self.preset, **QUIET)
        self.keep.click(self.save_preset, [self.preset, self.form], self.preset, **IN_TURN)
        self.drop.click(self.delete_preset, self.preset, self.preset, **QUIET)
        self.bring.click(self.load_preset, self.preset, self.whole, **IN_TURN).success(**self.refill)
        self.job.input(self.watch, [self.job, gr.State(())], watched, **CHOSEN)
        timer.tick(self.watch_all, [self.job, self.stamp], [*watched, self.machine], **CHOSEN)

    # The form

    def choose(self, form: Form, *options: str) -> Form:
        """Return the form with other options of the groups; values of keys stay."""
        chosen = {group: option for group, option in zip(GROUPS, options, strict=True) if option not in (None, DEFAULT)}
        return Form(chosen, dict(form.values), form.sweep)

    def preset_names(self) -> Any:
        """Return the names of the presets."""
        return gr.update(choices=self.panel.presets.names())

    def save_preset(self, name: str | None, form: Form) -> Any:
        """Keep the form under a name."""
        with told():
            self.panel.check_may_change()
            self.panel.presets.save(name or "", form)
        gr.Info("saved", duration=3)
        return self.preset_names()

    def delete_preset(self, name: str | None) -> Any:
        """Delete a preset."""
        with told():
            self.panel.check_may_change()
            self.panel.presets.delete(name or "")
        return gr.update(choices=self.panel.presets.names(), value="")

    def load_preset(self, name: str | None) -> list[Any]:
        """Return the form of a preset, with the options of its groups; one that is gone stays in the form's line."""
        with told():
            form = self.panel.presets.load(name or "")
        return self.opened(form)

    @staticmethod
    def opened(form: Form) -> list[Any]:
        """Return what shows a form that comes from elsewhere, for the components of `whole`; `refill` is to follow."""
        return [form, *(form.groups.get(group) or DEFAULT for group in GROUPS), form.sweep]

    def look(self) -> str:
        """Return the line on the machine."""
        line = self.panel.machine.line()
        return page(f'<p class="hint">{text(line)}</p>') if line else ""

    def several(self, form: Form, sweep: bool) -> Form:
        """Return the form with or without several values."""
        return Form(form.groups, form.values, bool(sweep))

    def put(self, form: Form, keys: list[str], *given: str) -> Form:
        """Return the form with the texts in the boxes of some keys; an empty one takes its key out."""
        typed = zip(keys, given, strict=False)  # there are more boxes where fewer keys are shown
        values = form.values | {key: (box or "").strip() for key, box in typed}
        changed = Form(form.groups, {key: value for key, value in values.items() if value}, form.sweep)
        return gr.skip() if changed == form else changed

    def first(self, form: Form, search: str, section: str, changed: bool, place: int) -> list[Any]:
        """Return the first keys that fit."""
        return self.fill(form, search, section, changed, 0)

    def _turner(self, step: int) -> Any:
        def turn(form: Form, search: str, section: str, changed: bool, place: int) -> list[Any]:
            return self.fill(form, search, section, changed, place + step)

        return turn

    def fill(
        self, form: Form, search: str, section: str, changed: bool, place: int, typed: Sequence[str] = ()
    ) -> list[Any]:
        """Return form, keys in the boxes, place of the first, sections, count, problem, command, boxes, mistakes.

        Where the boxes show the keys `typed` already, what is in them stays: somebody may be writing in the next one.
        """
        by_key, other = problems_of(form, self.panel.folders)
        found: list[Entry] = []
        names = ["main", "all"]
        try:
            found, names = entries(form, search or "", section or "main", bool(changed), by_key), sections(form)
        except UserError as error:
            other = other or str(error)
        place = max(0, min(place, (len(found) - 1) // ROWS * ROWS))
        shown = found[place : place + ROWS]
        count = f"keys {place + 1} to {place + len(shown)} of {len(found)}" if shown else "no key fits"
        section = section if section in names else "main"
        keys = [entry.key for entry in shown]
        boxes = [self._box(entry, keys == list(typed)) for entry in shown]
        boxes += [gr.update(visible=False)] * (ROWS - len(shown))
        wrong = [page(problem(entry.problem)) if entry.problem else "" for entry in shown]
        wrong += [""] * (ROWS - len(shown))
        told = page(problem(other)) if other else ""
        return [
            form,
            keys,
            place,
            gr.update(choices=names, value=section),
            count,
            told,
            form.line(self.panel.places),
            *boxes,
            *wrong,
        ]

    def _box(self, entry: Entry, stays: bool) -> Any:
        words = f"; {', '.join(entry.choices)}" if entry.choices else ""
        changed = f" (default {entry.default})" if entry.given is not None else ""
        return gr.update(
            visible=True,
            label=entry.key + changed,
            info=entry.help + words,
            placeholder=entry.default,
            **({} if stays else {"value": entry.given or ""}),
        )

    # Start and watch

    def dry_run(self, form: Form) -> str:
        """Return what a dry run says, or the mistake."""
        try:
            return page(block(jobs.dry_run(self.panel, form), "log"))
        except UserError as error:
            return page(problem(str(error)))

    def begin(self, form: Form, after: str, attempts: float) -> list[Any]:
        """Start what the form says, and watch it."""
        with told():
            numbers = jobs.start(self.panel, form, after or "", int(attempts or 1))
        gr.Info(f"job {', '.join(map(str, numbers))} is in the queue", duration=6)
        return self.watch(numbers[0], ())

    def _acting(self, action: str) -> Any:
        def act(number: int | None) -> list[Any]:
            with told():
                if number is None:
                    raise UserError("choose a job first")
                done = jobs.move_up(self.panel, number) if action == "up" else jobs.act(self.panel, action, number)
            gr.Info(done, duration=6)
            return self.watch(number, ())

        return act

    def go_on(self, number: int | None) -> list[Any]:
        """Start a worker where none is at the queue."""
        with told():
            self.panel.check_may_change()
            jobs.see_to_worker(self.panel)
        return self.watch(number, ())

    def watch_all(self, number: int | None, stamp: tuple) -> list[Any]:
        """Return what `watch` does, and the line on the machine: one event costs half of two."""
        return [*self.watch(number, stamp), self.look()]

    def watch(self, number: int | None, stamp: tuple) -> list[Any]:
        """Return queue, page of the watched job, stamp and list of jobs, where something has changed since `stamp`."""
        now = jobs.stamp(self.panel, number)
        if now == tuple(stamp):
            return [gr.skip()] * 4
        try:
            listed = self.panel.queue.jobs()[-jobs.MOST_JOBS :] if self.panel.queue_file.is_file() else []
        except UserError as error:
            return [page(problem(str(error))), "", now, gr.skip()]
        choices = [(jobs.job_label(job), job.id) for job in reversed(listed)]
        if number is None:
            number = next((job.id for job in listed if job.state == "running"), None)
        shown = jobs.job_page(self.panel, number) if number is not None else ""
        return [jobs.queue_page(self.panel), shown, now, gr.update(choices=choices, value=number)]
