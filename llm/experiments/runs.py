"""The reader of runs: a row for every stage of every run in a folder.

Small files only, run.json and eval.json; no learning curves, and neither torch nor pandas.
"""

import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm.config.stages import row_or_stranger
from llm.errors import UserError
from llm.report.results import evaluated_metrics, final_metrics
from llm.run.config_diff import BEFORE_KEYS, covers, flatten, neutral_keys
from llm.run.formats import read_scores
from llm.run.stage_folder import list_runs, read_manifest

FACTS = ("run", "stage", "status", "seed", "parent", "steps", "tokens", "flops", "seconds")  # first columns of a row
ORIGIN = ("depth", "params", "started", "finished", "commit", "folder", "config")  # the last ones
GROUP = ("seeds", "members")  # of a row that stands for several, see `table.grouped`
TOKENIZER = "tokenizer"  # of a row: fingerprint of the tokenizer, where the stage starts from nothing else; or None
EVALUATED = "evaluated"  # of a row: {score of eval.json: what it was measured on, as `200 items`; None = unknown}
NO_SHARES = ("preference/margin",)  # means of other things, also where they lie between 0 and 1
SEED = re.compile(r"\bseed=\d+")  # in the name of a run that a sweep has made
MOST_NAMED = 6  # runs or keys that an error names

Row = dict[str, Any]


def warn(problem: str) -> None:
    """Print a problem as a line of stderr."""
    print(f"warning: {problem}", file=sys.stderr)


def stage_rows(
    runs_root: str | Path, wanted: Callable[[str, str], bool] | None = None, problem: Callable[[str], None] = warn
) -> Iterator[Row]:
    """Yield a row for every stage of every run in a folder: runs in natural order, stages in that of the pipeline.

    A row has `FACTS` (flops: floating-point operations; parent: `run/stage`), every score by its name (`bpb`, `loss`,
    tasks as shares from 0 to 1) with its standard error as `<score>_stderr` where there is one, and `ORIGIN`: times as
    ISO 8601 in UTC, the folder of the stage, and the nested configuration under today's names of keys, {} where none
    was saved. `EVALUATED` says which scores are those of eval.json, `TOKENIZER` what a pretraining starts from. A fact
    that a stage lacks is None, a score that it lacks is no key.

    wanted: takes (run, stage) and says whether to read this stage. problem: is called with a line for each file that
    cannot be read; a stage without a readable run.json has no row.
    """
    for run in list_runs(runs_root):
        for stage in run.stages():
            try:
                if wanted is None or wanted(run.name, stage):
                    yield stage_row_of(run.path / stage, problem)
            except UserError as error:
                problem(str(error))


def stage_row_of(folder: Path, problem: Callable[[str], None] = warn) -> Row:
    """Return the row of one stage folder, see `stage_rows`. Raises UserError where its run.json cannot be read.

    A wrong eval.json is a problem, and the row has the scores of the training only.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no run.json: it is not the folder of a stage")
    config, derived, parent = manifest.get("config") or {}, manifest.get("derived") or {}, manifest.get("parent")
    row: Row = {"run": folder.parent.name, "stage": folder.name, "status": manifest.get("status", "finished")}
    seed = config.get("seed")
    row |= {
        "seed": seed if isinstance(seed, int) else None,
        "parent": "/".join(Path(parent).parts[-3:-1]) if parent else None,
    }
    row |= {name: manifest.get(name) for name in FACTS[len(row) :]}
    scores: dict[str, Any] = {}
    try:
        scores = read_scores(folder)
    except UserError as wrong:
        problem(str(wrong))
    for name, (score, error) in final_metrics(manifest | {"eval": scores}).items():
        row[name] = score
        if error is not None:
            row[f"{name}_stderr"] = error
    counts = {name: f"{one['tokens']} tokens" for name, one in scores.get("scored", {}).items() if "tokens" in one}
    counts |= {task: f"{one['n']} items" for task, one in scores.get("chat", {}).items() if one.get("n") is not None}
    row[EVALUATED] = {name: counts.get(name) for name in evaluated_metrics({"eval": scores})}
    start = (manifest.get("parents") or {}).get("init_from") or {}
    row[TOKENIZER] = None if start.get("weights") else start.get("tokenizer")
    depth = derived.get("depth", (config.get("model") or {}).get("depth"))
    times = (manifest.get(name) for name in ("started", "finished", "commit"))
    return row | dict(zip(ORIGIN, (depth, derived.get("params_total"), *times, str(folder), config), strict=True))


def runs_named(root: str | Path, text: str, stages: Collection[str] = ()) -> list[str]:
    """Return the runs that a text names, separated by commas: each a run, a pattern (`base-*`), or a sweep.

    The name of a sweep is what its runs begin with: `base` for `base-seed=1`, `base-seed=2`. Only runs count that have
    one of `stages`, or, without them, any that trains a model: the tokenizer of `base` may lie in a run of that name.
    Raises UserError for a part that no run matches.
    """

    def counts(stage: str) -> bool:
        return stage in stages if stages else row_or_stranger(stage).makes_model

    names = [run.name for run in list_runs(root) if any(map(counts, run.stages()))]
    found: list[str] = []
    for part in filter(None, text.split(",")):
        matched = [name for name in names if name == part] or [name for name in names if fnmatchcase(name, part)]
        matched = matched or [name for name in names if name.startswith(f"{part}-")]
        if not matched:
            known = ", ".join(names[:MOST_NAMED]) + (" ..." if len(names) > MOST_NAMED else "")
            which = f"with stage {' or '.join(stages)} " if stages else ""
            raise UserError(f"{part}: no run {which}in {root} has this name or begins so ({known or 'there is none'})")
        found += matched
    if not found:
        raise UserError(f"{text!r} names no run")
    return list(dict.fromkeys(found))


def score_names(rows: Collection[Row]) -> list[str]:
    """Return the names of all scores in rows, without those of standard errors, in order of first appearance."""
    known = (*FACTS, *ORIGIN, *GROUP, TOKENIZER, EVALUATED)
    names = dict.fromkeys(name for row in rows for name in row if name not in known)
    return [name for name in names if not name.endswith("_stderr")]


def is_share(name: str, rows: Collection[Row]) -> bool:
    """Say whether a score is a share of items: a task of the data, or what has a standard error and is from 0 to 1."""
    single = [row for one in rows for row in one.get("members", [one])]
    tasks = (setting(row["config"], "data.tasks") or {} for row in single)
    if name.startswith("lm_eval/"):
        return "/acc" in name or "/exact_match" in name  # others are perplexities and the like
    if name.startswith("pass@") or any(name in t for t in tasks):
        return True
    values = [row[name] for row in single if row.get(name) is not None]
    is_mean = name not in NO_SHARES and any(f"{name}_stderr" in row for row in single)
    return is_mean and not any(number < 0 or number > 1 for number in values)


def way_of(row: Row, score: str) -> tuple[str, str | None]:
    """Return how a score of a row was measured: by whom, and on how many tokens or items (None = unknown)."""
    if score in row[EVALUATED]:
        return "evaluate.py", row[EVALUATED][score]
    is_task = score in (setting(row["config"], "data.tasks") or {}) or score == "chatcore"
    key, unit = ("chat_max_per_task", "items") if is_task else ("eval_tokens", "tokens")
    stage = row["config"].get("stage") or {}
    known = key in stage and (is_task or score.startswith("bpb"))
    return "the training", f"{stage[key] or 'all'} {unit}" if known else None


def unlike(ways: Iterable[tuple[str, str | None]]) -> str | None:
    """Say that scores were not measured in one way (see `way_of`); None where they were, as far as it is known."""
    found = list(dict.fromkeys(ways))
    if len({who for who, _ in found}) == 1 and len({count for _, count in found} - {None}) < 2:
        return None
    return " and ".join(f"by {who}" + ("" if count is None else f" on {count}") for who, count in found[:2])


def setting(config: Any, key: str) -> Any:
    """Return the value of a dotted key in a nested configuration; None where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def settings(row: Row) -> dict[str, Any]:
    """Return what decides the result of a stage as {dotted key: value}, without the seed.

    Keys that the stage does not read, or that only say how it is executed or watched, are left out. So is what is off
    (null, false, empty; of `BEFORE_KEYS` only the value there): a run that is older than such a key is equal to one
    that leaves it off. Other seeds are
    replaced by a star: the one in the name of a parent (`init_from=demo-seed=3/pretrain`), and `data.shuffle`.
    """
    kept = {}
    for key, value in flatten(row["config"]).items():
        off = value == BEFORE_KEYS[key] if key in BEFORE_KEYS else value is False or value in (None, {}, [])
        if not off and key != "seed" and not _is_neutral(key, row["stage"]):
            kept[key] = SEED.sub("seed=*", value) if key == "init_from" else "*" if key == "data.shuffle" else value
            kept[key] = "null" if value is None else kept[key]  # of `BEFORE_KEYS`; None stands for an absent key
    return kept


def settings_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the `settings` of rows. Those that start from a tokenizer which one of them names have one `init_from`.

    So a second seed, which names the tokenizer of the first, differs from it in nothing.
    """
    each, names = [settings(row) for row in rows], {}
    for row, kept in zip(rows, each, strict=True):
        if row[TOKENIZER] and "init_from" in kept:
            names.setdefault(row[TOKENIZER], kept["init_from"])
    for row, kept in zip(rows, each, strict=True):
        if row[TOKENIZER] in names:
            kept["init_from"] = names[row[TOKENIZER]]
    return each


@lru_cache(maxsize=1 << 16)
def _is_neutral(key: str, stage: str) -> bool:
    return any(covers(pattern, key) for pattern in neutral_keys(stage))
