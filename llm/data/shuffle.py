"""Seeded order of the documents of a training split, new in every epoch.

Text that fits (`WHOLE_BYTES` of files on this machine) is shuffled as one list of documents. Larger text, and shards of
the hub, keep memory small: each epoch shuffles the order of the shards, then the rows inside each shard. The order is a
function of seed, epoch and the shards alone, so all ranks see one global order. The cursor has the four integers of
text in file order; here `shard` and `row` are places in the shuffled order of `epoch`.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents import Cursor, in_order
from llm.data.files import size_of

WHOLE_BYTES = 64 * 2**20  # files of this size in all are held in memory, a few times as much if they are compressed


class Shuffle:
    """Order of documents by `seed`. whole: all shards as one list of documents, else shard by shard."""

    def __init__(self, seed: int, whole: bool) -> None:
        self.seed, self.whole = seed, whole

    def in_order(
        self,
        shards: Sequence,
        rows: Callable[[Any, int], Iterator[Any]],
        cursor: Cursor | None,
        loop: bool,
        where: str,
    ) -> Iterator[tuple[Any, Cursor]]:
        """Yield every document from `cursor` on in shuffled order, each with the cursor behind it.

        `rows(shard, start)` yields the rows of a shard from row `start` on. Raises UserError for a cursor beyond the
        shards, and for an epoch without a document.
        """
        groups = [tuple(shards)] if self.whole else [(shard,) for shard in shards]
        position = dict(cursor or {"epoch": 0, "shard": 0, "row": 0, "index": 0})
        while True:
            epoch = position["epoch"]
            order = self._generator(epoch).permutation(len(groups))

            def shuffled(place: int, start: int, epoch: int = epoch, order=order) -> Iterator[Any]:
                documents = [row for shard in groups[order[place]] for row in rows(shard, 0)]
                places = self._generator(epoch, int(order[place])).permutation(len(documents))
                return (documents[place] for place in places[start:])

            for text, behind in in_order(range(len(groups)), shuffled, position, False, where):
                position = behind
                yield text, behind
            if not loop:
                return
            position = {"epoch": epoch + 1, "shard": 0, "row": 0, "index": position["index"]}

    def _generator(self, *part: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *part])


def fits(files: Sequence[Path]) -> bool:
    """Return whether the text of `files` is small enough to be shuffled as a whole."""
    return sum(map(size_of, files)) <= WHOLE_BYTES
