"""The Inside tab: its components, and the functions behind them, which work without a browser."""

from typing import Any

import gradio as gr

from llm.errors import UserError
from llm.panel import inside_view as view
from llm.panel.markup import page, problem
from llm.panel.models import MOST_TOKENS, PanelModels
from llm.panel.runs_tab import CHOSEN, QUIET, html

TEXT, QUESTION = "a text", "a question and the model's answer"
Look = tuple[str, tuple[int, ...], tuple[int, ...]]  # stage, tokens, mask


class InsideTab:
    """A model on its way from a text to the next token. Nothing is loaded before the button is pressed."""

    def __init__(self, models: PanelModels):
        self.models, may = models, not models.panel.readonly
        self.look: gr.State = gr.State(None)
        if not may:
            gr.Markdown("This panel only shows; to look into a model takes memory and cores of the server.")
        with gr.Column(visible=may):
            with gr.Row():
                self.stage = gr.Dropdown([], label="Model", scale=2, elem_id="panel-inside-of", min_width=200)
                self.kind = gr.Radio([TEXT, QUESTION], value=TEXT, label="Look into", scale=2, min_width=260)
            self.text = gr.Textbox(
                label=f"Text, at most {MOST_TOKENS} tokens with the answer",
                lines=2,
                max_lines=8,
                value="Ava has 12 apples.",
            )
            self.go = gr.Button("Look inside", variant="primary", size="sm")
            self.said, self.tokens = html("panel-inside-said"), html("panel-inside-tokens")
            with gr.Column(visible=False) as self.rest:
                self.at = gr.Slider(0, 1, 0, step=1, label="Position", elem_id="panel-position")
                self.next = html("panel-inside-next")
                with gr.Accordion("All positions", open=False):
                    self.all = html("panel-inside-all")
                with gr.Accordion("Attention", open=True):
                    with gr.Row():
                        self.layer = gr.Slider(1, 2, 1, step=1, label="Layer")
                        self.head = gr.Slider(1, 2, 1, step=1, label="Head")
                    self.attention = html("panel-attention")
                with gr.Accordion("Attention of all layers and heads", open=False):
                    self.heads = html("panel-heads")
                with gr.Accordion("Logit lens", open=False):
                    self.lens, self.grid = html("panel-lens"), html("panel-lens-grid")
                with gr.Accordion("Steps of the calculator", open=False):
                    self.calculator = html("panel-calculator")

    def connect(self, tab: gr.Tab) -> None:
        """Connect the events."""
        tab.select(self.choices, self.stage, self.stage, **CHOSEN)
        places = [self.at, self.layer, self.head]
        moving = [self.tokens, self.next, self.attention, self.lens]
        whole = [self.look, self.said, self.rest, *places, *moving, self.all, self.heads, self.grid, self.calculator]
        for event in (self.go.click, self.text.submit):
            event(lambda: page("<p>The model is being loaded and run…</p>"), None, self.said, **QUIET).then(
                self.begin, [self.stage, self.kind, self.text], whole, **QUIET
            )
        self.at.change(self.move, [self.look, *places], moving, **QUIET)
        for one in (self.layer, self.head):
            one.change(self.turn, [self.look, *places], self.attention, **QUIET)

    def choices(self, name: str | None) -> Any:
        """Return the models; the last one is taken where none was."""
        names = self.models.names()
        return gr.update(choices=names, value=name if name in names else next(iter(reversed(names)), None))

    def begin(self, name: str | None, kind: str, content: str) -> list[Any]:
        """Look into a model: everything that the tab shows, at the last position."""
        try:
            if not name:
                raise UserError("choose a model first: a finished stage is needed")
            ids, mask = self.models.ids_of(name, content or "", kind == QUESTION)
            inside = self.models.inside(name, ids)
        except UserError as error:
            return [None, page(problem(str(error))), gr.update(visible=False), *[gr.skip()] * 3, *[""] * 8]
        at, (n_layer, n_head) = len(ids) - 1, inside.attention.shape[:2]
        look: Look = (name, tuple(ids), tuple(mask))
        sliders = [gr.update(maximum=max(at, 1), value=at)]
        sliders += [gr.update(maximum=max(n, 2), value=1, interactive=n > 1) for n in (n_layer, n_head)]
        fixed = [view.positions_view(inside), view.heads_view(inside), view.lens_grid(inside)]
        fixed.append(view.calculator_view(inside, mask))
        return [look, "", gr.update(visible=True), *sliders, *self.move(look, at, 1, 1), *fixed]

    def move(self, look: Look | None, at: float, layer: float, head: float) -> list[Any]:
        """Return what another position shows: tokens, next tokens, attention, lens."""
        if look is None:
            return [gr.skip()] * 4
        inside, at = self.models.inside(look[0], look[1]), int(at)
        tokens = view.tokens_view(inside, look[2], at)
        attention = view.attention_view(inside, int(layer) - 1, int(head) - 1, at)
        return [tokens, view.next_view(inside, at), attention, view.lens_view(inside, at)]

    def turn(self, look: Look | None, at: float, layer: float, head: float) -> Any:
        """Return the attention of another layer or head."""
        if look is None:
            return gr.skip()
        return view.attention_view(self.models.inside(look[0], look[1]), int(layer) - 1, int(head) - 1, int(at))
