"""Conversations of a task mixture as token ids and masks, in an order that resumes exactly; the steps of an epoch."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llm.data.balance import Balance
from llm.data.documents import Consumed
from llm.data.packing import BestFitPad, Document
from llm.errors import UserError
from llm.tokenizer.chat_format import render_conversation

TRAIN_ON = ("assistant", "all")


CHARS_PER_TOKEN = 16  # of a row's tokens: a conversation of more characters is encoded only as far as it fits a row


class Rendered(NamedTuple):
    """Conversation as ids and mask of at most a row, with the numbers that tell what the row did not take."""

    document: Document
    length: int  # tokens of the whole conversation
    is_estimated: bool  # True where `length` follows from the beginning, because the rest was not encoded
    answers: int  # turns of the assistant that are to be trained
    answers_kept: int  # those whose end of turn is in the row
    is_unanswered: bool  # True if no token of an answer is in the row


def render(tokenizer, conversation: dict, row_len: int, train_on: str = "assistant") -> Rendered:
    """Render a conversation as ids and mask of at most `row_len` tokens, and count what does not fit."""
    beginning = _Beginning(tokenizer, row_len)
    ids, trained = render_conversation(beginning, conversation, train_all=train_on == "all")
    start, end = (tokenizer.special_id(mark) for mark in ("<|assistant_start|>", "<|assistant_end|>"))
    ends = [i for i, token in enumerate(ids) if token == end and trained[i]]
    begins = [i for i, token in enumerate(ids[: row_len - 1]) if token == start and trained[i + 1]]
    has_factors = any(0 < factor < 1 for factor in trained[:row_len])
    return Rendered(
        Document(np.array(ids[:row_len], np.int32), np.array(trained[:row_len], np.float32 if has_factors else bool)),
        len(ids) + beginning.skipped_tokens,
        beginning.skipped_chars > 0,
        len(ends),
        sum(i < row_len for i in ends),
        not begins,
    )


class _Beginning:
    """Tokenizer for one conversation that leaves out texts, or their ends, that are far behind the end of a row.

    The first `row_len` tokens are those of the whole conversation, because a text is cut between two pieces only.
    """

    def __init__(self, tokenizer, row_len: int) -> None:
        self.bos_id, self.special_id = tokenizer.bos_id, tokenizer.special_id
        self._tokenizer, self._row_len = tokenizer, row_len
        self._chars = self._tokens = self.skipped_chars = 0

    @property
    def skipped_tokens(self) -> int:
        """Tokens of the texts left out, estimated by the characters per token of the others."""
        return round(self.skipped_chars * self._tokens / max(self._chars, 1))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, or of a beginning of it that fills the row."""
        room = max(CHARS_PER_TOKEN * self._row_len - self._chars, 0)
        if len(text) <= room:
            ids, chars = self._tokenizer.encode(text), len(text)
        elif room == 0 and self._tokens >= self._row_len:
            ids, chars = [], 0
        else:
            ids, chars = self._tokenizer.encode_start(text, room)
            while self._tokens + len(ids) < self._row_len and chars < len(text):
                ids, chars = self._tokenizer.encode_start(text, 4 * max(chars, 1))
        self._chars += chars
        self._tokens += len(ids)
        self.skipped_chars += len(text) - chars
        return ids


class ConversationFeed:
    """Rendered conversations of one rank, epoch after epoch, for packing into rows of `row_len` tokens.

    Epoch 0 follows the mixture's own shuffle; each later epoch permutes it anew, seeded by seed + epoch. Conversation
    number i over all epochs belongs to rank i % world. A conversation longer than a row is cut at its end, and dropped
    if no trained target is left; both are counted. `cursor` (index, truncated, dropped, size of the mixture) is the
    position after the last conversation handed out, `balance` what became of the tokens. Raises UserError for an
    unknown `train_on`, an empty mixture, one of another size than the cursor's, and one without a trained token.
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
        self.balance = Balance()
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
            rendered = self._document(int(order[index % size]))
            document = rendered.document
            is_trained = bool(document.mask[1:].any())
            at["truncated"] += rendered.length > self._row_len
            count(self.balance, rendered, is_trained)
            if is_trained:
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

    def _document(self, row: int) -> Rendered:
        try:
            return render(self._tokenizer, self._mixture[row], self._row_len, self._train_on)
        except UserError as error:
            raise UserError(f"conversation {row} of the mixture: {error}") from error


def count(balance: Balance, rendered: Rendered, is_trained: bool) -> None:
    """Count a conversation in the balance; one of which nothing is trained is dropped as a whole."""
    lost = rendered.length - len(rendered.document.ids)
    balance.documents += 1
    balance.read += rendered.length
    balance.documents_cut += lost > 0
    balance.estimated += rendered.is_estimated
    balance.answers += rendered.answers
    balance.answers_cut += rendered.answers - (rendered.answers_kept if is_trained else 0)
    balance.unanswered += rendered.is_unanswered
    if is_trained:
        balance.cut += lost
    else:
        balance.documents_dropped += 1
        balance.dropped += rendered.length


def of_conversations(all_rendered: Sequence[Rendered]) -> Balance:
    """Return the balance of conversations that are trained a row each, without packing."""
    found = Balance()
    for rendered in all_rendered:
        trained = int((rendered.document.mask[1:] > 0).sum())
        count(found, rendered, trained > 0)
        found.trained += trained
        found.masked += len(rendered.document.ids) - trained if trained else 0
    return found


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order (size,) of a mixture's rows in an epoch: unchanged in epoch 0, then permuted by seed + epoch."""
    return np.arange(size) if epoch == 0 else np.random.default_rng(seed + epoch).permutation(size)


class Forecast(NamedTuple):
    """Numbers of one pass over a mixture, found by rendering and packing `sampled` of its `size` conversations."""

    size: int
    sampled: int
    rows: int  # of seq_len positions, that the sampled conversations take
    seq_len: int
    balance: Balance  # of all conversations: that of the sampled ones times size / sampled
    median_length: int  # tokens of a conversation

    @property
    def tokens(self) -> int:
        """Positions of one pass, padding included."""
        return math.ceil(self.rows * self.size / self.sampled * self.seq_len)

    def steps(self, tokens_per_step: int, epochs: float = 1) -> int:
        """Return the steps of `tokens_per_step` positions (all ranks) in `epochs` passes over the mixture."""
        return math.ceil(epochs * self.rows * self.size / self.sampled * self.seq_len / tokens_per_step)


def forecast(
    mixture: Sequence, tokenizer, sample: int = 2000, *, seq_len: int, train_on: str = "assistant"
) -> Forecast:
    """Render and pack every len/sample-th conversation (all, if there are no more than `sample`).

    The result is deterministic, so that a resumed run finds the horizon it had.
    """
    size = len(mixture)
    count = min(size, sample)
    feed = _MeasuredFeed(_Every(mixture, count), tokenizer, seq_len + 1, train_on=train_on, loop=False)
    packer, rows, trained = BestFitPad(seq_len + 1), 0, 0
    ids, mask = np.empty(seq_len + 1, np.int32), np.empty(seq_len + 1, bool)
    while used := packer.fill(ids, mask, feed):
        rows += 1
        trained += int(mask[1:used].sum())
    placed = Balance(trained=trained, masked=packer.placed - trained, padded=packer.lost)
    median = int(statistics.median_low(feed.lengths))
    return Forecast(size, count, rows, seq_len, (feed.balance + placed).scaled(size / count), median)


class _MeasuredFeed(ConversationFeed):
    """Feed that keeps the length in tokens of every conversation."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.lengths: list[int] = []

    def _document(self, row: int) -> Rendered:
        rendered = super()._document(row)
        self.lengths.append(rendered.length)
        return rendered


class _Every(Sequence):
    """View of `count` rows of a sequence at equal distances."""

    def __init__(self, rows: Sequence, count: int) -> None:
        self._rows, self._count = rows, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> dict:
        return self._rows[i * len(self._rows) // self._count]
