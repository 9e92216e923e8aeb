"""Scaling laws fitted to finished runs: isoFLOP parabolas, and surfaces L(N, D) of two forms.

`Surface` adds a term of N and one of D (Hoffmann et al. 2022, arXiv 2203.15556, approach 3; the parabolas are its
approach 2), `Coupled` lets the two act together (Kaplan et al. 2020, arXiv 2001.08361, equation 1.5). N is a number of
parameters, D one of training tokens, C one of training FLOPs, L the loss on held-out text in any unit (here bits per
byte). All fits are Huber-robust.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import numpy as np
from scipy.optimize import least_squares, nnls

HUBER = 1e-3  # error of log L from which a point counts linearly, as in Hoffmann et al.
EXPONENTS = np.arange(0.05, 1.01, 0.05)  # of the grid that a fit begins from
POWERS = np.geomspace(0.25, 4, 17)  # a / b of a coupled law
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
    FORMULA: ClassVar[str] = "L(N, D) = E + A / N^a + B / D^b"
    # of what is fitted: log E, log A, a, log B, b
    LOW: ClassVar[tuple[float, ...]] = (-10.0, -10.0, 1e-3, -10.0, 1e-3)
    HIGH: ClassVar[tuple[float, ...]] = (10.0, 40.0, LARGEST_EXPONENT, 40.0, LARGEST_EXPONENT)

    def at(self, params: float, tokens: float) -> float:
        """Return the loss that N = `params` and D = `tokens` lead to."""
        return self.E + self.A * params**-self.a + self.B * tokens**-self.b

    def best_tokens(self, flops: float, flops_per_param: float) -> float:
        """Return the D of the least loss where C = flops_per_param x N x D FLOPs are spent."""
        share = self.b * self.B / (self.a * self.A)  # at the minimum a A / N^a = b B / D^b
        return (share * (flops / flops_per_param) ** self.a) ** (1 / (self.a + self.b))

    def numbers(self) -> list[float]:
        """Return the law as numbers that a fit may change freely."""
        E, A, B = (math.log(max(x, 1e-9)) for x in (self.E, self.A, self.B))
        return [E, A, self.a, B, self.b]

    @classmethod
    def of_numbers(cls, x: Sequence[float]) -> "Surface":
        """Return the law of such numbers."""
        e, A, a, B, b = map(float, x)
        return cls(math.exp(e), math.exp(A), a, math.exp(B), b)

    @staticmethod
    def log_losses(x: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log L of runs (n,) by the law of such numbers, and its derivatives (n, numbers)."""
        terms = np.stack([np.full_like(log_n, x[0]), x[1] - x[2] * log_n, x[3] - x[4] * log_d])
        total = np.logaddexp.reduce(terms)
        e, N, D = np.exp(terms - total)
        return total, np.stack([e, N, -N * log_n, D, -D * log_d], axis=1)

    @classmethod
    def nearest(cls, params: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> "Surface":
        """Return the best law of a grid of exponents, with which it is linear in E, A and B."""
        best = (math.inf, None)
        for a, b in product(EXPONENTS, EXPONENTS):
            terms = np.stack([np.ones_like(params), (params / params[0]) ** -a, (tokens / tokens[0]) ** -b], axis=1)
            (E, A, B), error = nnls(terms / losses[:, None], np.ones_like(losses))
            best = min(best, (error, (E, A * params[0] ** a, a, B * tokens[0] ** b, b)))
        return cls(*map(float, best[1]))


@dataclass(frozen=True)
class Coupled:
    """The law L(N, D) = ((Nc / N)^(a / b) + Dc / D)^b: D moves the loss of a large model more than that of a small one.

    Without a constant, it is for losses far from the least possible ones.
    """

    Nc: float
    a: float
    Dc: float
    b: float
    FORMULA: ClassVar[str] = "L(N, D) = ((Nc / N)^(a / b) + Dc / D)^b"
    LOW: ClassVar[tuple[float, ...]] = (-200.0, 1e-2, -200.0, 1e-3)  # of what is fitted: a / b log Nc, a / b, log Dc, b
    HIGH: ClassVar[tuple[float, ...]] = (400.0, 20.0, 400.0, LARGEST_EXPONENT)

    def at(self, params: float, tokens: float) -> float:
        """Return the loss that N = `params` and D = `tokens` lead to."""
        return ((self.Nc / params) ** (self.a / self.b) + self.Dc / tokens) ** self.b

    def best_tokens(self, flops: float, flops_per_param: float) -> float:
        """Return the D of the least loss where C = flops_per_param x N x D FLOPs are spent."""
        power = self.a / self.b  # at the minimum power (Nc / N)^power = Dc / D
        return (self.Dc / power * (flops / flops_per_param / self.Nc) ** power) ** (1 / (power + 1))

    def numbers(self) -> list[float]:
        """Return the law as numbers that a fit may change freely."""
        power = self.a / self.b
        return [power * math.log(self.Nc), power, math.log(self.Dc), self.b]

    @classmethod
    def of_numbers(cls, x: Sequence[float]) -> "Coupled":
        """Return the law of such numbers."""
        N, power, D, b = map(float, x)
        return cls(math.exp(N / power), power * b, math.exp(D), b)

    @staticmethod
    def log_losses(x: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log L of runs (n,) by the law of such numbers, and its derivatives (n, numbers)."""
        terms = np.stack([x[0] - x[1] * log_n, x[2] - log_d])
        total = np.logaddexp.reduce(terms)
        N, D = x[3] * np.exp(terms - total)
        return x[3] * total, np.stack([N, -N * log_n, D, total], axis=1)

    @classmethod
    def nearest(cls, params: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> "Coupled":
        """Return the best law of a grid of exponents, with which L^(1 / b) is linear in both of its terms."""
        best = (math.inf, None)
        for power, b in product(POWERS, EXPONENTS):
            raised = losses ** (1 / b)
            terms = np.stack([(params / params[0]) ** -power, tokens[0] / tokens], axis=1)
            (N, D), _ = nnls(terms / raised[:, None], np.ones_like(losses))
            if N > 0 and D > 0:
                error = float(np.sum((b * np.log(terms @ (N, D)) - np.log(losses)) ** 2))
                best = min(best, (error, (N ** (1 / power) * params[0], power * b, D * tokens[0], b)))
        return cls(*map(float, best[1] or (params[0], 0.1, tokens[0], 0.1)))


Law = Surface | Coupled


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


def fit_law(points: Sequence[Point], form: type[Law] = Surface) -> Law:
    """Fit the numbers of a law of this form to runs: least Huber errors of log L, from the best of a grid of exponents.

    Raises ValueError for fewer than six runs, three N or three D, which leave a number of the law undetermined.
    """
    if len(points) < 6 or len({p.params for p in points}) < 3 or len({p.tokens for p in points}) < 3:
        raise ValueError("the law L(N, D) needs six runs or more, of three sizes or more")
    return _fit(points, _nearest(points, form))


def choose_law(points: Sequence[Point]) -> tuple[Law, dict[type[Law], float]]:
    """Fit both forms to runs and return the better one, with the error of each as a share of the loss.

    That error is the root mean square over the runs of what a fit to all others predicts: nothing that was held out
    takes part. Raises ValueError as `fit_law` does.
    """
    laws = {form: fit_law(points, form) for form in (Surface, Coupled)}
    errors = {form: _error_left_out(points, form) for form in laws}
    return laws[min(errors, key=errors.get)], errors


def _error_left_out(points: Sequence[Point], form: type[Law]) -> float:
    """Return the root mean square error of log L of runs by laws that are fitted to the others."""
    total = 0.0
    for i, out in enumerate(points):
        others = [*points[:i], *points[i + 1 :]]
        law = _fit(others, _nearest(others, form))
        total += math.log(out.loss / law.at(out.params, out.tokens)) ** 2
    return math.sqrt(total / len(points))


def _nearest(points: Sequence[Point], form: type[Law]) -> Law:
    """Return the best law of the form's grid."""
    return form.nearest(*(np.array([getattr(p, name) for p in points]) for name in ("params", "tokens", "loss")))


def _fit(points: Sequence[Point], start: Law) -> Law:
    """Return the law of least Huber errors that is reached from the law `start`."""
    log_n, log_d = np.log([p.params for p in points]), np.log([p.tokens for p in points])
    log_l = np.log([p.loss for p in points])
    low, high = np.array(start.LOW), np.array(start.HIGH)
    found = least_squares(
        lambda x: start.log_losses(x, log_n, log_d)[0] - log_l,
        np.clip(start.numbers(), low + 1e-6, high - 1e-6),
        lambda x: start.log_losses(x, log_n, log_d)[1],
        bounds=(low, high),
        loss="huber",
        f_scale=HUBER,
    )
    return start.of_numbers(found.x)


def bootstrap(points: Sequence[Point], surface: Law, draws: int = 200, seed: int = 0) -> list[Law]:
    """Return the laws of `draws` repetitions of the experiment: the fitted losses with errors drawn from those seen.

    A law of k numbers makes n errors too small by sqrt((n - k) / n); they are drawn that much larger. Runs themselves
    are not drawn: too few of them would often leave a number of the law undetermined.
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


def _errors(points: Sequence[Point], surface: Law) -> np.ndarray:
    """Return the errors of log L of a fit, scaled up for the numbers that were fitted to them."""
    errors = np.array([math.log(p.loss / surface.at(p.params, p.tokens)) for p in points])
    return errors * math.sqrt(len(points) / max(1, len(points) - len(surface.LOW)))


def predict(
    points: Sequence[Point],
    surface: Law,
    laws: Sequence[Law],
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
