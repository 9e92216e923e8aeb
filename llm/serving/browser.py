"""The chat in the browser (Gradio): streaming, stop, regenerate, undo, sampling controls, visible calculator calls.

The conversation lives in a session state with the content parts that the model produced; what the browser shows is a
rendering of it. So a calculator call stays a call when the conversation is given back to the model. Nothing is loaded
from outside: the fonts are the system's and Gradio's analytics are off.
"""

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.middleware import Middleware

from llm.inference.sampling import SamplingParams
from llm.serving.chat import ChatModel, Message, Reply, stream_reply
from llm.serving.guard import Guard
from llm.tokenizer.chat_format import split_calls

__all__ = ["build", "launch", "mount"]

FRAME_SECONDS = 0.05  # a browser does not need more frames, and each one sends the whole conversation
MAX_MESSAGE = 8_000  # characters
MAX_MESSAGES = 500
MAX_VISITORS = 50  # conversations in memory; the one that waited longest is forgotten first
EXAMPLES = (
    "Who are you?",
    "How many r are in strawberry?",
    "Ava has 12 apples. She buys 7 more and eats 3. How many apples does she have?",
)

CSS = """
.gradio-container { width: 100% !important; max-width: 860px !important; margin: 0 auto !important; }
.title h2 { margin: 0; } .title p { margin: 0; opacity: 0.65; }
.chat .example { border: 1px solid var(--border-color-primary) !important; border-radius: var(--radius-lg); }
.chat .message-buttons-right { display: none; }
.chat .tool { font-family: var(--font-mono); font-size: 0.9em; padding: 0.1em 0.45em; margin: 0 0.2em;
              border-radius: 0.4em; border: 1px solid var(--border-color-primary);
              background: var(--background-fill-primary); white-space: nowrap; }
.chat .note { font-size: 0.85em; opacity: 0.65; }
.sampling { gap: 0 !important; }
"""

_FENCE = re.compile(r"( {0,3})(`{3,}|~{3,})[ \t]*([\w+-]*)[^`]*")  # first line of a code block
_CODE = re.compile(r"(`[^`\n]*`)")
_HARMLESS = re.compile(r"[^<\[|]*")  # code that means nothing in HTML or Markdown, should its frame not hold
_ESCAPES = (
    (re.compile(r"[\\<\[]"), r"\\\g<0>"),  # raw HTML, backslashes, links and images
    (re.compile(r"(?<=[\w)])\*(?=[\w(])"), r"\\*"),  # 3*4*5 is a product, not emphasis
    (re.compile(r"^(?=#{1,6} *-?\$?\d)", re.MULTILINE), r"\\"),  # "#### 12" is a result, not a heading
)


def mount(app: FastAPI, demo: gr.Blocks) -> None:
    """Put the page at `/` of an application, whose own routes come first."""
    demo.state_session_capacity = MAX_VISITORS
    gr.mount_gradio_app(app, demo.queue(max_size=32), path="/", ssr_mode=False, **_looks())


def launch(demo: gr.Blocks, host: str, port: int, public_names: Sequence[str] = ()) -> None:
    """Start a server of the page alone in the background of this process, behind a guard (llm.serving.guard)."""
    demo.queue(max_size=32).launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(Guard, host=host, public_names=public_names)]},
        state_session_capacity=MAX_VISITORS,
        **_looks(),
    )


def _looks() -> dict[str, Any]:
    """Return the options of Gradio that say how the page looks."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", **fonts)
    return {"footer_links": [], "run_history": False, "theme": theme, "css": CSS}


def build(model: ChatModel, params: SamplingParams) -> gr.Blocks:
    """Build the page: title, conversation, question box, sampling controls."""
    longest = model.engine.net.config.seq_len
    with gr.Blocks(title=f"Fathom: {model.name}", fill_height=True, analytics_enabled=False) as demo:
        gr.Markdown("\n\n".join((f"## {escape(model.name)}", model.summary, *model.notes)), elem_classes="title")
        state = gr.State([])
        chatbot = gr.Chatbot(
            scale=1,
            elem_classes="chat",
            show_label=False,
            buttons=["copy"],
            placeholder="Ask something",
            examples=[{"text": text} for text in EXAMPLES],
            latex_delimiters=[],  # a formula may end a code block in the middle, and what follows would be HTML
        )
        question = gr.Textbox(
            placeholder="Message",
            show_label=False,
            submit_btn=True,
            max_lines=8,
            max_length=MAX_MESSAGE,
            autofocus=True,
        )
        with gr.Row(elem_classes="sampling"):
            sampling = [
                gr.Slider(0, 2, min(params.temperature, 2), step=0.05, label="Temperature"),
                gr.Slider(0, 200, min(params.top_k, 200), step=1, label="Top-k (0 = all)"),
                gr.Slider(1, longest, min(params.max_new_tokens, longest), step=1, label="Max. tokens"),
            ]
        _connect(_Handlers(model, params), state, chatbot, question, sampling)
    return demo


def _connect(handlers: "_Handlers", state, chatbot, question, sampling) -> None:
    """Connect the page's events to handlers. Every way to ask ends in one `answer`, of which one runs at a time."""
    shown = [state, chatbot]
    answer = {
        "fn": handlers.answer,
        "inputs": [state, *sampling],
        "outputs": shown,
        "concurrency_id": "engine",
        "concurrency_limit": 1,
        "show_progress": "hidden",
    }
    busy = {"fn": lambda: gr.Textbox(submit_btn=False, stop_btn=True), "outputs": question, "queue": False}
    idle = {"fn": lambda: gr.Textbox(submit_btn=True, stop_btn=False), "outputs": question, "queue": False}
    private = {"api_visibility": "private"}

    asked = question.submit(
        handlers.ask, [question, state], [question, *shown], queue=False, api_name="ask", show_progress="hidden"
    )
    example = chatbot.example_select(handlers.ask_example, state, shown, queue=False, **private)
    again = chatbot.retry(handlers.again, state, shown, queue=False, **private)
    running = []
    for event, name in ((asked, "answer"), (example, None), (again, None)):
        visible = {"api_name": name} if name else private
        answered = event.success(**busy, **private).then(**answer, **visible)
        answered.then(**idle, **private)
        running.append(answered)
    question.stop(**idle, cancels=running, **private)
    chatbot.undo(handlers.undo, state, [question, *shown], queue=False, **private)
    chatbot.clear(lambda: [], None, state, queue=False, **private)


class _Handlers:
    """Actions of the page on the conversation: a list of messages, `notes` beside `role` and `content`."""

    def __init__(self, model: ChatModel, params: SamplingParams):
        self.model, self.params = model, params
        self._answers = itertools.count()

    def ask(self, question: str, messages: list[Message]):
        """Append the question; (emptied box, state, display)."""
        if not question.strip():
            raise gr.Error("The message is empty.", print_exception=False)
        if len(question) > MAX_MESSAGE or len(messages) >= MAX_MESSAGES:
            raise gr.Error(
                f"A message may have {MAX_MESSAGE:,} characters and a chat {MAX_MESSAGES} messages.",
                print_exception=False,
            )
        messages = [*answered(messages), {"role": "user", "content": question}]
        return "", messages, display(messages)

    def ask_example(self, messages: list[Message], picked: gr.SelectData):
        return self.ask(picked.value["text"], messages)[1:]

    def again(self, messages: list[Message]):
        """Take the last answer back."""
        messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
        return messages, display(messages)

    def undo(self, messages: list[Message]):
        """Take the last answer and its question back; the question returns to the box."""
        messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
        question = messages[-1]["content"] if messages else ""
        return question, messages[:-1], display(messages[:-1])

    def answer(self, messages: list[Message], temperature: float, top_k: int, max_new_tokens: int) -> Iterator[tuple]:
        """Stream the answer to the last question as (state, display)."""
        if not messages or messages[-1]["role"] != "user":
            return
        params = replace(
            self.params,
            temperature=temperature,
            top_k=int(top_k),
            max_new_tokens=int(max_new_tokens),
            seed=self.params.seed + next(self._answers),  # or asking again would give the same answer
        )
        next_frame = 0.0
        replies = stream_reply(self.model.engine, messages, params)
        try:
            for reply in replies:
                if reply.done or time.monotonic() >= next_frame:
                    conversation = [*messages, as_message(reply)]
                    yield conversation, display(conversation)
                    next_frame = time.monotonic() + FRAME_SECONDS
        finally:  # also when the stop button or a closed page ends this generator
            replies.close()


def answered(messages: list[Message]) -> list[Message]:
    """Return the conversation without a last question that was never answered (stopped while it was waiting)."""
    return messages[:-1] if messages and messages[-1]["role"] == "user" else messages


def as_message(reply: Reply) -> Message:
    """Return a copy of the reply as the assistant's message of a conversation."""
    return {"role": "assistant", "content": [dict(part) for part in reply.content], "notes": list(reply.notes)}


def display(messages: list[Message]) -> list[dict]:
    """Return what the chatbot component shows for the conversation."""
    return [{"role": m["role"], "content": markdown(m["content"], m.get("notes", ()))} for m in messages]


def markdown(content: str | list[dict[str, str]], notes: list[str] | tuple[str, ...] = ()) -> str:
    """Return a message in Markdown: its text, calculator calls like `12*3 = 36` in a frame, notes in small."""
    parts = [(False, content)] if isinstance(content, str) else split_calls(content)
    pieces = [_tool(text) if is_call else escape(text) for is_call, text in parts]
    return "".join(pieces) + "".join(f'\n\n<span class="note">{_verbatim(note)}</span>' for note in notes)


def _tool(text: str) -> str:
    return f'<span class="tool" title="calculator">{_verbatim(text)}</span>'


def _verbatim(text: str) -> str:
    """Return text that means nothing in HTML or Markdown: every sign becomes a character reference."""
    return re.sub(r"[^\w ]|_", lambda sign: f"&#{ord(sign[0])};", text)


def escape(text: str) -> str:
    """Return text in which Markdown stays Markdown, but HTML, links, images, products and `#### 12` appear as written.

    A code block is framed anew, so that nothing around it can open it; one that has no end (yet) is escaped.
    """
    pieces, lines = [], []
    rest = iter(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    for line in rest:
        if start := _FENCE.fullmatch(line):
            pieces += [_prose("\n".join(lines)), _block(start, rest)]
            lines = []
        else:
            lines.append(line)
    return "".join([*pieces, _prose("\n".join(lines))])


def _block(start: re.Match, rest: Iterator[str]) -> str:
    """Return the code block behind its first line, which `start` has matched; takes its lines from `rest`."""
    indent, fence, language = len(start[1]), start[2], start[3]
    end = re.compile(rf" {{0,3}}{re.escape(fence)}{fence[0]}*[ \t]*")
    lines = []
    for line in rest:
        if end.fullmatch(line):
            code = "\n".join(lines)
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", code))])
            language = "" if language == "mermaid" else language  # a drawing may load images
            return f"\n\n{fence}{language}\n{code}\n{fence}\n\n"
        lines.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
    return f"\n\n<pre><code>{_verbatim(chr(10).join(lines))}</code></pre>\n\n"


def _prose(text: str) -> str:
    """Return text outside of code blocks with its HTML, links, images, products and results escaped."""
    pieces = _CODE.split(text)
    for i in range(0, len(pieces), 2):
        for pattern, replacement in _ESCAPES:
            pieces[i] = pattern.sub(replacement, pieces[i])
    for i in range(1, len(pieces), 2):
        if not _HARMLESS.fullmatch(pieces[i]):
            pieces[i] = f"<code>{_verbatim(pieces[i][1:-1])}</code>"
    return "".join(pieces)
