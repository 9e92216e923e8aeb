"""Conversations to train on: chat rows in the SmolTalk format, and the identity rows that can also be scored."""

from llm.chat import validate_conversation
from llm.errors import UserError
from tasks.base import Task
from tasks.files import need


def check_chat(row: dict, where: str) -> None:
    """Raise `UserError` where the messages are missing or the roles do not alternate."""
    need(row, where, messages=list)
    validate_conversation(row, where)


def check_identity(row: dict, where: str) -> None:
    """As `check_chat`; keywords, where present, must be a list of texts."""
    check_chat(row, where)
    keywords = row.get("keywords", [])
    if not isinstance(keywords, list) or not all(isinstance(k, str) and k for k in keywords):
        raise UserError(f"{where}: 'keywords' must be a list of texts")


def check_scored_identity(row: dict, where: str) -> None:
    """As `check_identity` for evaluation rows: without keywords nothing could be scored."""
    check_identity(row, where)
    if not row.get("keywords"):
        raise UserError(f"{where}: an evaluation row needs 'keywords': the texts that a right answer contains")


class Chat(Task):
    """Rows `{"messages": [...]}` (or a bare list of messages per line), for training only."""

    kind = "chat"

    def conversation(self, row: dict, index: int) -> dict:
        return {"messages": row["messages"]}


class Identity(Task):
    """Chat rows about the assistant itself; an answer is in character when it contains all of the row's `keywords`."""

    kind = "generative"

    def conversation(self, row: dict, index: int) -> dict:
        return {"messages": row["messages"], "keywords": row.get("keywords", [])}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        text = completion.casefold()
        return bool(conversation["keywords"]) and all(k.casefold() in text for k in conversation["keywords"])
