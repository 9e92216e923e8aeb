"""Read the rows of chat files as conversations: names and roles of the configuration, checks, what is left out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llm.errors import UserError
from llm.tokenizer.chat_format import validate_conversation
from tasks.base import Dropped
from tasks.row_formats import FIELDS, FORMATS, PREFERENCE, ROLES, Reading, format_of, pick, read_messages, takes_turns

STOP_OR_DROP = ("stop", "drop")


@dataclass(frozen=True)
class ChatReader:
    """Reader of the rows of one chat task, as its configuration (`CHAT_KEYS`) says."""

    reading: Reading
    empty_answers: str = "stop"
    false_labels: str = "stop"
    keeps: tuple[str, ...] = ()  # further keys of the row that the type of the task uses, such as keywords

    @classmethod
    def of(cls, spec: Mapping[str, Any], key: str, keeps: tuple[str, ...] = ()) -> "ChatReader":
        """Build the reader of the task that `key`, such as data.tasks.chat, describes. UserError for wrong values."""
        fields, roles = _names(spec, key, "fields"), _names(spec, key, "roles")
        for name in fields:
            if name not in (*FIELDS, *keeps):
                raise UserError(f"{key}.fields.{name}: there is no such field; choose from {', '.join(FIELDS)}")
        for name, role in roles.items():
            if role not in ROLES:
                raise UserError(f"{key}.roles.{name}={role}: must be one of {', '.join(ROLES)}")
        choices = {name: spec.get(name) or "stop" for name in ("empty_answers", "false_labels")}
        for name, choice in choices.items():
            if choice not in STOP_OR_DROP:
                raise UserError(f"{key}.{name}={choice}: must be one of {', '.join(STOP_OR_DROP)}")
        ignore = spec.get("ignore") or ()
        if isinstance(ignore, str) or not all(isinstance(name, str) for name in ignore):
            raise UserError(f"{key}.ignore={ignore}: must be a list of keys, as in [topic,level]")
        reading = Reading(key, fields, roles, tuple(ignore), bool(spec.get("merge_neighbours")))
        return cls(reading, **choices, keeps=keeps)

    @property
    def may_drop(self) -> bool:
        """True where a row that is in order may be left out, so that rows must be read before they can be counted."""
        return "drop" in (self.empty_answers, self.false_labels)

    def read(self, row: Any, where: str) -> dict:
        """Return {"messages": [...]} of a row, and the keys that the task's type uses.

        row: an object of any format in the table, or a bare list of messages. `check_chat` looks at the result. Raises
        UserError, beginning with `where` (file and row), for a row that cannot be read, and Dropped for one that the
        configuration leaves out.
        """
        try:
            return self._conversation(row)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _conversation(self, row: Any) -> dict:
        if not self.reading.fields and takes_turns(row):  # nothing to mend or refuse
            return row
        if isinstance(row, list):
            return {"messages": self.tidied(read_messages(row, self.reading, "the row"))}
        if not isinstance(row, Mapping):
            raise UserError(f"a row must be a JSON object (or a list of messages), found {type(row).__name__}")
        row = self.renamed(row)
        form = format_of(row)
        if form is None:
            raise UserError(self._no_conversation(row))
        messages = form.read(row, self.reading)
        self.reading.check_keys(row, (*form.needs, *form.uses, *self.keeps), "the row")
        self._check_label(row)
        return {"messages": self.tidied(messages)} | {key: row[key] for key in self.keeps if row.get(key) is not None}

    def renamed(self, row: Mapping) -> Mapping:
        """Return the row with the columns of `fields` under the names of the table.

        What else stands in an object that they lead into has its whole name, such as `talk.tools`.
        """
        fields = self.reading.fields
        if not fields:
            return row
        rest = _left([[column] if column in row else column.split(".") for column in fields.values()], row)
        for name, column in fields.items():
            if rest.get(name) and name not in self.reading.ignore:
                raise UserError(f"{self.reading.key}.fields.{name}={column}, but the row has a {name!r} of its own")
            rest[name] = pick(row, column, f"{self.reading.key}.fields.{name}={column}")
        return rest

    def _no_conversation(self, row: Mapping) -> str:
        found, key = ", ".join(map(str, row)) or "nothing", self.reading.key
        if "chosen" in row or "rejected" in row:
            return f"'chosen' and 'rejected': {PREFERENCE}"
        needed = ", ".join(" and ".join(form.needs) for form in FORMATS)
        plain = " Text without roles is for pretraining: data.path=<file>." if "text" in row else ""
        return (
            f"no conversation (found: {found}); needed: {needed}. Columns of other names: "
            f"{key}.fields={{user: question, assistant: answer}}.{plain}"
        )

    def _check_label(self, row: Mapping) -> None:
        """Refuse or leave out a row whose answer is marked as wrong (KTO)."""
        label = row.get("label")
        if label is None or "label" in self.reading.ignore:
            return
        text = str(label).strip().casefold()
        if text in ("true", "1", "1.0", ""):
            return
        if text not in ("false", "0", "0.0"):
            raise UserError(
                f"'label' is {label!r}: true marks a good answer and false a wrong one; where it means nothing, "
                f"{self.reading.key}.ignore=[label]"
            )
        if self.false_labels == "drop":
            raise Dropped("label false")
        raise UserError(
            "'label' is false: the answer is marked as wrong, and would be trained as a good one. Leave such rows out "
            f"with {self.reading.key}.false_labels=drop"
        )

    def tidied(self, messages: list[dict]) -> list[dict]:
        """Return the messages with neighbours joined and without an empty system message; look for empty ones."""
        if messages and messages[0]["role"] == "system" and _is_blank(messages[0]["content"]):
            messages = messages[1:]
        if any(first["role"] == second["role"] for first, second in pairwise(messages)):
            messages = list(self._joined(messages))
        for number, message in enumerate(messages, start=1):
            if not _is_blank(message["content"]):
                continue
            if _answers(message) and self.empty_answers == "drop":
                raise Dropped("empty answer")
            problem = f"message {number} ({message['role']}) is empty"
            if _answers(message):
                problem += ": it would teach to answer nothing. Leave such rows out with "
                raise UserError(f"{problem}{self.reading.key}.empty_answers=drop")
            raise UserError(f"{problem}. {self.reading.way_out()}")
        return messages

    def _joined(self, messages: list[dict]) -> Iterator[dict]:
        """Yield the messages, neighbours of one role joined with a blank line between, or refused."""
        for number, (first, second) in enumerate(pairwise(messages), start=1):
            if first["role"] == second["role"] and not self.reading.merge_neighbours:
                raise UserError(
                    f"message {number + 1} has role {second['role']!r} as message {number} has; join such neighbours "
                    f"with {self.reading.key}.merge_neighbours=true"
                )
        group: list[dict] = []
        for message in [*messages, None]:
            if group and (message is None or message["role"] != group[0]["role"]):
                yield group[0] if len(group) == 1 else _join(group)
                group = []
            group += [message] * (message is not None)


def check_chat(conversation: dict, where: str) -> None:
    """Raise UserError unless the roles alternate and an answer is trained; `where` (file and row) leads the message."""
    validate_conversation(conversation, where)
    if not any(message.get("train", True) for message in conversation["messages"] if _answers(message)):
        raise UserError(f"{where}: every answer has weight 0, so nothing of the row would be trained")


def _join(group: list[dict]) -> dict:
    """Return neighbouring messages of one role as one."""
    if len({message.get("train", True) for message in group}) > 1:
        raise UserError("neighbouring answers of different weights cannot be joined")
    contents = [message["content"] for message in group]
    if all(isinstance(content, str) for content in contents):
        return group[0] | {"content": "\n\n".join(contents)}
    parts: list = []
    for content in contents:
        parts += [{"type": "text", "text": "\n\n"}] if parts else []
        parts += content if isinstance(content, list) else [{"type": "text", "text": content}]
    return group[0] | {"content": parts}


def _answers(message: Mapping) -> bool:
    return message["role"] == "assistant"


def _left(taken: list[list[str]], thing: Mapping, before: str = "") -> dict:
    """Return the keys of an object without those that the paths in `taken` lead to, each behind the text `before`."""
    left = {}
    for key, value in thing.items():
        inner = [path[1:] for path in taken if path[0] == key]
        if not inner:
            left[before + key] = value
        elif all(inner) and isinstance(value, Mapping):
            left |= _left(inner, value, f"{before}{key}.")
    return left


def _is_blank(content: Any) -> bool:
    """Return whether a content says nothing: no character that is seen. Wrong types are not looked at."""
    if isinstance(content, str):
        return not content[:1].isalnum() and not any(char.isprintable() and not char.isspace() for char in content)
    if not isinstance(content, list):
        return False
    return all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) and _is_blank(part["text"]) for part in content
    )


def _names(spec: Mapping[str, Any], key: str, name: str) -> dict[str, str]:
    names = spec.get(name) or {}
    if not isinstance(names, Mapping):
        raise UserError(f"{key}.{name}={names}: write names and values, as in {{user: question}}")
    names = dict(names)
    for ours, theirs in names.items():
        if not isinstance(theirs, str) or not theirs:
            raise UserError(f"{key}.{name}.{ours}={theirs}: must be a name")
    return names
