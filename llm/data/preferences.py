"""Preferences as token ids, and the steps that reward models and preference losses are trained on.

A row of `tasks.preferences` becomes one or two sequences of ids with a mask on the answer. Where a sequence is longer
than the context, its prompt loses its beginning: whole turns first, then tokens of the turn that is left. The answer
is always whole: a row with an answer that does not fit beside an empty question is dropped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from llm.errors import UserError
from llm.tokenizer.chat_format import render_conversation, render_prompt

Sequences = list[tuple[list[int], list[int]]]  # (ids, mask), mask 1 on what the assistant has to produce


def render_row(tokenizer, row: Mapping, limit: int) -> tuple[Sequences | None, bool]:
    """Return the sequences of a row, at most `limit` ids each, and whether its prompt was cut.

    A pair gives that of the chosen answer and that of the rejected one, which begin with one prompt; a labelled answer
    gives one. None where an answer does not fit.
    """
    prompt, answers = render_prompt(tokenizer, row["messages"]), []
    for name in ("chosen", "rejected") if "chosen" in row else ("completion",):
        ids, mask = render_conversation(tokenizer, {"messages": [*row["messages"], *row[name]]})
        start = len(prompt)
        answers.append((ids[start:], mask[start:]))
    kept = cut_prompt(prompt, limit - max(len(ids) for ids, _ in answers), tokenizer.special_id("<|user_start|>"))
    if kept is None:
        return None, False
    return [(kept + ids, [0] * len(kept) + mask) for ids, mask in answers], len(kept) < len(prompt)


def cut_prompt(prompt: list[int], room: int, user_start: int) -> list[int] | None:
    """Return a prompt of at most `room` ids: <|bos|> and its last turns, or the end of its last question.

    None where not even an empty question fits: <|bos|>, the marks around it and that of the answer.
    """
    if len(prompt) <= room:
        return prompt
    starts = [i for i, token in enumerate(prompt) if token == user_start]
    bos, start = prompt[:1], next((i for i in starts if 1 + len(prompt) - i <= room), None)
    if start is not None:
        return bos + prompt[start:]
    if room < 4:
        return None
    return [*bos, user_start, *prompt[len(prompt) - (room - 2) :]]


@dataclass(frozen=True)
class Usable:
    """Places (source, row) of the rows that fit, in the order of the sources, and counts of what was cut and dropped.

    limit: ids of a sequence, at most; is_paired: whether all of them are pairs; median: ids of the median sequence.
    """

    places: list[tuple[int, int]]
    limit: int
    is_paired: bool
    cut: int
    dropped: int
    median: int

    @classmethod
    def of(cls, sources: Sequence, tokenizer, limit: int, most: int | None = None) -> "Usable":
        """Render every row of the sources once, or the first `most` that fit. Raises UserError where none fits."""
        places, cut, dropped, lengths, is_paired = [], 0, 0, [], True
        for number, source in enumerate(sources):
            for index in range(len(source)):
                if most is not None and len(places) >= most * (number + 1) / len(sources):
                    break
                sequences, was_cut = render_row(tokenizer, source[index], limit)
                if sequences is None:
                    dropped += 1
                    continue
                cut, is_paired = cut + was_cut, is_paired and len(sequences) == 2
                lengths.append(max(len(ids) for ids, _ in sequences))
                places.append((number, index))
        if not places:
            raise UserError(
                f"data.preferences: no answer of the {dropped:,} rows fits into model.seq_len={limit}; take a "
                "model with a longer context, or shorter answers"
            )
        return cls(places, limit, is_paired, cut, dropped, int(np.median(lengths)))

    def __len__(self) -> int:
        return len(self.places)


def micro_batches_of(rows: Sequence[Sequences], labels: Sequence[bool] | None, most: int) -> list[dict]:
    """Return micro-batches {"inputs", "targets", "last", ["labels"]} of at most `most` sequences, the longest first.

    rows: the sequences of each row of the data. inputs, targets: (B, T), right-padded, targets -1 where nothing is
    asked; last: (B,) place of the last token of each sequence; the sequences of a pair are neighbours, the chosen one
    first. labels: of rows with one sequence each, (B,) true for good answers; None for pairs.
    """
    order = sorted(range(len(rows)), key=lambda i: -max(len(ids) for ids, _ in rows[i]))
    size, batches = max(1, most // len(rows[0])), []
    for start in range(0, len(order), size):
        part = order[start : start + size]
        sequences = [one for i in part for one in rows[i]]
        length = max(len(ids) for ids, _ in sequences)
        inputs = torch.zeros(len(sequences), length, dtype=torch.long)
        targets = torch.full((len(sequences), length), -1)
        for place, (ids, mask) in enumerate(sequences):
            ids, mask = torch.tensor(ids), torch.tensor(mask)
            inputs[place, : len(ids)] = ids
            targets[place, : len(ids) - 1] = torch.where(mask[1:] == 1, ids[1:], -1)
        batch = {"inputs": inputs, "targets": targets, "last": torch.tensor([len(ids) - 1 for ids, _ in sequences])}
        if labels is not None:
            batch["labels"] = torch.tensor([labels[i] for i in part])
        batches.append(batch)
    return batches


class PreferenceSteps:
    """Step batches of `per_step` rows, in a new order in every epoch; never runs ahead of training.

    The order depends on (seed, epoch) alone, so the position is the number of the step; row number i of a step belongs
    to rank i % world. labelled: give every answer of a pair by itself, with its label. prepare: called with the
    micro-batches of a step, to add what the network or its reference says of them, and with a function that makes
    micro-batches in which every prompt is followed by the answers to the next question of the step.
    """

    def __init__(
        self,
        sources: Sequence,
        usable: Usable,
        tokenizer,
        *,
        rows_per_micro: int,
        per_step: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        position: dict | None = None,
        labelled: bool = False,
        prepare: Callable[[list[dict], Callable[[], list[dict]]], None] = lambda micro, mismatched: None,
    ):
        self.sources, self.usable, self.tokenizer = sources, usable, tokenizer
        self.labelled, self.prepare = labelled, prepare
        self.per_step, self.rows_per_micro, self.seed, self.rank, self.world = (
            per_step,
            rows_per_micro,
            seed,
            rank,
            world,
        )
        self.step = 0 if position is None else position["step"]
        self._epoch, self._order = -1, np.arange(0)

    def __len__(self) -> int:
        """Return a huge number: Lightning fetches ahead from a loader without a length. Stages stop at max_steps."""
        return 10**9

    def skip(self, steps: int) -> None:
        """Leave out the rows of so many steps."""
        self.step += steps

    def __iter__(self) -> Iterator[dict]:
        while True:
            numbers = range(self.step * self.per_step + self.rank, (self.step + 1) * self.per_step, self.world)
            batch = self.batch([self.row(number) for number in numbers])
            self.prepare(batch["micro"], partial(self.mismatched, numbers))
            self.step += 1
            yield batch | {"state": {"step": self.step}}

    def row(self, number: int) -> Mapping:
        """Return row number `number` of an endless sequence of shuffled epochs."""
        epoch, index = divmod(number, len(self.usable))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.usable))
        source, place = self.usable.places[self._order[index]]
        return self.sources[source][place]

    def batch(self, rows: Sequence[Mapping]) -> dict:
        """Return {"micro", "n_trained": pairs, or labelled answers, "n_tokens"} of some rows."""
        sequences, labels = [render_row(self.tokenizer, row, self.usable.limit)[0] for row in rows], None
        if self.labelled:
            labels = [label for row in rows for label in ([True, False] if "chosen" in row else [row["label"]])]
            sequences = [[one] for own in sequences for one in own]
        micro = micro_batches_of(sequences, labels, self.rows_per_micro)
        tokens = sum(len(ids) for own in sequences for ids, _ in own)
        return {"micro": micro, "n_trained": len(sequences), "n_tokens": tokens}

    def mismatched(self, numbers: Sequence[int]) -> list[dict]:
        """Return micro-batches of the rows `numbers` with the answers of the next row of their step, or of the first.

        The step is that of all ranks, so the answers do not depend on the number of ranks.
        """
        first = numbers[0] // self.per_step * self.per_step
        others = [self.row(first + (number + 1 - first) % self.per_step) for number in numbers]
        rows = [other | {"messages": self.row(n)["messages"]} for n, other in zip(numbers, others, strict=True)]
        return self.batch(rows)["micro"]

    def fixed(self) -> list[dict]:
        """Return the micro-batches of this rank's share of all rows, in the order of the sources."""
        own = self.usable.places[self.rank :: self.world]
        return self.batch([self.sources[source][place] for source, place in own])["micro"] if own else []
