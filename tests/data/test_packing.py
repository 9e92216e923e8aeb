"""Best-fit packing against a plain restatement of its rule, its accounting, its state and its speed."""

import random
import time
from itertools import cycle

import numpy as np
import pytest

from llm.data.packing import PACKINGS, BestFit, BestFitCrop, BestFitPad, Document, Stream, deal


def make_documents(lengths, masked=False):
    """Documents whose tokens name document and position, so that every placement can be traced."""
    for i, n in enumerate(lengths):
        ids = np.arange(n, dtype=np.int32) + i * 1000
        yield Document(ids, ids % 3 == 0 if masked else None)


def pack(packer, documents, rows=None):
    """Rows as lists of the tokens written; all that come if `rows` is None."""
    packed = []
    while rows is None or len(packed) < rows:
        ids, mask = np.full(packer.row_len, -7, np.int32), np.zeros(packer.row_len, bool)
        used = packer.fill(ids, mask, documents)
        if not used:
            break
        assert (ids[used:] == -7).all() and not mask[used:].any()
        packed.append(ids[:used].tolist())
    return packed


def plain_rows(lengths, row_len, buffer, crop):
    """The rule by brute force: largest that fits, oldest among equals; else crop the shortest, or end the row."""
    waiting, coming, rows = [], list(make_documents(lengths)), []
    while coming or waiting:
        row = []
        while len(row) < row_len:
            while coming and len(waiting) < buffer:
                waiting.append(coming.pop(0).ids.tolist())
            space = row_len - len(row)
            fitting = [d for d in waiting if len(d) <= space]
            if not waiting or not (fitting or crop):
                break
            chosen = max(fitting, key=len) if fitting else min(waiting, key=len)  # the first of equals: the oldest
            waiting.remove(chosen)
            row += chosen[:space]
        rows.append(row)
    return rows


def plain_best_fit(lengths, row_len, buffer):
    """BestFit's rule by brute force; the rest of a cut document is `first token + rest`."""
    waiting, coming, rows = [], list(make_documents(lengths)), []

    def wait(document):
        while len(document) > row_len:
            waiting.append(document[:row_len])
            document = document[:1] + document[row_len:]
        waiting.append(document)

    while coming or waiting:
        row = []
        while len(row) < row_len:
            while coming and len(waiting) < buffer:
                wait(coming.pop(0).ids.tolist())
            if not waiting:
                break
            space = row_len - len(row)
            sizes = [len(d) for d in waiting]
            fitting = [n for n in sizes if n <= space]
            pairs = [n for i, n in enumerate(sizes) if space - n in sizes[:i] + sizes[i + 1 :]]
            wanted = space if space in sizes else max(pairs or fitting or [min(sizes)])
            chosen = waiting.pop(sizes.index(wanted))
            row += chosen[:space]
            if len(chosen) > space:
                wait(chosen[:1] + chosen[space:])
        rows.append(row)
    return rows


@pytest.mark.parametrize("seed", range(12))
def test_best_fit_is_the_plain_rule_and_loses_nothing(seed):
    rng = random.Random(seed)
    row_len, buffer = rng.choice([8, 33, 64]), rng.choice([1, 5, 30])
    lengths = [rng.randint(1, 3 * row_len) for _ in range(150)]
    packer = BestFit(row_len, buffer)
    rows = pack(packer, make_documents(lengths))
    assert rows == plain_best_fit(lengths, row_len, buffer)
    assert all(len(row) == row_len for row in rows[:-1]) and all(row[0] % 1000 == 0 for row in rows)
    trained = {token for row in rows for token in row}
    assert trained == {token for document in make_documents(lengths) for token in document.ids.tolist()}
    assert packer.placed == sum(map(len, rows)) and packer.lost_fraction == 0


def test_stream_is_all_documents_one_after_the_other():
    lengths = random.Random(6).choices(range(1, 300), k=100)
    rows = pack(Stream(64), make_documents(lengths))
    flat = [token for document in make_documents(lengths) for token in document.ids.tolist()]
    assert rows == [flat[i : i + 64] for i in range(0, len(flat), 64)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("crop", [True, False])
def test_rows_are_those_of_the_plain_rule(seed, crop):
    rng = random.Random(seed)
    row_len, buffer = rng.choice([8, 33, 64]), rng.choice([1, 5, 30])
    lengths = [rng.randint(1, 2 * row_len if crop else row_len) for _ in range(200)]
    packer = (BestFitCrop if crop else BestFitPad)(row_len, buffer)
    assert pack(packer, make_documents(lengths)) == plain_rows(lengths, row_len, buffer, crop)


def test_crop_rows_are_full_and_every_token_is_accounted_for():
    lengths = random.Random(3).choices(range(1, 300), k=1000)
    packer = BestFitCrop(128, buffer=50)
    rows = pack(packer, make_documents(lengths))
    assert all(len(row) == 128 for row in rows[:-1]) and 0 < len(rows[-1]) <= 128
    assert all(row[0] % 1000 == 0 for row in rows)  # every row begins with a document's first token
    assert packer.placed == sum(map(len, rows))
    assert packer.placed + packer.lost == sum(lengths)
    assert packer.lost_fraction == packer.lost / sum(lengths)


def test_pad_places_every_document_whole_exactly_once():
    lengths = random.Random(4).choices(range(1, 65), k=500)
    packer = BestFitPad(64, buffer=20)
    rows = pack(packer, make_documents(lengths))
    assert sorted(token for row in rows for token in row) == sorted(
        token for document in make_documents(lengths) for token in document.ids.tolist()
    )
    assert packer.placed == sum(lengths) and packer.placed + packer.lost == 64 * len(rows)
    assert 0 < packer.lost_fraction < 0.1  # best-fit leaves little


def test_masks_travel_with_their_tokens():
    packer = BestFitPad(64, buffer=10)
    ids, mask = np.zeros(64, np.int32), np.zeros(64, bool)
    used = packer.fill(ids, mask, make_documents([20, 30, 13, 9], masked=True))
    assert used > 60 and mask[:used].tolist() == (ids[:used] % 3 == 0).tolist()
    crop = BestFitCrop(16)
    ids, mask = np.zeros(16, np.int32), np.zeros(16, bool)
    assert crop.fill(ids, mask, make_documents([100, 100])) == 16 and mask.all()  # no mask: all tokens are trained


def test_pad_refuses_a_document_longer_than_a_row():
    with pytest.raises(ValueError, match="65 tokens exceeds the row of 64"):
        pack(BestFitPad(64), make_documents([65]))


@pytest.mark.parametrize("packer_class", [BestFit, BestFitCrop, BestFitPad, Stream])
def test_state_continues_with_the_same_rows(packer_class):
    lengths = random.Random(5).choices(range(1, 64 if packer_class is BestFitPad else 200), k=400)
    straight = packer_class(64, buffer=40)
    documents = make_documents(lengths, masked=True)
    pack(straight, documents, rows=60)
    rest = list(documents)  # what the first packer has not seen yet
    resumed = packer_class(64, buffer=40)
    resumed.load_state_dict(straight.state_dict())
    assert len(resumed) == len(straight) >= (1 if packer_class is Stream else 39)
    assert pack(straight, iter(rest)) == pack(resumed, iter(rest))
    assert straight.lost_fraction == resumed.lost_fraction and straight.placed == resumed.placed


def test_state_is_a_copy_of_at_most_a_row_per_document():
    packer = BestFitCrop(16, buffer=4)
    documents = make_documents([1000, 500, 400, 300, 200, 100])
    pack(packer, documents, rows=1)
    state = packer.state_dict()
    assert state["lengths"].tolist() == [1000, 500, 400] and len(state["tokens"]) == 3 * 16
    before = state["tokens"].copy()
    pack(packer, documents)
    assert (state["tokens"] == before).all()
    with pytest.raises(ValueError, match="rows of 32"):
        BestFitCrop(32, buffer=4).load_state_dict(state)


@pytest.mark.parametrize("packer_class", PACKINGS.values())
def test_packing_searches_its_buffer_and_does_not_scan_it(packer_class):
    """Sixteen times as many waiting documents cost about as much a row; a scan of them costs sixteen times as much."""
    lengths = np.random.default_rng(0).integers(100, 3000, 3000)
    ids, mask = np.empty(2049, np.int32), np.empty(2049, bool)

    def seconds(buffer: int) -> float:
        """Least processor time of 100 rows, once the buffer is full."""
        documents = cycle(list(make_documents(lengths)))
        packer, least = packer_class(2049, buffer), float("inf")
        packer.fill(ids, mask, documents)
        for _ in range(5):
            start = time.thread_time()
            for _ in range(100):
                packer.fill(ids, mask, documents)
            least = min(least, time.thread_time() - start)
        return least

    assert seconds(16_000) < 5 * seconds(1000)


def test_positions_of_older_releases_are_dealt_to_other_ranks():
    states = [pack_state(seed) for seed in (1, 2)]
    old = [{("cropped" if key == "lost" else key): value for key, value in state.items()} for state in states]
    assert [one["lost"] for one in deal(old, 3)] == [one["lost"] for one in deal(states, 3)]


def pack_state(seed: int) -> dict:
    packer = BestFitCrop(64, buffer=10)
    pack(packer, make_documents(random.Random(seed).choices(range(1, 200), k=60)), rows=20)
    return packer.state_dict()
