"""The first run with text of one's own, a part of the Data tab; the functions work without a browser."""

from typing import Any

import gradio as gr

from llm.errors import UserError
from llm.panel import first_run, own_files
from llm.panel.first_run import DEPTHS, KEYS, VOCABULARIES, Plan
from llm.panel.markup import block, page, problem
from llm.panel.own_files import CHAT, TEXT
from llm.panel.runs_tab import CHOSEN, QUIET, html, told
from llm.panel.state import Panel
from llm.panel.train_tab import DEFAULT, IN_TURN, TrainTab
from llm.utils.format import in_bytes

UNDER_WAY = page("<p>This is under way…</p>")


class OwnTab:
    """Four steps: check, tokenizer, size and time, start."""

    def __init__(self, panel: Panel):
        self.panel, self.wrong = panel, {}
        gr.Markdown(
            "### 1. Your data\n\n"
            "Send files (.txt, .md, .jsonl, .csv, .parquet, ...), or name a folder or file below "
            f"`{panel.folders[-1]}` or `{panel.runs}`. Text teaches the language, chats (rows with `messages`) how to "
            f"answer; text alone is enough. At most {in_bytes(own_files.MOST_BYTES)} are sent."
        )
        with gr.Row():
            self.name = self._box("name", "Name of the run", "letters, digits, dots, - and _", "")
            self.before = gr.Dropdown(
                [],
                label="Or one from before",
                info="with its files and jobs",
                elem_id="panel-own-before",
                min_width=200,
            )
        with gr.Row():
            self.files = {
                kind: gr.UploadButton(
                    f"Send files of {label}", file_count="multiple", elem_id=f"panel-own-{kind}-files", min_width=200
                )
                for kind, label in ((TEXT, "text"), (CHAT, "chats"))
            }
        with gr.Row():
            self.texts = self._box("texts", "Text", "folder or file", "")
            self.chats = self._box("chats", "Chats, if any", "folder or file", "")
        self.check = gr.Button("Check the data", size="sm")
        self.checked = html("panel-own-checked")
        gr.Markdown("### 2. Tokenizer\n\nIt cuts your text into tokens. A small text takes a small vocabulary.")
        with gr.Row():
            self.vocabulary = self._field(
                "vocabulary",
                lambda: gr.Dropdown(
                    [*VOCABULARIES],
                    value="8192",
                    label="Vocabulary",
                    info="tokens: stage.vocab_size; the check proposes one",
                    allow_custom_value=True,
                    elem_id="panel-own-vocabulary",
                ),
            )
        self.train_tokenizer = gr.Button("Train the tokenizer", size="sm")
        self.about_tokenizer = html("panel-own-tokenizer")
        gr.Markdown("### 3. Size and time")
        with gr.Row():
            self.model = gr.Dropdown(
                [DEFAULT, *DEPTHS], value=DEFAULT, label="Model", info="depth; default d6", elem_id="panel-own-model"
            )
            self.context = self._box("context", "Context", "tokens at once", "512")
            self.steps = self._box("steps", "Steps", "fewer end sooner", "by text and size")
            self.tokens = self._box("tokens", "Tokens per step", "", "16384")
            self.seed = self._box("seed", "Seed", "", "42")
        self.ask = gr.Button("How long will this take?", size="sm")
        self.time = html("panel-own-time")
        gr.Markdown("### 4. Start\n\nThe training goes on when the browser or the server ends.")
        self.other = html("panel-own-wrong")
        with gr.Row():
            self.start = gr.Button("Start the training", variant="primary", min_width=160)
            self.take = gr.Button("Take this into the form of Train", min_width=160)
        self.shown, self.stamp = html("panel-own-jobs"), gr.State(())
        self.fields = [self.name, self.texts, self.chats, self.vocabulary, self.model, self.context]
        self.fields += [self.steps, self.tokens, self.seed]

    def _field(self, field: str, make: Any) -> Any:
        """Return a component that has room for its mistake below."""
        with gr.Column(min_width=200):
            component = make()
            self.wrong[field] = html(f"panel-own-wrong-{field}")
        return component

    def _box(self, field: str, label: str, about: str, default: str) -> Any:
        info = f"{about}: {KEYS[field]}" if about else KEYS[field]
        return self._field(
            field,
            lambda: gr.Textbox(label=label, info=info, placeholder=default, max_lines=1, elem_id=f"panel-own-{field}"),
        )

    def connect(self, tab: gr.Tab, timer: gr.Timer, train: TrainTab) -> None:
        """Connect the events, after those of the Train tab."""
        wrong, looked = [*self.wrong.values(), self.other], [self.shown, self.about_tokenizer, self.stamp]
        tab.select(self.choices, None, self.before, **QUIET)
        self.before.select(lambda name: name or gr.skip(), self.before, self.name, **CHOSEN)
        self.name.change(self.open, self.name, [self.texts, self.chats, self.vocabulary, *looked], **QUIET)
        for kind, field, box in ((TEXT, "texts", self.texts), (CHAT, "chats", self.chats)):
            self.files[kind].upload(
                self._keeper(kind), [self.name, self.files[kind]], [box, self.wrong[field]], **QUIET
            )
        boxes = [field for field in self.fields if isinstance(field, gr.Textbox)]
        left = [event for box in boxes for event in (box.submit, box.blur)]
        left += [field.input for field in self.fields if field not in boxes]
        gr.on(left, self.typed, self.fields, wrong, trigger_mode="always_last", **QUIET)
        for button, act, shown in ((self.check, self.check_data, self.checked), (self.ask, self.expect, self.time)):
            outputs = [shown, self.vocabulary] if act == self.check_data else [shown]
            button.click(lambda: UNDER_WAY, None, shown, **QUIET).then(act, self.fields, outputs, **QUIET).then(
                self.mistakes, self.fields, wrong, **QUIET
            )
        for button, act in ((self.train_tokenizer, first_run.start_tokenizer), (self.start, first_run.start)):
            button.click(self._starter(act), self.fields, looked, **QUIET).then(
                self.mistakes, self.fields, wrong, **QUIET
            )
        self.take.click(self.to_form, self.fields, train.whole, **IN_TURN).success(**train.refill)
        timer.tick(self.watch, [self.name, self.stamp], looked, **QUIET)

    def choices(self) -> Any:
        """Return the names under which files are kept."""
        return gr.update(choices=own_files.names(self.panel))

    def open(self, name: str | None) -> list[Any]:
        """Return the folders of a name, the vocabulary of its tokenizer, and what is known of its run."""
        name, folders = (name or "").strip(), []
        for kind in (TEXT, CHAT):
            try:
                found = own_files.kept(self.panel, name, kind)
                folders.append(str(own_files.folder_of(self.panel, name, kind)) if found else gr.skip())
            except UserError:  # half a name
                folders.append(gr.skip())
        size = first_run.vocabulary_of(self.panel, name)
        return [*folders, gr.skip() if size is None else str(size), *self.watch(name, ())]

    def _keeper(self, kind: str) -> Any:
        def keep(name: str | None, sent: list[str] | None) -> list[Any]:
            name = (name or "").strip()
            try:
                if not name:
                    raise UserError("give the run a name first, then send files")
                folder = own_files.keep(self.panel, name, kind, sent or [])
            except UserError as error:
                return [gr.skip(), page(problem(str(error)))]
            count = len(own_files.kept(self.panel, name, kind))
            gr.Info(f"{count} {'file' if count == 1 else 'files'} in {folder}", duration=6)
            return [str(folder), ""]

        return keep

    def typed(self, *fields: str | None) -> list[str]:
        """Return what is wrong with the fields that are filled in, and what belongs to no field."""
        plan = Plan.of(*self._plain(fields))
        filled = [field for field in self.wrong if getattr(plan, field)]
        return self._lines(plan, filled) if plan.name and plan.texts else [""] * (len(self.wrong) + 1)

    def mistakes(self, *fields: str | None) -> list[str]:
        """Return what is wrong, also with fields that are still empty, and what belongs to no field."""
        return self._lines(Plan.of(*self._plain(fields)), list(self.wrong))

    def _lines(self, plan: Plan, shown: list[str]) -> list[str]:
        by_field, other = first_run.mistakes(self.panel, plan)
        lines = [by_field.get(field, "") if field in shown else "" for field in self.wrong]
        return [page(problem(line)) if line else "" for line in (*lines, other)]

    @staticmethod
    def _plain(fields: tuple[str | None, ...]) -> list[str | None]:
        return [None if content == DEFAULT else content for content in fields]

    def check_data(self, *fields: str | None) -> list[Any]:
        """Return what is said of the data, and the vocabulary that fits its size."""
        plan = Plan.of(*self._plain(fields))
        try:
            said = first_run.check_data(self.panel, plan)
        except UserError as error:
            return [page(problem(str(error))), gr.skip()]
        size = first_run.size_of(plan.texts)
        fitting = first_run.proposed(size)
        hint = f"<p>{in_bytes(size)} of text: a vocabulary of {int(fitting):,} is proposed below.</p>"
        return [page(block(said, "log"), hint), fitting]

    def expect(self, *fields: str | None) -> str:
        """Return what a dry run says."""
        try:
            return page(block(first_run.expected(self.panel, Plan.of(*self._plain(fields))), "log"))
        except UserError as error:
            return page(problem(str(error)))

    def _starter(self, act: Any) -> Any:
        def start(*fields: str | None) -> list[Any]:
            plan = Plan.of(*self._plain(fields))
            with told():
                numbers = act(self.panel, plan)
            gr.Info(f"job {', '.join(map(str, numbers))} is in the queue", duration=6)
            return self.watch(plan.name, ())

        return start

    def to_form(self, *fields: str | None) -> list[Any]:
        """Return the form of pretrain, for the Train tab."""
        gr.Info("the form of Train has these settings now", duration=6)
        return TrainTab.opened(first_run.form_of(Plan.of(*self._plain(fields)), "pretrain"))

    def watch(self, name: str | None, stamp: tuple) -> list[Any]:
        """Return jobs, tokenizer and stamp, where something has changed since `stamp`."""
        name = (name or "").strip()
        now = first_run.stamp(self.panel, name)
        if now == tuple(stamp):
            return [gr.skip()] * 3
        return [first_run.watched(self.panel, name), first_run.tokenizer_facts(self.panel, name), now]
