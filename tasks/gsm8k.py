"""Word problems in the GSM8K format: calculator marks become tool calls, the answer stands after `####`."""

import re
from typing import ClassVar

from llm.errors import UserError
from llm.tokenizer.chat_format import content_text
from tasks.base import BESIDE_QUESTION, Task, dialogue, shortened, visible
from tasks.files import need
from tasks.numbers import Number, parse_number, same_number

MARK = re.compile(r"<<([^<>=]*)=([^<>]*)>>")


def extract_answer(text: str) -> Number | None:
    """Return the number on the line after the last `####`, calculator calls left out; None where there is none."""
    _, marks, answer = MARK.sub("", visible(text)).rpartition("####")
    lines = answer.strip().splitlines() if marks else []
    return parse_number(lines[0]) if lines else None


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


class GSM8K(Task):
    """Rows `{question, answer}`; a completion is right when its number after `####` equals the reference's."""

    kind = "generative"
    lost = BESIDE_QUESTION
    generated: ClassVar[dict[str, str]] = {"embedded": "arithmetic"}

    @classmethod
    def check_row(cls, row: dict, where: str) -> None:
        """Raise UserError for a row without a question or without a final `#### number` that can be read whole."""
        need(row, where, question=str, answer=str)
        if extract_answer(row["answer"]) is None:
            end = shortened(row["answer"].rpartition("####")[2].strip())
            raise UserError(f"{where}: the answer does not end with '#### <number>' and one number only, found {end}")

    def conversation(self, row: dict, index: int) -> dict:
        return {"messages": dialogue(row["question"], answer_parts(row["answer"]))}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        own = content_text(conversation["messages"][-1]["content"])
        return same_number(extract_answer(own), extract_answer(completion))
