"""The reader of runs: a row for every stage of every run in a folder.

Small files only, run.json and eval.json; no learning curves, and neither torch nor pandas.
"""

import re
import sys
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.report.report import final_metrics
from llm.run.config_diff import BEFORE_KEYS, covers, flatten, neutral_keys
from llm.run.formats import read_scores
from llm.run.stage_folder import list_runs, read_manifest

FACTS = ("run", "stage", "status", "seed", "parent", "steps", "tokens", "flops", "seconds")  # first columns of a row
ORIGIN = ("depth", "params", "started", "finished", "commit", "folder", "config")  # the last ones
SEED = re.compile(r"\bseed=\d+")  # in the name of a run that a sweep has made

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
    was saved. A fact that a stage lacks is None, a score that it lacks is no key.

    wanted: takes (run, stage) and says whether to read this stage. problem: is called with a line for each stage whose
    files cannot be read; such a stage has no row.
    """
    for run in list_runs(runs_root):
        for stage in run.stages():
            folder = run.path / stage
            try:
                if wanted is None or wanted(run.name, stage):
                    yield stage_row_of(folder)
            except UserError as error:
                problem(str(error))


def stage_row_of(folder: Path) -> Row:
    """Return the row of one stage folder, see `stage_rows`. Raises UserError where its files cannot be read."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no run.json: it is not the folder of a stage")
    config, derived, parent = manifest.get("config") or {}, manifest.get("derived") or {}, manifest.get("parent")
    row: Row = {"run": folder.parent.name, "stage": folder.name, "status": manifest.get("status", "finished")}
    row |= {"seed": config.get("seed"), "parent": "/".join(Path(parent).parts[-3:-1]) if parent else None}
    row |= {name: manifest.get(name) for name in FACTS[len(row) :]}
    for name, (score, error) in final_metrics(manifest | {"eval": read_scores(folder)}).items():
        row[name] = score
        if error is not None:
            row[f"{name}_stderr"] = error
    depth = derived.get("depth", (config.get("model") or {}).get("depth"))
    times = (manifest.get(name) for name in ("started", "finished", "commit"))
    return row | dict(zip(ORIGIN, (depth, derived.get("params_total"), *times, str(folder), config), strict=True))


def score_names(rows: Collection[Row]) -> list[str]:
    """Return the names of all scores in rows, without those of standard errors, in order of first appearance."""
    names = dict.fromkeys(name for row in rows for name in row if name not in FACTS and name not in ORIGIN)
    return [name for name in names if not name.endswith("_stderr")]


def settings(row: Row) -> dict[str, Any]:
    """Return what decides the result of a stage as {dotted key: value}, without the seed.

    Keys that the stage does not read, or that only say how it is executed or watched, are left out. So is what is off
    (null, false, empty): a run that is older than such a key is equal to one that leaves it off. The seed in the name
    of a parent (`init_from=demo-seed=3/pretrain`) is left out too.
    """
    kept = {}
    for key, value in flatten(row["config"]).items():
        off = value is False or value in (None, {}, []) or value == BEFORE_KEYS.get(key)
        if not off and key != "seed" and not _is_neutral(key, row["stage"]):
            kept[key] = SEED.sub("seed=*", value) if key == "init_from" else value
    return kept


@lru_cache(maxsize=1 << 16)
def _is_neutral(key: str, stage: str) -> bool:
    return any(covers(pattern, key) for pattern in neutral_keys(stage))
