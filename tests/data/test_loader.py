"""Step loaders of text and conversations: order, ranks, ends of epochs, exact resume, threads and bad input."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, SHARED, needs_shared
from data_files import words, write
from processes import run_python

from llm.data.conversations import ConversationFeed, epoch_order, forecast
from llm.data.documents import LocalDocuments
from llm.data.loader import ConversationSteps, StepLayout, TextSteps, positions_for, validation_batches
from llm.data.packing import PACKINGS
from llm.data.tokens import CachedDocuments, encoded
from llm.errors import UserError

REAL = SHARED / "data" / "text"
BOS = 256
MARKS = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]


class Bytes:
    """A tokenizer of single bytes with the special tokens that conversations need."""

    bos_id, vocab_size, fingerprint = BOS, 256 + len(MARKS), "bytes"

    def special_id(self, name):
        return 256 + MARKS.index(name)

    def encode(self, text):
        return list(text.encode())

    def encode_document(self, text):
        return np.array([BOS, *self.encode(text)], np.int32)


@pytest.fixture
def folder(tmp_path):
    """Three parquet shards: 40 and 25 training documents, 30 for validation."""
    for shard, (n, first) in enumerate([(40, 0), (25, 100), (30, 200)]):
        write(tmp_path / f"shard_{shard}.parquet", words(n, first))
    return tmp_path


def same(a, b):
    """Return whether two batches or states are equal to the bit, with the same structure."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def take(loader, n):
    """n steps through the background thread."""
    steps = [placed(step) for step, _ in zip(loader, range(n), strict=False)]
    loader.close()
    return steps


def placed(step):
    """The step with its position, not the function that makes it."""
    return step | {"state": step["state"]()}


def documents_in(step):
    """Every document in a step's rows as text, cropped ones included."""
    found = []
    for micro in step["micro"]:
        for inputs, targets in zip(micro["inputs"].tolist(), micro["targets"].tolist(), strict=True):
            row = [*inputs, targets[-1] if targets[-1] >= 0 else BOS]
            starts = [i for i, token in enumerate(row) if token == BOS] + [len(row)]
            pieces = [row[a + 1 : b] for a, b in zip(starts, starts[1:], strict=False)]
            found += [bytes(t for t in piece if t < 256).decode() for piece in pieces if piece]
    return found


# ---- text steps -----------------------------------------------------------------------------------------------------


def text_steps(folder, state=None, **options):
    sizes, options = layout_of({"seq_len": 32, "rows_per_micro": 3, "micro_per_step": 2, "buffer": 20} | options)
    return TextSteps(LocalDocuments(folder), Bytes(), sizes, state, **options)


def layout_of(options):
    """The layout in a test's options, and the options of the loader."""
    names = [name for name in StepLayout.__dataclass_fields__ if name in options]
    return StepLayout(**{name: options.pop(name) for name in names}), options


def test_step_format(folder):
    step = next(text_steps(folder).steps())
    assert len(step["micro"]) == 2 and step["n_tokens"] == step["n_trained"] == 2 * 3 * 32
    for micro in step["micro"]:
        assert micro["inputs"].shape == micro["targets"].shape == (3, 32)
        assert micro["inputs"].dtype == micro["targets"].dtype == torch.int64
        assert torch.equal(micro["inputs"][:, 1:], micro["targets"][:, :-1])
        assert (micro["inputs"][:, 0] == BOS).all()
    assert len(text_steps(folder)) == 10**9
    originals = set(words(40) + words(25, 100))
    assert all(any(original.startswith(text) for original in originals) for text in documents_in(step))
    assert step["state"]()["balance"]["trained"] == step["n_trained"]


def test_steps_do_not_depend_on_threads_prefetch_or_micro_batches(folder, monkeypatch):
    straight = [placed(step) for step, _ in zip(text_steps(folder).steps(), range(8), strict=False)]
    for prefetch in (1, 5):
        assert same(take(text_steps(folder, prefetch=prefetch), 8), straight)
    monkeypatch.setattr("llm.data.tokens.PORTION_DOCUMENTS", 7)
    monkeypatch.setattr("llm.data.tokens.ENCODE_THREADS", 1)
    assert same(take(text_steps(folder), 8), straight)
    other = take(text_steps(folder, rows_per_micro=2, micro_per_step=3), 8)
    rows = [torch.cat([micro["inputs"] for step in steps for micro in step["micro"]]) for steps in (straight, other)]
    assert torch.equal(*rows)


def test_long_documents_are_not_tokenised_far_ahead(monkeypatch):
    monkeypatch.setattr("llm.data.tokens.PORTION_CHARS", 100)
    taken = []

    def documents():
        for i in range(200):
            taken.append(i)
            yield "ab " * (1_000 if 50 <= i < 150 else 3), {"index": i}

    ahead = [len(taken) - 1 - cursor["index"] for _, cursor in encoded(documents(), Bytes())]
    assert len(ahead) == 200 and max(ahead[60:150]) <= 1 and max(ahead[:30]) > 10


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_text_resumes_bit_for_bit(folder, tmp_path_factory, rank, world, packing):
    straight = take(text_steps(folder, rank=rank, world=world, packing=packing), 40)
    assert straight[-1]["state"]["cursor"]["epoch"] >= 2
    for done in (1, 9, 23):
        path = tmp_path_factory.mktemp("state") / "state.pt"
        torch.save(straight[done - 1]["state"], path)
        state = torch.load(path, weights_only=True)
        resumed = text_steps(folder, state, rank=rank, world=world, packing=packing)
        assert same(take(resumed, 40 - done), straight[done:])


def test_iterating_again_starts_over(folder):
    loader = text_steps(folder)
    assert same(take(loader, 3), take(loader, 3))


def test_state_of_another_layout_is_refused(folder):
    state = next(text_steps(folder).steps())["state"]()
    for options, message in [({"seq_len": 16}, "has seq_len=32, this run seq_len=16"), ({"world": 2}, "world=1, this")]:
        with pytest.raises(UserError, match=message):
            text_steps(folder, state, **options)
    with pytest.raises(UserError, match="kind=text, this run kind=conversations"):
        conversation_steps(10, state=state)
    with pytest.raises(ValueError, match="out of range"):
        text_steps(folder, rank=2, world=2)


def test_ranks_train_on_disjoint_documents(folder):
    seen = []
    for rank in (0, 1):
        steps = take(text_steps(folder, rank=rank, world=2, seq_len=64, buffer=1), 40)
        first_epoch = [step for step in steps if step["state"]["cursor"]["epoch"] == 0]
        seen.append({text[:4] for step in first_epoch for text in documents_in(step) if len(text) >= 4})
    assert len(seen[0]) > 10 < len(seen[1]) and not seen[0] & seen[1]


def test_an_epoch_end_neither_hangs_nor_drops_documents(tmp_path):
    source = LocalDocuments(write(tmp_path / "few.jsonl", words(6)))  # five to train on, far fewer than the buffer
    steps = take(TextSteps(source, Bytes(), StepLayout(63, 4), buffer=50), 30)
    counts = Counter(text[:4] for step in steps for text in documents_in(step) if len(text) >= 4)
    assert counts.keys() == {text[:4] for text in words(5)}
    assert steps[-1]["state"]["cursor"]["epoch"] > 20
    assert max(counts.values()) <= 2.5 * min(counts.values())


def test_a_finite_split_delivers_every_document(folder):
    steps = list(text_steps(folder, split="val", seq_len=127).steps())
    found = Counter(text[:4] for step in steps for text in documents_in(step) if len(text) >= 4)
    assert max(found.values()) == 1 and len(found) >= 28  # at most two were cropped to less than their number
    n_trained = sum(step["n_trained"] for step in steps)
    rows = sum(bool((row >= 0).any()) for step in steps for micro in step["micro"] for row in micro["targets"])
    packer = steps[-1]["state"]()["packer"]
    assert n_trained == packer["placed"] - rows  # each row's first token is no target
    assert packer["placed"] + packer["lost"] == sum(len(text) + 1 for text in words(30, 200))
    assert len(packer["lengths"]) == 0


@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_what_loses_nothing_trains_every_token_on_any_number_of_ranks(folder, packing):
    """One rank begins, three go on, two finish: together they write every token of the split exactly once."""
    written, positions = Counter(), [None]
    for world, steps in ((1, 3), (3, 2), (2, 10_000)):
        positions = positions_for(positions, world)
        for rank, position in enumerate(positions):
            loader = text_steps(folder, position, split="val", rank=rank, world=world, packing=packing)
            for step, _ in zip(loader.steps(), range(steps), strict=False):
                positions[rank] = step["state"]()
                for micro in step["micro"]:
                    rows = zip(micro["inputs"].tolist(), micro["targets"].tolist(), strict=True)
                    written.update(t for x, y in rows for t in (x[0], *y) if 0 <= t < BOS)
    assert written == Counter(byte for text in words(30, 200) for byte in text.encode())


# ---- the cache of tokens --------------------------------------------------------------------------------------------


def test_steps_from_the_cache_are_the_same_to_the_bit(folder, tmp_path, tmp_path_factory, capsys):
    write(folder / "shard_0.parquet", ["", *words(20), None, "  ", *words(20, 20), ""])

    def steps(source, state=None, **more):
        layout = StepLayout(32, 3, 2, **more)
        return take(TextSteps(source, Bytes(), layout, state=state, buffer=20, packing="best_fit"), 40)

    def cached():
        return CachedDocuments(LocalDocuments(folder), Bytes(), tmp_path / "cache")

    straight = steps(LocalDocuments(folder))
    assert same(steps(cached()), straight) and straight[-1]["state"]["cursor"]["epoch"] > 0
    assert capsys.readouterr().out.count("token cache: shard_") == 2
    assert same(steps(cached()), straight) and same(steps(cached(), straight[8]["state"])[:31], straight[9:])
    ranks = [steps(LocalDocuments(folder), rank=1, world=2), steps(cached(), rank=1, world=2)]
    assert same(*ranks) and not capsys.readouterr().out
    write(new := tmp_path_factory.mktemp("new") / "shard_1.parquet", words(25, 300))
    new.replace(folder / "shard_1.parquet")  # whole: a thread that reads ahead may look
    changed = steps(LocalDocuments(folder))
    assert not same(changed, straight) and same(steps(cached()), changed)
    assert "shard_1.parquet has changed since it was tokenised" in capsys.readouterr().out
    for path in (tmp_path / "cache").glob("*.tokens"):
        path.write_bytes(path.read_bytes()[:-1])
    assert same(steps(cached()), changed) and len(list((tmp_path / "cache").glob("*.tokens"))) == 2


def test_the_next_shard_is_tokenised_while_one_is_read_and_once_for_all(folder, tmp_path, capsys):
    def read_all(documents):
        return [ids.tolist() for ids, _ in documents]

    def cached():
        return CachedDocuments(LocalDocuments(folder), Bytes(), tmp_path / "cache").iterate("train", loop=False)

    first = cached()
    next(first)
    for thread in threading.enumerate():
        if thread.name == "fathom-cache":
            thread.join()
    assert len(list((tmp_path / "cache").glob("*.tokens"))) == 2
    for path in (tmp_path / "cache").glob("*.tokens"):
        path.unlink()
    capsys.readouterr()
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(read_all, [cached() for _ in range(4)]))
    assert several == [[[BOS, *text.encode()] for text in words(40) + words(25, 100)]] * 4
    assert capsys.readouterr().out.count("token cache: shard_") == 2


def test_a_cache_that_cannot_be_written_is_an_error_of_the_user(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="cannot be written.*a part of the path is a file.*name another folder in data.token_cache"
    ):
        next(CachedDocuments(LocalDocuments(folder), Bytes(), tmp_path / "file").iterate("train"))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="no space left on "):
        next(CachedDocuments(LocalDocuments(folder), Bytes(), tmp_path / "cache").iterate("train"))
    assert all(path.name.endswith(".lock") for path in (tmp_path / "cache").iterdir())
    with pytest.raises(UserError, match="data.token_cache is for files of text"):
        CachedDocuments(None, Bytes(), tmp_path)


# ---- the background thread ------------------------------------------------------------------------------------------


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "fathom-data"]


def test_thread_ends_on_close_break_and_collection(folder):
    loader = text_steps(folder)
    steps = iter(loader)
    next(steps)
    assert len(data_threads()) == 1 and loader.wait_seconds > 0
    steps.close()
    assert not data_threads() and list(steps) == []
    for _ in loader:
        break
    assert not data_threads()  # the iterator was collected
    running = iter(loader)
    next(running)
    loader.close()
    assert not data_threads()


def test_an_iterator_that_is_made_for_a_try_prepares_no_step(folder):
    """Lightning makes one to see whether it can; the next one begins at once, while other things are still done."""
    loader = text_steps(folder)
    tried = iter(loader)
    assert not data_threads()
    used = iter(loader)
    assert len(data_threads()) == 1
    assert next(tried, None) is None  # there is one at a time
    assert next(used)["n_tokens"] == next(iter(text_steps(folder)))["n_tokens"]
    loader.close()
    assert not data_threads()


def test_errors_of_the_thread_surface_in_the_consumer(tmp_path):
    rows = [json.dumps({"text": text}) for text in words(300)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, "{broken"]))
    write(tmp_path / "b.jsonl", words(3))
    steps = iter(TextSteps(LocalDocuments(tmp_path), Bytes(), StepLayout(32, 4), buffer=10))
    with pytest.raises(UserError, match="a.jsonl: line 301: not valid JSON"):
        for _ in range(10_000):
            next(steps)
    assert next(steps, None) is None and not data_threads()


def test_a_process_with_a_running_loader_exits(folder):
    code = f"""
import sys
sys.path[:0] = [{str(REPO)!r}, {str(REPO / "tests")!r}, {str(Path(__file__).parent)!r}]
from test_loader import text_steps
steps = iter(text_steps({str(folder)!r}))
print(next(steps)["n_tokens"])
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "192\n", "")


# ---- conversations --------------------------------------------------------------------------------------------------


def conversation(i):
    messages = [{"role": "user", "content": f"q{i:04d}"}, {"role": "assistant", "content": f"a{i:04d}" + "!" * (i % 9)}]
    return {"messages": messages}


def conversation_steps(n, **options):
    sizes, options = layout_of({"seq_len": 63, "rows_per_micro": 2, "micro_per_step": 2, "buffer": 8} | options)
    return ConversationSteps([conversation(i) for i in range(n)], Bytes(), sizes, **options)


def numbers_in(step):
    return [int(text[1:5]) for text in documents_in(step)]


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_conversation_targets(train_on):
    step = next(conversation_steps(50, train_on=train_on).steps())
    targets = torch.cat([micro["targets"] for micro in step["micro"]])
    inputs = torch.cat([micro["inputs"] for micro in step["micro"]])
    assert step["n_trained"] == int((targets >= 0).sum()) and step["n_tokens"] == inputs.numel()
    trained = inputs[:, 1:][targets[:, :-1] >= 0]
    assert torch.equal(trained, targets[:, :-1][targets[:, :-1] >= 0])  # a target is the next input
    user, assistant_start = 257, 259
    if train_on == "assistant":
        assert not set(trained.tolist()) & {BOS, user, assistant_start}
        for row in range(
            len(inputs)
        ):  # exactly what stands between assistant_start and assistant_end, the latter included
            inside = False
            for here, target in zip(inputs[row].tolist(), targets[row].tolist(), strict=True):
                inside = here == assistant_start or (inside and here != 260)
                assert (target >= 0) == inside
    else:
        assert {BOS, user, assistant_start} <= set(trained.tolist())


def test_every_conversation_comes_once_per_epoch_in_a_new_order():
    order = [list(epoch_order(100, 42, epoch)) for epoch in range(3)]
    assert order[0] == list(range(100)) and order[1] != order[2] and sorted(order[1]) == order[0]
    mixture = [conversation(i) for i in range(100)]
    feed = ConversationFeed(mixture, Bytes(), 64, seed=42)
    stream = [int(bytes(next(feed).ids[3:7].tolist())) for _ in range(300)]
    assert [stream[:100], stream[100:200], stream[200:]] == order
    other = ConversationFeed(mixture, Bytes(), 64, seed=7)
    assert [int(bytes(next(other).ids[3:7].tolist())) for _ in range(200)][100:] != order[1]


def test_one_pass_delivers_each_conversation_whole():
    steps = list(conversation_steps(101, loop=False).steps())
    assert sorted(number for step in steps for number in numbers_in(step)) == list(range(101))
    endless = take(conversation_steps(10), 40)  # fewer conversations than fit into a few rows
    counts = Counter(number for step in endless for number in numbers_in(step))
    assert len(counts) == 10 and max(counts.values()) - min(counts.values()) <= 4


@pytest.mark.parametrize("rank, world", [(0, 1), (2, 3)])
def test_conversations_resume_bit_for_bit(tmp_path, rank, world):
    straight = take(conversation_steps(60, rank=rank, world=world), 30)
    assert straight[-1]["state"]["cursor"]["index"] > 120
    for done in (1, 13):
        torch.save(straight[done - 1]["state"], tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        resumed = conversation_steps(60, rank=rank, world=world, state=state)
        assert same(take(resumed, 30 - done), straight[done:])
    with pytest.raises(UserError, match="holds 61 conversations, the checkpoint's position is in one of 60"):
        take(conversation_steps(61, rank=rank, world=world, state=straight[0]["state"]), 1)


def test_ranks_get_disjoint_conversations():
    seen = [
        {n for step in conversation_steps(100, rank=rank, world=3, loop=False).steps() for n in numbers_in(step)}
        for rank in range(3)
    ]
    assert sorted(number for part in seen for number in part) == list(range(100))


def test_long_conversations_are_cut_and_counted():
    def long(question, answer):
        return {
            "messages": [{"role": "user", "content": "q" * question}, {"role": "assistant", "content": "a" * answer}]
        }

    mixture = [long(5, 5), long(5, 500), long(500, 5)]
    loader = ConversationSteps(mixture, Bytes(), StepLayout(63, 2), loop=False)
    (step,) = loader.steps()
    counts = step["state"]()["cursor"]
    assert (counts["truncated"], counts["dropped"]) == (2, 1)
    assert sorted(len(text) for text in documents_in(step)) == [10, 64 - 4]  # the cut one fills its row
    assert step["n_trained"] == 5 + 1 + 64 - 1 - 7 - 1
    for loop in (False, True):
        with pytest.raises(UserError, match="none of the 2 conversations has a trained token in its first 63 tokens"):
            next(ConversationSteps([long(500, 5), long(90, 5)], Bytes(), StepLayout(63, 2), loop=loop).steps())


def test_bad_mixtures():
    with pytest.raises(UserError, match="holds no conversation"):
        next(conversation_steps(0).steps())
    with pytest.raises(UserError, match="stage.train_on=user: must be one of assistant, all"):
        next(conversation_steps(5, train_on="user").steps())
    wrong = [conversation(0), {"messages": [{"role": "assistant", "content": "I begin"}]}]
    with pytest.raises(UserError, match="conversation 1 of the mixture: message 1 has role 'assistant'"):
        next(ConversationSteps(wrong, Bytes(), StepLayout(63, 2)).steps())


@pytest.mark.parametrize("size", [100, 5000])
def test_estimated_steps_are_what_an_epoch_takes(size):
    mixture = [conversation(i) for i in range(size)]
    expected = forecast(mixture, Bytes(), seq_len=63)
    estimate = expected.steps(tokens_per_step=4 * 63, epochs=1)
    taken = len(list(conversation_steps(size, loop=False, buffer=100).steps()))
    assert abs(estimate - taken) <= max(1, 0.03 * taken)
    twice = expected.steps(tokens_per_step=4 * 63, epochs=2)
    assert abs(twice - 2 * estimate) <= 1


# ---- validation batches ---------------------------------------------------------------------------------------------


def test_validation_batches_cover_the_tokens_asked_for_on_any_number_of_ranks(folder):
    def loader():
        return text_steps(folder, split="val")

    batches = validation_batches(loader(), eval_tokens=250)
    assert [batch["inputs"].shape for batch in batches] == [(3, 32)] * 3  # 288 positions
    assert same(batches, validation_batches(loader(), eval_tokens=250))
    everything = validation_batches(loader(), eval_tokens=10**9)
    trained = sum(int((batch["targets"] >= 0).sum()) for batch in everything)
    assert trained == sum(step["n_trained"] for step in loader().steps())
    parts = [validation_batches(loader(), 10**9, rank, 2) for rank in (0, 1)]
    assert same(everything[0::2], parts[0]) and same(everything[1::2], parts[1])
    talks = validation_batches(conversation_steps(30, loop=False), eval_tokens=10**9)
    assert sum(batch["inputs"].numel() for batch in talks) >= 30 * 15


# ---- real files -----------------------------------------------------------------------------------------------------


@needs_shared("data/text")
def test_real_text():
    source = LocalDocuments(REAL)
    assert source.check().startswith(f"5 parquet files, data.path={REAL}; validation: shard_00004.parquet")
    loader = TextSteps(source, Bytes(), StepLayout(2048, 8), buffer=200)
    steps = take(loader, 6)
    assert all(step["n_trained"] == 8 * 2048 for step in steps)
    state = steps[2]["state"]
    assert state["cursor"]["shard"] == 0 and state["cursor"]["row"] == state["cursor"]["index"]
    resumed = take(TextSteps(source, Bytes(), StepLayout(2048, 8), buffer=200, state=state), 3)
    assert same(resumed, steps[3:])
    late = next(source.iterate("train", {"epoch": 0, "shard": 3, "row": 4686, "index": 29262}))
    assert late[1] == {"epoch": 0, "shard": 3, "row": 4687, "index": 29263}
    held_out = TextSteps(source, Bytes(), StepLayout(256, 16), split="val")
    assert validation_batches(held_out, 10_000)[0]["inputs"].shape == (16, 256)
