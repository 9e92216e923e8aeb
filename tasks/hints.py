"""Word problems with a second try: a wrong number is answered by a hint, and the model may answer again."""

from collections.abc import Sequence

from llm.tokenizer.chat_format import content_text
from tasks.gsm8k import GSM8K

HINTED = 0.5  # reward of a right answer behind a hint


class SecondTry(GSM8K):
    """Problems in the GSM8K format; a wrong answer gets a hint, where `stage.turns` allows a further one.

    A right answer is worth 1 at once and 0.5 behind a hint, so that it never pays to ask for one.
    """

    def reply(self, conversation: dict, completion: str) -> str | None:
        """Return a hint to a wrong answer."""
        wanted = self.number_of(content_text(conversation["messages"][-1]["content"]))
        if self.evaluate(conversation, completion):
            return None
        given = self.number_of(completion)
        if given is None or len(given.value) != len(wanted.value):
            where = "behind ####" if self.answer_form is None else "between <answer> and </answer>"
            return f"I see no number. Write it {where}."
        return f"That is too {'low' if given.value < wanted.value else 'high'}. Try again."

    def rewards(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[float]:
        worth = [HINTED if c.get("earlier") else 1.0 for c in conversations]
        return [w * right for w, right in zip(worth, super().rewards(conversations, completions), strict=True)]
