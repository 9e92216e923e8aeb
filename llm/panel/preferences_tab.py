"""The Preferences tab: its components, and the functions behind them, which work without a browser."""

import shlex
from dataclasses import dataclass
from typing import Any

import gradio as gr

from llm.errors import UserError
from llm.panel.eval_view import parts
from llm.panel.labels import (
    CHOICES,
    MOST_QUESTIONS,
    Labels,
    Pair,
    draw_pairs,
    option_of,
    recorded_questions,
    sets_of,
    settings_for,
    tally,
)
from llm.panel.markup import block, page, problem, section, table, text
from llm.panel.models import MOST_TOKENS, PanelModels
from llm.panel.runs_tab import CHOSEN, QUIET, html, told
from llm.run.stage_folder import read_manifest
from llm.tokenizer.chat_format import readable

TYPED = "typed above"
ONE_BY_ONE = CHOSEN | {"concurrency_limit": 1, "concurrency_id": "labels"}
BUTTONS = {"left": "← Left is better", "right": "Right is better →", "tie": "Tie (T)", "skip": "Skip (S)"}


@dataclass
class Work:
    """Pairs of a visitor that wait for a decision, with the number of the next one; note: what to tell with them."""

    pairs: tuple[Pair, ...] = ()
    at: int = 0
    note: str = ""

    @property
    def pair(self) -> Pair | None:
        """The pair that is shown; None where all are decided."""
        return self.pairs[self.at] if self.at < len(self.pairs) else None


class PreferencesTab:
    """Two answers side by side, and the keys that say which is better."""

    def __init__(self, models: PanelModels):
        self.models, self.panel, may = models, models.panel, not models.panel.readonly
        with gr.Row():
            self.name = gr.Dropdown(
                [], value="mine", label="Set of labels", allow_custom_value=True, elem_id="panel-labels", min_width=160
            )
            self.one = gr.Dropdown([], label="One answer by", scale=2, min_width=160)
            self.other = gr.Dropdown([], label="The other by", scale=2, min_width=160)
        with gr.Column(visible=may):
            with gr.Accordion("Questions", open=True):
                self.questions = gr.Textbox(
                    label=f"Questions, one a line, at most {MOST_QUESTIONS}", lines=3, max_lines=MOST_QUESTIONS
                )
                with gr.Row():
                    self.source = gr.Dropdown([TYPED], value=TYPED, label="Or some of the records of", min_width=180)
                    self.temperature = gr.Slider(0, 2, 1.0, step=0.05, label="Temperature", min_width=140)
                    self.length = gr.Slider(1, MOST_TOKENS, 128, step=1, label="Most tokens", min_width=140)
                    self.seed = gr.Number(1, label="Seed", precision=0, minimum=0, min_width=90)
                self.draw = gr.Button("Draw pairs", variant="primary", size="sm")
        self.work, self.pair = gr.State(Work()), html("panel-pair")
        self.buttons = {}
        with gr.Row(visible=may, elem_id="panel-choices"):
            for choice in BUTTONS:
                self.buttons[choice] = gr.Button(
                    BUTTONS[choice], size="sm", elem_id=f"panel-choice-{choice}", min_width=110
                )
            self.undo = gr.Button("Undo (U)", size="sm", elem_id="panel-choice-undo", min_width=110)
        self.counts = html("panel-label-counts")

    def connect(self, tab: gr.Tab) -> None:
        """Connect the events."""
        given = [self.name, self.one]
        tab.select(self.choices, [self.name, self.one, self.other], [self.name, self.one, self.other], **CHOSEN).then(
            self.sources, self.one, self.source, **CHOSEN
        ).then(self.count, given, self.counts, **CHOSEN)
        self.one.input(self.sources, self.one, self.source, **CHOSEN)
        for one in given:
            one.input(self.count, given, self.counts, **CHOSEN)
        asked = [self.one, self.other, self.questions, self.source, self.temperature, self.length, self.seed]
        self.draw.click(lambda: page("<p>The answers are being written…</p>"), None, self.pair, **QUIET).then(
            self.begin, asked, [self.work, self.pair, self.seed], **QUIET
        )
        shown = [self.work, self.pair, self.counts]
        for choice, button in self.buttons.items():
            button.click(self._deciding(choice), [self.work, *given], shown, **ONE_BY_ONE)
        self.undo.click(self.take_back, [self.work, *given], shown, **ONE_BY_ONE)

    def choices(self, name: str, one: str | None, other: str | None) -> list[Any]:
        """Return the sets of labels, and the stages that answer; the last one is taken where none was."""
        names, sets = self.models.chatting(), sets_of(self.panel)
        last = names[-1] if names else None
        chosen = [stage if stage in names else last for stage in (one, other)]
        first = gr.update(choices=sets, value=name or "mine")
        return [first, *(gr.update(choices=names, value=stage) for stage in chosen)]

    def sources(self, one: str | None) -> Any:
        """Return where questions can come from: typed ones, or records of the stage."""
        return gr.update(choices=[TYPED, *parts(self.panel, one)], value=TYPED)

    def begin(
        self,
        one: str | None,
        other: str | None,
        typed: str,
        source: str,
        temperature: float,
        length: float,
        seed: float,
    ) -> list[Any]:
        """Let the stages answer, and show the first pair; the seed grows, so that the next pairs are others."""
        try:
            self.panel.check_may_change()
            if not one or not other:
                raise UserError("choose a stage that answers, on both sides")
            questions = (typed or "").splitlines()
            if source not in (None, TYPED):
                questions = recorded_questions(self.panel, one, source, MOST_QUESTIONS // 2, int(seed or 0))
            pairs, equal = draw_pairs(
                self.models, questions, one, other, float(temperature), int(length), int(seed or 0)
            )
        except UserError as error:
            return [Work(), page(problem(str(error))), gr.skip()]
        note = f"{equal} questions got two equal answers, or an empty one, and are left out. " if equal else ""
        work = Work(tuple(pairs), 0, note)
        return [work, pair_page(work), int(seed or 0) + 1]

    def decide(self, work: Work, choice: str, name: str, one: str | None) -> list[Any]:
        """Keep a decision and show the next pair."""
        with told():
            if work.pair is None:
                raise UserError("draw pairs first")
            Labels(self.panel, name or "").add(work.pair, choice)
        work = Work(work.pairs, work.at + 1, "")
        return [work, pair_page(work), self.count(name, one)]

    def _deciding(self, choice: str) -> Any:
        def decide(work: Work, name: str, one: str | None) -> list[Any]:
            return self.decide(work, choice, name, one)

        return decide

    def take_back(self, work: Work, name: str, one: str | None) -> list[Any]:
        """Take the last decision back and show its pair again."""
        with told():
            pair = Labels(self.panel, name or "").undo()
            if pair is None:
                raise UserError(f"{name} has no decision to take back")
        again = work.at > 0 and work.pairs[work.at - 1] == pair
        pairs = work.pairs if again else (pair, *work.pairs[work.at :])
        work = Work(pairs, work.at - 1 if again else 0, "")
        return [work, pair_page(work), self.count(name, one)]

    def count(self, name: str, one: str | None) -> str:
        """Return what a set holds, who wins in it, and how stages train on it."""
        try:
            labels = Labels(self.panel, name or "")
            votes = labels.votes()
            manifest = (read_manifest(self.panel.index.row(one)["folder"]) or {}) if one else {}
        except UserError as error:
            return page(problem(str(error)))
        by_choice = {choice: sum(vote["choice"] == choice for vote in votes) for choice in CHOICES}
        rows = by_choice["left"] + by_choice["right"]
        about = f"{labels.name}: {rows:,} rows of preferences, {by_choice['tie']:,} ties, {by_choice['skip']:,} skipped"
        wins = table(["A", "B", "A wins", "ties", "B wins"], tally(votes), (2, 3, 4), "wins") if tally(votes) else ""
        source = ((manifest.get("config") or {}).get("data") or {}).get("name")  # for runs that kept no options
        data = str((manifest.get("options") or {}).get("data") or source or "own")
        settings = shlex.join(settings_for(labels, data))
        use = (
            f"Further settings of train.py stage=reward or stage=dpo:\n{settings}"
            if settings
            else _as_file(labels, data)
        )
        return page(f"<p><b>{text(about)}</b></p>", wins, section("Train on them", block(use), opened=False))


def _as_file(labels: Labels, data: str) -> str:
    head = f"A file my_conf/data/{labels.name}.yaml, for train.py --config-dir=my_conf data={labels.name} stage=dpo:"
    return f"{head}\n{option_of(labels, data)}"


def pair_page(work: Work) -> str:
    """Return the pair that waits for a decision, its answers side by side."""
    pair = work.pair
    if pair is None:
        done = "All pairs are decided. " if work.pairs else ""
        return page(f"<p>{text(work.note)}{done}Draw pairs; then ← and → say which answer is better.</p>")
    sides = "".join(
        f'<div class="side"><p><b>{name}</b></p>{block(readable(answer))}</div>'
        for name, answer in (("Left", pair.left), ("Right", pair.right))
    )
    return page(
        f'<p data-pair="{work.at}"><b>Pair {work.at + 1} of {len(work.pairs)}.</b> {text(work.note)}'
        "Keys: ← left, → right, T tie, S skip, U undo.</p>",
        block(pair.question, "asked"),
        f'<div class="sides">{sides}</div>',
    )
