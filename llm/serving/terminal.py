"""Chat in the terminal: streaming answers, commands, several lines, Ctrl-C to stop an answer. Clean in a pipe.

Somebody at a terminal gets a prompt and a history of what was typed. In a pipe every line of stdin is a question, and
stdout holds the answers only.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.serving import commands
from llm.serving.chat import ChatModel, Message, Reply
from llm.serving.interrupts import CtrlC
from llm.serving.models import Models
from llm.serving.saved_chat import Chat, Thread
from llm.tokenizer.chat_format import split_calls
from llm.utils.format import harmless

DIM, BOLD, RESET = "\033[2m", "\033[1m", "\033[0m"
FENCE = '"""'  # before and behind a message of several lines
MOST_REMEMBERED = 1_000  # lines of history


def plain_text(reply: Reply, dim: str = "", reset: str = "", clean: Callable[[str], str] = str) -> str:
    """The answer as text, calculator calls in brackets: `[12*3 = 36]`. As an answer grows, so does this, at its end.

    clean: is applied to what the model wrote, sign by sign.
    """
    found = ((is_call, clean(text)) for is_call, text in split_calls(reply.content))
    pieces = [f"{dim}[{text}]{reset}" if is_call else text for is_call, text in found]
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
    print_reply(model, [{"role": "user", "content": prompt}], params, Reply())


def chat(models: Models, params: SamplingParams, ctrl_c: CtrlC) -> None:
    """Read questions and print answers until /quit or the end of input."""
    _prepare_streams()
    terminal = Terminal(ctrl_c)
    session = commands.Session(models, Chat([Thread(models.first)]), params, terminal.say)
    if terminal.is_interactive:
        warm_up(session.model)
        ctrl_c.heeded()
        title = f"{terminal.bold}{session.model.name}{terminal.reset}"
        terminal.say(f"{title}: {session.model.summary}. /help lists the commands.")
    for note in session.model.notes:
        terminal.say(note)
    with terminal.history():
        while (line := terminal.read()) is not None:
            _turn(terminal, session, line)
            if session.is_over:
                return


def _turn(terminal: "Terminal", session: commands.Session, line: str) -> None:
    """Carry out a command, or answer a question."""
    try:
        if not session.take(line):
            return
    except UserError as error:
        if not terminal.is_interactive:
            raise
        terminal.say(str(error))
        return
    reply = Reply()
    if not print_reply(session.model, session.chat.prompt(), session.params, reply, terminal):
        terminal.say(f"{terminal.reset}\n(stopped)")
    session.answered(reply)


def warm_up(model: ChatModel) -> None:
    """Let the model say two tokens to nobody: what is loaded and compiled at the first answer is then there."""
    for _ in model.answer([{"role": "user", "content": "Hello"}], SamplingParams(temperature=0.0, max_new_tokens=2)):
        pass


def print_reply(
    model: ChatModel,
    messages: Sequence[Message],
    params: SamplingParams,
    reply: Reply,
    terminal: "Terminal | None" = None,
) -> bool:
    """Stream an answer into `reply` and to stdout, its notes to stderr. Return False if Ctrl-C stopped it."""
    dim, reset = (terminal.dim, terminal.reset) if terminal else ("", "")
    shown, n_notes, clean = "", 0, harmless if sys.stdout.isatty() else str  # a pipe gets the answer as it is
    with contextlib.closing(model.answer(messages, params, reply)) as replies:
        for _ in replies:
            text = plain_text(reply, dim, reset, clean)
            print(text[len(shown) :], end="\n" if reply.done else "", flush=True)
            shown = text
            for note in reply.notes[n_notes:]:
                print(f"{dim}({harmless(note)}){reset}", file=sys.stderr, flush=True)
            n_notes = len(reply.notes)
            if terminal and terminal.ctrl_c.heeded() and not reply.done:
                return False
    return True


class Terminal:
    """Reader of what is typed or piped in, and writer of the chat's own messages: in a pipe they go to stderr."""

    def __init__(self, ctrl_c: CtrlC):
        self.ctrl_c = ctrl_c
        self.is_interactive = sys.stdin.isatty()
        on_screen = self.is_interactive and sys.stdout.isatty()
        self._out = sys.stdout if on_screen else sys.stderr
        self._reads_by_line_editor = on_screen
        colours = on_screen and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self.dim, self.bold, self.reset = (DIM, BOLD, RESET) if colours else ("", "", "")

    def say(self, text: str) -> None:
        """Print a message of the chat itself."""
        print(text, file=self._out, flush=True)

    def read(self) -> str | None:
        """Return the next message or command, which may have several lines (see `commands.HELP`); None at the end."""
        while True:
            try:
                with self.ctrl_c.at_the_prompt():
                    return self._message()
            except EOFError:
                if self.is_interactive:
                    self.say("")
                return None
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                self.say("\n(/quit or Ctrl-D ends the chat)")

    def _message(self) -> str:
        line = self._line("\n> ")
        if line.lstrip().startswith(FENCE):
            text = line.lstrip().removeprefix(FENCE)
            with contextlib.suppress(EOFError):
                while FENCE not in text:
                    text += "\n" + self._line(". ")
            return text.partition(FENCE)[0].strip("\n")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._line(". ")
        return line.strip()

    def _line(self, prompt: str) -> str:
        """Return a line without its end. Raises EOFError behind the last one."""
        if self._reads_by_line_editor:
            return input(prompt)
        if self.is_interactive:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    @contextlib.contextmanager
    def history(self):
        """Edit lines, and remember them over chats, where there is a line editor."""
        try:
            if not self._reads_by_line_editor:
                raise ImportError
            import readline
        except ImportError:
            yield
            return
        path = history_file()
        readline.set_history_length(MOST_REMEMBERED)
        with contextlib.suppress(OSError):
            readline.read_history_file(path)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(path)
                path.chmod(0o600)


def history_file() -> Path:
    """Return the file that keeps what was typed, in the user's folder for such state."""
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state) / "fathom" / "chat_history"


def _prepare_streams() -> None:
    """A byte that is not text, or a terminal that cannot show a character, must not end a chat."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
