"""Look at every row of a data set without training: lengths, foreign markers, repeated rows, held-out rows in training.

Words are compared in small letters. Memory is bounded: of each row a hash of 8 bytes and the number of its file are
kept in arrays, for at most `MAX_ROWS` rows of a split, and of held-out rows a hash for each run of 13 words, at most
`MAX_GRAMS`. Beyond that no more are noted, and the result says so. Text that is written without spaces is compared by
runs of 40 characters.
"""

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from llm.data.records import LISTED
from llm.utils.words import words_or_signs

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
CHARS = 40  # the same in text without spaces: about 25 words of Chinese, 10 of Thai, more than a long name has
MAX_ROWS = 50_000_000  # 0.6 GB of memory for each split, three times as much while they are compared
MAX_GRAMS = 20_000_000  # about 2 GB of memory


@dataclass
class Rows:
    """Counts of the rows of one file, or of one generated source, in one split."""

    name: str
    split: str
    read: int = 0
    empty: int = 0
    bad: int = 0
    failing: int = 0  # bad rows that no setting leaves out: programs that fail their own tests
    first_bad: list[str] = field(default_factory=list)  # at most LISTED
    unreadable: str = ""  # why reading ended early or never began; "" = all was read
    chars: int = 0
    bytes: int = 0  # of the text in UTF-8
    repeated: int = 0  # rows that stood before, in this split
    leaked: int = 0  # held-out rows that training holds too, word for word
    overlapping: int = 0  # held-out rows that share 13 words, or 40 characters, in a row with training
    near_duplicates: int = 0  # training documents that data.near_duplicates leaves out
    markers: Counter = field(default_factory=Counter)
    # Rows with text by length, in tokens, else in characters: n different ones need n^2 / 2 characters of text.
    lengths: Counter = field(default_factory=Counter)

    def add_bad(self, problem: object) -> None:
        """Count a row that cannot be used, and keep the first problems."""
        self.bad += 1
        if len(self.first_bad) < LISTED:
            self.first_bad.append(str(problem))

    @property
    def total(self) -> int:
        """Sum of the lengths of all rows."""
        return sum(length * count for length, count in self.lengths.items())

    def quantile(self, share: float) -> int:
        """Return the length that `share` of the rows do not exceed; 0 without rows."""
        left = int(share * self.lengths.total())
        for length in sorted(self.lengths):
            left -= self.lengths[length]
            if left < 0:
                return length
        return max(self.lengths, default=0)

    def longer_than(self, limit: int) -> int:
        """Return the number of rows longer than `limit`."""
        return sum(count for length, count in self.lengths.items() if length > limit)

    def to_dict(self) -> dict:
        """Return the counts as JSON can hold them, lengths as median, p95, maximum and total."""
        lengths = {"median": self.quantile(0.5), "p95": self.quantile(0.95), "max": max(self.lengths, default=0)}
        counts = {key: value for key, value in vars(self).items() if key not in ("markers", "lengths")}
        return counts | {"markers": dict(self.markers), "length": lengths | {"total": self.total}}


class Checker:
    """Takes texts of held-out rows first and of training then, and counts what is wrong with them.

    Rows that stand twice are counted by `finish`. markers: strings that mean something to a chat format. encode: text
    -> token ids; None = lengths in characters.
    """

    def __init__(self, markers: tuple[str, ...] = MARKERS, encode=None) -> None:
        self.markers, self.encode = markers, encode
        self.is_complete = True  # False once there were too many hashes to note them all
        self._files: list[Rows] = []
        self._numbers: dict[int, int] = {}  # id of Rows -> number in `_files`
        self._hashes = {split: array("q") for split in ("held out", "train")}  # of every row with text
        self._origins = {split: array("I") for split in ("held out", "train")}  # the number of its file
        self._grams: dict[int, int] = {}  # hash of a run -> number of the first held-out row with it
        self._others: dict[int, list[int]] = {}  # hash of a run -> numbers of further held-out rows with it
        self._further = 0  # numbers in `_others` so far
        self._row_of = array("i")  # number of the file by the number of the row; -1 once the row is counted

    def add(self, rows: Rows, text: str | None) -> None:
        """Count one row. `rows.split` is "train" or "held out"."""
        rows.read += 1
        if text is None or not text.strip():
            rows.empty += 1
            return
        rows.chars += len(text)
        rows.bytes += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        rows.lengths[len(text) if self.encode is None else len(self.encode(text))] += 1
        if "<" in text or "[" in text:
            rows.markers.update(marker for marker in self.markers if marker in text)
        parts, file = words_or_signs(text), self._number(rows)
        if self._has_room(len(self._hashes[rows.split]), MAX_ROWS):
            self._hashes[rows.split].append(hash(parts if isinstance(parts, str) else tuple(parts)))
            self._origins[rows.split].append(file)
        if rows.split == "train":
            self._compare(parts)
        else:
            self._keep(file, parts)

    def finish(self) -> None:
        """Count the rows that stood before in their split, and the held-out rows that training holds word for word."""
        hashes = {split: np.asarray(found) for split, found in self._hashes.items()}
        first = {}
        for split, found in hashes.items():
            first[split] = np.unique(found, return_index=True)
            again = np.bincount(np.asarray(self._origins[split]), minlength=len(self._files))
            again -= self._by_file(split, first[split][1])
            for rows, count in zip(self._files, again.tolist(), strict=True):
                rows.repeated += count
        held_out, places = first["held out"]
        leaked = self._by_file("held out", places[np.isin(held_out, first["train"][0], assume_unique=True)])
        for rows, count in zip(self._files, leaked.tolist(), strict=True):
            rows.leaked += count

    def _by_file(self, split: str, places: np.ndarray) -> np.ndarray:
        """Return the number of the rows at `places` in each file."""
        return np.bincount(np.asarray(self._origins[split])[places], minlength=len(self._files))

    def _number(self, rows: Rows) -> int:
        """Return the number of a file; rows of one file mostly come one after the other."""
        number = self._numbers.setdefault(id(rows), len(self._files))
        if number == len(self._files):
            self._files.append(rows)
        return number

    def _has_room(self, kept: int, most: int) -> bool:
        self.is_complete = self.is_complete and kept < most
        return kept < most

    def _keep(self, file: int, parts: list[str] | str) -> None:
        """Note the runs of a held-out row."""
        number = len(self._row_of)
        for gram in _grams(parts):
            # Asked within a row: one may be a whole book.
            if not self._has_room(len(self._grams) + self._further, MAX_GRAMS):
                return
            if number == len(self._row_of):
                self._row_of.append(file)
            if self._grams.setdefault(gram, number) != number:
                others = self._others.setdefault(gram, [])
                if others[-1:] != [number]:
                    others.append(number)
                    self._further += 1

    def _compare(self, parts: list[str] | str) -> None:
        """Count the held-out rows that share a run with a training row."""
        if not self._grams:
            return
        for gram in _grams(parts):
            if gram not in self._grams:
                continue
            # All rows with this run are counted now, so it is not needed again.
            for number in (self._grams.pop(gram), *self._others.pop(gram, ())):
                if (file := self._row_of[number]) >= 0:
                    self._files[file].overlapping += 1
                    self._row_of[number] = -1


def _grams(parts: list[str] | str) -> Iterator[int]:
    """Yield the hash of every run of 13 words, or of 40 characters of a text without spaces."""
    if isinstance(parts, str):
        return (hash(parts[start : start + CHARS]) for start in range(len(parts) - CHARS + 1))
    return map(hash, zip(*(islice(parts, start, None) for start in range(GRAM)), strict=False))
