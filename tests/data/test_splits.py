"""Splits of files by their names and those of their folders."""

from pathlib import PurePath

import pytest

from llm.data.splits import of_split, split_of


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[(f"{word}.jsonl", split) for word, split in [("train", "train"), ("test", "test"), ("dev", "val")]],
        *[(f"my_{word}.csv.gz", "val") for word in ("val", "valid", "validation")],
        ("train-00000-of-00003.parquet", "train"),
        ("VALIDATION_2.json", "val"),
        ("wiki.test.txt", "test"),
        ("a/train/0001.txt", "train"),
        ("train/part/test.txt", "test"),
        ("Dev/0001.txt", "val"),
        ("contest.txt", None),
        ("latest/developers.md", None),
        ("how-to-test-it.md", None),
        ("0001.txt", None),
    ],
)
def test_the_name_of_a_file_or_else_of_a_folder_speaks(name, split):
    assert split_of(name) == split


def test_what_is_held_out_is_never_trained_on():
    names = [PurePath(f"data/{name}.jsonl") for name in ("a", "test", "train", "val")]
    assert [path.stem for path in of_split(names, "train")] == ["a", "train"]
    assert [path.stem for path in of_split(names, "test")] == ["val"]
    assert [path.stem for path in of_split(names[:3], "test")] == ["test"]
    assert of_split(names[:1], "test") == [] and of_split(names[:1], "train") == names[:1]
    inside = [PurePath("test/corpus/train/a.txt"), PurePath("test/corpus/b.txt")]  # the root's own name does not speak
    assert of_split(inside, "train", PurePath("test")) == inside
