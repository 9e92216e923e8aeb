"""Look at every row of a data set without training: lengths, foreign markers, repeated rows, held-out rows in training.

Words are compared in small letters. Memory is bounded: of each row a hash of 8 bytes is kept, of held-out rows also one
per run of 13 words; beyond `MAX_HASHES` of either kind no more are noted, and the result says so.
"""

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from llm.data.records import SHOWN

MARKERS = (
    *(
        "</s>",
        "<s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|end_of_text|>",
        "<|begin_of_text|>",
    ),
    *("[INST]", "[/INST]", "<<SYS>>", "<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
)
GRAM = 13  # words in a row that two texts share only if one was taken from the other (GPT-3's rule of contamination)
MAX_HASHES = 20_000_000  # about 2 GB of memory


@dataclass
class Rows:
    """Counts of the rows of one file, or of one generated source, in one split."""

    name: str
    split: str
    read: int = 0
    empty: int = 0
    bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    unreadable: str = ""  # why reading ended early or never began; "" = all was read
    chars: int = 0
    repeated: int = 0  # rows that stood before, in this split
    leaked: int = 0  # held-out rows that training holds too, word for word
    overlapping: int = 0  # held-out rows that share 13 words in a row with training
    markers: Counter = field(default_factory=Counter)
    lengths: array = field(default_factory=lambda: array("q"))  # of each row with text: tokens, else characters

    def add_bad(self, problem: object, count: int = 1) -> None:
        """Count rows that cannot be used, and keep the first problems."""
        self.bad += count
        if len(self.first_bad) < SHOWN:
            self.first_bad.append(str(problem))

    def quantile(self, share: float) -> int:
        """Return the length that `share` of the rows do not exceed; 0 without rows."""
        ordered = sorted(self.lengths)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0

    def longer_than(self, limit: int) -> int:
        """Return the number of rows longer than `limit`."""
        return sum(length > limit for length in self.lengths)

    def to_dict(self) -> dict:
        """Return the counts as JSON can hold them, lengths as median, p95, maximum and total."""
        shown = (
            "name",
            "split",
            "read",
            "empty",
            "bad",
            "first_bad",
            "unreadable",
            "chars",
            "repeated",
            "leaked",
            "overlapping",
        )
        lengths = {"median": self.quantile(0.5), "p95": self.quantile(0.95), "max": max(self.lengths, default=0)}
        lengths["total"] = sum(self.lengths)
        return {key: getattr(self, key) for key in shown} | {"markers": dict(self.markers), "length": lengths}


class Checker:
    """Takes texts of held-out rows first and of training then, and counts what is wrong with them.

    markers: strings that mean something to a chat format. encode: text -> token ids; None = lengths in characters.
    """

    def __init__(self, markers: tuple[str, ...] = MARKERS, encode=None) -> None:
        self.markers, self.encode = markers, encode
        self.is_complete = True  # False once there were too many hashes to note them all
        self._seen: dict[str, set[int]] = {"train": set(), "held out": set()}
        self._owner: dict[int, Rows] = {}  # hash of a held-out row -> where it stands, until training repeats it
        self._grams: dict[int, int] = {}  # hash of 13 words -> number of the first held-out row with them
        self._others: dict[int, list[int]] = {}  # hash of 13 words -> numbers of further held-out rows with them
        self._further = 0  # numbers in `_others` so far
        self._row_of: list[Rows | None] = []  # by that number; None once the row is counted

    def add(self, rows: Rows, text: str | None) -> None:
        """Count one row. `rows.split` is "train" or "held out"."""
        rows.read += 1
        if text is None or not text.strip():
            rows.empty += 1
            return
        rows.chars += len(text)
        rows.lengths.append(len(text) if self.encode is None else len(self.encode(text)))
        if "<" in text or "[" in text:
            rows.markers.update(marker for marker in self.markers if marker in text)
        words = text.lower().split()
        whole = hash(tuple(words))
        seen = self._seen[rows.split]
        if whole in seen:
            rows.repeated += 1
            return
        if self._has_room(len(seen)):
            seen.add(whole)
        if rows.split == "train":
            self._compare(words, whole)
        else:
            self._keep(rows, words, whole)

    def _has_room(self, kept: int) -> bool:
        self.is_complete = self.is_complete and kept < MAX_HASHES
        return kept < MAX_HASHES

    def _keep(self, rows: Rows, words: list[str], whole: int) -> None:
        self._owner[whole] = rows
        number = len(self._row_of)
        self._row_of.append(rows)
        for gram in _grams(words):
            if not self._has_room(len(self._grams) + self._further):  # asked within a row: one may be a whole book
                return
            if self._grams.setdefault(gram, number) != number:
                others = self._others.setdefault(gram, [])
                if others[-1:] != [number]:
                    others.append(number)
                    self._further += 1

    def _compare(self, words: list[str], whole: int) -> None:
        if (held_out := self._owner.pop(whole, None)) is not None:
            held_out.leaked += 1
        if not self._grams:
            return
        for gram in _grams(words):
            if gram not in self._grams:
                continue
            # All rows with these words are counted now, so the words are not needed again.
            for number in (self._grams.pop(gram), *self._others.pop(gram, ())):
                if (rows := self._row_of[number]) is not None:
                    rows.overlapping += 1
                    self._row_of[number] = None


def _grams(words: list[str]) -> Iterator[int]:
    """Yield the hash of every run of 13 words."""
    return map(hash, zip(*(islice(words, start, None) for start in range(GRAM)), strict=False))
