"""The task interface: a sequence of conversations with a way to score completions; no model code."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from llm.data.embedded import rows as embedded_rows
from llm.errors import UserError

KINDS = ("categorical", "generative", "chat")
CHAT_KEYS = ("fields", "roles", "ignore", "merge_neighbours", "empty_answers", "false_labels")  # of a task's config


class Dropped(Exception):
    """A row that the configuration leaves out; its text is the reason, under which such rows are counted."""


class RowReader(Protocol):
    """Turns what a file holds into the rows of a task. may_drop: whether `read` may raise `Dropped`."""

    may_drop: bool

    def read(self, row: Any, where: str) -> dict:
        """Return the row that `check_row` and `conversation` take, or raise UserError or `Dropped`."""


class Objects:
    """Reads rows as they are: JSON objects, whose keys the type of the task looks at."""

    may_drop = False

    def read(self, row: Any, where: str) -> dict:
        """Return the row. Raises UserError, beginning with `where`, for anything but an object."""
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be a JSON object, found {type(row).__name__}")
        return row


class Task:
    """A sequence of conversations `{"messages": [{"role", "content"}, ...], ...}` and the scoring that belongs to it.

    A subclass says everything about its type. It must define `conversation`, and `evaluate` unless it is for training
    only; `check_row` and `check_test_row` where rows can be wrong. Class attributes:

    kind: "categorical" (the answer is one of `conversation["letters"]`, scored by the letters' logits), "generative"
    (scored on the generated text) or "chat" (training only).
    reads: "rows" (of .jsonl files or of the hub) or "words" (a .txt list, from which items are drawn).
    generated: source ("embedded", "template") -> kind of rows of `llm.data.embedded` that stand in for files.
    sizes: number of rows per split that are generated where the configuration says null.
    """

    kind = "chat"
    reads = "rows"
    generated: ClassVar[dict[str, str]] = {}
    sizes: ClassVar[dict[str, int]] = {"train": 8_000, "test": 500}

    def __init__(self, rows: Sequence[dict], name: str, start: int = 0, stop: int | None = None, step: int = 1):
        """Take a lazy slice of `rows`; `name` is the key of the task in data.tasks."""
        self.rows = rows
        self.name = name
        self.indices = range(*slice(start, stop, step).indices(len(rows)))

    @property
    def skipped(self) -> dict[str, int]:
        """Number of rows of the files or of the hub that were left out, by reason."""
        return dict(getattr(self.rows, "skipped", {}))

    @classmethod
    def from_words(
        cls, words: Sequence[str], name: str, size: int, split: str, source: str, stop: int | None
    ) -> "Task":
        """Build a task that reads words: `size` items drawn from a list, of which the first `stop` are used."""
        raise NotImplementedError

    @classmethod
    def generate(cls, source: str, split: str, size: int, **options: Any) -> Sequence[dict]:
        """Return `size` generated rows of a split. Raises UserError where the type has none from this source."""
        if source not in cls.generated:
            raise UserError(f"source={source}: {cls.__name__} has no rows of that source; use local or hub")
        return embedded_rows(cls.generated[source], split, size, **options)

    @classmethod
    def row_reader(cls, spec: Mapping[str, Any], key: str) -> RowReader:
        """Return the reader of the rows of files and of the hub; spec: the task's configuration, at `key`."""
        for name in CHAT_KEYS:
            if spec.get(name):
                raise UserError(f"{key}.{name}: type={spec.get('type')} does not read it, only chat rows have it")
        return Objects()

    @classmethod
    def check_row(cls, row: dict, where: str) -> None:
        """Raise UserError, beginning with `where` (file and row), for a row that the task cannot use."""

    @classmethod
    def check_test_row(cls, row: dict, where: str) -> None:
        """Raise UserError for a held-out row that cannot be scored; by default what `check_row` tests."""
        cls.check_row(row, where)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self.conversation(self.rows[self.indices[index]], self.indices[index])

    def __iter__(self) -> Iterator[dict]:
        return (self[i] for i in range(len(self)))

    def conversation(self, row: dict, index: int) -> dict:
        """Return the conversation made from row number `index`."""
        raise NotImplementedError

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Return whether `completion` (the generated text) answers the conversation rightly; TypeError if kind=chat."""
        raise TypeError(f"task {self.name} ({type(self).__name__}) is for training only: it cannot score a completion")

    def verdicts(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[str]:
        """Return how each completion ended: "pass" for a right one, else "fail" or what the task says more exactly."""
        pairs = zip(conversations, completions, strict=True)
        return ["pass" if self.evaluate(conversation, text) else "fail" for conversation, text in pairs]

    def rewards(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[float]:
        """Return the reward of each completion for reinforcement learning: 1.0 for a right one, else 0.0."""
        return [float(verdict == "pass") for verdict in self.verdicts(conversations, completions)]


def dialogue(user: str, assistant: str | list[dict]) -> list[dict]:
    """Return the messages of one exchange."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
