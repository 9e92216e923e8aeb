"""Balance of tokens: what became of everything that a stage read.

    read + repeated = trained + masked + cut + dropped + waiting

All numbers are tokens. `repeated` are the <|bos|> that `best_fit` puts before the rests of cut documents. `masked` were
in a row as context and not as targets: the first token of every row, and what others than the assistant wrote. `cut`
is the end of a document that packing cropped, or of a conversation longer than a row. `dropped` are conversations of
which nothing could be trained, data left out by a roll-back, and answers without a signal. `waiting` were read and wait
for a place when training ends. Beside them, `padded` positions of rows hold nothing:

    positions of the rows = trained + masked + padded
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from typing import Any

from llm.utils.format import amount, percent

CUT_ANSWERS = 0.05  # share of cut answers above which a stage warns
ANSWERS = "answers and conversations"  # what reinforcement learning reads
SHOWN_FILES = 5  # with near-duplicates, in a line
FEW_STEPS = 30  # a horizon of fewer steps teaches next to nothing: warned of


@dataclass
class Balance:
    """Counters of documents or conversations, their answers, and tokens; sums of them are the balance of all ranks."""

    documents: int = 0  # read: documents, or conversations
    documents_cut: int = 0  # conversations that lost their end
    documents_dropped: int = 0  # conversations of which nothing is trained: the question fills the row
    unanswered: int = 0  # conversations with no token of an answer in the row, dropped or not
    answers: int = 0  # turns of the assistant
    answers_cut: int = 0  # those that lost their end of turn, or all
    estimated: int = 0  # conversations far longer than a row: their length is estimated from their beginning
    read: int = 0
    repeated: int = 0
    trained: int = 0
    masked: int = 0
    cut: int = 0
    dropped: int = 0
    waiting: int = 0
    padded: int = 0
    partial: int = 0  # ranks that count from a checkpoint without counters on, as older versions wrote them

    def __add__(self, other: "Balance") -> "Balance":
        return Balance(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def missing(self) -> int:
        """Tokens read that are on no side of the balance: 0, if every counter is right."""
        placed = self.trained + self.masked
        return self.read + self.repeated - placed - self.cut - self.dropped - self.waiting

    def leave_out(self, since: "Balance") -> None:
        """Count what was placed in rows after `since` as dropped: a roll-back leaves out the data of its steps."""
        self.dropped += self.trained - since.trained + self.masked - since.masked
        self.trained, self.masked, self.padded = since.trained, since.masked, since.padded

    def scaled(self, factor: float) -> "Balance":
        """Return the balance of `factor` times as much data; `read` is the rounded sum of its parts."""
        values = {name: round(factor * number) for name, number in asdict(self).items()}
        larger = Balance(**values)
        return replace(larger, read=larger.read - larger.missing)

    def to_dict(self) -> dict[str, int]:
        """Return the counters that are not 0, for checkpoints and run.json."""
        return {name: number for name, number in vars(self).items() if number}

    @classmethod
    def from_dict(cls, saved: Mapping[str, int]) -> "Balance":
        """Return the balance of a `to_dict`; names that this version does not know are left out."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: int(number) for name, number in saved.items() if name in names})


@dataclass
class Reading:
    """Block `data` of run.json: what one pass over the data is expected to be, and what the training made of it."""

    unit: str  # what is read: documents, conversations or `ANSWERS`
    expected: Balance | None = None  # of what `sample` says; None where it was not looked at
    facts: dict[str, Any] = field(default_factory=dict)  # further numbers: median_length, sampled, ...
    parts: Sequence[Any] = ()  # tasks or sources; their `skipped` counts the bad rows left out so far, by cause
    sample: str = "one pass"  # what `expected` is the balance of, in words

    @property
    def skipped(self) -> dict[str, int]:
        """Bad rows that have been left out of the files so far, by cause."""
        return skipped_rows(self.parts)

    @property
    def left_out(self) -> dict[str, int]:
        """Near-duplicates that training leaves out, by file."""
        found = (getattr(part, "left_out", None) or {} for part in self.parts)
        return {name: count for counts in found for name, count in counts.items()}

    def to_dict(self, read: Balance | None = None) -> dict[str, Any]:
        """Return the block for run.json; `read`: the balance of all ranks when training ends."""
        block = {"unit": self.unit, **self.facts}
        block |= {} if self.expected is None else {"expected_of": self.sample}
        balances = {"expected": self.expected, "read": read}
        block |= {name: balance.to_dict() for name, balance in balances.items() if balance is not None}
        rows = {"skipped": self.skipped, "near_duplicates": self.left_out}
        return block | {name: counts for name, counts in rows.items() if counts}

    def start_lines(self, details: bool = True) -> list[str]:
        """Return the lines for the start of the stage: the expected balance (`details`), rows left out, warnings."""
        lines = []
        if self.expected is not None and details:
            lines.append(f"data, {self.sample}:")
            lines += [f"  {line}" for line in describe(self.expected, self.unit)]
            if "median_length" in self.facts:
                lines.append(
                    f"  median length {self.facts['median_length']:,}, a row holds {self.facts['seq_len'] + 1:,}"
                )
        if self.expected is not None:
            lines += [f"WARNING: {line}" for line in warnings_of(self.expected, self.unit)]
        if self.skipped:
            rows = ", ".join(f"{number:,} {cause}" for cause, number in self.skipped.items())
            lines.append(f"data: rows left out of the files: {rows}")
        if self.left_out:
            first = ", ".join(f"{number:,} of {name}" for name, number in islice(self.left_out.items(), SHOWN_FILES))
            more = f" and of {len(self.left_out) - SHOWN_FILES} more files" if len(self.left_out) > SHOWN_FILES else ""
            total_rows = sum(self.left_out.values())
            lines.append(f"data: dropped as near-duplicates: {total_rows:,} documents, {first}{more}")
        return lines


def total(saved: Iterable[Mapping[str, int]]) -> Balance:
    """Return the sum of the balances of several ranks, given as their `to_dict`."""
    return sum(map(Balance.from_dict, saved), Balance())


def of_rollout(sequences: Sequence[tuple], advantages: Iterable[float], finished: Sequence[bool]) -> Balance:
    """Return the balance of sampled answers, (ids, mask) each; one without advantage trains nothing and is dropped."""
    found = Balance(documents=len(sequences), answers=len(sequences), answers_cut=len(finished) - sum(finished))
    for (ids, mask), advantage in zip(sequences, advantages, strict=True):
        found.read += len(ids)
        if advantage:
            trained = int(sum(mask[1:]))
            found.trained += trained
            found.masked += len(ids) - trained
        else:
            found.dropped += len(ids)
            found.documents_dropped += 1
    return found


def describe(balance: Balance, unit: str) -> list[str]:
    """Return the balance in two or three lines; unit: what is read, "documents", "conversations" or `ANSWERS`."""
    b = balance
    about = "about " if b.estimated else ""
    parts = [("trained", b.trained), ("masked", b.masked), ("cut", b.cut), ("dropped", b.dropped)]
    parts += [("waiting", b.waiting)]
    whole = max(b.read + b.repeated, 1)
    shares = " + ".join(f"{amount(n)} {name} ({percent(n / whole)})" for name, n in parts if n)
    again = f" + {amount(b.repeated)} <|bos|> repeated" if b.repeated else ""
    since = " since the resume" if b.partial else ""
    lines = [f"{about}{amount(b.read)} tokens of {b.documents:,} {unit} read{since}{again} = {shares or 'nothing'}"]
    rows = b.trained + b.masked + b.padded
    if b.padded:
        lines.append(f"rows: {amount(rows)} positions, {percent(b.padded / rows)} of them padding")
    if unit == ANSWERS:
        lines.append(
            f"{b.answers_cut:,} of {b.answers:,} answers cut at stage.max_new_tokens, {b.documents_dropped:,} dropped "
            "(not trained: all answers to their question were rewarded alike, or another one was kept)"
        )
    elif b.answers:
        lines.append(
            f"{b.documents_cut:,} of {b.documents:,} {unit} longer than a row, {b.documents_dropped:,} dropped "
            f"(nothing to train fits), {b.answers_cut:,} of {b.answers:,} answers lost their end"
        )
    return lines


def table_column(balance: Balance) -> dict[str, str]:
    """Return the balance as a column of the report: tokens by what became of them, then documents and answers."""
    b, whole = balance, max(balance.read + balance.repeated, 1)
    column = {"read": ("about " if b.estimated else "") + amount(b.read), "repeated <|bos|>": amount(b.repeated)}
    for name in ("trained", "masked", "cut", "dropped", "waiting"):
        column[name] = f"{amount(getattr(b, name))} ({percent(getattr(b, name) / whole)})"
    column["padding of the rows"] = percent(b.padded / max(b.trained + b.masked + b.padded, 1))
    column["documents, conversations"] = f"{b.documents:,}"
    if b.answers:
        column["longer than a row"] = f"{b.documents_cut:,}"
        column["dropped whole"] = f"{b.documents_dropped:,}"
        column["answers cut"] = f"{b.answers_cut:,} of {b.answers:,}"
    return column


def warnings_of(balance: Balance, unit: str = "conversations") -> list[str]:
    """Return a line for each loss of conversations that a user should know of, without its leading WARNING."""
    lines, b = [], balance
    if unit == ANSWERS:  # sampled ones: their ends are for the model to learn
        return lines
    if b.answers_cut - b.unanswered > CUT_ANSWERS * b.answers:
        whole = "no answer keeps its end of turn, so the model does not learn to stop"
        part = "they do not teach the model to stop"
        lines.append(
            f"{b.answers_cut:,} of {b.answers:,} answers are cut ({b.answers_cut / b.answers:.0%}): "
            f"{whole if b.answers_cut == b.answers else part}. "
            "Shorten the rows, or train with a larger model.seq_len from pretraining on"
        )
    if b.unanswered:
        lines.append(
            f"{b.unanswered:,} of {b.documents:,} {unit} have a question that fills the row: nothing of the answer "
            "is trained. Shorten them, or raise model.seq_len"
        )
    return lines


def skipped_rows(parts: Iterable[Any]) -> dict[str, int]:
    """Return the rows left out as bad, by cause: the sum of `skipped` of all tasks or sources that have it."""
    found: dict[str, int] = {}
    for part in parts:
        skipped = getattr(part, "skipped", None) or {}
        for cause, number in (skipped if isinstance(skipped, Mapping) else {"bad": skipped}).items():
            found[cause] = found.get(cause, 0) + int(number)
    return found
