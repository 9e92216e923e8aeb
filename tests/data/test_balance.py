"""Balance of tokens: it adds up for random texts and conversations, over resumes and any number of ranks."""

import random
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from llm.data.balance import ANSWERS, Balance, Reading, describe, of_rollout, skipped_rows, total, warnings_of
from llm.data.conversations import forecast, of_conversations, render
from llm.data.documents import walk
from llm.data.loader import ConversationSteps, StepLayout, TextSteps, positions_for
from llm.data.sample import sample_balance
from llm.tokenizer.bpe import Tokenizer, split_pattern
from llm.tokenizer.chat_format import render_conversation

BOS = 256
MARKS = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]


class Bytes:
    """A tokenizer of single bytes with the special tokens that conversations need."""

    bos_id = BOS

    def special_id(self, name):
        return 256 + MARKS.index(name)

    def encode(self, text):
        return list(text.encode())


class Numbers:
    """A tokenizer of texts "number length": BOS and the number as often as the length says."""

    bos_id = 10**6

    def encode_document(self, text):
        number, length = map(int, text.split())
        return np.array([self.bos_id] + [number] * length, np.int32)


class Lengths:
    """A source of numbered documents with the given lengths."""

    def __init__(self, lengths):
        self.lengths = lengths

    def iterate(self, split, cursor=None, rank=0, world=1, loop=True):
        def rows(shard, start):
            return (f"{n} {length}" for n, length in enumerate(self.lengths) if n >= start)

        return walk([0], rows, cursor, rank, world, loop, "test")


def rows_of(step):
    """Return the whole rows (seq_len + 1 tokens) of a step of text."""
    return [
        [*inputs, targets[-1]]
        for micro in step["micro"]
        for inputs, targets in zip(micro["inputs"].tolist(), micro["targets"].tolist(), strict=True)
    ]


def stopped(make, steps, stop):
    """Return `steps` steps of a loader that is stopped behind step `stop` and continues from its position."""
    loader = make(None).steps()
    first = [next(loader) for _ in range(stop)]
    loader = make(first[-1]["state"]()).steps()
    return first + [next(loader) for _ in range(steps - stop)]


@pytest.mark.parametrize("packing", ["crop", "best_fit", "stream"])
@pytest.mark.parametrize("seed", range(5))
def test_balance_of_text_is_a_naive_count(packing, seed):
    draw = random.Random(seed)
    lengths = [draw.choice([1, 5, 12, draw.randint(1, 90)]) for _ in range(900)]
    layout, buffer = StepLayout(draw.choice([15, 31]), 3, 2), draw.choice([1, 9])

    def make(position):
        return TextSteps(Lengths(lengths), Numbers(), layout, position, packing=packing, buffer=buffer)

    steps = stopped(make, 12, draw.randint(1, 11))
    position = steps[-1]["state"]()
    balance = Balance.from_dict(position["balance"])
    read, rows = position["cursor"]["index"], [row for step in steps for row in rows_of(step)]
    assert balance.documents == read < 900 and balance.missing == 0
    assert balance.read == sum(lengths[:read]) + read
    assert balance.trained == sum(int((m["targets"] >= 0).sum()) for step in steps for m in step["micro"])
    assert balance.masked == len(rows) and balance.padded == balance.dropped == 0
    placed = Counter(token for row in rows for token in row if token != Numbers.bos_id)
    waits = Counter(token for token in position["packer"]["tokens"].tolist() if token != Numbers.bos_id)
    if packing == "crop":
        assert balance.cut == sum(lengths[number] - placed[number] for number in range(read) if number not in waits) > 0
        assert balance.waiting == sum(lengths[number] + 1 for number in waits)
    else:
        assert balance.cut == 0 and placed + waits == Counter({n: lengths[n] for n in range(read)})
    starts = sum(row.count(Numbers.bos_id) for row in rows) + position["packer"]["tokens"].tolist().count(
        Numbers.bos_id
    )
    assert balance.repeated == (starts - read if packing == "best_fit" else 0)


def conversations(draw, count):
    """Return conversations of one to three turns with questions and answers of 0 to 60 bytes."""
    return [
        {
            "messages": [
                {"role": role, "content": "q" * draw.choice([1, 7, draw.randint(0, 60)])}
                for _ in range(draw.randint(1, 3))
                for role in ("user", "assistant")
            ]
        }
        for _ in range(count)
    ]


def naive(rows, row_len, train_on):
    """Return the balance of conversations without packing, by rendering them whole."""
    found = Balance()
    for row in rows:
        ids, mask = render_conversation(Bytes(), row)
        trained = sum(mask[1:row_len]) if train_on == "assistant" else min(len(ids), row_len) - 1
        turns = [i for i, token in enumerate(ids) if token == Bytes().special_id("<|assistant_end|>")]
        found.documents += 1
        found.read += len(ids)
        found.documents_cut += len(ids) > row_len
        found.answers += len(turns)
        found.unanswered += not any(mask[:row_len])
        if trained:
            found.trained += trained
            found.cut += max(0, len(ids) - row_len)
            found.answers_cut += sum(i >= row_len for i in turns)
        else:
            found.documents_dropped += 1
            found.dropped += len(ids)
            found.answers_cut += len(turns)
    return found


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("seed", range(5))
def test_balance_of_conversations_is_a_naive_count(train_on, seed):
    draw = random.Random(seed)
    mixture, layout = conversations(draw, 300), StepLayout(draw.choice([40, 63]), 3, 2)

    def make(position):
        return ConversationSteps(mixture, Bytes(), layout, position, train_on=train_on, loop=False, buffer=7)

    steps = stopped(make, 10, draw.randint(1, 9))
    position = steps[-1]["state"]()
    balance = Balance.from_dict(position["balance"])
    assert balance.missing == 0 and balance.documents_dropped == position["cursor"]["dropped"]
    assert balance.trained + balance.masked + balance.padded == 60 * (layout.seq_len + 1)
    assert balance.trained == sum(step["n_trained"] for step in steps)
    expected = naive(mixture[: position["cursor"]["index"]], layout.seq_len + 1, train_on)
    counts = ("documents", "documents_cut", "documents_dropped", "unanswered", "answers", "answers_cut")
    assert all(getattr(balance, name) == getattr(expected, name) for name in (*counts, "read", "cut", "dropped"))
    whole = forecast(mixture, Bytes(), seq_len=layout.seq_len, train_on=train_on)
    expected = naive(mixture, layout.seq_len + 1, train_on)
    assert whole.balance.missing == whole.balance.waiting == 0 and whole.balance.trained > 0
    assert all(getattr(whole.balance, name) == getattr(expected, name) for name in (*counts, "read", "cut"))
    if train_on == "assistant":  # else the BOS of a conversation that does not begin a row is a target too
        assert whole.balance.trained == expected.trained
    lengths = sorted(len(render_conversation(Bytes(), row)[0]) for row in mixture)
    assert whole.median_length == lengths[149] and whole.sampled == 300
    part = forecast(mixture, Bytes(), 100, seq_len=layout.seq_len, train_on=train_on)
    assert part.sampled == 100 and part.balance.missing == 0
    assert abs(part.balance.read - whole.balance.read) < 0.2 * whole.balance.read


def test_balance_survives_another_number_of_ranks():
    mixture = conversations(random.Random(7), 400)

    def make(rank, world, position=None):
        return ConversationSteps(mixture, Bytes(), StepLayout(63, 2, 1, rank, world), position, loop=False, buffer=7)

    positions = []
    for rank in range(3):
        steps = make(rank, 3).steps()
        positions.append([next(steps) for _ in range(4)][-1]["state"]())
    before = total(position["balance"] for position in positions)
    moved = positions_for(positions, 2)
    assert total(position["balance"] for position in moved) == before
    ends = [list(make(rank, 2, position).steps())[-1]["state"]()["balance"] for rank, position in enumerate(moved)]
    after = total(ends)
    assert after.documents == 400 and after.missing == after.waiting == 0
    assert after.read == naive(mixture, 64, "assistant").read
    grpo = positions_for([{"step": 3, "balance": {"trained": 5}}, {"step": 3, "balance": {"trained": 7}}], 1)
    assert grpo == [{"step": 3, "balance": {"trained": 12}}]


def test_a_checkpoint_without_counters_counts_from_there_on():
    mixture = conversations(random.Random(3), 200)

    def make(position):
        return ConversationSteps(mixture, Bytes(), StepLayout(63, 2), position, buffer=7)

    position = next(make(None).steps())["state"]()
    waiting = Balance.from_dict(position.pop("balance")).waiting
    balance = Balance.from_dict(next(make(position).steps())["state"]()["balance"])
    assert balance.partial == 1 and balance.missing == 0 and balance.read > waiting > 0
    assert "read since the resume" in describe(balance, "conversations")[0]


def test_data_left_out_counts_as_dropped():
    mixture = conversations(random.Random(3), 200)
    loader = ConversationSteps(mixture, Bytes(), StepLayout(63, 2), buffer=7)
    steps = loader.steps()
    done = [next(steps) for _ in range(3)]
    behind = ConversationSteps(mixture, Bytes(), StepLayout(63, 2), done[0]["state"](), buffer=7)
    behind.skip(2)
    balance, trained = Balance.from_dict(behind.state["balance"]), Balance.from_dict(done[2]["state"]()["balance"])
    assert balance.missing == 0 and balance.trained == done[0]["n_trained"]
    assert balance.dropped == trained.dropped + trained.trained + trained.masked - balance.trained - balance.masked
    assert balance.padded == Balance.from_dict(done[0]["state"]()["balance"]).padded


LONG = [
    "the quick brown fox, 12345 times; ".replace("12345", str(n)) * 40 + "\n\n" * (n % 3) + "it's naïve 中文 हिन्दी "
    for n in range(60)
]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(LONG, 340)


@pytest.mark.parametrize("pattern", [split_pattern(), split_pattern(3, marks=True), r"\p{N}{1,3}+|\p{L}++|\s++$|\s|."])
def test_the_beginning_of_a_long_message_has_the_first_tokens_of_all(tok, pattern):
    tok, draw = Tokenizer(tok.tokens, pattern), random.Random(5)
    for _ in range(30):
        text = "".join(draw.choice([*LONG, " ", "\n", "  \n ", "x" * 99, "…!?"]) for _ in range(draw.randint(1, 40)))
        whole, chars = tok.encode(text), draw.randint(0, len(text) + 9)
        ids, end = tok.encode_start(text, chars)
        assert ids == whole[: len(ids)] and min(chars, len(text)) <= end <= len(text)


def test_a_message_far_longer_than_the_context_is_not_encoded_whole(tok):
    text = "".join(LONG) * (4_000_000 // len("".join(LONG)))
    talk = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "text", "text": text}, {"type": "python", "text": "1+1"}]},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
        ]
    }
    encoded = []
    counting = SimpleNamespace(
        bos_id=tok.bos_id,
        special_id=tok.special_id,
        encode=lambda t: encoded.append(len(t)) or tok.encode(t),
        encode_start=lambda t, n: encoded.append(n) or tok.encode_start(t, n),
    )
    begin = time.process_time()
    found = render(counting, talk, 513)
    assert time.process_time() - begin < 0.5 and sum(encoded) < 100_000
    short = {"messages": [*talk["messages"][:2], {"role": "assistant", "content": text[:60_000]}]}
    ids, mask = render_conversation(tok, short)
    assert found.document.ids.tolist() == ids[:513] and found.document.mask.tolist() == [m == 1 for m in mask[:513]]
    whole = 3 * len(tok.encode(text))
    assert found.is_estimated and abs(found.length - whole) < 0.2 * whole
    assert (found.answers, found.answers_kept, found.is_unanswered) == (2, 0, False)


def test_words_of_many_characters_still_fill_a_row():
    spaces = Tokenizer([bytes([b]) for b in range(256)] + [b" " * 2**n for n in range(1, 8)])
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ("\n" + " " * 4096) * 30}]}
    found = render(spaces, talk, 65)
    assert found.document.ids.tolist() == render_conversation(spaces, talk)[0][:65]


def test_what_is_lost_is_said():
    cut = Balance(
        documents=60, documents_cut=60, answers=60, answers_cut=60, read=900, trained=200, masked=100, cut=600
    )
    (line,) = warnings_of(cut)
    assert (
        line.startswith("60 of 60 answers are cut (100%): no answer keeps its end of turn") and "model.seq_len" in line
    )
    assert warnings_of(Balance(documents=60, answers=100, answers_cut=5)) == []
    assert "do not teach the model to stop" in warnings_of(Balance(documents=60, answers=100, answers_cut=6))[0]
    assert "30 of 60 conversations have a question" in warnings_of(Balance(documents=60, unanswered=30))[0]
    lines = describe(cut, "conversations")
    assert lines[0] == (
        "900 tokens of 60 conversations read = 200 trained (22.2 %) + 100 masked (11.1 %) + 600 cut (66.7 %)"
    )
    assert "60 of 60 answers lost their end" in lines[1]


def test_rows_that_are_left_out_hold_no_padding_either():
    """Keeps both sums of the balance: that of the tokens, and that of the positions of the rows trained on."""
    before = Balance(documents=2, read=20, trained=12, masked=4, waiting=4, padded=2)
    after = Balance(documents=5, read=50, trained=30, masked=10, waiting=10, padded=8)
    after.leave_out(before)
    assert (after.dropped, after.missing, after.read) == (24, 0, 50)
    assert after.trained + after.masked + after.padded == 12 + 4 + 2


def test_answers_that_no_row_holds_are_warned_of_apart_from_those_that_are_cut():
    unanswered = Balance(documents=100, answers=100, answers_cut=6, unanswered=6)
    (line,) = warnings_of(unanswered)
    assert line.startswith("6 of 100 conversations have a question that fills the row")
    assert len(warnings_of(unanswered + Balance(answers_cut=5))) == 1  # 5 of 100
    cut, _ = warnings_of(unanswered + Balance(answers_cut=6))
    assert cut.startswith("12 of 100 answers are cut (12%)")


def test_rows_left_out_of_several_tasks_are_added_up_by_their_cause():
    found = ({"empty answer": 2}, 3, None, {"empty answer": 1, "bad": 4}, 5)
    assert skipped_rows(SimpleNamespace(skipped=one) for one in found) == {"empty answer": 3, "bad": 12}


def test_sampled_answers_without_a_signal_are_dropped():
    sequences = [([1, 2, 3, 4], [0, 0, 1, 1]), ([1, 2, 3], [0, 0, 1]), ([1, 2, 3, 4, 5], [0, 0, 1, 0, 1])]
    balance = of_rollout(sequences, [0.5, 0.0, -0.5], [True, False, False])
    assert balance == Balance(
        documents=3, documents_dropped=1, answers=3, answers_cut=2, read=12, trained=4, masked=5, dropped=3
    )
    assert balance.missing == 0 and warnings_of(balance, ANSWERS) == []
    assert "2 of 3 answers cut at stage.max_new_tokens, 1 dropped" in describe(balance, ANSWERS)[1]


def test_conversations_that_take_a_row_each():
    rows = conversations(random.Random(2), 50)
    balance, expected = of_conversations([render(Bytes(), row, 40) for row in rows]), naive(rows, 40, "assistant")
    assert balance.missing == 0 and balance.padded == 0 and balance.masked > 0
    assert (balance.trained, balance.cut, balance.dropped) == (expected.trained, expected.cut, expected.dropped)


@pytest.mark.parametrize("packing", ["crop", "best_fit", "stream"])
def test_a_sample_of_text_foretells_the_losses(packing):
    lengths = [random.Random(n).randint(1, 90) for n in range(300)]
    source = Lengths(lengths)
    balance = sample_balance(source, Numbers(), 32, packing, 50)
    assert balance.missing == balance.waiting == 0 and balance.documents == 100
    assert balance.read == sum(lengths[:100]) + 100 and (balance.cut > 0) == (packing == "crop")


def test_block_of_run_json():
    parts = [SimpleNamespace(skipped={"empty answer": 2}), SimpleNamespace(skipped=3), object()]
    assert skipped_rows(parts) == {"empty answer": 2, "bad": 3}
    reading = Reading("conversations", Balance(read=9, trained=9), {"median_length": 4, "seq_len": 8}, parts)
    assert reading.to_dict(Balance(read=18, trained=18)) == {
        "unit": "conversations",
        "median_length": 4,
        "seq_len": 8,
        "expected_of": "one pass",
        "expected": {"read": 9, "trained": 9},
        "read": {"read": 18, "trained": 18},
        "skipped": {"empty answer": 2, "bad": 3},
    }
    assert reading.start_lines()[-1] == "data: rows left out of the files: 2 empty answer, 3 bad"
