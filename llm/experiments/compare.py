"""Compare two configurations by their runs: is B better than A, equal within a margin, or can nobody tell yet?

    python -m llm.experiments.compare base faster                       two sweeps over seeds, paired by seed
    python -m llm.experiments.compare base faster --json
    python -m llm.experiments.compare 'd4-seed=*' d6-seed=1,d6-seed=2 --metric choice --margin 0.02

docs/experiments.md explains the tests and the fields of --json.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from llm.errors import UserError
from llm.experiments.curves import Curve, common_seconds, common_steps
from llm.experiments.sides import Side, common_stage, differences, incomparable, load_side, machines
from llm.experiments.statistics import (
    ALPHA,
    POWER,
    Difference,
    Noise,
    Verdict,
    compare_groups,
    judge,
    seeds_needed,
    t_limit,
)
from llm.utils.files import plain
from llm.utils.format import print_table

FORMAT = 1  # of --json; rises when a field changes its meaning or goes
MARGIN = 0.005  # of A's value: a tenth more compute lowers the loss by about as much (it falls as compute^-0.05)
MARGIN_OF_SHARES = 0.01
LOWER = ("bpb*", "*loss", "ms_per_step", "seconds", "kl")
HIGHER = ("chat/*", "pass@*", "*core", "reward", "preference/*", "accuracy*", "tok_per_s", "mfu")


@dataclass(frozen=True)
class Measure:
    """One way to compare: `at` equal steps or seconds, `point` of them, `of` the last evaluation or a mean of them.

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
    lower = _lower_is_better(metric, direction)
    sides = [load_side(root, text, stage, metric) for text in (a, b)]
    _check(sides, metric, force)
    used = [side.curves for side in sides]
    pairs, notes = _pairs(*used, unpaired)
    if pairs is not None:
        used = [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]
    everything = [*used[0], *used[1]]
    steps, times = common_steps(everything), common_seconds(everything)
    if not steps:
        raise UserError(f"{a} and {b} have no evaluated step in common: train both with one stage.eval_every")
    end = steps[-1]
    floor = _noise(root, noise, used, stage, metric, lambda curve: curve.at(end))
    wide = _margin(margin, fmean(curve.at(end) for curve in used[0]), metric, lower)

    def measure(at: str, point: float, of: str, value: Callable[[Curve], float]) -> Measure:
        found = compare_groups(*([value(c) for c in side] for side in used), pairs is not None, floor)
        verdict = judge(found, wide, lower)
        needed = seeds_needed(found, wide) if verdict.verdict == "undecided" else None
        further = needed and tuple(max(0, needed - len(side)) for side in used)
        return Measure(at, point, of, found, verdict, further)

    tail = steps[-last:]
    measures = [measure("steps", end, "last", lambda curve: curve.at(end))]
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


def _lower_is_better(metric: str, direction: str | None) -> bool:
    if direction is not None:
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
    root: str | Path, given: str | None, used: Sequence[Sequence[Curve]], stage: str, metric: str, value: Callable
) -> Noise | None:
    """Return the spread of single runs: as given (a number, or runs to take it from), else that of A over its seeds."""
    if given is None:
        numbers = [value(curve) for curve in used[0]]
        return Noise(stdev(numbers), len(numbers) - 1, "seeds of A") if len(numbers) > 1 else None
    try:
        sd = float(given)
    except ValueError:
        pool = load_side(root, given, stage, metric).curves
        if len(pool) < 2:
            raise UserError(f"--noise {given}: takes two finished runs or more, with different seeds") from None
        numbers = [curve.values[-1] for curve in pool]
        return Noise(stdev(numbers), len(numbers) - 1, f"{len(numbers)} runs of {given}")
    if not 0 < sd < math.inf:
        raise UserError(f"--noise {given}: must be above 0, a standard deviation between seeds, or the name of runs")
    return Noise(sd, math.inf, "given")


def _margin(text: str | None, level: float, metric: str, lower: bool) -> float:
    """Return the margin in the unit of the metric; `level`: A's value, of which a percentage is taken."""
    if text is None:
        return MARGIN * abs(level) if lower or not 0 <= level <= 1 else MARGIN_OF_SHARES
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


RANGE = (("min", min), ("max", max))


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
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Output


def as_json(result: Comparison) -> dict[str, Any]:
    """Return the comparison as plain data; docs/experiments.md describes the fields."""
    sides = {}
    for letter, side in (("a", result.a), ("b", result.b)):
        runs = [{"run": curve.run, "seed": curve.seed} for curve in side.curves]
        left_out = [{"run": run, "reason": reason} for run, reason in side.left_out]
        sides[letter] = {"name": side.name, "stage": side.stage, "runs": runs, "left_out": left_out}
    measures = []
    for one in result.measures:
        found, verdict = asdict(one.found), asdict(one.verdict)
        found["difference"] = found.pop("mean")
        measures.append(
            {
                "at": one.at,
                "point": one.point,
                "of": one.of,
                **found,
                **verdict,
                "further_seeds": one.further and dict(zip("ab", one.further, strict=True)),
            }
        )
    return plain(
        {
            "format": FORMAT,
            "verdict": result.measures[0].verdict.verdict,
            "metric": result.metric,
            "better": "min" if result.lower_is_better else "max",
            "margin": result.margin,
            "alpha": ALPHA,
            "power": POWER,
            **sides,
            "pairs": None if result.pairs is None else [[one.run, other.run] for one, other in result.pairs],
            "noise": result.noise and asdict(result.noise),
            "differences": result.differs,
            "measures": measures,
            "points": result.points,
            "notes": result.notes,
        }
    )


def in_words(result: Comparison) -> str:
    """Return the verdict as a sentence."""
    one = result.measures[0]
    found, verdict = one.found, one.verdict
    size = f"{found.mean:+.4g}" + ("" if found.stderr is None else f" ± {found.stderr:.2g}")
    size += f" ({100 * found.mean / abs(found.a):+.2f} %)" if found.a else ""
    if verdict.verdict in ("better", "worse"):
        return f"B is {verdict.verdict} than A: {size}, p = {verdict.p:.2g}"
    if verdict.verdict == "equal":
        real = ", a difference that is there but too small to matter" if verdict.p < ALPHA else ""
        return f"B is equal to A within the margin: {size}, margin {result.margin:.3g}{real}"
    if found.stderr is None:
        return f"undecided: {size} of single runs; nothing says how far single runs scatter"
    if one.further is None:
        return f"undecided: {size}, and no number of seeds up to 10,000 would decide"
    aim = "called different" if abs(found.mean) > result.margin else "called equal within the margin"
    a, b = one.further
    more = f"{a} further seeds on each side" if a == b else f"{a} further seeds of A and {b} of B"
    return (
        f"undecided: {size}, margin {result.margin:.3g}; with {more} such a case is {aim} "
        f"{100 * POWER:.0f} times in 100, if single runs scatter as these do"
    )


def show(result: Comparison) -> None:
    """Print the comparison for people."""
    for letter, side in (("A", result.a), ("B", result.b)):
        seeds = " ".join(str(curve.seed) for curve in side.curves)
        print(f"{letter}: {side.name}, {side.stage}, seeds {seeds}")
    for key, (before, after) in result.differs.items():
        print(f"   {key}: {_short(before)} -> {_short(after)}")
    if not result.differs:
        print("   one configuration: nothing differs but the seeds")
    better = "lower" if result.lower_is_better else "higher"
    print(f"{result.metric}, {better} is better; differences below {result.margin:.4g} do not matter (the margin)")
    if result.noise:
        print(f"noise floor: single runs scatter by {result.noise.sd:.3g} ({result.noise.source})")
    print(TESTS[result.measures[0].found.test].format(len(result.pairs or [])))
    header = ["at", "of", "A", "B", "B - A", "± 1 s.e.", "95 % interval", "p", "p equal", "verdict"]
    print_table(header, [_line(one) for one in result.measures])
    for note in result.notes:
        print(f"note: {note}")
    print(in_words(result))


TESTS = {
    "paired": "paired by seed: t-test over {} pairs",
    "welch": "not paired: the sides have different seeds; Welch's t-test",
    "pooled": "not paired: t-test with the spread of the side that has several runs",
    "noise": "one run on each side: test against the noise floor",
    "none": "one run on each side: no test is possible",
}


def _line(one: Measure) -> list[str]:
    found, verdict = one.found, one.verdict
    place = f"step {one.point:,.0f}" if one.at == "steps" else f"{one.point:,.1f} s"
    if found.stderr is None:
        return [place, one.of, f"{found.a:.4f}", f"{found.b:.4f}", f"{found.mean:+.4f}", *["-"] * 4, verdict.verdict]
    interval = f"{verdict.low:+.4f} to {verdict.high:+.4f}"
    numbers = [f"{found.a:.4f}", f"{found.b:.4f}", f"{found.mean:+.4f}", f"{found.stderr:.4f}", interval]
    return [place, one.of, *numbers, f"{verdict.p:.2g}", f"{verdict.p_equal:.2g}", verdict.verdict]


def _short(value: Any) -> str:
    text = "off" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what `argv` names; returns the exit status, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m llm.experiments.compare",
        description="Say whether configuration B is better than A, by runs with several seeds.",
    )
    runs = "runs separated by commas: names, patterns such as 'base-*', or the name of a sweep over seeds"
    parser.add_argument("a", help=f"the baseline: {runs}")
    parser.add_argument("b", help=f"the change: {runs}")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--stage", help="stage to compare (default: the last one that all runs have)")
    parser.add_argument("--metric", default="bpb", help="column of metrics.csv, a task or a score (default: bpb)")
    parser.add_argument("--direction", choices=("min", "max"), help="say which values of the metric are better")
    parser.add_argument("--margin", help="largest difference that does not matter: a number, or a percentage of A")
    parser.add_argument("--last", type=int, default=3, help="evaluations in the mean over the last ones (default: 3)")
    parser.add_argument("--noise", help="spread between seeds for single runs: a number, or runs to take one from")
    parser.add_argument("--unpaired", action="store_true", help="do not pair runs of one seed")
    parser.add_argument("--force", action="store_true", help="compare numbers that were measured on different things")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--plot", help="write a picture of curves and differences to this PNG file")
    options = vars(parser.parse_args(argv))
    root, as_data, picture = options.pop("runs"), options.pop("json"), options.pop("plot")
    try:
        if options["last"] < 1:
            raise UserError(f"--last {options['last']}: must be 1 or more")
        result = compare(root, **options)
        if picture:
            from llm.experiments.plot import draw_comparison

            draw_comparison(Path(picture), result)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if as_data:
        print(json.dumps(as_json(result), indent=2, ensure_ascii=False))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
