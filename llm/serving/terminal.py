"""Chat in the terminal: streaming answers, a few commands, Ctrl-C to stop an answer."""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.serving.chat import ChatModel, Reply, stream_reply
from llm.tokenizer.chat_format import split_calls

HELP = """\
/again            another answer to the last question
/clear            forget the conversation
/temperature X    0 = always the most likely token
/top_k N          sample among the N most likely tokens; 0 = all
/help /quit       Ctrl-C stops an answer, Ctrl-D ends the chat"""

DIM, BOLD, RESET = "\033[2m", "\033[1m", "\033[0m"


def plain_text(reply: Reply, dim: str = "", reset: str = "") -> str:
    """The answer as text, calculator calls in brackets: `[12*3 = 36]`. As an answer grows, so does this, at its end."""
    pieces = [f"{dim}[{text}]{reset}" if is_call else text for is_call, text in split_calls(reply.content)]
    if reply.content and reply.content[-1]["type"] != "text" and not reply.done:
        pieces[-1] = pieces[-1].removesuffix(f"]{reset}")  # the call goes on, or its result follows
    return "".join(pieces)


def answer_once(model: ChatModel, prompt: str, params: SamplingParams) -> None:
    """Print the answer to one prompt: the answer on stdout, notes on stderr."""
    if not prompt.strip():
        raise UserError("prompt= is empty: write the question behind it, prompt='...', or leave it out to chat")
    for note in model.notes:
        print(note, file=sys.stderr)
    _prepare_streams()
    _print_reply(model, [{"role": "user", "content": prompt}], params, Reply(), colours=False)


def chat(model: ChatModel, params: SamplingParams) -> None:
    """Read questions and print answers until /quit or the end of input."""
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    bold, reset = (BOLD, RESET) if colours else ("", "")
    _prepare_streams()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    print("\n".join((f"{bold}{model.name}{reset}: {model.summary}. /help lists the commands.", *model.notes)))
    messages: list[dict] = []
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends the chat)")
            continue
        if line in ("/quit", "/exit", "quit", "exit"):
            return
        if line == "/again" and messages:
            messages.pop()
        elif line.startswith("/"):
            params = _command(line, messages, params)
            continue
        elif line:
            messages.append({"role": "user", "content": line})
        else:
            continue
        reply = Reply()
        try:
            _print_reply(model, messages, params, reply, colours)
        except KeyboardInterrupt:
            print(f"{reset}\n(stopped)")
        messages.append({"role": "assistant", "content": [dict(part) for part in reply.content]})
        params = replace(params, seed=params.seed + 1)  # or /again would say the same again


def _prepare_streams() -> None:
    """A byte that is not text, or a terminal that cannot show a character, must not end a chat."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _command(line: str, messages: list[dict], params: SamplingParams) -> SamplingParams:
    """Carry out a command; the sampling parameters from now on."""
    name, _, value = line[1:].partition(" ")
    if name == "clear":
        messages.clear()
        print("forgotten")
    elif name == "again":
        print("there is no question yet")
    elif name in ("temperature", "top_k"):
        try:
            number = float(value) if name == "temperature" else int(value)
            params = replace(params, **{name: number})
            print(f"{name} = {number}")
        except ValueError as error:
            print(str(error) if isinstance(error, UserError) else f"/{name} needs a number, as in /{name} 1")
    else:
        print(HELP)
    return params


def _print_reply(
    model: ChatModel, messages: Sequence[dict], params: SamplingParams, reply: Reply, colours: bool
) -> None:
    """Stream an answer to stdout and its notes to stderr; `reply` holds what was said, also after an interruption."""
    dim, reset = (DIM, RESET) if colours else ("", "")
    shown, n_notes = "", 0
    with contextlib.closing(stream_reply(model.engine, messages, params, reply)) as replies:
        for _ in replies:
            text = plain_text(reply, dim, reset)
            print(text[len(shown) :], end="\n" if reply.done else "", flush=True)
            shown = text
            for note in reply.notes[n_notes:]:
                print(f"{dim}({note}){reset}", file=sys.stderr, flush=True)
            n_notes = len(reply.notes)
