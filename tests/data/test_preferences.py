"""Preferences as ids: prompts that are cut, answers that are kept whole, micro-batches, the order of steps."""

import pytest
import torch

from llm.data.preferences import PreferenceSteps, Usable, cut_prompt, micro_batches_of, render_row
from llm.errors import UserError

SPECIALS = {"<|user_start|>": 1, "<|user_end|>": 2, "<|assistant_start|>": 3, "<|assistant_end|>": 4}


class Letters:
    """Tokenizer with an id of its own for each letter, and specials below 10."""

    bos_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def special_id(self, mark: str) -> int:
        return SPECIALS[mark]


TOKENIZER = Letters()


def pair(question="abc", good="yes", bad="no", before=()) -> dict:
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, before, strict=False)]
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", good), ("rejected", bad))}
    return {"messages": [*messages, {"role": "user", "content": question}]} | answers


def labelled(label: bool, answer="yes") -> dict:
    row = pair(good=answer)
    return {"messages": row["messages"], "completion": row["chosen"], "label": label}


def text(ids) -> str:
    return "".join(chr(i) if i >= 10 else f"<{i}>" for i in ids)


def test_a_pair_is_two_sequences_with_a_mask_on_the_answers():
    sequences, was_cut = render_row(TOKENIZER, pair(before=("hi", "oh")), 100)
    assert [text(ids) for ids, _ in sequences] == [
        "<0><1>hi<2><3>oh<4><1>abc<2><3>yes<4>",
        "<0><1>hi<2><3>oh<4><1>abc<2><3>no<4>",
    ]
    for (ids, mask), answer in zip(sequences, ("yes<4>", "no<4>"), strict=True):
        assert text([i for i, kept in zip(ids, mask, strict=True) if kept]) == answer
    assert not was_cut


@pytest.mark.parametrize(
    "limit, wanted",
    [
        (19, "<0><1>hi<2><3>oh<4><1>abc<2><3>"),
        (18, "<0><1>abc<2><3>"),  # whole turns first
        (11, "<0><1>abc<2><3>"),
        (10, "<0><1>bc<2><3>"),  # then the beginning of the question
        (8, "<0><1><2><3>"),
        (7, None),  # the answer does not fit beside an empty question
    ],
)
def test_the_prompt_is_cut_at_its_start_and_the_answer_never(limit, wanted):
    sequences, was_cut = render_row(TOKENIZER, pair(before=("hi", "oh")), limit)
    if wanted is None:
        assert sequences is None
        return
    assert [text(ids) for ids, _ in sequences] == [f"{wanted}yes<4>", f"{wanted}no<4>"]
    assert was_cut == (limit < 19) and all(len(ids) <= limit for ids, _ in sequences)


def test_a_system_message_is_cut_with_the_turn_that_it_stands_in():
    row = pair()
    row["messages"].insert(0, {"role": "system", "content": "be nice"})
    sequences, _ = render_row(TOKENIZER, row, 12)
    assert text(sequences[0][0]) == "<0><1>\nabc<2><3>yes<4>"
    assert cut_prompt([0, 1, 50, 2, 3], 3, 1) is None


def test_rows_that_do_not_fit_are_counted_and_a_source_without_others_is_refused():
    rows = [pair(), pair(good="x" * 50), pair(question="q" * 50)]
    usable = Usable.of([rows], TOKENIZER, 20)
    assert usable.places == [(0, 0), (0, 2)] and (usable.cut, usable.dropped, usable.is_paired) == (1, 1, True)
    assert not Usable.of([rows, [labelled(False)]], TOKENIZER, 20).is_paired
    assert len(Usable.of([rows, rows], TOKENIZER, 20, most=2)) == 2
    with pytest.raises(UserError, match="no answer of the 1 rows fits into model.seq_len=20"):
        Usable.of([rows[1:2]], TOKENIZER, 20)


def test_micro_batches_hold_pairs_together_and_the_last_token():
    rows = [render_row(TOKENIZER, pair(good="y" * n), 100)[0] for n in (1, 9, 4)]
    micro = micro_batches_of(rows, None, 4)
    assert [len(one["inputs"]) for one in micro] == [4, 2]
    assert text(micro[0]["inputs"][0]).startswith("<0><1>abc<2><3>yyyyyyyyy<4>")  # the longest first
    for one in micro:
        ends = one["inputs"].gather(1, one["last"].unsqueeze(1))
        assert (ends == 4).all()
        trained = one["targets"] >= 0
        assert trained.any(1).all() and (one["targets"][:, -1] == -1).all()
        shifted = one["inputs"].roll(-1, 1)
        assert torch.equal(one["targets"][trained], shifted[trained])
    assert len(micro_batches_of(rows, None, 1)) == 3  # a pair is never divided


def steps(rows, **options) -> PreferenceSteps:
    usable = Usable.of([rows], TOKENIZER, 100)
    return PreferenceSteps([rows], usable, TOKENIZER, rows_per_micro=100, **({"per_step": 4} | options))


ROWS = [pair(question=f"question {i:02d}") for i in range(10)]


def seen(batch) -> list[str]:
    return sorted(text(ids.tolist())[6:20] for ids in torch.cat([m["inputs"] for m in batch["micro"]])[::2])


def test_every_epoch_shows_every_row_once_in_another_order():
    batches = [seen(batch) for _, batch in zip(range(5), steps(ROWS), strict=False)]
    flat = [one for batch in batches for one in batch]
    assert sorted(flat) == sorted(2 * [f"question {i:02d}<2>" for i in range(10)])
    assert all(batch["n_trained"] == 4 for _, batch in zip(range(3), steps(ROWS), strict=False))
    assert len(seen(next(iter(steps(ROWS[:2]))))) == 4  # fewer rows than a step: no endless search


def test_another_seed_gives_another_order():
    orders = [[seen(batch) for _, batch in zip(range(5), steps(ROWS, seed=seed), strict=False)] for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]


def test_a_few_held_out_rows_are_taken_from_every_source():
    """Takes as many of each source as of the others, and all of a source that has fewer."""
    places = Usable.of([ROWS, ROWS[:1], ROWS], TOKENIZER, 64, most=6).places
    assert places == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert len(Usable.of([ROWS, ROWS], TOKENIZER, 64, most=100)) == 20


def test_tokens_are_counted_in_both_answers_and_a_row_is_as_long_as_the_longer_one():
    rows = [pair(good="y" * n, bad="n" * 9) for n in (3, 20, 30)]
    lengths = [[len(ids) for ids, _ in render_row(TOKENIZER, row, 64)[0]] for row in rows]
    usable = Usable.of([rows], TOKENIZER, 64)
    assert usable.median == sorted(map(max, lengths))[1] == lengths[1][0]
    batch = PreferenceSteps([rows], usable, TOKENIZER, rows_per_micro=4).batch(rows)
    assert batch["n_tokens"] == sum(map(sum, lengths)) and batch["n_trained"] == 3


def test_steps_resume_at_their_position_and_are_shared_by_ranks():
    alone = steps(ROWS)
    first = [batch for _, batch in zip(range(6), alone, strict=False)]
    resumed = steps(ROWS, position=first[2]["state"])
    assert seen(next(iter(resumed))) == seen(first[3])
    skipping = steps(ROWS)
    skipping.skip(3)
    assert seen(next(iter(skipping))) == seen(first[3])
    for step, _ in enumerate(first):
        parts = []
        for rank in range(2):
            parts += seen(next(iter(steps(ROWS, position={"step": step}, rank=rank, world=2))))
        assert sorted(parts) == seen(first[step])


def test_labelled_answers_stand_alone_with_their_labels_and_meet_other_questions():
    given = {}

    def prepare(micro, mismatched):
        given["micro"], given["others"] = micro, mismatched()

    rows = [pair(question="aaa"), labelled(False, "bbb")]
    batch = next(iter(steps(rows, per_step=2, labelled=True, prepare=prepare)))
    (micro,), (others,) = batch["micro"], given["others"]
    assert batch["n_trained"] == 3 and sorted(micro["labels"].tolist()) == [False, False, True]
    own = {text(ids.tolist()).rstrip("<0>") for ids in micro["inputs"]}
    mixed = {text(ids.tolist()).rstrip("<0>") for ids in others["inputs"]}
    assert own == {f"<0><1>{end}<4" for end in ("aaa<2><3>yes", "aaa<2><3>no", "abc<2><3>bbb")}
    assert mixed == {f"<0><1>{end}<4" for end in ("abc<2><3>yes", "abc<2><3>no", "aaa<2><3>bbb")}


def test_questions_meet_the_answers_to_the_next_one_of_their_step():
    """Gives the last question of a step the answers to the first: no row of another step is needed."""
    rows = [pair(question=f"{i}", good=f"good {i}", bad=f"bad {i}") for i in range(7)]
    few = steps(rows, per_step=3)
    order = [int(few.row(number)["messages"][-1]["content"]) for number in range(3, 6)]
    (micro,) = few.mismatched(range(3, 6))
    found = {text(ids.tolist()).rstrip("<0>") for ids in micro["inputs"]}
    nexts = zip(order, [*order[1:], order[0]], strict=True)
    wanted = {f"<0><1>{i}<2><3>{answer} {other}<4>" for i, other in nexts for answer in ("good", "bad")}
    assert found == {one.rstrip("<0>") for one in wanted}


def test_held_out_rows_are_dealt_to_the_ranks():
    parts = [steps(ROWS[:3], rank=rank, world=2).fixed() for rank in range(2)]
    assert [sum(len(m["inputs"]) for m in part) for part in parts] == [4, 2]
    assert steps(ROWS[:1], rank=1, world=2).fixed() == []
