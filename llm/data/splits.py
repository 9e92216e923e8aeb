"""Splits by name: the one rule by which files of text and of tasks, local or of the hub, are divided."""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import regex

from llm.data.files import kind_of

WORDS = {"train": "train", "test": "test", **dict.fromkeys(("val", "valid", "validation", "dev"), "val")}


class Parts(NamedTuple):
    """Numbers of the files of each split, in the order of the files; files without a split's name are in `train`."""

    train: list[int]
    val: list[int]
    test: list[int]


def split_of(name: str) -> str | None:
    """Return the split that a path below the data folder names: "train", "val", "test", or None.

    Only a whole part of a name counts: `my_train.jsonl` and `train-00000-of-00005.parquet` do, `latest.txt` does not.
    Letters that are not Latin part words too: `数据val.txt`. The file's name goes before its folders', the inner folder
    before the outer. In source code only the first folder counts, because `test_x.py` is code like any other.
    """
    parts = name.replace("\\", "/").split("/")
    if kind_of(name) == "code":
        return WORDS.get(parts[0].lower()) if len(parts) > 1 else None
    for part in reversed(parts):
        for word in regex.findall(r"\p{Latin}+", unicodedata.normalize("NFC", part.lower())):
            if word in WORDS:
                return WORDS[word]
    return None


def divide(names: Sequence[str]) -> Parts:
    """Return the files of each split by their names (paths below the data folder)."""
    parts = Parts([], [], [])
    for number, name in enumerate(names):
        getattr(parts, split_of(name) or "train").append(number)
    return parts
