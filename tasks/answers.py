"""Questions of any kind with an answer that is known: the whole answer counts, or the words that it must contain."""

import unicodedata

from llm.errors import UserError
from llm.tokenizer.chat_format import content_text
from tasks.base import BESIDE_QUESTION, Task, dialogue, visible
from tasks.chat import Identity
from tasks.columns import as_text
from tasks.files import need
from tasks.numbers import parse_number, same_number

_STOPS, _QUOTES = ".!。।॥؟۔", "\"'“”‘’„«»「」『』` "  # these may stand within those: 「パリ。」


def plain_answer(text: str) -> str:
    """Return an answer without what does not matter: case, spaces, bold, quotes around it and a dot at its end.

    Signs that cannot be seen, such as marks of direction, do not matter either.
    """
    text = unicodedata.normalize("NFKC", visible(text)).replace("**", "").casefold()
    text = "".join(sign for sign in text if sign.isascii() or unicodedata.category(sign) != "Cf")
    return " ".join(text.split()).rstrip(_STOPS + _QUOTES).lstrip(_QUOTES)


class Exact(Task):
    """Rows `{question, answer}`; right is the same answer: the same number where it is one, else the same text."""

    kind = "generative"
    lost = BESIDE_QUESTION

    @classmethod
    def check_row(cls, row: dict, where: str) -> None:
        """Raise UserError for a row without a question, or without an answer that another could be compared with."""
        need(row, where, question=str, answer=(str, int, float))
        if not row["question"].strip() or not plain_answer(as_text(row["answer"])):
            raise UserError(f"{where}: the question or the answer is empty")

    def conversation(self, row: dict, index: int) -> dict:
        return {"messages": dialogue(row["question"], as_text(row["answer"]))}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        own = content_text(conversation["messages"][-1]["content"])
        wanted = parse_number(own)
        if wanted is not None and wanted.bare:
            return same_number(wanted, parse_number(visible(completion)))
        return plain_answer(own) == plain_answer(completion)


class Keywords(Identity):
    """Rows of chat, or `{question, answer}`, with `keywords`; right is an answer that contains all of them."""

    generated = {}
