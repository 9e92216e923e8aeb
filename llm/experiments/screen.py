"""Compare many changes, often one run each, with a pool of runs of one baseline: a table, the best change first.

    python -m llm.experiments.screen base soap average 'rate-*'
    python -m llm.experiments.screen base soap average --json

A screening finds candidates. With many changes some look better by luck, so the best are trained again with new seeds
and go through `llm.experiments.compare`. docs/experiments.md has an example.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from llm.errors import UserError
from llm.experiments.comparison import Comparison, compare
from llm.experiments.statistics import ALPHA
from llm.utils.files import plain
from llm.utils.format import print_table
from llm.utils.streams import run_and_exit


def screen(root: str, pool: str, changes: Sequence[str], **options: Any) -> list[dict[str, Any]]:
    """Return a mapping for each change, the best first; options: those of `comparison.compare`.

    name; settings: {key: (before, after)}; pool, value: means of the metric; difference, stderr, p, verdict: at equal
    steps, or at equal tokens where `compare` decides by these, not paired by seed; seconds: training time over that of
    the pool, None where it is unknown; seeds; notes. Raises UserError where a change cannot be compared.
    """
    found = []
    for change in changes:
        result = compare(root, pool, change, unpaired=True, **options)
        one = result.measures[0]
        settings = {key: values for key, values in result.differs.items() if key != "commit"}
        found.append(
            {
                "name": change,
                "settings": settings,
                "seeds": len(result.b.curves),
                "pool": one.found.a,
                "value": one.found.b,
                "difference": one.found.mean,
                "stderr": one.found.stderr,
                "p": one.verdict.p,
                "verdict": one.verdict.verdict,
                "seconds": _time_ratio(result),
                "notes": result.notes,
                "lower_is_better": result.lower_is_better,
            }
        )
    return sorted(found, key=lambda row: row["difference"] if row["lower_is_better"] else -row["difference"])


def _time_ratio(result: Comparison) -> float | None:
    """Return B's seconds over A's up to where the verdict is; None where a run does not say its seconds."""
    one = result.measures[0]
    times = [
        [
            curve.seconds[-1 if one.at == "tokens" else curve.steps.index(int(one.point))] if curve.seconds else None
            for curve in side.curves
        ]
        for side in (result.a, result.b)
    ]
    if any(time is None for side in times for time in side):
        return None
    return fmean(times[1]) / fmean(times[0])


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the screening for people."""
    header = ["change", "seeds", "value", "difference", "± 1 s.e.", "p", "seconds x", "verdict"]
    print_table(header, [_line(row) for row in rows])
    for row in rows:
        named = ", ".join(f"{key} {before} -> {after}" for key, (before, after) in row["settings"].items())
        print(f"{row['name']}: {named or 'nothing differs but the seeds'}")
    print(
        f"of {len(rows)} changes that do nothing about {ALPHA * len(rows):.1f} would be called better or worse: "
        "train the best again with new seeds and compare"
    )


def _line(row: dict[str, Any]) -> list[str]:
    known = row["stderr"] is not None
    numbers = [f"{row['stderr']:.4f}", f"{row['p']:.2g}"] if known else ["-", "-"]
    time = "-" if row["seconds"] is None else f"{row['seconds']:.2f}"
    values = [f"{row['value']:.4f}", f"{row['difference']:+.4f}"]
    return [row["name"], str(row["seeds"]), *values, *numbers, time, row["verdict"]]


def main(argv: Sequence[str] | None = None) -> int:
    """Screen what `argv` names; returns the exit status, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m llm.experiments.screen",
        description="Compare many changes with a pool of runs of one baseline.",
    )
    parser.add_argument("pool", help="the baseline: runs separated by commas, a pattern, or the name of a sweep")
    parser.add_argument("changes", nargs="+", help="the changes, each named like the baseline")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--stage", help="stage to compare (default: the last one that all runs have)")
    parser.add_argument("--metric", default="bpb", help="column of metrics.csv, a task or a score (default: bpb)")
    parser.add_argument("--direction", choices=("min", "max"), help="say which values of the metric are better")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    options = vars(parser.parse_args(argv))
    root, pool, changes, as_data = (options.pop(name) for name in ("runs", "pool", "changes", "json"))
    try:
        rows = screen(root, pool, changes, **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if as_data:
        print(json.dumps(plain(rows), indent=2, ensure_ascii=False))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    run_and_exit(main)
