"""Conversations to train on: chat rows in the formats that are about, and the identity rows that can also be scored."""

from typing import ClassVar

from llm.errors import UserError
from llm.tokenizer.chat_format import validate_conversation
from tasks.base import Task
from tasks.files import need

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # ShareGPT's and others'
PAIRS = (
    ("instruction", "output"),
    ("prompt", "completion"),
    ("question", "response"),
    ("question", "answer"),
)  # a single exchange
FORMATS = "messages, conversations, or one of " + ", ".join(" and ".join(pair) for pair in PAIRS)


def as_conversation(row: dict) -> dict:
    """Return a row with its "messages", whatever format it has.

    messages [{"role", "content"}]; conversations of ShareGPT [{"from", "value"}]; one exchange under the names of
    `PAIRS`, with "input" (Alpaca) behind the instruction, and "system" or "system_prompt" in front.
    """
    if "messages" in row:
        return row
    if isinstance(row.get("conversations"), list):
        return {"messages": [_message(m) for m in row["conversations"]]}
    for asked, answered in PAIRS:
        if asked in row and answered in row:
            parts = [row[asked], *([row["input"]] if row.get("input") else [])]
            text = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else row[asked]
            system = row.get("system") or row.get("system_prompt")
            first = [{"role": "system", "content": system}] if system else []
            exchange = [{"role": "user", "content": text}, {"role": "assistant", "content": row[answered]}]
            return {"messages": first + exchange}
    return row


def _message(message) -> object:
    if not isinstance(message, dict) or "role" in message:
        return message
    role = message.get("from")
    return {"role": ROLES.get(role, role), "content": message.get("value")}


def check_chat(row: dict, where: str) -> None:
    """Raise `UserError` where the messages are missing or the roles do not alternate."""
    conversation = as_conversation(row)
    if "messages" not in conversation:
        raise UserError(f"{where}: no conversation (found: {', '.join(map(str, row)) or 'nothing'}); needed: {FORMATS}")
    need(conversation, where, messages=list)
    validate_conversation(conversation, where)


class Chat(Task):
    """Conversations in any format that `as_conversation` reads, or a bare list of messages per row; training only."""

    kind = "chat"
    generated: ClassVar[dict[str, str]] = {"embedded": "smalltalk"}

    @classmethod
    def check_row(cls, row: dict, where: str) -> None:
        """Raise UserError where the messages are missing or the roles do not alternate."""
        check_chat(row, where)

    def conversation(self, row: dict, index: int) -> dict:
        return {"messages": as_conversation(row)["messages"]}


class Identity(Task):
    """Chat rows about the assistant itself; an answer is in character when it contains all of the row's `keywords`."""

    kind = "generative"
    generated: ClassVar[dict[str, str]] = {"embedded": "identity", "template": "persona"}
    sizes: ClassVar[dict[str, int]] = {"train": 600, "test": 80}  # there are fewer different sentences about oneself

    @classmethod
    def check_row(cls, row: dict, where: str) -> None:
        """Raise UserError where the messages are wrong, or `keywords` is there and not a list of texts."""
        check_chat(row, where)
        keywords = row.get("keywords", [])
        if not isinstance(keywords, list) or not all(isinstance(k, str) and k for k in keywords):
            raise UserError(f"{where}: 'keywords' must be a list of texts")

    @classmethod
    def check_test_row(cls, row: dict, where: str) -> None:
        """Raise UserError for a row that `check_row` refuses, or without keywords: nothing could be scored."""
        cls.check_row(row, where)
        if not row.get("keywords"):
            raise UserError(f"{where}: an evaluation row needs 'keywords': the texts that a right answer contains")

    @classmethod
    def is_scored(cls, row: dict) -> bool:
        """Return whether the row has keywords; training rows need none."""
        return bool(row.get("keywords"))

    def conversation(self, row: dict, index: int) -> dict:
        return {"messages": as_conversation(row)["messages"], "keywords": row.get("keywords", [])}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        text = completion.casefold()
        return bool(conversation["keywords"]) and all(k.casefold() in text for k in conversation["keywords"])
