"""A sample of large files comes from many places, and tells their size and what packing loses of them."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm.data import sample, text_size
from llm.data.documents import LocalDocuments
from llm.data.packing import PACKINGS, Document
from llm.data.sample import sample_balance, spread_documents

PLAIN = {"use_dictionary": False, "compression": None}  # else a file may hold what is repeated once
PARTS = {"a": ("x", 200, 2000), "b": ("yyy ", 100, 1000), "c": ("z", 400, 500)}  # what is repeated, how often, rows


class Letters:
    """A tokenizer of one token per z, another for all else, and one in front."""

    def encode_document(self, text):
        return [0] * (1 + text.count("z") + (len(text) - text.count("z")) // 4)


@pytest.fixture
def folder(tmp_path):
    """Three files of different documents, whose lengths differ by a tenth, and one to validate on."""
    draw = random.Random(0)
    for name, (text, times, rows) in PARTS.items():
        column = [text * draw.randint(9 * times // 10, 11 * times // 10) for _ in range(rows)]
        pq.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet", row_group_size=300, **PLAIN)
    pq.write_table(pa.table({"text": ["held out"]}), tmp_path / "val.parquet")
    return tmp_path


def everything(folder) -> list[str]:
    return [text for text, _ in LocalDocuments(folder).iterate("train", loop=False)]


def test_large_files_are_looked_at_in_many_places_and_small_ones_from_the_beginning(folder, monkeypatch):
    source, texts = LocalDocuments(folder), everything(folder)
    assert [text for text, _ in spread_documents(source, 160, 10**9)] == texts[:160]
    monkeypatch.setattr(sample, "SMALL_BYTES", 1)
    found = list(spread_documents(source, 180, 10**9))
    assert 170 < len(found) == len({(at["shard"], at["row"]) for _, at in found}) <= 192
    counts = [sum(at["shard"] == number for _, at in found) for number in range(3)]
    assert counts[0] == pytest.approx(counts[1], abs=13) and counts[2] == pytest.approx(counts[1] / 2, abs=13)
    before = [0, 2000, 3000]
    assert all(text == texts[before[at["shard"]] + at["row"] - 1] for text, at in found)
    assert len(list(spread_documents(source, 10**6, 10**9))) == len(texts)  # each document once
    few = list(spread_documents(source, 10**6, 16 * 2000))
    assert 32 <= len(few) <= 16 * 12 and {at["shard"] for _, at in few} == {0, 1, 2}


def test_the_size_of_large_files_is_near_the_true_one(folder, monkeypatch):
    true = sum(len(Letters().encode_document(text)) for text in everything(folder))
    for module, name in ((text_size, "EXACT_BYTES"), (sample, "SMALL_BYTES")):
        monkeypatch.setattr(module, name, 1)
    assert text_size.text_tokens(LocalDocuments(folder), Letters()) == pytest.approx(true, rel=0.15)


def test_the_losses_of_packing_are_near_those_of_all_text(folder, monkeypatch):
    """With lengths that are estimated for nineteen of twenty documents."""
    texts, packer = everything(folder), PACKINGS["crop"](65, 100)
    lengths, trained = [len(Letters().encode_document(text)) for text in texts], 0
    ids, mask = np.empty(65, np.int32), np.empty(65, bool)
    feed = iter([Document(np.zeros(length, np.int32)) for length in lengths])
    while used := packer.fill(ids, mask, feed):
        trained += used - 1
    monkeypatch.setattr(sample, "SMALL_BYTES", 1)
    exact = sample_balance(LocalDocuments(folder), Letters(), 65, "crop", 100)
    monkeypatch.setattr(sample, "ENCODED_CHARS", 20_000)
    rough = sample_balance(LocalDocuments(folder), Letters(), 65, "crop", 100)
    assert exact.missing == rough.missing == 0 and rough.documents == exact.documents < len(texts)
    share = packer.lost / sum(lengths)
    assert exact.cut / exact.read == pytest.approx(share, rel=0.1)
    assert rough.cut / rough.read == pytest.approx(share, rel=0.2)
