"""Tell the split that a file belongs to by the usual names of files and folders."""

import re
from collections.abc import Sequence
from pathlib import PurePath

NAMES = {"train": "train", "test": "test", **dict.fromkeys(("val", "valid", "validation", "dev"), "val")}


def split_of(path: str | PurePath) -> str | None:
    """Return the split that a relative path names, "train", "val" or "test"; None where no name speaks.

    The file speaks first, by the first or the last word of its name (`train-00000-of-00003.parquet`, `my_val.jsonl`),
    then the folders, from the inner to the outer one, each by its whole name.
    """
    path = PurePath(path)
    stem, *more = path.name.lower().split(".")
    words = re.findall(r"[a-z]+", stem)
    for word in (*words[:1], *words[-1:], *more[:1]):  # more: of wiki.test.txt
        if word in NAMES:
            return NAMES[word]
    return next((NAMES[folder] for part in reversed(path.parts[:-1]) if (folder := part.lower()) in NAMES), None)


def of_split(paths: Sequence[PurePath], split: str, root: PurePath | None = None) -> list[PurePath]:
    """Return those of the files that belong to a split, "train" or "test" (held out), by their names below `root`.

    Files without a split in their names are trained on. Held out are the files for validation, or if there are none
    those for the test. Where no name speaks, or none for the split, that is an empty list for "test", else all.
    """
    splits = [split_of(path.relative_to(root) if root else path.name) for path in paths]
    wanted = ("train", None) if split == "train" else ("val",) if "val" in splits else ("test",)
    return [path for path, own in zip(paths, splits, strict=True) if own in wanted]
