"""The batch ramp: sizes of steps and their sums against naive loops, and the rules that follow the batch of a step."""

from itertools import product

import pytest

from llm.scaling.batch_ramp import BatchSchedule
from llm.scaling.rules import decay_factor, lr_batch_factor


def naive_sizes(tokens: int, tenths: int, parts: int, steps: int) -> list[int]:
    """Tokens of each step in integers: at least (n / (parts - 1)) of the ramp is done, so n parts were added."""
    sizes = []
    for step in range(steps):
        added = sum(10 * step * (parts - 1) >= n * tenths * steps for n in range(1, parts))
        sizes.append(tokens * (1 + added) // parts)
    return sizes


def test_sizes_grow_by_equal_parts():
    ramp = BatchSchedule(8192, 0.4, 4)
    assert ramp.grows_at(15) == (2, 4, 6)
    assert [ramp.tokens_of(step, 15) for step in range(8)] == [2048, 2048, 4096, 4096, 6144, 6144, 8192, 8192]
    assert [BatchSchedule(8192, 1.0, 2).tokens_of(step, 3) for step in range(3)] == [4096] * 3


@pytest.mark.parametrize("parts", [2, 3, 4, 7])
def test_sums_are_those_of_the_steps(parts):
    for tenths, steps in product((1, 3, 7, 10), (1, 2, 5, 13, 40)):
        ramp, sizes = BatchSchedule(84 * 64, tenths / 10, parts), naive_sizes(84 * 64, tenths, parts, steps)
        assert [ramp.tokens_of(step, steps) for step in range(steps)] == sizes
        assert [ramp.total(steps, done) for done in range(steps + 1)] == [sum(sizes[:n]) for n in range(steps + 1)]
        assert ramp.total(steps) == sum(sizes) and sizes[0] == 84 * 64 // parts
        assert sizes == sorted(sizes)


def test_a_horizon_keeps_its_tokens():
    """To less than a whole step, as a horizon without a ramp does, in the largest number of steps."""
    for share, parts, tokens in product((0.01, 0.3, 0.4, 1.0), (2, 4, 16), (64, 1000, 12_345, 10**7)):
        ramp = BatchSchedule(64, share, parts)
        steps = ramp.steps_within(tokens)
        assert ramp.total(steps) <= tokens < ramp.total(steps + 1)
        assert tokens - ramp.total(steps) < 64 <= (ramp.total(steps + 1) - ramp.total(steps)) * parts
    assert BatchSchedule(8192, 0.4, 4).steps_within(300 * 8192) == 375


def test_without_a_ramp_all_steps_are_whole():
    plain = BatchSchedule(64)
    assert (plain.grows_at(9), plain.tokens_of(0, 9), plain.total(9), plain.total(9, 2)) == ((), 64, 576, 128)
    assert [plain.steps_within(tokens) for tokens in (63, 64, 640, 700)] == [0, 1, 10, 10]
    assert plain.lr_factor(0, 9) == plain.decay_factor(0, 9) == 1


def test_rates_and_decay_follow_the_rules_for_the_batch_of_the_step():
    ramp = BatchSchedule(2**20, 0.3, 4)
    for step in range(12):
        now = ramp.tokens_of(step, 12)
        assert ramp.lr_factor(step, 12) * lr_batch_factor(2**20) == pytest.approx(lr_batch_factor(now))
        assert ramp.decay_factor(step, 12) * decay_factor(2**20, 7, 3) == pytest.approx(decay_factor(now, 7, 3))
    assert ramp.lr_factor(0, 12) == 0.5
    assert BatchSchedule(8192, 0.3, 4).lr_factor(0, 12) == 1  # below the floor of the rule
