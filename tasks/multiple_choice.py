"""Multiple choice questions from ARC rows and MMLU rows, answered with one letter."""

from collections.abc import Sequence
from string import ascii_uppercase
from typing import ClassVar

from llm.errors import UserError
from tasks.base import BESIDE_QUESTION, Task, dialogue
from tasks.files import need

INSTRUCTION = "Answer with the letter only."
MOST_CHOICES = len(ascii_uppercase)


def render_question(question: str, options: Sequence[str], letters: Sequence[str]) -> str:
    """Return the prompt: the question, one `- option=LETTER` line per option, the instruction.

    The letter follows the option without a space, so it is the same token as the answer; after the option, so that
    the model reads the meaning before the name.
    """
    lines = [f"- {option}={letter}" for option, letter in zip(options, letters, strict=True)]
    return "\n".join([question, *lines, INSTRUCTION])


def parse_choices(row: dict) -> tuple[list[str], tuple[str, ...], str]:
    """Return options, their letters and the right letter of a row of ARC (labels are kept) or MMLU (A, B, ...)."""
    if isinstance(row["choices"], dict):
        return row["choices"]["text"], tuple(row["choices"]["label"]), row["answerKey"]
    letters = tuple(ascii_uppercase[: len(row["choices"])])
    return row["choices"], letters, letters[row["answer"]]


class MultipleChoice(Task):
    """Rows `{question, choices: {text, label}, answerKey}` (ARC) or `{question, choices: [...], answer}` (MMLU)."""

    kind = "categorical"
    lost = BESIDE_QUESTION
    generated: ClassVar[dict[str, str]] = {"embedded": "choice"}

    @classmethod
    def check_row(cls, row: dict, where: str) -> None:
        """Raise UserError for a row that is neither in the ARC nor in the MMLU format."""
        need(row, where, question=str, choices=(dict, list))
        if isinstance(row["choices"], dict):
            need(row, where, answerKey=str)
            need(row["choices"], f"{where} choices", text=list, label=list)
            texts, labels, right = row["choices"]["text"], row["choices"]["label"], row["answerKey"]
            if right not in labels:
                raise UserError(f"{where}: answerKey {right!r} is not among the labels {labels}")
            if not all(isinstance(label, str) and label and label == label.strip() for label in labels):
                raise UserError(f"{where}: labels must be texts without space around them, found {labels}")
            if len(set(labels)) < len(labels):
                raise UserError(f"{where}: labels are there twice, so an answer would be of two choices: {labels}")
        else:
            need(row, where, answer=int)
            texts = row["choices"]
            labels = list(ascii_uppercase[: len(texts)])
            if not 0 <= row["answer"] < len(texts):
                last = len(texts) - 1
                raise UserError(f"{where}: answer {row['answer']} is not the number of a choice (0 to {last})")
        if not 2 <= len(texts) <= MOST_CHOICES:
            raise UserError(f"{where}: needs two choices at least and {MOST_CHOICES} at most, found {len(texts)}")
        if len(texts) != len(labels):
            raise UserError(f"{where}: has {len(texts)} choices and {len(labels)} labels; each choice needs one")
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: a choice is no text: {texts}")

    def conversation(self, row: dict, index: int) -> dict:
        options, letters, right = parse_choices(row)
        messages = dialogue(render_question(row["question"], options, letters), right)
        return {"messages": messages, "letters": letters}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return completion.strip() == conversation["messages"][-1]["content"]
