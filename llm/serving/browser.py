"""The chat in the browser (Gradio): its components, and the events between them and `llm.serving.talk`.

`build` makes the page, and `mount` puts it into the server's application, with its looks (`PAGE`). The conversation
lives in a session of the server, as a `Talk`, with the content parts that the model produced; what the browser shows is
a rendering of it. After every answer the browser is told the chat, which it keeps (page.js). Nothing
is loaded from outside: the fonts are the system's and Gradio's analytics are off. gr.HTML is of no use here: it needs
`eval`, which the guard's Content-Security-Policy forbids.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Router

from llm.inference.sampling import SamplingParams
from llm.serving.models import Models
from llm.serving.talk import NONE, Handlers, Talk, title

MAX_VISITORS = 50  # conversations in memory; the one that waited longest is forgotten first
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")  # Gradio keeps 10,000 otherwise, four of every turn
HERE = Path(__file__).parent
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
SECONDS_FREE = 0.05  # between two looks of an idle page at its events
SECONDS_PROGRESS = 0.2  # between two looks at the progress of events
PAGE = {
    "theme": gr.themes.Default(primary_hue="blue", neutral_hue="slate", **FONTS),
    "css": (HERE / "page.css").read_text(encoding="utf-8"),
    "head": f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
    "footer_links": [],
    "run_history": False,
    "ssr_mode": False,
}


def mount(app: FastAPI, demo: gr.Blocks) -> None:
    """Put the page at `/` of an application, whose own routes come first: below /v1 the page has nothing to say."""
    app.mount("/v1", Router())
    gr.mount_gradio_app(app, demo, path="/", **PAGE)


def build(models: Models, params: SamplingParams) -> gr.Blocks:
    """Build the page: chats, title, conversation, question box, settings. By the Tab key they follow in this order."""
    with gr.Blocks(title=f"Fathom: {models.first}", fill_height=True, analytics_enabled=False) as demo:
        demo.state_session_capacity = MAX_VISITORS
        handlers = Handlers(models, params)
        _Page(handlers).connect(demo)
    return queued(demo, 32)


def queued(demo: gr.Blocks, most: int) -> gr.Blocks:
    """Give a page its queue of at most `most` waiting events, looked at 20 times a second.

    Gradio looks for events 1,000 times and for progress 100 times a second, which costs 3 % of a core while nobody is
    there. It has no setting for that, so attributes of its queue are set.
    """
    demo.queue(max_size=most)
    demo._queue.sleep_when_free = SECONDS_FREE
    demo._queue.progress_update_sleep_when_free = SECONDS_PROGRESS
    return demo


class _Page:
    """Components of the page, and the events between them and the handlers."""

    def __init__(self, handlers: Handlers):
        self.handlers = handlers
        model = handlers.models.get(handlers.models.first)
        with gr.Sidebar(label="Chats", open=False, width=300):
            gr.Button("New chat", elem_id="fathom-new", size="sm")
            with gr.Row():
                gr.Button("Export as text", elem_id="fathom-text", size="sm", min_width=100)
                gr.Button("Export as JSON", elem_id="fathom-json", size="sm", min_width=100)
            with gr.Column(elem_id="fathom-chats"):  # page.js writes the list
                gr.Markdown("Chats are kept in this browser only.")
        self.title = gr.Markdown(title(model), elem_classes="title")
        self.state = gr.State(Talk.new(model.name))
        with gr.Row(elem_classes="conversations"):
            self.chats = [_chatbot(number, model.examples) for number in (0, 1)]
        self.question = gr.Textbox(
            label="Message",
            placeholder="Message",
            show_label=False,
            submit_btn="Send",
            max_lines=8,
            elem_id="fathom-question",
        )
        with gr.Accordion("Settings", open=False, elem_classes="settings"):
            self._settings(model.seq_len)
        self.told = gr.Markdown(visible="hidden", elem_id="fathom-data", latex_delimiters=[])
        self.stored = gr.Textbox(visible="hidden", elem_id="fathom-stored", label="Stored chat")

    def _settings(self, longest: int) -> None:
        params, names = self.handlers.params, self.handlers.models.names()
        shown = len(names) > 1
        with gr.Row():
            self.model = gr.Dropdown(names, value=names[0], label="Model", visible=shown, filterable=False)
            self.other = gr.Dropdown(
                [NONE, *names], value=NONE, label="Side by side with", visible=shown, filterable=False
            )
        self.system = gr.Textbox(
            label="System prompt", placeholder="Text that stands before the first message", max_lines=6, lines=2
        )
        with gr.Row():
            self.sampling = [
                gr.Slider(0, 2, min(params.temperature, 2), step=0.05, label="Temperature", min_width=220),
                gr.Slider(0, 200, min(params.top_k, 200), step=1, label="Top-k, 0 = all", min_width=220),
                gr.Slider(0.05, 1, params.top_p, step=0.05, label="Top-p, 1 = all", min_width=220),
                gr.Slider(1, longest, min(params.max_new_tokens, longest), step=1, label="Max. tokens", min_width=220),
                gr.Textbox(label="Seed", placeholder="empty = another answer each time", min_width=220),
            ]

    def connect(self, demo: gr.Blocks) -> None:
        """Connect the events. Every way to ask ends in one `answer`."""
        handlers, private = self.handlers, {"api_visibility": "private", "show_progress": "hidden"}
        quick = {"concurrency_limit": None, **private}  # in the queue all the same: only there gr.Warning is shown
        shown = [self.state, *self.chats]
        asked = [self.question, *shown]
        first = self.chats[0]
        ways = (
            self.question.submit(
                handlers.ask,
                [self.question, self.state],
                asked,
                concurrency_limit=None,
                api_name="ask",
                show_progress="hidden",
            ),
            first.example_select(handlers.ask_example, self.state, asked, **quick),
            first.retry(handlers.again, self.state, asked, **quick),
            first.edit(handlers.edit, self.state, asked, **quick),
        )
        running = []
        for number, way in enumerate(ways):
            visible = {"api_name": "answer"} if number == 0 else private
            answered = way.then(
                handlers.answer,
                [self.state, *self.sampling, self.system],
                self.chats,  # not the state: a late frame would bring a chat back that was left meanwhile
                concurrency_id="engine",
                concurrency_limit=handlers.models.at_once,
                **{"show_progress": "hidden", **visible},
            )
            answered.then(handlers.rest, self.state, [self.question, self.told], **quick)
            running.append(answered)
        self.question.stop(handlers.stop, self.state, [self.question, self.told], cancels=running, **quick)
        first.undo(handlers.undo, [self.question, self.state], [*asked, self.told], **quick)
        whole = [*shown, self.told, self.system, self.title, self.model, self.other]
        first.clear(handlers.clear, self.state, whole, **quick)
        self.stored.change(handlers.restore, [self.stored, self.state], whole, **quick)
        demo.load(handlers.rest, self.state, [self.question, self.told], **quick)  # page.js waits for it
        for chosen in (self.model, self.other):
            chosen.input(handlers.choose, [self.model, self.other, self.state], whole, **quick)


def _chatbot(number: int, examples: Sequence[str]) -> gr.Chatbot:
    return gr.Chatbot(
        min_width=320,
        elem_id=f"fathom-chat-{number}",
        elem_classes="chat",
        show_label=False,
        visible=number == 0,
        editable="user" if number == 0 else None,
        buttons=["copy"],
        placeholder="Ask something" if number == 0 else None,
        examples=[{"text": text} for text in examples] if number == 0 else None,
        latex_delimiters=[],  # a formula may end a code block in the middle, and what follows would be HTML
    )
