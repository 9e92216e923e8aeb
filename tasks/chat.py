"""Conversations to train on: chat rows in the formats that are about, and the identity rows that can also be scored."""

from collections.abc import Mapping
from typing import Any, ClassVar

from llm.errors import UserError
from tasks.base import RowReader, Task
from tasks.chat_rows import ChatReader, check_chat


class Chat(Task):
    """Conversations in any format of `tasks.row_formats`, or a bare list of messages per row; training only."""

    kind = "chat"
    generated: ClassVar[dict[str, str]] = {"embedded": "smalltalk"}

    @classmethod
    def row_reader(cls, spec: Mapping[str, Any], key: str) -> RowReader:
        """Return the reader of chat rows of every format, as `fields`, `roles` and the like say."""
        return ChatReader.of(spec, key)

    @classmethod
    def check_row(cls, row: dict, where: str) -> None:
        """Raise UserError where the roles do not alternate or no answer is trained."""
        check_chat(row, where)

    def conversation(self, row: dict, index: int) -> dict:
        return {"messages": row["messages"]}


class Identity(Task):
    """Chat rows about the assistant itself; an answer is in character when it contains all of the row's `keywords`."""

    kind = "generative"
    generated: ClassVar[dict[str, str]] = {"embedded": "identity", "template": "persona"}
    sizes: ClassVar[dict[str, int]] = {"train": 600, "test": 80}  # there are fewer different sentences about oneself

    @classmethod
    def row_reader(cls, spec: Mapping[str, Any], key: str) -> RowReader:
        """Return the reader of chat rows of every format, which keeps `keywords` and `subject`."""
        return ChatReader.of(spec, key, keeps=("keywords", "subject"))

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
        return {"messages": row["messages"], "keywords": row.get("keywords", [])}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        text = completion.casefold()
        return bool(conversation["keywords"]) and all(k.casefold() in text for k in conversation["keywords"])
