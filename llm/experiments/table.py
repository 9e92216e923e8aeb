"""One table over all runs: filtered, sorted, with seeds of one configuration in one row, and with what differs.

    python -m llm.experiments.table --stage pretrain --sort bpb
    python -m llm.experiments.table 'd4-*' --filter 'optim.matrix_lr<0.03' --diff
    python -m llm.experiments.table --each --columns run,seed,bpb,optim.matrix_lr

`make table ARGS="..."` is the same command.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from llm.config.stages import row_or_stranger, stage_names
from llm.errors import UserError
from llm.experiments.runs import (
    FACTS,
    ORIGIN,
    SEED,
    Row,
    is_share,
    runs_named,
    score_names,
    setting,
    settings_of,
    stage_rows,
    unlike,
    way_of,
)
from llm.run.config_diff import flatten
from llm.utils.files import plain
from llm.utils.format import amount, percent, print_table, value
from llm.utils.streams import run_and_exit

FIRST = ("run", "seeds", "stage", "depth", "params", "tokens", "flops", "seconds", "loss", "bpb")
TITLES = {"flops": "FLOPs"}
MOST_DIFFERING = 12  # columns that --diff adds
MOST_NAMES = 3  # of the runs in one row
_FILTER = re.compile(r"\s*([^<>=!\s]+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*")

Getter = Callable[[Row], Any]


def read_rows(runs_root: str | Path, names: Sequence[str] = (), stages: Sequence[str] = ()) -> list[Row]:
    """Return the rows (see `runs.stage_rows`) of all runs in a folder, or of those that `names` stand for.

    stages: only these; default: all that train a model. Raises UserError where nothing matches.
    """
    if not Path(runs_root).is_dir():
        raise UserError(f"--runs {runs_root}: there is no such folder")
    chosen = set(runs_named(runs_root, ",".join(names), stages)) if names else None

    def wanted(run: str, stage: str) -> bool:
        return (chosen is None or run in chosen) and (stage in stages if stages else row_or_stranger(stage).makes_model)

    rows = list(stage_rows(runs_root, wanted))
    if not rows:
        known = ", ".join(stage_names())
        raise UserError(f"--runs {runs_root}: no run there has a matching stage yet (stages: {known})")
    return rows


def column(name: str, rows: Sequence[Row], flag: str) -> Getter:
    """Return the function that takes the value of a column from a row: a fact, a score, or a key of the configuration.

    The last part of a key is enough where no other key ends so. flag: of the command line, for the UserError about a
    name that no row has.
    """
    name = {title: key for key, title in TITLES.items()}.get(name, name)
    if name in FIRST or any(name in row for row in rows):
        return lambda row: row.get(name)
    keys = dict.fromkeys(key for row in rows for key in flatten(row["config"]))
    found = [name] if name in keys else [key for key in keys if key.endswith(f".{name}")]
    if len(found) == 1:
        return lambda row: setting(row["config"], found[0])
    if found:
        raise UserError(f"{flag} {name}: several keys end so: {', '.join(found[:6])}; name one of them in full")
    known = [*FACTS, *ORIGIN[:-1], *score_names(rows), *keys]
    near = get_close_matches(name, [*known, *(key.rpartition(".")[2] for key in keys)], 3) or score_names(rows)[:6]
    raise UserError(f"{flag} {name}: no run has such a column or key; did you mean {', '.join(dict.fromkeys(near))}?")


def filtered(rows: list[Row], conditions: Sequence[str]) -> list[Row]:
    """Return the rows for which all conditions hold, such as `depth=4`, `bpb<1.5`, `run=d4-*`, `status!=running`.

    Raises UserError for what is no condition, an unknown column, and where no row is left.
    """
    for condition in conditions:
        parts = _FILTER.fullmatch(condition)
        if parts is None:
            raise UserError(f"--filter {condition!r}: write <column><sign><value> with one of = != < <= > >=")
        name, sign, text = parts.groups()
        get, number = column(name, rows, "--filter"), _number(text)
        if sign in SIGNS and number is None:
            raise UserError(f"--filter {condition!r}: {sign} needs a number")
        rows = [row for row in rows if _holds(get(row), sign, text, number)]
        if not rows:
            raise UserError(f"--filter {condition!r}: no row is left")
    return rows


SIGNS = {"<": float.__lt__, "<=": float.__le__, ">": float.__gt__, ">=": float.__ge__}


def _holds(found: Any, sign: str, text: str, number: float | None) -> bool:
    if sign in SIGNS:
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return is_number and SIGNS[sign](float(found), number)
    if number is not None and isinstance(found, int | float):
        equal = float(found) == number
    else:
        equal = fnmatchcase(_as_set(found), text)
    return equal == (sign == "=")


def _as_set(found: Any) -> str:
    """Return a value as a configuration writes it."""
    return json.dumps(found, ensure_ascii=False).strip('"')


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def ordered(rows: list[Row], by: str, descending: bool = False) -> list[Row]:
    """Return the rows by a column, smallest first or largest first; those without a value come last."""
    get = column(by, rows, "--sort")
    have = [row for row in rows if get(row) is not None]
    numbers = all(isinstance(get(row), int | float) for row in have)
    have.sort(key=get if numbers else lambda row: str(get(row)), reverse=descending)
    return have + [row for row in rows if get(row) is None]


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


def grouped(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with those in one that differ in nothing but the seed.

    Such a row has their number as `seeds` and themselves as `members`, means of numbers, as standard errors those over
    the seeds, and what the names have in common. A score that not all of them have, or that was not measured in one
    way, is None. A second run of a seed is no further seed: it has a row of its own.
    So has every run without a saved configuration, as its seed is not known.
    """
    groups: dict[Any, list[Row]] = {}
    for row, kept in zip(rows, settings_of(rows), strict=True):
        what = json.dumps([row["stage"], row["status"], plain(kept)], sort_keys=True)
        again = 0
        while any(other["seed"] == row["seed"] for other in groups.get((what, again), ())):
            again += 1
        groups.setdefault((what, again), []).append(row)
    return [_together(group) if len(group) > 1 else group[0] for group in groups.values()]


def _together(rows: Sequence[Row]) -> Row:
    first, names = rows[0], dict.fromkeys(name for row in rows for name in row)
    scores, merged = set(score_names(rows)), {}
    for name in names:
        found = [row[name] for row in rows if row.get(name) is not None]
        if name.endswith("_stderr") and name.removesuffix("_stderr") in scores:
            continue  # of single runs
        if name in scores and (len(found) < len(rows) or unlike(way_of(row, name) for row in rows)):
            merged[name] = None
        elif name != "seed" and found and all(isinstance(number, int | float) for number in found):
            merged[name] = found[0] if len(set(found)) == 1 else fmean(found)
            if name in scores and len(found) > 1:
                merged[f"{name}_stderr"] = stdev(found) / math.sqrt(len(found))
        else:
            merged[name] = found[0] if found and all(other == found[0] for other in found) else None
    merged |= {
        "run": _common_name([row["run"] for row in rows]),
        "seeds": len(rows),
        "members": rows,
        "config": first["config"],
    }
    return merged


def _common_name(names: Sequence[str]) -> str:
    """Return names in one text, with a star for the seeds that a sweep has put into them: `base-seed=*`."""
    shown = list(dict.fromkeys(SEED.sub("seed=*", name) for name in names))
    return ", ".join(shown[:MOST_NAMES]) + (f" and {len(shown) - MOST_NAMES} more" if len(shown) > MOST_NAMES else "")


# ---------------------------------------------------------------------------------------------------------------------
# Output


def differing(rows: Sequence[Row]) -> list[str]:
    """Return the settings in which rows of one stage differ, those that take the most values first."""
    counts: dict[str, int] = {}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        each = settings_of([row for row in rows if row["stage"] == stage and row["config"]])
        for key in dict.fromkeys(key for one in each for key in one):
            kinds = len({json.dumps(plain(one.get(key))) for one in each})
            if kinds > 1:
                counts[key] = max(counts.get(key, 0), kinds)
    return sorted(counts, key=lambda key: (-counts[key], key))


def layout(rows: Sequence[Row], columns: str | None, diff: bool) -> tuple[list[str], list[Getter]]:
    """Return the names of the columns and their getters. columns: names with commas; default: those that hold a value.

    diff: also the settings in which rows differ, at most `MOST_DIFFERING`; a line on stderr names the others. Another
    one names scores without a mean.
    """
    scores = score_names(rows)
    names = [name.strip() for name in columns.split(",") if name.strip()] if columns else None
    if names is None:
        shares = [name for name in scores if is_share(name, rows) and "/" not in name]
        names = [name for name in (*FIRST, *shares) if any(row.get(name) is not None for row in rows)]
    if diff:
        keys = [key for key in differing(rows) if key not in names]
        names += keys[:MOST_DIFFERING]
        if len(keys) > MOST_DIFFERING:
            more = ", ".join(keys[MOST_DIFFERING:][:20])
            print(f"note: {len(keys) - MOST_DIFFERING} more settings differ: {more}", file=sys.stderr)
    partial = [name for name in names if name in scores and any(row.get(name, 0) is None for row in rows)]
    if partial:
        print(
            f"note: {', '.join(partial)}: no mean where a seed lacks it or has measured it otherwise; see --each",
            file=sys.stderr,
        )
    return names, [column(name, rows, "--columns") for name in names]


def as_text(rows: Sequence[Row], columns: str | None = None, diff: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return (header, lines) of a table for people; see `layout`."""
    names, getters = layout(rows, columns, diff)
    shares = {name for name in names if is_share(name, rows)}
    lines = [
        [_cell(row, name, get(row), name in shares) for name, get in zip(names, getters, strict=True)] for row in rows
    ]
    return [TITLES.get(name, name) for name in names], lines


def _cell(row: Row, name: str, found: Any, share: bool) -> str:
    error = row.get(f"{name}_stderr") if "seeds" in row else None
    if name == "stage" and row["status"] not in ("finished", None):
        return f"{found} ({row['status']})"
    if name in ("params", "tokens", "flops") and isinstance(found, int | float):
        return amount(found)
    if name == "seconds":
        return value(found, digits=1)
    if share and isinstance(found, int | float):
        return percent(found, error)
    if name in row or found is None:
        return value(found, error)
    return _as_set(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table that `argv` asks for; returns the exit status, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m llm.experiments.table",
        description="One table over runs; seeds of one configuration are one row, with mean ± standard error.",
    )
    parser.add_argument("run", nargs="*", help="only these runs: names, patterns such as 'd4-*', or names of sweeps")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--stage", action="append", default=[], help="only this stage; may be repeated")
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        help="only rows with, for example, 'depth=4' or 'bpb<1.5'; may be repeated",
    )
    parser.add_argument("--sort", help="column or key to sort by, smallest first")
    parser.add_argument("--descending", action="store_true", help="sort with the largest first")
    parser.add_argument("--columns", help="columns and configuration keys to show, separated by commas")
    parser.add_argument("--diff", action="store_true", help="add a column for each setting in which rows differ")
    parser.add_argument("--each", action="store_true", help="a row for every run, also of one configuration")
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows instead of a table")
    options = parser.parse_args(argv)
    try:
        rows = filtered(read_rows(options.runs, options.run, options.stage), options.filter)
        rows = rows if options.each else grouped(rows)
        rows = ordered(rows, options.sort, options.descending) if options.sort else rows
        if options.json:
            names, getters = layout(rows, options.columns, options.diff)
            table = [{name: get(row) for name, get in zip(names, getters, strict=True)} for row in rows]
            print(json.dumps(plain(table), indent=2, ensure_ascii=False))
        else:
            print_table(*as_text(rows, options.columns, options.diff))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_and_exit(main)
