"""The comparison of two configurations: at equal steps and at equal seconds, with a verdict for each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from llm.errors import UserError
from llm.experiments.curves import Curve, common_seconds, common_steps
from llm.experiments.runs import is_share
from llm.experiments.sides import Side, common_stage, differences, incomparable, load_side, machines
from llm.experiments.statistics import (
    ALPHA,
    Difference,
    Noise,
    Verdict,
    compare_groups,
    judge,
    seeds_needed,
    t_limit,
)

MARGIN = 0.005  # of A's value: a tenth more compute lowers the loss by about as much (it falls as compute^-0.05)
MARGIN_OF_SHARES = 0.01
LOWER = ("bpb*", "*loss", "ms_per_step", "kl")
HIGHER = ("*core", "reward", "preference/*", "accuracy*", "tok_per_s", "mfu")
SAME_TOKENS = 1.01  # most over fewest tokens of runs that were to have equally many: steps are whole
UNEVEN = 1.1  # longest time over shortest within one side
RANGE = (("min", min), ("max", max))


@dataclass(frozen=True)
class Measure:
    """One way to compare: `at` equal steps, seconds or tokens, `point` of them, `of` the last evaluation or a mean.

    further: seeds that A and B need in addition where the verdict is undecided; None where nobody knows.
    """

    at: str
    point: float
    of: str
    found: Difference
    verdict: Verdict
    further: tuple[int, int] | None


@dataclass(frozen=True)
class Comparison:
    """All that is said about two sides. measures: the first one gives the verdict. points: differences on the way.

    noise: spread of single runs of A, or what was given for it. margin: in the unit of the metric.
    """

    a: Side
    b: Side
    metric: str
    lower_is_better: bool
    margin: float
    pairs: list[tuple[Curve, Curve]] | None
    noise: Noise | None
    measures: list[Measure]
    points: dict[str, list[dict[str, Any]]]
    differs: dict[str, tuple[Any, Any]]
    notes: list[str] = field(default_factory=list)


def compare(
    root: str | Path,
    a: str,
    b: str,
    metric: str = "bpb",
    stage: str | None = None,
    margin: str | None = None,
    last: int = 3,
    direction: str | None = None,
    noise: str | None = None,
    unpaired: bool = False,
    force: bool = False,
) -> Comparison:
    """Return the comparison of the runs that `a` and `b` name in the folder `root`; see `runs.runs_named`.

    margin: a number in the unit of the metric, or `0.5%` of A's value. last: evaluations in the mean of the last ones.
    direction: min or max, what is better. noise: spread of single runs, a number, or the name of runs to take it from.
    force: compare what was not measured on the same things. Raises UserError where no comparison is possible.
    """
    stage = stage or common_stage(root, (a, b))
    sides = [load_side(root, text, stage, metric) for text in (a, b)]
    share = is_share(metric.removeprefix("chat/"), [row for side in sides for row in side.rows])
    lower = _lower_is_better(metric, share, direction)
    _check(sides, metric, force)
    used = [side.curves for side in sides]
    pairs, notes = _pairs(*used, unpaired)
    if pairs is not None:
        used = [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]
    everything = [*used[0], *used[1]]
    steps, times = common_steps(everything), common_seconds(everything)
    if not steps:
        raise UserError(f"{a} and {b} have no evaluated step in common: train both with one stage.eval_every")
    end, tokens = steps[-1], _tokens_at_ends(everything)

    def decisive(curve: Curve) -> float:
        return curve.at(end) if tokens is None else curve.values[-1]

    floor = _noise(root, noise, sides[0], used[0], decisive, metric, force)
    wide = _margin(margin, fmean(map(decisive, used[0])), metric, share)

    def measure(at: str, point: float, of: str, value: Callable[[Curve], float]) -> Measure:
        found = compare_groups(*([value(c) for c in side] for side in used), pairs is not None, floor)
        verdict = judge(found, wide, lower)
        needed = seeds_needed(found, wide) if verdict.verdict == "undecided" else None
        further = needed and tuple(max(0, needed - len(side)) for side in used)
        return Measure(at, point, of, found, verdict, further)

    tail = steps[-last:]
    measures = [measure("steps", end, "last", lambda curve: curve.at(end))]
    if tokens is not None:
        measures.insert(0, measure("tokens", tokens, "last", decisive))
        notes.append(
            "runs end after equal tokens in different numbers of steps: the first line, of their ends, decides"
        )
    if len(tail) > 1:
        mean = measure("steps", end, f"mean of {len(tail)}", lambda curve: fmean(curve.at(step) for step in tail))
        measures.append(mean)
    if times:
        measures.append(measure("seconds", times[-1], "interpolated", lambda curve: curve.after(times[-1])))
    points = {
        "steps": [_point(step, used, pairs, lambda c, at=step: c.at(at)) for step in steps],
        "seconds": [_point(time, used, pairs, lambda c, at=time: c.after(at)) for time in times],
    }
    notes += _notes(sides, everything, end, floor, measures[0].found)
    differs = differences(*sides)
    return Comparison(*sides, metric, lower, wide, pairs, floor, measures, points, differs, notes)


def _lower_is_better(metric: str, share: bool, direction: str | None) -> bool:
    """Say which values are better. share: the metric is a share of right items."""
    if direction is not None or share:
        return direction == "min"
    for patterns, lower in ((LOWER, True), (HIGHER, False)):
        if any(fnmatchcase(metric, pattern) for pattern in patterns):
            return lower
    raise UserError(f"--metric {metric}: say what is better, --direction min or --direction max")


def _check(sides: Sequence[Side], metric: str, force: bool) -> None:
    """Raise UserError where a side has no run that ended, where both share one, and where numbers do not compare."""
    for side in sides:
        if not side.curves:
            reasons = "; ".join(f"{run}: {reason}" for run, reason in side.left_out)
            raise UserError(f"{side.name}: no run of {side.stage} can be compared ({reasons})")
    shared = [row["run"] for row in sides[0].rows if any(row["folder"] == other["folder"] for other in sides[1].rows)]
    if shared:
        raise UserError(f"{shared[0]} is on both sides; name the runs so that each is on one")
    if (reasons := incomparable(*sides, metric)) and not force:
        raise UserError(
            f"{metric} of {sides[0].name} and {sides[1].name} was not measured on the same things: "
            f"{'; '.join(reasons[:4])}; evaluate both alike, or use --force"
        )


def _tokens_at_ends(curves: Sequence[Curve]) -> float | None:
    """Return the tokens after which all runs end, where they took different numbers of steps for them; else None."""
    tokens = [curve.tokens for curve in curves]
    if None in tokens or len({curve.steps[-1] for curve in curves}) == 1:
        return None
    return min(tokens) if max(tokens) <= SAME_TOKENS * min(tokens) else None


def _pairs(
    a: Sequence[Curve], b: Sequence[Curve], unpaired: bool
) -> tuple[list[tuple[Curve, Curve]] | None, list[str]]:
    """Return (pairs of one seed each, notes).

    There are pairs where two seeds or more of one side are all on the other side, else None.
    """
    by_seed = [{curve.seed: curve for curve in side if curve.seed is not None} for side in (a, b)]
    shared = sorted(by_seed[0].keys() & by_seed[1].keys())
    if unpaired or len(shared) < 2 or len(shared) < min(len(a), len(b)):
        return None, []
    alone = [curve.run for side in (a, b) for curve in side if curve.seed not in shared]
    notes = [f"without a partner of the same seed, and so left out: {', '.join(alone)}"] if alone else []
    return [(by_seed[0][seed], by_seed[1][seed]) for seed in shared], notes


def _noise(
    root: str | Path, given: str | None, a: Side, used: Sequence[Curve], value: Callable, metric: str, force: bool
) -> Noise | None:
    """Return the spread of single runs: as given (a number, or runs to take it from), else that of A over its seeds.

    used: the runs of A that are compared. Runs that are given must be measured on the same things as A, unless `force`.
    """
    if given is None:
        numbers = [value(curve) for curve in used]
        return Noise(stdev(numbers), len(numbers) - 1, "seeds of A") if len(numbers) > 1 else None
    try:
        sd = float(given)
    except ValueError:
        pool = load_side(root, given, a.stage, metric)
        if len(pool.curves) < 2:
            raise UserError(f"--noise {given}: takes two finished runs or more, with different seeds") from None
        if (reasons := incomparable(a, pool, metric)) and not force:
            raise UserError(
                f"--noise {given}: {metric} was not measured on the same things as that of {a.name}: "
                f"{'; '.join(reasons[:4])}; name other runs, give a number, or use --force"
            ) from None
        numbers = [curve.values[-1] for curve in pool.curves]
        return Noise(stdev(numbers), len(numbers) - 1, f"{len(numbers)} runs of {given}")
    if not 0 < sd < math.inf:
        raise UserError(f"--noise {given}: must be above 0, a standard deviation between seeds, or the name of runs")
    return Noise(sd, math.inf, "given")


def _margin(text: str | None, level: float, metric: str, share: bool) -> float:
    """Return the margin in the unit of the metric; `level`: A's value, of which a percentage is taken."""
    if text is None:
        return MARGIN_OF_SHARES if share else MARGIN * abs(level)
    try:
        number = float(text.removesuffix("%")) * (abs(level) / 100 if text.endswith("%") else 1)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(
            f"--margin {text}: must be a number above 0 in the unit of {metric}, or a percentage of A's value"
        )
    return number


def _point(at: float, used: Sequence[Sequence[Curve]], pairs: Any, value: Callable[[Curve], float]) -> dict[str, Any]:
    """Return both sides and their difference at a step or second: means, lowest and highest run, 95 % interval."""
    numbers = [[value(curve) for curve in side] for side in used]
    found = compare_groups(*numbers, pairs is not None)
    reach = None if found.stderr is None else t_limit(ALPHA / 2, found.df) * found.stderr
    point = {"at": at, "a": found.a, "b": found.b, "difference": found.mean}
    point |= {
        "low": None if reach is None else found.mean - reach,
        "high": None if reach is None else found.mean + reach,
    }
    point |= {f"{side}_{name}": pick(part) for side, part in zip("ab", numbers, strict=True) for name, pick in RANGE}
    return point


def _notes(
    sides: Sequence[Side], curves: Sequence[Curve], end: int, floor: Noise | None, found: Difference
) -> list[str]:
    """Return what a reader must know to trust the numbers, a line each."""
    notes = []
    for letter, side in zip("AB", sides, strict=True):
        if side.left_out:
            named = "; ".join(f"{run}: {reason}" for run, reason in side.left_out)
            notes.append(f"{len(side.left_out)} of {len(side.rows)} runs of {letter} cannot be compared ({named})")
    failed = [len(side.left_out) / len(side.rows) for side in sides]
    if max(failed):
        notes.append("runs that fail are part of a configuration's result: means hold for those that ended only")
    beyond = sorted({curve.run for curve in curves if curve.steps[-1] > end})
    if beyond:
        notes.append(f"trained beyond step {end}, with another schedule there: {', '.join(beyond[:4])}")
    if found.test == "noise":
        notes.append(f"one run on each side: the spread between seeds is taken from elsewhere ({floor.source}); weak")
    elif found.test == "pooled":
        notes.append("a side has one run: it is taken to scatter as the other side does; weak")
    elif found.test == "none":
        notes.append("one run on each side, and no spread between seeds is known: train more seeds, or give --noise")
    elif found.stderr == 0:
        notes.append("all differences are exactly equal: does the setting that was changed have an effect at all?")
    if len(names := machines(sides)) > 1:
        notes.append(f"seconds are of different machines: {'; '.join(sorted(names))}")
    for letter, side in zip("AB", sides, strict=True):
        took = [curve.seconds[curve.steps.index(end)] for curve in side.curves if curve.seconds and end in curve.steps]
        if took and max(took) > UNEVEN * min(took):
            digits = 1 if min(took) < 10 else 0
            notes.append(
                f"runs of {letter} took {min(took):,.{digits}f} to {max(took):,.{digits}f} s for the same "
                "steps: was the machine busy? Then equal seconds say little"
            )
    return notes
