"""Best-fit packing of documents into rows of fixed length: which documents share a row, and what is lost.

Both packers keep a buffer of waiting documents, refilled before every placement, and put the LARGEST one that fits into
the space left in the row. They differ where none fits:

- BestFitCrop (pretraining) crops the SHORTEST waiting document to the space and drops its rest: rows are full, every
  row and document begins with a document's first token (BOS), and a share of the tokens is never trained on (`waste`).
- BestFitPad (conversations) never crops: the space left is padding that is not trained on (`waste`).

Documents of equal length leave in order of arrival, so the result is a function of the order of documents alone.
Waiting lengths are kept sorted: a placement is a binary search plus one copy, a few microseconds.
Source: nanochat's loader since January 2026 (largest that fits, else crop the shortest; buffers of 1,000 and 100).
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_ARRIVALS = (
    1 << 48
)  # keys are length * _ARRIVALS + (_ARRIVALS - 1 - arrival): by length, among equals the oldest is largest


class Document(NamedTuple):
    """Token ids (int32) and the mask of those that are trained on as targets (bool; None: all)."""

    ids: np.ndarray
    mask: np.ndarray | None = None


class _Packer:
    """The buffer that both packers share: waiting documents, sorted by (length, age)."""

    def __init__(self, row_len: int, buffer: int) -> None:
        if row_len < 2 or buffer < 1:
            raise ValueError(f"row_len={row_len}, buffer={buffer}: need at least 2 and 1")
        self.row_len, self.buffer = row_len, buffer
        self.placed = 0  # tokens placed in rows so far
        self._arrivals = 0
        self._keys: list[int] = []
        self._waiting: dict[int, Document] = {}  # key -> document of at most row_len tokens, in order of arrival

    def __len__(self) -> int:
        return len(self._keys)

    def _refill(self, documents: Iterator[Document]) -> None:
        while len(self._keys) < self.buffer:
            document = next(documents, None)
            if document is None:
                return
            self._add(document, len(document.ids))

    def _add(self, document: Document, length: int) -> None:
        if not length:
            return
        key = length * _ARRIVALS + _ARRIVALS - 1 - self._arrivals
        self._arrivals += 1
        if length > self.row_len:  # copied, so that the rest of a long document can be freed
            ids, mask = document
            document = Document(ids[: self.row_len].copy(), None if mask is None else mask[: self.row_len].copy())
        insort(self._keys, key)
        self._waiting[key] = document

    def _pop_largest(self, space: int) -> Document | None:
        """The largest waiting document of at most `space` tokens, the oldest among equals."""
        i = bisect_left(self._keys, (space + 1) * _ARRIVALS) - 1
        return self._waiting.pop(self._keys.pop(i)) if i >= 0 else None

    def _pop_shortest(self) -> tuple[Document, int]:
        """The shortest waiting document, the oldest among equals, and its length before capping."""
        length = self._keys[0] // _ARRIVALS
        i = bisect_left(self._keys, (length + 1) * _ARRIVALS) - 1
        return self._waiting.pop(self._keys.pop(i)), length

    def state_dict(self) -> dict:
        """The waiting documents in order of arrival as flat arrays, and the counters. Fresh copies, a few MB."""
        documents = list(self._waiting.values())
        empty = [np.zeros(0, np.int32)]
        state = {
            "placed": self.placed,
            "row_len": self.row_len,
            "lengths": np.array([key // _ARRIVALS for key in self._waiting], np.int64),
            "tokens": np.concatenate([document.ids for document in documents] or empty),
        }
        if documents and documents[0].mask is not None:
            state["mask"] = np.concatenate([document.mask for document in documents])
        return state

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()` of a packer with the same row length: the same documents give the same rows."""
        self.placed, self._arrivals, self._keys, self._waiting = int(state["placed"]), 0, [], {}
        tokens, mask, start = np.asarray(state["tokens"]), state.get("mask"), 0
        for length in np.asarray(state["lengths"]).tolist():
            stop = start + min(length, self.row_len)
            part = None if mask is None else np.asarray(mask)[start:stop].copy()
            self._add(Document(tokens[start:stop].copy(), part), length)
            start = stop
        if start != len(tokens):
            raise ValueError(f"packing state holds {len(tokens)} tokens where rows of {self.row_len} need {start}")


def deal(states: list[dict], n: int) -> list[dict]:
    """States of `n` packers that together hold the documents of all `states`, dealt out one by one; the first has the
    counters of all.
    """
    hands: list[dict] = [{"lengths": [], "tokens": [], "mask": []} for _ in range(n)]
    turn = 0
    for state in states:
        ends = np.cumsum(np.minimum(state["lengths"], state["row_len"]))
        parts = {key: np.split(state[key], ends)[:-1] for key in ("tokens", "mask") if key in state}
        for i, length in enumerate(state["lengths"]):
            hand = hands[turn % n]
            hand["lengths"].append(length)
            for key, documents in parts.items():
                hand[key].append(documents[i])
            turn += 1
    dealt = []
    for number, hand in enumerate(hands):
        state = {key: value * (number == 0) for key, value in _sums(states).items()} | {"row_len": states[0]["row_len"]}
        state["lengths"] = np.array(hand["lengths"], np.int64)
        state["tokens"] = np.concatenate([*hand["tokens"], np.zeros(0, np.int32)])
        if hand["mask"]:
            state["mask"] = np.concatenate(hand["mask"])
        dealt.append(state)
    return dealt


def _sums(states: list[dict]) -> dict[str, int]:
    counters = ("placed", "cropped", "padded")
    return {key: sum(int(state[key]) for state in states) for key in counters if key in states[0]}


class BestFitCrop(_Packer):
    """Full, BOS-aligned rows; only the last row of a finite stream may end early."""

    def __init__(self, row_len: int, buffer: int = 1000) -> None:
        super().__init__(row_len, buffer)
        self.cropped = 0  # tokens dropped so far

    @property
    def waste(self) -> float:
        """Share of the tokens that left the buffer without ever being placed in a row."""
        return self.cropped / max(1, self.cropped + self.placed)

    def fill(self, ids: np.ndarray, mask: np.ndarray, documents: Iterator[Document]) -> int:
        """Write one row into `ids` and `mask` (row_len,); return the tokens written, 0 when no document is left."""
        at = 0
        while at < self.row_len:
            self._refill(documents)
            if not self._keys:
                break
            space = self.row_len - at
            document = self._pop_largest(space)
            if document is None:
                document, length = self._pop_shortest()
                self.cropped += length - space
            end = at + min(len(document.ids), space)
            ids[at:end] = document.ids[: end - at]
            mask[at:end] = True if document.mask is None else document.mask[: end - at]
            at = end
        self.placed += at
        return at

    def state_dict(self) -> dict:
        return super().state_dict() | {"cropped": self.cropped}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.cropped = int(state["cropped"])


class BestFitPad(_Packer):
    """Whole documents only; the rest of the row stays as the caller prepared it (padding, mask False)."""

    def __init__(self, row_len: int, buffer: int = 100) -> None:
        super().__init__(row_len, buffer)
        self.padded = 0  # positions left unused so far

    @property
    def waste(self) -> float:
        """Share of the row positions that are padding."""
        return self.padded / max(1, self.padded + self.placed)

    def fill(self, ids: np.ndarray, mask: np.ndarray, documents: Iterator[Document]) -> int:
        """Write one row into `ids` and `mask` (row_len,); return the tokens written, 0 when no document is left."""
        at = 0
        while at < self.row_len:
            self._refill(documents)
            document = self._pop_largest(self.row_len - at)
            if document is None:
                break
            end = at + len(document.ids)
            ids[at:end] = document.ids
            mask[at:end] = True if document.mask is None else document.mask
            at = end
        if at == 0 and self._keys:
            raise ValueError(f"a document of {self._keys[0] // _ARRIVALS} tokens exceeds the row of {self.row_len}")
        self.placed += at
        self.padded += self.row_len - at if at else 0
        return at

    def state_dict(self) -> dict:
        return super().state_dict() | {"padded": self.padded}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.padded = int(state["padded"])
