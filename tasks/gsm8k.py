"""Word problems in the GSM8K format: calculator marks become tool calls, the answer stands after `####`.

With `answer_form: think` it stands in `<think>working</think><answer>42</answer>` instead: in the rows to train on, in
the instruction behind each question, and in what is judged right and rewarded.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from llm.errors import UserError
from llm.tokenizer.chat_format import content_text
from tasks.base import BESIDE_QUESTION, Task, dialogue, shortened, visible
from tasks.files import need
from tasks.numbers import Number, parse_number, same_number
from tasks.stated import form_reward, reference, same_answer, tagged

THINK = "Think between <think> and </think>. Then write the number between <answer> and </answer>."  # to the model
MARK = re.compile(r"<<([^<>=]*)=([^<>]*)>>")


def extract_answer(text: str) -> Number | None:
    """Return the number on the line after the last `####`, calculator calls left out; None where there is none."""
    line = answer_line(text)
    return parse_number(line) if line else None


def answer_line(text: str) -> str:
    """Return the line after the last `####` of an answer, without calculator calls; "" where there is none."""
    _, marks, answer = MARK.sub("", visible(text)).rpartition("####")
    lines = answer.strip().splitlines() if marks else []
    return lines[0].strip() if lines else ""


def thought_through(answer: str) -> list[dict]:
    """Return the content parts of an answer in the form `<think>working</think><answer>42</answer>`."""
    working = answer_parts(answer.rpartition("####")[0].rstrip())
    end = f"</think><answer>{answer_line(answer)}</answer>"
    return [{"type": "text", "text": "<think>"}, *working, {"type": "text", "text": end}]


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
    answer_forms = ("think",)

    @classmethod
    def check_row(cls, row: dict, where: str) -> None:
        """Raise UserError for a row without a question or without a final `#### number` that can be read whole."""
        need(row, where, question=str, answer=str)
        if extract_answer(row["answer"]) is None:
            end = shortened(row["answer"].rpartition("####")[2].strip())
            raise UserError(f"{where}: the answer does not end with '#### <number>' and one number only, found {end}")

    def conversation(self, row: dict, index: int) -> dict:
        if self.answer_form == "think":
            return {"messages": dialogue(f"{row['question']}\n{THINK}", thought_through(row["answer"]))}
        return {"messages": dialogue(row["question"], answer_parts(row["answer"]))}

    def number_of(self, text: str) -> Number | None:
        """Return the number that an answer states where the form of the task has it; None where there is none."""
        return extract_answer(text) if self.answer_form is None else parse_number(tagged(text) or "")

    def evaluate(self, conversation: dict, completion: str) -> bool:
        if self.answer_form is not None:
            return same_answer(reference(conversation), tagged(completion))
        own = content_text(conversation["messages"][-1]["content"])
        return same_number(extract_answer(own), extract_answer(completion))

    def rewards(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[float]:
        """Return 1 for each right answer, else 0; with `answer_form: think` also 0.2 for the form."""
        if self.answer_form is None:
            return super().rewards(conversations, completions)
        return [form_reward(*pair) for pair in zip(conversations, completions, strict=True)]
