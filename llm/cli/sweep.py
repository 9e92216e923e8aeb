"""Sweeps (-m): what a job is called, and which run it belongs to.

A sweep over stages is a pipeline within one run. A sweep over anything else compares settings, so each of its jobs
needs a run of its own: `-m experiment=demo stage=pretrain model=d2,d4` trains demo-d2 and demo-d4.
"""

import re
from collections.abc import Sequence
from typing import Any

from llm.config.stages import row_or_stranger
from llm.run.stage_folder import RunDir, stage_before


def job_title(swept: Sequence[Any], lines: Sequence[str], number: int) -> str:
    """Return `job 2 of 5: stage=pretrain`: a job's place in the sweep over the overrides `swept`, and its values."""
    total = 1
    for override in swept:
        total *= len(list(override.sweep_iterator()))
    return f"job {number + 1} of {total}: {' '.join(lines)}"


def separate_run(cfg: Any, lines: Sequence[str]) -> None:
    """Name the job's run after its values in the sweep (`lines`), unless the run is swept or its name tells already.

    A stage that makes no run keeps the name, as that of the run whose tokenizer it takes.
    Where the new run lacks the stage before, the job starts from that of the run without the added values, so that a
    sweep can share one tokenizer. Changes `cfg.run` and `cfg.init_from`.
    """
    values = dict(line.split("=", 1) for line in lines)
    told = {"stage", "run"} | ({"model"} if cfg.run is None else set())
    parts = [_short(name, value) for name, value in values.items() if name not in told]
    if "run" in values or not parts or not row_or_stranger(cfg.stage.name).in_run:
        return
    base = RunDir(cfg.paths.runs, cfg.run or f"d{cfg.model.depth}")
    own = RunDir(cfg.paths.runs, "-".join([base.name, *parts]))
    cfg.run = own.name
    before = stage_before(cfg)
    if cfg.init_from is None and before and before not in own.finished() and before in base.finished():
        cfg.init_from = f"{base.name}/{before}"


def _short(name: str, value: str) -> str:
    """Return a part of a run's name: the option of a group, or the last part of a key with its value."""
    text = value if "." not in name and not re.fullmatch(r"[-+.\d]+.*", value) else f"{name.rpartition('.')[2]}={value}"
    return re.sub(r"[^\w.+=-]+", "_", text)
