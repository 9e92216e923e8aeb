"""Packing of documents into rows of fixed length: which documents share a row, and how much is lost.

All packings but Stream keep a buffer of waiting documents, refilled before every placement:

- BestFit (pretraining) looks for one document, or two, that end exactly at the row's end; else it takes the largest
  that fits, and where none fits the shortest fills the row and its rest waits as a piece of its own. A document longer
  than a row is cut into such pieces at once. Rows are full and nothing is lost; every piece begins with BOS, and a BOS
  that is a target always stands behind the true end of a document.
- BestFitCrop (as nanochat since January 2026) takes the LARGEST document that fits; where none fits it crops the
  SHORTEST to the space and drops its rest: a share of the tokens is never trained on (`lost_fraction`).
- Stream (as nanochat in 2025) cuts one flat stream of documents into rows, which then begin anywhere.
- BestFitPad (conversations) never crops: the space left is padding that is not trained on (`lost_fraction`).

Documents of equal length leave in order of arrival, so the result is a function of the order of documents alone.
Waiting lengths are kept sorted: a placement is a binary search plus one copy, a few microseconds.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

# A key is length * _ARRIVALS + (_ARRIVALS - 1 - arrival): sorted by length, and among equals the oldest is largest.
_ARRIVALS = 1 << 48


class Document(NamedTuple):
    """Token ids (int32) and the mask of those that are trained on as targets (bool; None: all).

    A mask of float32 holds factors of the targets' losses, 0 to 1.
    """

    ids: np.ndarray
    mask: np.ndarray | None = None


class _Packer:
    """Base of all packings: waiting documents, sorted by (length, age), and the loop that fills a row with them."""

    def __init__(self, row_len: int, buffer: int = 1000) -> None:
        if row_len < 2 or buffer < 1:
            raise ValueError(f"row_len={row_len}, buffer={buffer}: need at least 2 and 1")
        self.row_len, self.buffer = row_len, buffer
        self.placed = 0  # tokens placed in rows so far
        self.lost = 0  # tokens cropped, or positions of rows left unused
        self.repeated = 0  # BOS put before the rests of cut documents since this packer was made
        self._arrivals = 0
        self._keys: list[int] = []
        self._waiting: dict[int, Document] = {}  # key -> document of at most row_len tokens, in order of arrival

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def lost_fraction(self) -> float:
        """Share lost / (lost + placed) of the tokens or positions so far."""
        return self.lost / max(1, self.lost + self.placed)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the waiting documents, in full length."""
        return sum(key // _ARRIVALS for key in self._waiting)

    def fill(self, ids: np.ndarray, mask: np.ndarray, documents: Iterator[Document]) -> int:
        """Write one row into `ids` and `mask` (row_len,); return the tokens written, 0 when no document is left."""
        at = 0
        while at < self.row_len:
            self._refill(documents)
            document = self._next(self.row_len - at) if self._waiting else None
            if document is None:
                break
            used = min(len(document.ids), self.row_len - at)
            ids[at : at + used] = document.ids[:used]
            mask[at : at + used] = True if document.mask is None else document.mask[:used]
            if used < len(document.ids):
                self._put_back(document, used)
            at += used
        self.placed += at
        return at

    def _next(self, space: int) -> Document | None:
        """Take out the waiting document that comes next in a row with `space` left; None ends the row."""
        raise NotImplementedError

    def _put_back(self, document: Document, used: int) -> None:
        """Keep the rest of a document behind its first `used` tokens. A packing that crops drops it."""

    def _refill(self, documents: Iterator[Document]) -> None:
        """Take documents until `buffer` of them wait, or none is left."""
        while len(self._waiting) < self.buffer:
            document = next(documents, None)
            if document is None:
                return
            self._add(document, len(document.ids))

    def _add(self, document: Document, length: int) -> None:
        """Let a document wait under its full `length`, with at most row_len of its tokens."""
        if not length:
            return
        key = self._key(length)
        if length > self.row_len:  # copied, so that the rest of a long document can be freed
            ids, mask = document
            document = Document(ids[: self.row_len].copy(), None if mask is None else mask[: self.row_len].copy())
        insort(self._keys, key)
        self._waiting[key] = document

    def _key(self, length: int) -> int:
        """Return the sort key of the next arrival: by length, the oldest largest among equals."""
        self._arrivals += 1
        return length * _ARRIVALS + _ARRIVALS - self._arrivals

    def _pop_largest(self, space: int) -> Document | None:
        """Take out the largest waiting document of at most `space` tokens, the oldest among equals; else None."""
        i = bisect_left(self._keys, (space + 1) * _ARRIVALS) - 1
        return self._waiting.pop(self._keys.pop(i)) if i >= 0 else None

    def _pop_shortest(self) -> tuple[Document, int]:
        """Take out the shortest waiting document, the oldest among equals; return it and its length before capping."""
        length = self._keys[0] // _ARRIVALS
        i = bisect_left(self._keys, (length + 1) * _ARRIVALS) - 1
        return self._waiting.pop(self._keys.pop(i)), length

    def state_dict(self) -> dict:
        """Return the waiting documents in order of arrival as flat arrays, and the counters: fresh copies, a few MB."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], dict]:
        """Return a function that makes the `state_dict` of this moment; it copies only when it is called."""
        numbers = {"placed": self.placed, "lost": self.lost, "row_len": self.row_len}
        waiting = list(self._waiting.items())
        return lambda: numbers | _flat(waiting)

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()` of a packer with equal row length: equal documents then give equal rows.

        Raises ValueError for a state of another row length.
        """
        self.placed, self.lost = int(state["placed"]), _lost(state)
        self._arrivals, self._keys, self._waiting = 0, [], {}
        tokens, mask, start = np.asarray(state["tokens"]), state.get("mask"), 0
        for length in np.asarray(state["lengths"]).tolist():
            stop = start + min(length, self.row_len)
            part = None if mask is None else np.asarray(mask)[start:stop].copy()
            self._add(Document(tokens[start:stop].copy(), part), length)
            start = stop
        if start != len(tokens):
            raise ValueError(f"packing state holds {len(tokens)} tokens where rows of {self.row_len} need {start}")


def _lost(state: dict) -> int:
    """Return the tokens that a packer had lost, also under the former names."""
    return int(state.get("lost", state.get("cropped", state.get("padded", 0))))


def _flat(waiting: list[tuple[int, Document]]) -> dict[str, np.ndarray]:
    """Return (key, document) pairs as flat arrays: lengths, tokens and, if the documents have them, masks."""
    documents = [document for _, document in waiting]
    flat = {
        "lengths": np.array([key // _ARRIVALS for key, _ in waiting], np.int64),
        "tokens": np.concatenate([document.ids for document in documents] or [np.zeros(0, np.int32)]),
    }
    if documents and documents[0].mask is not None:
        flat["mask"] = np.concatenate([document.mask for document in documents])
    return flat


def deal(states: list[dict], n: int) -> list[dict]:
    """Deal the waiting documents of all packer `states` out to `n` packers, one by one; return their states.

    The first of them gets the counters of all.
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
        state = {"placed": sum(int(one["placed"]) for one in states) * (number == 0)}
        state["lost"] = sum(map(_lost, states)) * (number == 0)
        state["row_len"] = states[0]["row_len"]
        state["lengths"] = np.array(hand["lengths"], np.int64)
        state["tokens"] = np.concatenate([*hand["tokens"], np.zeros(0, np.int32)])
        if hand["mask"]:
            state["mask"] = np.concatenate(hand["mask"])
        dealt.append(state)
    return dealt


class BestFit(_Packer):
    """Packing into full rows in which every piece begins with BOS, and no token is lost.

    Only the last row of a finite stream ends early.
    """

    def __init__(self, row_len: int, buffer: int = 1000) -> None:
        super().__init__(row_len, buffer)
        self._counts = np.zeros(row_len + 1, np.int32)  # waiting pieces by length

    def _add(self, document: Document, length: int) -> None:
        if length <= self.row_len:
            super()._add(document, length)
            self._counts[length] += 1
            return
        for start in range(1, length, self.row_len - 1):
            piece = _behind_first(document, start, start + self.row_len - 1)
            self._add(piece, len(piece.ids))
            self.repeated += start > 1

    def _next(self, space: int) -> Document:
        """Take out the piece to place: the largest that leaves no gap, alone or with one other.

        If there is none, the largest that fits is taken, and if none fits the shortest.
        """
        length = space
        if not self._counts[space]:
            ends = self._counts[1:space]
            pairs = ((ends > 0) & (ends[::-1] > 0)).nonzero()[0]
            if len(pairs) and (2 * (pairs[-1] + 1) > space or ends[pairs[-1]] > 1):
                length = int(pairs[-1]) + 1
        document = self._pop_largest(length) or self._pop_shortest()[0]
        self._counts[len(document.ids)] -= 1
        return document

    def _put_back(self, document: Document, used: int) -> None:
        rest = _behind_first(document, used, len(document.ids))
        self._add(rest, len(rest.ids))
        self.repeated += 1

    def load_state_dict(self, state: dict) -> None:
        self._counts[:] = 0
        super().load_state_dict(state)


def _behind_first(document: Document, start: int, stop: int) -> Document:
    """Return the first token (BOS) of a document and those from `start` to `stop`."""
    ids, mask = (None if x is None else np.concatenate((x[:1], x[start:stop])) for x in document)
    return Document(ids, mask)


class Stream(_Packer):
    """Packing of all documents end to end, cut where a row ends; the rest begins the next row, without a BOS."""

    def __init__(self, row_len: int, buffer: int = 1) -> None:
        super().__init__(row_len, 1)

    def _add(self, document: Document, length: int) -> None:
        ids, mask = document
        for start in range(0, length, self.row_len):
            part = slice(start, start + self.row_len)
            piece = Document(ids[part].copy(), None if mask is None else mask[part].copy())
            self._waiting[self._key(len(piece.ids))] = piece

    def _next(self, space: int) -> Document:
        return self._waiting.pop(next(iter(self._waiting)))

    def _put_back(self, document: Document, used: int) -> None:
        rest = Document(*(None if x is None else x[used:] for x in document))
        self._waiting = {self._key(len(rest.ids)): rest} | self._waiting


class BestFitCrop(_Packer):
    """Packing into full, BOS-aligned rows that crops; only the last row of a finite stream may end early."""

    def _next(self, space: int) -> Document:
        document = self._pop_largest(space)
        if document is None:
            document, length = self._pop_shortest()
            self.lost += length - space
        return document


class BestFitPad(_Packer):
    """Packing of whole documents only; the rest of a row stays as the caller prepared it (padding, mask False)."""

    def __init__(self, row_len: int, buffer: int = 100) -> None:
        super().__init__(row_len, buffer)

    def fill(self, ids: np.ndarray, mask: np.ndarray, documents: Iterator[Document]) -> int:
        """Write one row of whole documents; return the tokens written, 0 when no document is left.

        Raises ValueError for a document longer than a row.
        """
        used = super().fill(ids, mask, documents)
        if used == 0 and self._keys:
            raise ValueError(f"a document of {self._keys[0] // _ARRIVALS} tokens exceeds the row of {self.row_len}")
        self.lost += self.row_len - used if used else 0
        return used

    def _next(self, space: int) -> Document | None:
        return self._pop_largest(space)


PACKINGS: dict[str, type[BestFit] | type[BestFitCrop] | type[Stream]] = {
    "best_fit": BestFit,
    "crop": BestFitCrop,
    "stream": Stream,
}
