"""Compare two configurations by their runs: is B better than A, equal within a margin, or can nobody tell yet?

    python -m llm.experiments.compare base faster                       two sweeps over seeds, paired by seed
    python -m llm.experiments.compare base faster --json
    python -m llm.experiments.compare 'd4-seed=*' d6-seed=1,d6-seed=2 --metric choice --margin 0.02

docs/experiments.md explains the tests and the fields of --json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.experiments.comparison import Comparison, Measure, compare
from llm.experiments.plot import draw_comparison
from llm.experiments.statistics import ALPHA, POWER
from llm.utils.files import plain
from llm.utils.format import amount, print_table
from llm.utils.streams import run_and_exit

FORMAT = 1  # of --json; rises when a field changes its meaning or goes


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


def place_of(at: str, point: float) -> str:
    """Return in words where a measure compares: a step, a second, a number of tokens."""
    return {"steps": f"step {point:,.0f}", "seconds": f"{point:,.1f} s", "tokens": f"{amount(point)} tokens"}[at]


def _line(one: Measure) -> list[str]:
    found, verdict = one.found, one.verdict
    place = place_of(one.at, one.point)
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
    run_and_exit(main)
