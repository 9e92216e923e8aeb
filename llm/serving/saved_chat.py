"""Chats as JSON: what `/save` writes, what the page keeps in the browser and exports, and what both read again."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.serving.chat import Message
from llm.tokenizer.chat_format import PART_TYPES, validate_conversation
from llm.utils.files import read_json, write_json
from llm.utils.shapes import either, listing, mapping, one_of, text

MOST_MESSAGES = 500
MOST_BYTES = 1 << 20

_part = mapping({"type": one_of(*PART_TYPES), "text": text}, needs=("type", "text"))
_message = mapping(
    {"role": one_of("user", "assistant"), "content": either(text, listing(_part)), "notes": listing(text, (0, 20))},
    needs=("role", "content"),
)
_thread = mapping({"model": text, "messages": listing(_message, (0, MOST_MESSAGES))}, needs=("model", "messages"))
FORM = mapping({"system": text, "threads": listing(_thread, (1, 2))}, needs=("system", "threads"))


@dataclass
class Thread:
    """Conversation with one model, run/stage."""

    model: str
    messages: list[Message] = field(default_factory=list)


@dataclass
class Chat:
    """One conversation, or two side by side that share their questions. system: text before the first one, or ""."""

    threads: list[Thread]
    system: str = ""

    def prompt(self, number: int = 0) -> list[Message]:
        """Return the messages of a thread as its model reads them, the system message first."""
        head = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return [*head, *self.threads[number].messages]

    def to_dict(self) -> dict[str, Any]:
        """Return the chat as JSON holds it."""
        return {"system": self.system, "threads": [vars(thread) for thread in self.threads]}


def chat_from(value: Any, where: str) -> Chat:
    """Return the chat that JSON holds. Raises UserError, beginning with `where`, for anything else."""
    FORM(value, where)
    for thread in value["threads"]:
        if thread["messages"]:
            validate_conversation(thread, where, complete=False)
    threads = [Thread(thread["model"], thread["messages"]) for thread in value["threads"]]
    return Chat(threads, value["system"])


def load_chat(path: Path) -> Chat:
    """Read a chat from a file. Raises UserError where there is none."""
    value = read_json(path, MOST_BYTES)
    if value is None:
        raise UserError(f"{path}: there is no such file")
    return chat_from(value, str(path))


def save_chat(path: Path, chat: Chat) -> None:
    """Write a chat to a file, a new one or an older chat. Raises UserError where it holds something else."""
    if path.exists():
        try:
            load_chat(path)
        except UserError:
            raise UserError(f"{path} is there already and holds no chat; choose another name") from None
    write_json(path, chat.to_dict())
