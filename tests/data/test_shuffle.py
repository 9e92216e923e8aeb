"""Tests of the seeded order of documents and of the estimated size of a text."""

import gzip
import json

import numpy as np
import pytest

from llm.data.documents import LocalDocuments
from llm.data.embedded_documents import EmbeddedDocuments
from llm.data.shuffle import Shuffle
from llm.data.text_mixture import MixedDocuments
from llm.data.text_size import passes_over, text_tokens
from llm.data.tokens import CachedDocuments


class Letters:
    """A tokenizer of one token per character, and one in front."""

    def encode_document(self, text):
        return [0, *map(ord, text)]


@pytest.fixture
def folder(tmp_path):
    """Three files of twenty documents each; the last one validates."""
    for name in "abc":
        rows = [json.dumps({"text": f"{name}{number:03d}"}) for number in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def shuffled(folder, whole, seed=1):
    documents = LocalDocuments(folder)
    documents.shuffle = Shuffle(seed, whole)
    return documents


def taken(documents, count, cursor=None, rank=0, world=1):
    stream = documents.iterate("train", cursor, rank, world)
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("whole", [True, False])
def test_every_epoch_holds_every_document_once_in_an_order_of_its_own(folder, whole):
    read = [text for text, _ in taken(shuffled(folder, whole), 80)]
    first, second = read[:40], read[40:]
    assert sorted(first) == sorted(second) == [f"{name}{n:03d}" for name in "ab" for n in range(20)]
    assert first != sorted(first) and first != second


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("at", [1, 20, 39, 40, 41, 63])
def test_a_cursor_continues_with_exactly_what_would_have_followed(folder, whole, at):
    full = taken(shuffled(folder, whole), 100)
    cursor = full[at - 1][1]
    assert set(cursor) == {"epoch", "shard", "row", "index"}
    assert taken(shuffled(folder, whole), 100 - at, cursor) == full[at:]


@pytest.mark.parametrize("whole", [True, False])
def test_ranks_share_one_global_order(folder, whole):
    full = taken(shuffled(folder, whole), 90)
    for rank in range(3):
        assert taken(shuffled(folder, whole), 30, rank=rank, world=3) == full[rank::3]


def test_the_seed_decides_and_held_out_text_and_single_passes_keep_the_order_of_files(folder):
    one, other = shuffled(folder, True, 1), shuffled(folder, True, 2)
    assert taken(one, 40) != taken(other, 40)
    for split in ("train", "val"):
        plain = [text for text, _ in LocalDocuments(folder).iterate(split, loop=False)]
        assert [text for text, _ in one.iterate(split, loop=False)] == plain


def test_the_size_of_a_small_text_is_that_of_its_training_documents(folder):
    assert text_tokens(LocalDocuments(folder), Letters()) == pytest.approx(40 * 5, rel=0.01)
    assert passes_over(LocalDocuments(folder), Letters(), 600) == (200, pytest.approx(3.0))


def test_larger_text_is_estimated_by_its_files(folder, monkeypatch):
    monkeypatch.setattr("llm.data.text_size.EXACT_BYTES", 1)
    rows = sum((folder / f"{name}.jsonl").stat().st_size for name in "ab")
    assert 200 <= text_tokens(LocalDocuments(folder), Letters()) <= 1.5 * rows


CYRILLIC = "Съешь же ещё этих мягких французских булок. "


@pytest.mark.parametrize(
    "suffix, pack, content",
    [
        (".jsonl", bytes, lambda row: json.dumps(row) + "\n"),  # escapes: six bytes for a letter of two
        (".json", bytes, lambda row: json.dumps([row], indent=1)),
        (".jsonl", lambda data: gzip.compress(data, 0), lambda row: json.dumps(row, ensure_ascii=False) + "\n"),
        (".csv", bytes, lambda row: f"{row['url']},{row['text']}\n"),
        (".txt", bytes, lambda row: row["text"] + "\n<|endoftext|>\n"),
    ],
)
def test_what_stands_beside_the_text_of_rows_is_not_counted(tmp_path, monkeypatch, suffix, pack, content):
    rows = [{"url": "x" * (number % 1000), "text": CYRILLIC * (1 + number % 9)} for number in range(4000)]
    content = "url,text\n" * (suffix == ".csv") + "".join(map(content, rows))
    for number in range(2):
        (tmp_path / f"{number}{suffix}").write_bytes(pack(content.encode()))
    monkeypatch.setattr("llm.data.text_size.COMPRESSED", 1.0)
    exact = text_tokens(LocalDocuments(tmp_path), Letters())
    monkeypatch.setattr("llm.data.text_size.EXACT_BYTES", 1)
    assert text_tokens(LocalDocuments(tmp_path), Letters()) == pytest.approx(exact, rel=0.1)


def test_generated_text_is_sampled_and_no_source_has_no_size():
    assert text_tokens(EmbeddedDocuments(3000), Letters()) > 3000
    assert passes_over(None, Letters(), 600) == (None, None)


class Bytes(Letters):
    """A tokenizer that a cache can be made for."""

    vocab_size, fingerprint = 256, "bytes"

    def encode_document(self, text):
        return np.array(super().encode_document(text), np.int32)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("at", [7, 45, 79])
def test_cached_tokens_come_in_the_shuffled_order_of_their_text(folder, tmp_path_factory, whole, at):
    cache = tmp_path_factory.mktemp("cache")

    def ids(count, cursor=None):
        documents = CachedDocuments(shuffled(folder, whole), Bytes(), cache)
        return [(row.tolist(), behind) for row, behind in taken(documents, count, cursor)]

    full = ids(100)
    assert full == [(Bytes().encode_document(t).tolist(), behind) for t, behind in taken(shuffled(folder, whole), 100)]
    assert ids(100 - at, full[at - 1][1]) == full[at:]


@pytest.mark.parametrize("at", [10, 110, 190])
def test_shuffled_sources_of_a_mixture_go_on_where_they_were(folder, tmp_path_factory, at):
    other = tmp_path_factory.mktemp("other")
    for name in "xy":
        (other / f"{name}.txt").write_text(name)

    def mixed():
        return MixedDocuments({"one": (shuffled(folder, True), 3.0), "two": (LocalDocuments(other), 1.0)})

    full = taken(mixed(), 240)
    assert taken(mixed(), 240 - at, full[at - 1][1]) == full[at:]
    one = [text for text, _ in full if text != "x"]
    assert sorted(one[:40]) == sorted(one[40:80]) and one[:40] != one[40:80]
