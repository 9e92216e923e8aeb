"""Split of generated items: each item itself decides where it belongs, so train and test never share one."""

import random
import zlib
from collections.abc import Callable

from llm.errors import UserError

SPLITS = ("train", "test")
TEST_SHARE = 8  # one item in eight belongs to the test split
MAX_MISSES = 4_000  # draws in a row without a new item after which a kind counts as exhausted


def check_split(split: str) -> str:
    """Return `split`. Raises UserError if it is neither "train" nor "test"."""
    if split not in SPLITS:
        raise UserError(f"split={split!r} does not exist in the embedded world: choose one of {', '.join(SPLITS)}")
    return split


def split_of(text: str) -> str:
    """Return the split that owns `text`: a pure function of its bytes, independent of seed, order and size."""
    return "test" if zlib.crc32(text.encode()) % TEST_SHARE == 0 else "train"


def generator(*key: object) -> random.Random:
    """Return a random generator that depends on `key` alone.

    Seeding with a string is stable across processes and platforms.
    """
    return random.Random("/".join(map(str, key)))


def collect(draw: Callable[[], dict], key: Callable[[dict], str], n: int, what: str) -> list[dict]:
    """Return the first `n` rows of `draw()` with distinct keys; fewer requested rows are a prefix of more.

    Raises UserError if the world is too small to hold `n` different ones; `what` names them.
    """
    rows: dict[str, dict] = {}
    misses = 0
    while len(rows) < n:
        row = draw()
        name = key(row)
        if name in rows:
            misses += 1
            if misses > MAX_MISSES:
                raise UserError(
                    f"there are only about {len(rows)} different rows of {what}, {n} were asked for: "
                    "lower the task's size or test_size"
                )
        else:
            rows[name] = row
            misses = 0
    return list(rows.values())
