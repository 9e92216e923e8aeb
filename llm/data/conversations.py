"""Conversations of a task mixture as token ids and masks, in an order that resumes exactly; the steps of an epoch."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from llm.data.documents import Consumed
from llm.data.packing import BestFitPad, Document
from llm.errors import UserError
from llm.tokenizer.chat_format import render_conversation

TRAIN_ON = ("assistant", "all")


def render(tokenizer, conversation: dict, row_len: int, train_on: str = "assistant") -> tuple[Document, bool]:
    """Return (ids and mask of at most `row_len` tokens, True if the conversation was longer and lost its end)."""
    ids, mask = render_conversation(tokenizer, conversation, train_all=train_on == "all")
    document = Document(np.array(ids[:row_len], np.int32), np.array(mask[:row_len], bool))
    return document, len(ids) > row_len


class ConversationFeed:
    """Rendered conversations of one rank, epoch after epoch, for packing into rows of `row_len` tokens.

    Epoch 0 follows the mixture's own shuffle; each later epoch permutes it anew, seeded by seed + epoch. Conversation
    number i over all epochs belongs to rank i % world. A conversation longer than a row is cut at its end, and dropped
    if no trained target is left; both are counted. `cursor` (index, truncated, dropped, size of the mixture) is the
    position after the last conversation handed out. Raises UserError for an unknown `train_on`, an empty mixture, one
    of another size than the cursor's, and one without a trained token.
    """

    def __init__(
        self,
        mixture: Sequence,
        tokenizer,
        row_len: int,
        *,
        train_on: str = "assistant",
        seed: int = 42,
        cursor: dict | None = None,
        rank: int = 0,
        world: int = 1,
        loop: bool = True,
    ) -> None:
        if train_on not in TRAIN_ON:
            raise UserError(f"stage.train_on={train_on}: must be one of {', '.join(TRAIN_ON)}")
        if not len(mixture):
            raise UserError("the mixture holds no conversation. Give data.mixture tasks with rows and repeats above 0.")
        size = len(mixture)
        if cursor is not None and cursor["size"] != size:
            raise UserError(
                f"the mixture holds {size:,} conversations, the checkpoint's position is in one of {cursor['size']:,}. "
                "Restore the data that the run started with, or start another with run=<new name>."
            )
        self.cursor = cursor or {"index": 0, "truncated": 0, "dropped": 0, "size": size}
        self._mixture, self._tokenizer, self._row_len, self._train_on = mixture, tokenizer, row_len, train_on
        self._seed, self._rank, self._world, self._loop = seed, rank, world, loop
        self._documents = self._render()

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        document, self.cursor = next(self._documents)
        return document

    def _render(self) -> Iterator[tuple[Document, dict]]:
        """Yield the documents of this rank from `cursor` on, each with the cursor behind it."""
        size, at, consumed = len(self._mixture), dict(self.cursor), Consumed(self.cursor)
        epoch, order, dropped_in_a_row = -1, None, 0
        while True:
            index = at["index"]
            if index // size != epoch:
                epoch = index // size
                if epoch and not self._loop:
                    self.cursor = at  # includes the conversations dropped last
                    return
                order = epoch_order(size, self._seed, epoch)
            at["index"] = index + 1
            if index % self._world != self._rank or index in consumed:
                continue
            document, cut = self._document(int(order[index % size]))
            at["truncated"] += cut
            if document.mask[1:].any():
                dropped_in_a_row = 0
                yield document, {key: at[key] for key in at if key != "consumed"} | consumed.cursor(at["index"])
                continue
            at["dropped"] += 1
            dropped_in_a_row += 1
            if dropped_in_a_row >= size:
                raise UserError(
                    f"none of the {size:,} conversations has a trained token in its first {self._row_len - 1} tokens. "
                    "Raise model.seq_len or check the rows: the assistant's turns must not be empty."
                )

    def _document(self, row: int) -> tuple[Document, bool]:
        try:
            return render(self._tokenizer, self._mixture[row], self._row_len, self._train_on)
        except UserError as error:
            raise UserError(f"conversation {row} of the mixture: {error}") from error


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order (size,) of a mixture's rows in an epoch: unchanged in epoch 0, then permuted by seed + epoch."""
    return np.arange(size) if epoch == 0 else np.random.default_rng(seed + epoch).permutation(size)


def estimate_steps(
    mixture: Sequence,
    tokenizer,
    tokens_per_step: int,
    epochs: float = 1,
    sample: int = 2000,
    *,
    seq_len: int,
    train_on: str = "assistant",
) -> int:
    """Return the steps of `tokens_per_step` positions (all ranks) in `epochs` passes over the mixture, with padding.

    Every len/sample-th conversation (all, if there are no more than `sample`) is rendered and packed; the rows that a
    conversation takes give the horizon. The result is deterministic, so that a resumed run finds the horizon it had.
    """
    size = len(mixture)
    count = min(size, sample)
    feed = ConversationFeed(_Every(mixture, count), tokenizer, seq_len + 1, train_on=train_on, loop=False)
    packer, rows = BestFitPad(seq_len + 1), 0
    ids, mask = np.empty(seq_len + 1, np.int32), np.empty(seq_len + 1, bool)
    while packer.fill(ids, mask, feed):
        rows += 1
    return math.ceil(epochs * rows * size / count * seq_len / tokens_per_step)


class _Every(Sequence):
    """View of `count` rows of a sequence at equal distances."""

    def __init__(self, rows: Sequence, count: int) -> None:
        self._rows, self._count = rows, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> dict:
        return self._rows[i * len(self._rows) // self._count]
