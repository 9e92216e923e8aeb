"""The task interface: a sequence of conversations with a way to score completions; no model code."""

from collections.abc import Iterator, Sequence

KINDS = ("categorical", "generative", "chat")


class Task:
    """A sequence of conversations `{"messages": [{"role", "content"}, ...], ...}` and the scoring that belongs to it.

    kind: "categorical" (the answer is one of `conversation["letters"]`, scored by the letters' logits), "generative"
    (scored on the generated text) or "chat" (training only). `start`, `stop` and `step`: a lazy slice of the rows.
    """

    kind = "chat"

    def __init__(self, rows: Sequence[dict], name: str, start: int = 0, stop: int | None = None, step: int = 1):
        self.rows = rows
        self.name = name
        self.indices = range(*slice(start, stop, step).indices(len(rows)))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self.conversation(self.rows[self.indices[index]], self.indices[index])

    def __iter__(self) -> Iterator[dict]:
        return (self[i] for i in range(len(self)))

    def conversation(self, row: dict, index: int) -> dict:
        """The conversation made from row number `index`."""
        raise NotImplementedError

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Whether `completion` (the generated text) answers the conversation rightly. Chat tasks have no such thing."""
        raise TypeError(f"task {self.name} ({type(self).__name__}) is for training only: it cannot score a completion")

    def verdicts(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[str]:
        """How each completion ended: "pass" for a right one, else "fail" or what the task says more exactly."""
        pairs = zip(conversations, completions, strict=True)
        return ["pass" if self.evaluate(conversation, text) else "fail" for conversation, text in pairs]

    def rewards(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[float]:
        """For reinforcement learning: 1.0 for a right completion, else 0.0."""
        return [float(verdict == "pass") for verdict in self.verdicts(conversations, completions)]


def dialogue(user: str, assistant: str | list[dict]) -> list[dict]:
    """The messages of one exchange."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
