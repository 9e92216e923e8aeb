"""Word problems in the GSM8K format: calculator marks become tool calls, the answer stands after `####`."""

import re
from typing import ClassVar

from llm.errors import UserError
from tasks.base import Task, dialogue
from tasks.files import need

MARK = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
ANSWER = re.compile(r"####\s*(-?[\d.,]*\d)")


def extract_answer(text: str) -> str | None:
    """Return the number after the first `####`, without thousands separators; None where there is none."""
    match = ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None


def same_number(a: str | None, b: str | None) -> bool:
    """Return whether two extracted answers are the same number (12 and 12.0 are); None equals nothing."""
    if a is None or b is None:
        return False
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


def answer_parts(answer: str) -> list[dict]:
    """Return the content parts of an answer: each `<<expression=result>>` becomes a python and a python_output part."""
    parts: list[dict] = []
    end = 0
    for match in MARK.finditer(answer):
        parts += [
            {"type": "text", "text": answer[end : match.start()]},
            {"type": "python", "text": match.group(1)},
            {"type": "python_output", "text": match.group(2)},
        ]
        end = match.end()
    parts.append({"type": "text", "text": answer[end:]})
    return [part for part in parts if part["text"]]


def final_text(conversation: dict) -> str:
    """Return the last text part of the assistant's answer."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


class GSM8K(Task):
    """Rows `{question, answer}`; a completion is right when its number after `####` equals the reference's."""

    kind = "generative"
    generated: ClassVar[dict[str, str]] = {"embedded": "arithmetic"}

    @classmethod
    def check_row(cls, row: dict, where: str) -> None:
        """Raise UserError for a row without a question or without a final `#### number`."""
        need(row, where, question=str, answer=str)
        if extract_answer(row["answer"]) is None:
            raise UserError(f"{where}: the answer does not end with '#### <number>'")

    def conversation(self, row: dict, index: int) -> dict:
        return {"messages": dialogue(row["question"], answer_parts(row["answer"]))}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return same_number(extract_answer(final_text(conversation)), extract_answer(completion))
