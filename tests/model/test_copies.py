"""Copy candidates: the matcher against loops, causality, borders of documents, what a cache has in front."""

import pytest
import torch

from llm.model.copies import LENGTHS, copy_candidates

BOS, NOTHING = 61, 70


def drawn(*shape, seed: int = 1, most: int = 4) -> torch.Tensor:
    """Ids of few kinds, so that sequences of all lengths come again."""
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed))


def naive_copy(ids: list[int], t: int) -> tuple[int, int]:
    """Candidate and number of its length at place t of a row, by loops."""
    start = max(u for u in range(t + 1) if u == 0 or ids[u] == BOS)
    for number in range(len(LENGTHS), 0, -1):
        n = LENGTHS[number - 1]
        for end in range(t - 1, start + n - 2, -1):
            if t - n + 1 >= start and ids[end - n + 1 : end + 1] == ids[t - n + 1 : t + 1]:
                return ids[end + 1], number
    return 0, 0


def test_a_match_is_the_longest_one_and_of_these_the_newest():
    rows = [drawn(1, 70, seed=seed, most=most) for seed in range(4) for most in (1, 2, 5)]
    ids = torch.cat(rows)
    ids[:, 0] = BOS
    for row, places in enumerate([(23,), (30, 31), (1, 69), (), (40,), (20, 40, 60)] * 2):
        ids[row, list(places)] = BOS
    found, numbers = copy_candidates(ids, None, BOS, NOTHING)
    want = [[naive_copy(row, t) for t in range(len(row))] for row in ids.tolist()]
    assert torch.equal(torch.stack((found, numbers), dim=-1), torch.tensor(want))
    assert set(numbers.unique().tolist()) == set(range(len(LENGTHS) + 1))
    assert not numbers[ids == BOS].any()


@pytest.mark.parametrize("seed", [2, 3])
def test_tokens_behind_and_other_rows_and_documents_change_nothing(seed):
    ids = drawn(2, 60, seed=seed)
    ids[0, [0, 25]] = BOS
    found, numbers = copy_candidates(ids, None, BOS, NOTHING)
    for n in (1, 24, 25, 26, 59):
        cut = copy_candidates(ids[:, :n], None, BOS, NOTHING)
        assert torch.equal(cut[0], found[:, :n]) and torch.equal(cut[1], numbers[:, :n])
    for part in (slice(0, 25), slice(25, 60)):
        alone = copy_candidates(ids[:1, part], None, BOS, NOTHING)
        assert torch.equal(alone[0], found[:1, part]) and torch.equal(alone[1], numbers[:1, part])
    assert numbers[0, 26:].any()


@pytest.mark.parametrize("n_new", [1, 2, 7])
def test_tokens_in_front_count_as_if_they_stood_in_the_row(n_new):
    """Rows of other lengths, filled with `nothing` in front; a single token is looked for in another way."""
    ids = drawn(1, 64, most=3)
    ids[0, [0, 9]] = BOS
    found, numbers = copy_candidates(ids, None, BOS, NOTHING)
    ends = [n_new, n_new + 1, 9, 10, 11, 12, 30, 45, 64]
    before = torch.full((len(ends), 63), NOTHING)
    for row, end in enumerate(ends):
        before[row, 63 - (end - n_new) :] = ids[0, : end - n_new]
    new = torch.stack([ids[0, end - n_new : end] for end in ends])
    got = copy_candidates(new, before, BOS, NOTHING)
    for row, end in enumerate(ends):
        assert torch.equal(got[0][row], found[0, end - n_new : end])
        assert torch.equal(got[1][row], numbers[0, end - n_new : end])
