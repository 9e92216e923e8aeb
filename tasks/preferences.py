"""Preferences: of two answers to a prompt the better one, or one answer and whether it is good."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from llm.data.embedded.preferences import rule_score
from llm.errors import UserError
from llm.tokenizer.chat_format import validate_conversation
from tasks.base import RowReader, Task, shortened
from tasks.chat_rows import ChatReader
from tasks.row_formats import read_messages

KEYS = ("prompt", "chosen", "rejected", "completion", "label", "messages", "system", "system_prompt")
RULE = ("rule", "value", "others")  # of generated rows
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class PreferenceReader:
    """Reader of the rows of a preference source: pairs in three forms, and labelled answers.

    {prompt, chosen, rejected}: texts, or lists of messages, in which `chosen` and `rejected` may repeat the prompt
    (UltraFeedback). {chosen, rejected} without a prompt: lists of messages, or transcripts whose turns begin with
    "Human:" and "Assistant:" (Anthropic HH). {prompt, completion, label}: label true for a good answer, false for a bad
    one.
    """

    def __init__(self, spec: Mapping[str, Any], key: str) -> None:
        chat = ChatReader.of(spec, key, keeps=KEYS)
        self._chat, self._reading, self.may_drop = chat, chat.reading, chat.may_drop

    def read(self, row: Any, where: str) -> dict:
        """Return {"messages": the prompt, "chosen", "rejected"} or {"messages", "completion", "label"} of a row.

        All but the label are lists of messages. Raises UserError, beginning with `where`, for a row that cannot be
        used, and Dropped for one that the configuration leaves out.
        """
        try:
            if not isinstance(row, Mapping):
                raise UserError(f"a row must be a JSON object, found {type(row).__name__}")
            row = self._chat.renamed(row)
            self._reading.check_keys(row, (*KEYS, *RULE), "the row")
            return self._labelled(row) if "completion" in row and row["completion"] is not None else self._pair(row)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _pair(self, row: Mapping) -> dict:
        if row.get("chosen") is None or row.get("rejected") is None:
            found = ", ".join(map(str, row)) or "nothing"
            raise UserError(
                f"no preference (found: {found}); needed: chosen and rejected, with or without prompt, or prompt, "
                f"completion and label. Columns of other names: {self._reading.key}.fields={{chosen: <column>}}"
            )
        chosen, rejected = (self._conversation(row, name) for name in ("chosen", "rejected"))
        if chosen == rejected:
            raise UserError("'chosen' and 'rejected' are equal, so nothing is preferred")
        if row.get("messages") and self._tidy(read_messages(row["messages"], self._reading)) != chosen:
            raise UserError("'messages' beside 'chosen' is another conversation, and would be lost")
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        while shared and chosen[shared - 1]["role"] != "user":
            shared -= 1
        if not shared:
            raise UserError("'chosen' and 'rejected' have no question in common")
        return {"messages": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}

    def _labelled(self, row: Mapping) -> dict:
        label = row.get("label")
        if label not in (True, False) or isinstance(label, str | float):
            raise UserError(
                f"'label' is {shortened(str(label)) if isinstance(label, str) else label}: it must be true for a good "
                "answer and false for a bad one, not a text or null"
            )
        messages = self._conversation(row, "completion")
        return {"messages": messages[:-1], "completion": messages[-1:], "label": bool(label)}

    def _conversation(self, row: Mapping, name: str) -> list[dict]:
        """Return the whole conversation, prompt and answer, that ends with the answer in `row[name]`."""
        prompt, answer = row.get("prompt"), row[name]
        if isinstance(answer, str) and not prompt:
            messages = transcript(answer, name)
        else:
            before = [] if not prompt else self._messages(prompt, "prompt", "user")
            own = self._messages(answer, name, "assistant")
            messages = own if before and own[: len(before)] == before else before + own
        messages = self._tidy(self._with_system(row, messages))
        validate_conversation({"messages": messages})
        if len(messages) < 2:
            raise UserError(f"{name!r} has no question before its answer")
        return messages

    def _messages(self, value: Any, name: str, role: str) -> list[dict]:
        """Return a text as one message of `role`, and a list of messages as messages that are read as a chat's are."""
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        return read_messages(value, self._reading, name)

    @staticmethod
    def _with_system(row: Mapping, messages: list[dict]) -> list[dict]:
        for key in ("system", "system_prompt"):
            if isinstance(row.get(key), str) and row[key].strip():
                return [{"role": "system", "content": row[key]}, *messages]
        return messages

    def _tidy(self, messages: list[dict]) -> list[dict]:
        return self._chat.tidied([{"role": m["role"], "content": m["content"]} for m in messages])


def transcript(text: str, name: str) -> list[dict]:
    """Return the turns of a text in which "Human:" and "Assistant:" begin them; UserError for a text without turns."""
    pieces = _TURN.split(text)
    if len(pieces) < 5 or pieces[0].strip():
        raise UserError(
            f"{name!r} without a prompt must be a list of messages, or a transcript whose turns begin with Human: and "
            f"Assistant:, found {shortened(text)}"
        )
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return [{"role": _SPEAKERS[who], "content": content.strip()} for who, content in turns]


class Preferences(Task):
    """Preferences in the forms of `PreferenceReader`; generated ones come with the rule that made them."""

    kind = "preference"
    generated: ClassVar[dict[str, str]] = {"embedded": "preferences"}
    sizes: ClassVar[dict[str, int]] = {"train": 2_000, "test": 200}

    @classmethod
    def row_reader(cls, spec: Mapping[str, Any], key: str) -> RowReader:
        """Return the reader of preferences of every form, as `fields`, `roles` and the like say."""
        return PreferenceReader(spec, key)

    @classmethod
    def generate(cls, source: str, split: str, size: int, **options: Any) -> list[dict]:
        """Return generated rows as `PreferenceReader` reads them, with what their rule needs."""
        reader = PreferenceReader({}, "data.preferences")
        rows = super().generate(source, split, size, **options)
        return [reader.read(row, "row") | {key: row[key] for key in RULE if key in row} for row in rows]

    @classmethod
    def is_scored(cls, row: dict) -> bool:
        """Return whether free answers to the row's prompt can be scored: it comes from a rule."""
        return "rule" in row

    def conversation(self, row: dict, index: int) -> dict:
        return row

    def rewards(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[float]:
        """Return what the rules of the rows give each completion, numbers of any range."""
        return [rule_score(row, text) for row, text in zip(conversations, completions, strict=True)]

    def score(self, row: dict, answer: str) -> float | None:
        """Return how good an answer to the row's prompt is by the rule that made the row; None without a rule."""
        return rule_score(row, answer) if "rule" in row else None
