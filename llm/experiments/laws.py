"""Scaling laws fitted to finished runs: isoFLOP parabolas and the surface L(N, D) = E + A / N^a + B / D^b.

Hoffmann et al. 2022 (arXiv 2203.15556), approaches 2 and 3. N is a number of parameters, D one of training tokens, C
one of training FLOPs, L the loss on held-out text in any unit (here bits per byte). All fits are Huber-robust.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy.optimize import least_squares, nnls

HUBER = 1e-3  # error of log L from which a point counts linearly, as in Hoffmann et al.
EXPONENTS = np.arange(0.05, 1.01, 0.05)  # of the grid that a fit begins from
LARGEST_EXPONENT = 2.0


@dataclass(frozen=True)
class Point:
    """One finished run: N parameters, D tokens, C FLOPs and the loss on held-out text; the FLOPs that it was given.

    seeds: of how many runs the loss is the mean.
    """

    params: float
    tokens: float
    flops: float
    loss: float
    depth: int = 0
    budget: float = 0.0
    seeds: int = 1


@dataclass(frozen=True)
class Parabola:
    """The curve loss(D) = curvature (log10 D - log10 tokens)^2 + loss at a fixed number of FLOPs.

    tokens: the best D. is_inside: the minimum lies between the smallest and the largest D measured, so it is found and
    not extrapolated.
    """

    tokens: float
    loss: float
    curvature: float
    is_inside: bool

    def at(self, tokens: float) -> float:
        """Return the loss at D = `tokens`."""
        return self.curvature * (math.log10(tokens) - math.log10(self.tokens)) ** 2 + self.loss


@dataclass(frozen=True)
class Surface:
    """The law L(N, D) = E + A / N^a + B / D^b."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def at(self, params: float, tokens: float) -> float:
        """Return the loss that N = `params` and D = `tokens` lead to."""
        return self.E + self.A * params**-self.a + self.B * tokens**-self.b

    def best_tokens(self, flops: float, flops_per_param: float) -> float:
        """Return the D of the least loss where C = flops_per_param x N x D FLOPs are spent."""
        share = self.b * self.B / (self.a * self.A)  # at the minimum a A / N^a = b B / D^b
        return (share * (flops / flops_per_param) ** self.a) ** (1 / (self.a + self.b))


@dataclass(frozen=True)
class Prediction:
    """A loss with the interval that holds the loss of a run in `confidence` of cases, as far as the law holds."""

    loss: float
    low: float
    high: float
    confidence: float


def fit_parabola(points: Sequence[Point]) -> Parabola | None:
    """Fit a parabola in log10 D to runs of equal FLOPs; None for fewer than three D, or where it has no minimum."""
    logs, losses = np.log10([p.tokens for p in points]), np.array([p.loss for p in points])
    if len(set(logs)) < 3:
        return None
    middle = logs.mean()
    x = logs - middle

    def errors(c):
        return np.log(np.maximum(c[0] * x**2 + c[1] * x + c[2], 1e-9)) - np.log(losses)

    start = np.polyfit(x, losses, 2)
    curvature, slope, constant = least_squares(errors, start, loss="huber", f_scale=HUBER).x
    if curvature <= 0:
        return None
    lowest = -slope / (2 * curvature)
    is_inside = bool(x.min() <= lowest <= x.max())
    return Parabola(10 ** float(lowest + middle), float(constant + slope * lowest / 2), float(curvature), is_inside)


def fit_surface(points: Sequence[Point]) -> Surface:
    """Fit the five numbers of the law to runs: least Huber errors of log L, from the best of a grid of exponents.

    Raises ValueError for fewer than six runs, three N or three D, which leave a number of the law undetermined.
    """
    if len(points) < 6 or len({p.params for p in points}) < 3 or len({p.tokens for p in points}) < 3:
        raise ValueError("the law L(N, D) needs six runs or more, of three sizes or more")
    params, tokens = np.array([p.params for p in points]), np.array([p.tokens for p in points])
    losses = np.array([p.loss for p in points])
    best = (math.inf, None)
    for a, b in product(EXPONENTS, EXPONENTS):  # with these given, the law is linear in E, A and B
        terms = np.stack([np.ones_like(params), (params / params[0]) ** -a, (tokens / tokens[0]) ** -b], axis=1)
        (E, A, B), error = nnls(terms / losses[:, None], np.ones_like(losses))
        best = min(best, (error, (E, A * params[0] ** a, a, B * tokens[0] ** b, b)))
    return _fit(points, Surface(*map(float, best[1])))


def _fit(points: Sequence[Point], start: Surface) -> Surface:
    """Return the law of least Huber errors that is reached from the law `start`."""
    log_n, log_d = np.log([p.params for p in points]), np.log([p.tokens for p in points])
    log_l = np.log([p.loss for p in points])

    def terms(c):
        return np.stack([np.full_like(log_n, c[0]), c[1] - c[2] * log_n, c[3] - c[4] * log_d])

    def errors(c):
        return np.logaddexp.reduce(terms(c)) - log_l

    def slopes(c):
        parts = terms(c)
        shares = np.exp(parts - np.logaddexp.reduce(parts))
        return np.stack([shares[0], shares[1], -shares[1] * log_n, shares[2], -shares[2] * log_d], axis=1)

    low, high = [-10.0, -10.0, 1e-3, -10.0, 1e-3], [log_l.min(), 40.0, LARGEST_EXPONENT, 40.0, LARGEST_EXPONENT]
    logs = [math.log(max(x, 1e-9)) for x in (start.E, start.A, start.B)]
    first = np.clip([logs[0], logs[1], start.a, logs[2], start.b], np.array(low) + 1e-6, np.array(high) - 1e-6)
    found = least_squares(errors, first, slopes, bounds=(low, high), loss="huber", f_scale=HUBER)
    e, A, a, B, b = map(float, found.x)
    return Surface(math.exp(e), math.exp(A), a, math.exp(B), b)


def bootstrap(points: Sequence[Point], surface: Surface, draws: int = 200, seed: int = 0) -> list[Surface]:
    """Return the laws of `draws` repetitions of the experiment: the fitted losses with errors drawn from those seen.

    The law has five numbers, so n errors are too small by sqrt((n - 5) / n); they are drawn that much larger. Runs
    themselves are not drawn: too few of them would often leave a number of the law undetermined.
    """
    rng = np.random.default_rng(seed)
    errors = _errors(points, surface)
    laws = []
    for _ in range(draws):
        drawn = rng.choice(errors, len(points)) * rng.choice([-1, 1], len(points))
        repeated = [
            replace(p, loss=surface.at(p.params, p.tokens) * math.exp(e)) for p, e in zip(points, drawn, strict=True)
        ]
        laws.append(_fit(repeated, surface))
    return laws


def _errors(points: Sequence[Point], surface: Surface) -> np.ndarray:
    """Return the errors of log L of a fit, scaled up for the five numbers that were fitted to them."""
    errors = np.array([math.log(p.loss / surface.at(p.params, p.tokens)) for p in points])
    return errors * math.sqrt(len(points) / max(1, len(points) - 5))


def predict(
    points: Sequence[Point],
    surface: Surface,
    laws: Sequence[Surface],
    params: float,
    tokens: float,
    confidence: float = 0.95,
    seed: int = 0,
) -> Prediction:
    """Predict the loss of a run of N = `params` and D = `tokens` from a fit and the `laws` of its bootstrap.

    The interval covers the uncertainty of the fit and the scatter of a single run about the law. It knows nothing of a
    law that ceases to hold beyond the sizes that were measured.
    """
    rng = np.random.default_rng(seed)
    errors = _errors(points, surface)
    drawn = [law.at(params, tokens) * math.exp(rng.choice(errors) * rng.choice([-1, 1])) for law in laws]
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Prediction(surface.at(params, tokens), float(low), float(high), confidence)


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the bounds within which the middle `confidence` of `values` lie."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
