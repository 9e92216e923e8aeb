"""Tests, intervals and numbers of seeds: against closed forms, another library, and simulated experiments."""

import math
import random

import pytest

from llm.experiments.statistics import (
    ALPHA,
    POWER,
    Difference,
    Noise,
    compare_groups,
    judge,
    power_to_differ,
    power_to_equal,
    seeds_needed,
    t_limit,
    t_tail,
)


def test_tails_are_those_of_closed_forms():
    for t in (0.0, 0.3, 1.0, 4.0, 60.0):
        assert t_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-13)
        assert t_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-13)
        assert t_tail(t, math.inf) == pytest.approx(0.5 * math.erfc(t / math.sqrt(2)), rel=1e-12)
    assert t_tail(1.0, 1e6) == pytest.approx(t_tail(1.0, math.inf), rel=1e-5)
    assert [round(t_limit(0.025, df), 3) for df in (1, 2, 3, 10, math.inf)] == [12.706, 4.303, 3.182, 2.228, 1.96]


def test_tails_and_tests_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2.6, 7, 400):
        assert t_limit(0.05, df) == pytest.approx(stats.t.isf(0.05, df), rel=1e-10)
        for shift in (0.7, 4.0):
            assert t_tail(2.5, df, shift) == pytest.approx(stats.nct.sf(2.5, df, shift), abs=1e-11)
    a, b = [2.01, 2.04, 1.98, 2.02], [1.97, 2.01, 1.98, 1.96]
    for paired, theirs in ((True, stats.ttest_rel(b, a)), (False, stats.ttest_ind(b, a, equal_var=False))):
        found = compare_groups(a, b, paired)
        verdict = judge(found, 0.001, True)
        interval = theirs.confidence_interval()
        assert verdict.p == pytest.approx(theirs.pvalue, rel=1e-9) and found.df == pytest.approx(theirs.df)
        assert (verdict.low, verdict.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


# ----- simulated experiments, of which the truth is known


def rates(difference, margin, times=1000, seeds=4, paired=True, sd=(1.0, 1.0), shared=0.0, seed=7):
    """Return how often each verdict comes, for a true difference B - A; lower is better.

    sd: of a run of A and of B beside what their seed does to both, of which the deviation is `shared`.
    """
    chance = random.Random(seed)
    counts = dict.fromkeys(("better", "worse", "equal", "undecided"), 0)
    for _ in range(times):
        luck = [chance.gauss(0, shared) for _ in range(seeds)]
        a = [part + chance.gauss(0, sd[0]) for part in luck]
        b = [part + chance.gauss(difference, sd[1]) for part in luck]
        counts[judge(compare_groups(a, b, paired), margin, True).verdict] += 1
    return {name: count / times for name, count in counts.items()}


def near(share, times=1000):
    """Return the share with four standard deviations of the binomial distribution around."""
    return pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / times) + 1e-9)


def test_where_nothing_differs_one_comparison_in_twenty_says_so():
    found = rates(0.0, margin=1e-6, shared=3.0)
    assert found["better"] == near(ALPHA / 2) and found["worse"] == near(ALPHA / 2) and found["equal"] < 0.01
    assert rates(0.0, margin=1e-6, paired=False, times=500, sd=(1.0, 2.0))["undecided"] >= 1 - ALPHA - 0.04


def test_a_difference_of_the_margin_is_called_equal_in_one_case_of_twenty():
    sd = math.sqrt(2 / 4)  # standard error of the mean of four pairs
    margin = 20 * sd  # far apart, so that only one of the two one-sided tests decides
    assert rates(margin, margin)["equal"] == near(ALPHA)
    assert rates(-margin, margin)["equal"] == near(ALPHA)
    assert rates(1.5 * margin, margin)["equal"] == 0.0


def test_differences_are_found_as_often_as_the_power_says():
    error = math.sqrt(2 / 4)
    expected = power_to_differ(2.5 / error, 3)
    assert 0.6 < expected < 0.9
    assert rates(2.5, margin=1e-6)["worse"] == near(expected)
    assert rates(-2.5, margin=1e-6)["better"] == near(expected)


def test_equal_configurations_are_called_equal_as_often_as_the_power_says():
    error = math.sqrt(2 / 4)
    for margin in (2.0, 3.0):
        found = rates(0.0, margin, shared=5.0)
        assert found["equal"] == near(power_to_equal(0.0, margin / error, 3))


def test_pairs_take_away_what_a_seed_does_to_both():
    assert rates(1.0, 1e-6, times=300, sd=(0.2, 0.2), shared=3.0)["worse"] > 0.95
    assert rates(1.0, 1e-6, times=300, sd=(0.2, 0.2), shared=3.0, paired=False)["undecided"] > 0.9


@pytest.mark.parametrize("difference", [0.0, 1.5])
def test_with_the_seeds_that_are_said_to_be_needed_the_share_that_was_said_is_decided(difference):
    margin, sd = 1.0, math.sqrt(2)  # of a pair
    few = Difference(0.0, difference, difference, sd / math.sqrt(3), 2, "paired", sd, 3)
    needed = seeds_needed(few, margin)
    assert 8 < needed < 40
    decided = rates(difference, margin, times=800, seeds=needed)["worse" if difference else "equal"]
    assert decided >= POWER - 4 * math.sqrt(POWER * (1 - POWER) / 800)
    less = rates(difference, margin, times=800, seeds=needed - 3)["worse" if difference else "equal"]
    assert less < decided and less < POWER + 0.03


# ----- few runs


def test_single_runs_are_judged_by_the_spread_of_others():
    both = compare_groups([2.0], [1.9], True, Noise(0.01, 3, "4 runs of base"))
    assert (both.test, both.df) == ("noise", 3) and both.stderr == pytest.approx(0.01 * math.sqrt(2))
    assert judge(both, 0.005, True).verdict == "better" and judge(both, 0.005, False).verdict == "worse"
    one = compare_groups([2.0, 2.01, 2.02], [1.9], False)
    assert (one.test, one.df) == ("pooled", 2) and one.stderr == pytest.approx(0.01 * math.sqrt(4 / 3))
    nothing = judge(compare_groups([2.0], [1.9], False), 0.005, True)
    assert nothing.verdict == "undecided" and nothing.p is None


def test_runs_without_any_spread_are_equal_or_not():
    same = judge(compare_groups([2.0, 2.1], [2.0, 2.1], True), 0.01, True)
    assert (same.verdict, same.p, same.p_equal) == ("equal", 1.0, 0.0)
    apart = judge(compare_groups([2.0, 2.5], [1.5, 2.0], True), 0.01, True)
    assert (apart.verdict, apart.p, apart.low, apart.high) == ("better", 0.0, -0.5, -0.5)


def test_a_difference_that_is_certain_but_within_the_margin_is_equal():
    found = compare_groups([2.0, 2.001, 1.999], [2.0021, 2.0029, 2.001], True)
    verdict = judge(found, 0.01, True)
    assert verdict.p < ALPHA and verdict.verdict == "equal"
    assert judge(found, 0.001, True).verdict == "worse"
    assert seeds_needed(found, 0.001) <= 4 and seeds_needed(compare_groups([1.0], [2.0], False), 0.1) is None
