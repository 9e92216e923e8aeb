"""Statistics of the difference between two groups of runs: t tests, equivalence, and how many runs decide.

All probabilities are means of the normal distribution over the spread that a sample of runs may show, taken by one
quadrature. Central and noncentral t and the power of an equivalence test follow from it to 12 digits, so no library of
statistics is needed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, stdev, variance

ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 10_000  # more are not counted


@dataclass(frozen=True)
class Noise:
    """The spread of a metric between seeds: a standard deviation that is known from `df` degrees of freedom."""

    sd: float
    df: float
    source: str


@dataclass(frozen=True)
class Difference:
    """The mean difference B - A of a metric, in its unit.

    stderr: None where nothing says how far single runs scatter. df: degrees of freedom. test: paired, welch, pooled
    (one side has a single run), noise (both have) or none. sd: of one pair for paired, of one run for the others.
    """

    a: float
    b: float
    mean: float
    stderr: float | None
    df: float
    test: str
    sd: float | None
    runs: int  # on the smaller side


@dataclass(frozen=True)
class Verdict:
    """The answer: `better`, `worse`, `equal` (within the margin) or `undecided`, for B against A.

    p: two-sided, of no difference. p_equal: of a difference of the margin or more. low, high: the interval of the
    difference that holds at 1 - alpha. All are None where the standard error is unknown.
    """

    verdict: str
    p: float | None
    p_equal: float | None
    low: float | None
    high: float | None


# ---------------------------------------------------------------------------------------------------------------------
# Distributions


def normal(z: float) -> float:
    """Return the share of the standard normal distribution below `z`."""
    return 0.5 * math.erfc(-z / math.sqrt(2))


@lru_cache(maxsize=4096)
def _spreads(df: float) -> list[tuple[float, float]]:
    """Return (s, weight) pairs: the distribution of s = sample deviation / true deviation at `df` degrees of freedom.

    The logarithm of s has the density exp(df * (u - exp(2u) / 2)), up to a factor. It is analytic and falls fast to
    both sides, so equal steps are exact to rounding.
    """
    if math.isinf(df):
        return [(1.0, 1.0)]
    step = min(0.1, 0.25 / math.sqrt(df))
    low, high = -0.5 - 42 / df, 0.5 * math.log(3 + 180 / df)
    points = [low + step * number for number in range(math.ceil((high - low) / step) + 1)]
    weights = [math.exp(df * (u - math.expm1(2 * u) / 2)) for u in points]
    total = math.fsum(weights)
    return [(math.exp(u), weight / total) for u, weight in zip(points, weights, strict=True) if weight > 1e-19 * total]


def t_tail(t: float, df: float, shift: float = 0.0) -> float:
    """Return the probability that Student's t with noncentrality `shift` lies above `t`. df: at least 1, or inf."""
    return math.fsum(weight * normal(shift - t * s) for s, weight in _spreads(df))


@lru_cache(maxsize=4096)
def t_limit(tail: float, df: float) -> float:
    """Return the t that is exceeded with probability `tail`, below 0.5.

    Newton's steps come from the left, where the normal distribution has its limit: the tail is convex there.
    """
    t = step = NormalDist().inv_cdf(1 - tail)
    while step > 1e-13 * t:
        density = math.fsum(weight * s * math.exp(-((t * s) ** 2) / 2) for s, weight in _spreads(df)) / math.tau**0.5
        step = (t_tail(t, df) - tail) / density
        t += step
    return t


def power_to_differ(shift: float, df: float, alpha: float = ALPHA) -> float:
    """Return how often a two-sided t test finds a true difference, `shift` standard errors large, in its direction."""
    return t_tail(t_limit(alpha / 2, df), df, abs(shift))


def power_to_equal(shift: float, margin: float, df: float, alpha: float = ALPHA) -> float:
    """Return how often two one-sided tests find a true difference `shift` to be within +-`margin`.

    Both in true standard errors of the difference.
    """
    limit = t_limit(alpha, df)
    shares = ((w, normal(margin - limit * s - shift) - normal(limit * s - margin - shift)) for s, w in _spreads(df))
    return math.fsum(w * share for w, share in shares if share > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Tests


def compare_groups(a: Sequence[float], b: Sequence[float], paired: bool, noise: Noise | None = None) -> Difference:
    """Return the mean difference B - A with its standard error.

    a, b: a value for each run, at least one; paired: value i of both is of one seed. noise: of runs like these, used
    only where both sides have a single run.
    """
    pair = (fmean(a), fmean(b), fmean(b) - fmean(a))
    runs = min(len(a), len(b))
    if paired and runs > 1:
        sd = stdev([after - before for before, after in zip(a, b, strict=True)])
        return Difference(*pair, sd / math.sqrt(runs), runs - 1, "paired", sd, runs)
    if runs > 1:
        parts = [variance(side) / len(side) for side in (a, b)]
        shares = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (a, b), strict=True))
        df = sum(parts) ** 2 / shares if shares > 0 else len(a) + len(b) - 2
        sd = math.sqrt((variance(a) + variance(b)) / 2)
        return Difference(*pair, math.sqrt(sum(parts)), df, "welch", sd, runs)
    if max(len(a), len(b)) > 1:
        sd, most = stdev(max(a, b, key=len)), max(len(a), len(b))
        return Difference(*pair, sd * math.sqrt(1 + 1 / most), most - 1, "pooled", sd, 1)
    if noise is not None:
        return Difference(*pair, noise.sd * math.sqrt(2), noise.df, "noise", noise.sd, 1)
    return Difference(*pair, None, math.inf, "none", None, 1)


def judge(found: Difference, margin: float, lower_is_better: bool, alpha: float = ALPHA) -> Verdict:
    """Return the verdict on a difference. margin: differences below it do not matter, in the unit of the metric.

    `equal` needs both one-sided tests against the margin at `alpha`; a true difference of the margin or more gets it
    with a probability of `alpha` at most. `better` and `worse` need the two-sided test at `alpha`, so each comes with
    alpha/2 at most where nothing differs. A difference that is certain but within the margin is `equal`.
    """
    if found.stderr is None:
        return Verdict("undecided", None, None, None, None)
    if found.stderr == 0:
        p, p_equal, reach = float(found.mean == 0), float(abs(found.mean) >= margin), 0.0
    else:
        p = min(1.0, 2 * t_tail(abs(found.mean) / found.stderr, found.df))
        p_equal = t_tail((margin - abs(found.mean)) / found.stderr, found.df)
        reach = t_limit(alpha / 2, found.df) * found.stderr
    interval = (found.mean - reach, found.mean + reach)
    if p_equal < alpha:
        return Verdict("equal", p, p_equal, *interval)
    if p < alpha:
        return Verdict("better" if (found.mean < 0) == lower_is_better else "worse", p, p_equal, *interval)
    return Verdict("undecided", p, p_equal, *interval)


def seeds_needed(found: Difference, margin: float, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Return how many seeds each side needs in all, so that a share `power` of such comparisons is decided.

    It takes the spread found for the true one. A difference beyond the margin is taken for true, and to be found by the
    two-sided test; a smaller one is taken for none, and to be found equal. None if that takes more than `MOST_SEEDS`,
    and where the spread is unknown or zero.
    """
    if not found.sd:
        return None
    paired = found.test == "paired"

    def decided(runs: int) -> bool:
        error, df = found.sd * math.sqrt((1 if paired else 2) / runs), (1 if paired else 2) * (runs - 1)
        if abs(found.mean) > margin:
            return power_to_differ(found.mean / error, df, alpha) >= power
        return power_to_equal(0.0, margin / error, df, alpha) >= power

    return _first(decided, max(2, found.runs + 1))


def _first(holds: Callable[[int], bool], low: int) -> int | None:
    """Return the first number from `low` on at which a condition holds that then holds for all; None above a limit."""
    high = low
    while not holds(high):
        if high >= MOST_SEEDS:
            return None
        low, high = high + 1, min(2 * high, MOST_SEEDS)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high
