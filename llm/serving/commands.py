"""Commands of the chat in the terminal, /temp 0.8 and the like, and the conversation that they act on."""

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.serving.chat import ChatModel, Reply
from llm.serving.models import Models
from llm.serving.saved_chat import MOST_MESSAGES, Chat, Thread, load_chat, save_chat

HELP = '''\
/again          another answer to the last question
/undo           take the last question and its answer back
/clear          forget the conversation
/system TEXT    what the model is told before everything else; /system off removes the text
/temp X         temperature; 0 = always the most likely token
/topk N         sample among the N most likely tokens; 0 = all
/topp X         sample among the likeliest tokens that together have this probability; 1 = all
/max N          length limit of an answer in tokens
/seed N         seed of the next answer
/stage NAME     go on with another model, a stage of this run or run/stage; /stage lists them
/save FILE      write the conversation to a file; /load FILE reads one
/help  /quit    Ctrl-C stops an answer, Ctrl-D ends the chat
A message of several lines begins and ends with """, or has a \\ at the end of each line. // begins one with a /.'''
NUMBERS = {  # command -> field of SamplingParams, type
    "temp": ("temperature", float),
    "topk": ("top_k", int),
    "topp": ("top_p", float),
    "max": ("max_new_tokens", int),
    "seed": ("seed", int),
}
ALIASES = {"exit": "quit", "retry": "again"} | {field: name for name, (field, _) in NUMBERS.items()}


class Session:
    """A chat in progress: its model, conversation and settings; `say` shows what a command has to report."""

    def __init__(self, models: Models, chat: Chat, params: SamplingParams, say: Callable[[str], None]):
        self.models, self.chat, self.params, self.say = models, chat, params, say
        self.model: ChatModel = models.get(chat.threads[0].model)
        self.is_over = False

    @property
    def messages(self) -> list[dict]:
        """Messages of the conversation."""
        return self.chat.threads[0].messages

    def take(self, line: str) -> bool:
        """Carry out a command or append a question; return whether an answer is wanted now. UserError: it was wrong."""
        if line in ("quit", "exit"):
            line = f"/{line}"
        if line.startswith("/") and not line.startswith("//"):
            return self._command(line[1:])
        if not line.strip():
            return False
        if len(self.messages) >= MOST_MESSAGES:
            raise UserError(f"a chat has at most {MOST_MESSAGES} messages: /save it, then /clear")
        self.messages.append({"role": "user", "content": line.removeprefix("/") if line[0] == "/" else line})
        return True

    def answered(self, reply: Reply) -> None:
        """Append an answer, whole or stopped."""
        self.messages.append(reply.as_message())
        self.params = replace(self.params, seed=self.params.seed + 1)  # or /again would say it again

    def _command(self, line: str) -> bool:
        name, _, value = line.partition(" ")
        name, value = ALIASES.get(name, name), value.strip()
        if name in NUMBERS:
            self._set(name, value)
        elif name in COMMANDS:
            return bool(COMMANDS[name](self, value))
        else:
            known = difflib.get_close_matches(name, [*COMMANDS, *NUMBERS], n=1)
            hint = f" Did you mean /{known[0]}?" if known else ""
            raise UserError(f"there is no command /{name}.{hint} /help lists them; // begins a message with a /")
        return False

    def _set(self, name: str, value: str) -> None:
        field, kind = NUMBERS[name]
        try:
            number = kind(value)
        except ValueError:
            present = getattr(self.params, field)
            raise UserError(f"/{name} needs a number, as in /{name} {present:g}, the present one") from None
        self.params = replace(self.params, **{field: number})
        self.say(f"{field} = {number}")

    def _again(self, _: str) -> bool:
        if not self.messages:
            raise UserError("there is no question yet")
        self._drop_answer()
        return True

    def _undo(self, _: str) -> None:
        if not self.messages:
            raise UserError("there is nothing to take back")
        self._drop_answer()
        question = self.messages.pop()["content"]
        self.say(f"taken back: {_beginning(question)}")

    def _drop_answer(self) -> None:
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()

    def _clear(self, _: str) -> None:
        self.messages.clear()
        self.say("forgotten")

    def _system(self, value: str) -> None:
        if value:
            self.chat.system = "" if value == "off" else value
        self.say(f"system: {self.chat.system}" if self.chat.system else "there is no system message")

    def _stage(self, value: str) -> None:
        if not value:
            marked = [f"{'*' if name == self.model.name else ' '} {name}" for name in self.models.names()]
            self.say("\n".join(marked))
            return
        run = self.model.name.partition("/")[0]
        self.model = self.models.get(value if "/" in value else f"{run}/{value}")
        self.chat.threads[0].model = self.model.name
        self.say("\n".join((f"{self.model.name}: {self.model.summary}", *self.model.notes)))

    def _save(self, value: str) -> None:
        save_chat(_file("save", value), self.chat)
        self.say(f"saved: {value}")

    def _load(self, value: str) -> None:
        read = load_chat(_file("load", value))
        messages = read.threads[0].messages
        if messages and messages[-1]["role"] == "user":
            self.say(f"left out: a question without an answer at the end: {_beginning(messages.pop()['content'])}")
        self.chat = Chat([Thread(self.model.name, messages)], read.system)
        self.say(f"loaded: {len(self.messages)} messages with {read.threads[0].model}; {self.model.name} goes on")

    def _help(self, _: str) -> None:
        self.say(HELP)

    def _quit(self, _: str) -> None:
        self.is_over = True


COMMANDS = {
    "again": Session._again,
    "undo": Session._undo,
    "clear": Session._clear,
    "system": Session._system,
    "stage": Session._stage,
    "save": Session._save,
    "load": Session._load,
    "help": Session._help,
    "quit": Session._quit,
}


def _beginning(question: str) -> str:
    """Return the first words of a question, in a line."""
    return " ".join(question.split())[:60]


def _file(name: str, value: str) -> Path:
    if not value:
        raise UserError(f"/{name} needs a file, as in /{name} chat.json")
    return Path(value).expanduser()
