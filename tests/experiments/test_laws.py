"""Scaling laws: fits find the law that made the numbers, and intervals hold what they promise."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from llm.experiments.laws import (
    Coupled,
    Law,
    Point,
    Surface,
    bootstrap,
    choose_law,
    fit_law,
    fit_parabola,
    interval,
    predict,
)

LAW = Surface(E=0.9, A=30.0, a=0.34, B=200.0, b=0.36)
COUPLED = Coupled(Nc=8e7, a=0.095, Dc=7e7, b=0.14)
SIZES = (0.9e6, 2.1e6, 4.2e6)
BUDGETS = (1e13, 2e13, 4e13, 8e13)


def series(noise: float = 0.0, seed: int = 0, law: Law = LAW) -> list[Point]:
    """Return runs of three sizes and four budgets that follow a law, with errors of log L of this deviation."""
    rng = np.random.default_rng(seed)
    return [
        Point(n, c / 6 / n, c, law.at(n, c / 6 / n) * math.exp(rng.normal(0, noise) if noise else 0))
        for c in BUDGETS
        for n in SIZES
    ]


@pytest.mark.parametrize("law", [LAW, COUPLED], ids=["added", "coupled"])
def test_exact_losses_give_the_law_back(law):
    found = fit_law(series(law=law), type(law))
    for field in fields(law):
        assert getattr(found, field.name) == pytest.approx(getattr(law, field.name), rel=1e-3), field.name


def test_the_coupled_law_is_the_published_formula():
    """L = ((Nc / N)^(a / b) + Dc / D)^b of Kaplan et al. with their numbers: 8.8e13, 0.076, 5.4e13, 0.095."""
    law = Coupled(8.8e13, 0.076, 5.4e13, 0.095)
    assert law.at(1e30, 22e9) == pytest.approx((5.4e13 / 22e9) ** 0.095)  # only the data limit
    assert law.at(1.5e9, 1e40) == pytest.approx((8.8e13 / 1.5e9) ** 0.076)  # only the size limits
    assert law.at(1.5e9, 22e9) > max(law.at(1e30, 22e9), law.at(1.5e9, 1e40))


@pytest.mark.parametrize("law", [LAW, COUPLED], ids=["added", "coupled"])
def test_the_form_that_made_the_runs_is_chosen(law):
    """Each form is the better one for its own runs, with noise of a fifth of a percent, and its error is that noise."""
    found, errors = choose_law(series(0.002, law=law))
    assert type(found) is type(law)
    assert 0.001 < errors[type(law)] < 0.004
    assert found.at(12e6, 2e6) == pytest.approx(law.at(12e6, 2e6), rel=0.015)


def test_one_wild_run_does_not_bend_the_law():
    points = series(noise=0.001)
    points[5] = replace(points[5], loss=points[5].loss * 1.2)
    found = fit_law(points)
    assert found.at(12e6, 2e6) == pytest.approx(LAW.at(12e6, 2e6), rel=0.01)


@pytest.mark.parametrize("law", [LAW, COUPLED], ids=["added", "coupled"])
def test_best_tokens_is_where_no_neighbour_is_better(law):
    flops = 1e14
    best = law.best_tokens(flops, 6.0)
    losses = [law.at(flops / 6 / d, d) for d in (best * 0.98, best, best * 1.02)]
    assert losses[1] < min(losses[0], losses[2])


def test_a_parabola_finds_the_minimum_of_a_parabola():
    tokens = np.array([1e6, 3e6, 9e6, 2e7])
    losses = 0.3 * (np.log10(tokens) - np.log10(5e6)) ** 2 + 2
    found = fit_parabola([Point(1, t, 1, loss) for t, loss in zip(tokens, losses, strict=True)])
    assert found.tokens == pytest.approx(5e6, rel=1e-4) and found.loss == pytest.approx(2, rel=1e-6)
    assert found.curvature == pytest.approx(0.3, rel=1e-3) and found.is_inside
    assert found.at(1e6) == pytest.approx(losses[0])


def test_a_minimum_outside_the_runs_is_said_to_be_outside():
    points = [Point(1, t, 1, loss) for t, loss in ((1e6, 3.0), (2e6, 2.5), (4e6, 2.2))]
    assert not fit_parabola(points).is_inside


@pytest.mark.parametrize("losses", [(2.0, 2.0), (2.0, 2.5, 2.0)], ids=["two runs", "a hill"])
def test_no_parabola_without_a_minimum(losses):
    assert fit_parabola([Point(1, 10.0 ** (6 + i), 1, loss) for i, loss in enumerate(losses)]) is None


def test_too_few_runs_are_refused():
    with pytest.raises(ValueError, match="six runs"):
        fit_law(series()[:5])
    with pytest.raises(ValueError, match="three sizes"):
        fit_law([replace(p, params=1e6) for p in series()])


def test_an_interval_holds_the_middle():
    assert interval(range(1001), 0.9) == pytest.approx((50, 950))


@pytest.mark.slow
def test_intervals_hold_as_many_new_runs_as_promised():
    """Intervals hold about 95 % of 80 held-out runs, of twice and three times the largest size."""
    held, wrong = 0, []
    for seed in range(40):
        points = series(noise=0.003, seed=seed)
        law = fit_law(points)
        laws = bootstrap(points, law, draws=100, seed=seed)
        rng = np.random.default_rng(1000 + seed)
        for n in (7.2e6, 12.2e6):
            d = BUDGETS[-1] / 6 / n
            loss = LAW.at(n, d) * math.exp(rng.normal(0, 0.003))
            told = predict(points, law, laws, n, d)
            held += told.low <= loss <= told.high
            wrong.append(abs(told.loss / loss - 1))
    assert 68 <= held <= 80  # 76 expected; 68 or fewer have a chance below 1 in 1,000
    assert np.mean(wrong) < 0.01


@pytest.mark.slow
def test_noise_widens_an_interval():
    widths = []
    for noise in (0.001, 0.01):
        points = series(noise, seed=3)
        law = fit_law(points)
        told = predict(points, law, bootstrap(points, law, draws=40), 12e6, 1.1e6)
        assert told.low < told.loss < told.high
        widths.append(told.high - told.low)
    assert widths[1] > 3 * widths[0]
