"""The task interface: a sequence of conversations with a way to score completions; no model code."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from llm.data.embedded import rows as embedded_rows
from llm.errors import UserError
from llm.tokenizer.chat_format import PART_MARKS, content_text

UNSURE = ("timeout", "killed")  # verdicts that a busy machine may give to a right answer
KINDS = ("categorical", "generative", "chat", "preference")
CHAT_KEYS = ("fields", "roles", "ignore", "merge_neighbours", "empty_answers", "false_labels")  # of a task's config
BESIDE_QUESTION = ("system", "system_prompt", "context", "passage", "history", "input", "tools", "functions")
# Calculator calls and results in the text of an answer; the last one may have been cut off.
_CALLS = re.compile(
    "|".join(rf"{re.escape(start)}.*?(?:{re.escape(end)}|\Z)" for start, end in PART_MARKS.values()), re.DOTALL
)


class Dropped(Exception):
    """A row that the configuration leaves out; its text is the reason, under which such rows are counted."""


class RowReader(Protocol):
    """Turns what a file holds into the rows of a task. may_drop: whether `read` may raise `Dropped`."""

    may_drop: bool

    def read(self, row: Any, where: str) -> dict:
        """Return the row that `check_row` and `conversation` take, or raise UserError or `Dropped`."""


class Objects:
    """Reader of rows as they are: JSON objects, whose keys the type of the task looks at.

    lost: keys that the type does not read and that would change the meaning of the row; key: the task's place in the
    configuration.
    """

    may_drop = False

    def __init__(self, lost: Collection[str], key: str) -> None:
        self._lost, self._key = lost, key

    def read(self, row: Any, where: str) -> dict:
        """Return the row. Raises UserError, beginning with `where`, for no object, and for keys that would be lost."""
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be a JSON object, found {type(row).__name__}")
        for name in self._lost:
            if row.get(name):
                raise UserError(
                    f"{where}: {name!r} would be lost. Say what the question is made of, for one {self._key}.question="
                    f"'{{{name}}} {{question}}' with {self._key}.answer='{{answer}}'"
                )
        return row


class Task:
    """A sequence of conversations `{"messages": [{"role", "content"}, ...], ...}` and the scoring that belongs to it.

    A subclass says everything about its type. It must define `conversation`, and `evaluate` unless it is for training
    only; `check_row` and `check_test_row` where rows can be wrong. Class attributes:

    kind: "categorical" (the answer is one of `conversation["letters"]`, scored by the letters' logits), "generative"
    (scored on the generated text), "chat" (training only) or "preference" (of `data.preferences`).
    reads: "rows" (of .jsonl files or of the hub) or "words" (a .txt list, from which items are drawn).
    generated: source ("embedded", "template") -> kind of rows of `llm.data.embedded` that stand in for files.
    sizes: number of rows per split that are generated where the configuration says null.
    lost: keys of a row that the type does not read although they change its meaning; such rows are refused.
    answer_forms: values of `answer_form` of a task's configuration that the type has, beside null for its own form.
    judges_slowly: judging an answer takes long enough that the rows' own answers are not judged before a run.
    """

    kind = "chat"
    reads = "rows"
    generated: ClassVar[dict[str, str]] = {}
    sizes: ClassVar[dict[str, int]] = {"train": 8_000, "test": 500}
    judges_slowly = False
    lost: ClassVar[tuple[str, ...]] = ()
    answer_forms: ClassVar[tuple[str, ...]] = ()
    answer_form: str | None = None  # of answers in the data, in the instruction of the prompt and in the reward

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
        return Objects(cls.lost, key)

    @classmethod
    def check_row(cls, row: dict, where: str) -> None:
        """Raise UserError, beginning with `where` (file and row), for a row that the task cannot use."""

    @classmethod
    def check_test_row(cls, row: dict, where: str) -> None:
        """Raise UserError for a held-out row that cannot be scored; by default what `check_row` tests."""
        cls.check_row(row, where)

    @classmethod
    def is_scored(cls, row: dict) -> bool:
        """Return whether a training row has what its answers are judged by; rows that do not are only trained on."""
        return True

    def unscored(self) -> int:
        """Return the number of rows that have nothing to judge answers by."""
        if self.reads != "rows" or type(self).is_scored.__func__ is Task.is_scored.__func__:
            return 0
        return sum(not self.is_scored(self.rows[i]) for i in self.indices)

    @classmethod
    def check_reference(cls, row: dict, where: str, surely: bool = False) -> None:
        """Raise UserError for a row whose own answer is not marked right: no answer could ever be.

        surely: pass over an answer that cannot be judged here and now, such as a program that took too long.
        """
        if cls.evaluate is Task.evaluate and cls.verdicts is Task.verdicts:
            return  # it is scored elsewhere, for one by stage.reward
        task = cls([row], where)
        try:
            conversation = task[0]
            answer = content_text(conversation["messages"][-1]["content"])
            (verdict,) = task.verdicts([conversation], [answer])
        except Exception as error:  # code of any kind, written for any rows
            if surely:
                return
            raise UserError(f"{where}: its answer cannot be judged ({type(error).__name__}: {error})") from error
        if verdict != "pass" and not (surely and verdict in UNSURE):
            raise UserError(
                f"{where}: its own answer, {shortened(answer)}, is not marked right by {cls.__name__}, so no answer "
                "ever could be: mend the answer or leave the row out"
            )

    @classmethod
    def check(cls, row: dict, where: str, split: str) -> None:
        """Raise UserError for a row of `split` ("train" or "test") that cannot be used, or that nobody can answer."""
        (cls.check_test_row if split == "test" else cls.check_row)(row, where)
        if cls.kind not in ("chat", "preference") and not cls.judges_slowly and (split == "test" or cls.is_scored(row)):
            cls.check_reference(row, where)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[self.indices[index]]
        conversation = self.conversation(row, self.indices[index])
        subject = row.get("subject") if isinstance(row, dict) else None
        return conversation if subject is None else {"subject": str(subject)} | conversation

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

    def reply(self, conversation: dict, completion: str) -> str | None:
        """Return what the task says to an answer, after which the model answers again; None to end the conversation.

        `conversation["earlier"]` has the pairs (answer, reply) before this answer, as it has for the judging methods.
        """
        return None


def visible(text: str) -> str:
    """Return the text of an answer without calculator calls and their results."""
    return _CALLS.sub("", text)


def shortened(text: str, most: int = 60) -> str:
    """Return the repr of a text, cut for an error message."""
    return repr(text if len(text) <= most else f"{text[:most]}...")


def dialogue(user: str, assistant: str | list[dict]) -> list[dict]:
    """Return the messages of one exchange."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
