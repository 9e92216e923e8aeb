"""Sweeps (-m): what a job is called, and which run it belongs to.

A sweep over stages is a pipeline within one run. A sweep over anything else compares settings, so each of its jobs
needs a run of its own: `-m experiment=demo stage=pretrain model=d2,d4` trains demo-d2 and demo-d4.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.cli.options import group_options, listed
from llm.config.stages import row_or_stranger, stage_row
from llm.errors import UserError
from llm.run.stage_folder import RunDir, stage_before


def values_of(override: Any) -> list[Any]:
    """Return the values of a parsed override: one, or all of a sweep; of an interval its two ends."""
    if override.is_interval_sweep():
        return [override.value().start, override.value().end]
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


def lines_of(override: Any) -> list[str]:
    """Return a parsed override as a line of text, once for every value of a sweep."""
    if not override.is_sweep_override():
        return [override.input_line]
    return [f"{override.get_key_element()}={text}" for text in override.sweep_string_iterator()]


def expand_glob(line: str, override: Any, groups: Mapping[str, Any], folders: Sequence[Path]) -> str:
    """Return a setting with `choice(<options>)` in the place of `glob(<pattern>)`; any other `line` as it is.

    override: the parsed line. Options that begin with an underscore are no choice, which Hydra would not know.
    Raises UserError where the key is no group, and where no option matches.
    """
    from hydra.core.override_parser.types import Glob

    pattern = override.value()
    if not isinstance(pattern, Glob):
        return line
    group = override.key_or_group
    if group not in groups:
        raise UserError(f"{line}: glob chooses among the options of a group; write the values: {group}=<one>,<two>")
    options = group_options(group, folders)
    if names := [str(name) for name in pattern.filter(options)]:
        return f"{override.get_key_element()}=choice({','.join(names)})"
    raise UserError(f"{line}: no option of {group} is like this (options: {listed(options)})")


def sweep_params(params: Any) -> list[str]:
    """Return `hydra.sweeper.params` as settings of a command line. Raises UserError where a key is cut at its dots."""
    for name, value in (params or {}).items():
        if isinstance(value, Mapping):
            raise UserError(
                f"hydra.sweeper.params.{name}: write dotted keys inside braces, as in "
                f"'hydra.sweeper.params={{{name}.{next(iter(value), '<key>')}: \"choice(1,2)\"}}'"
            )
    return [f"{name}={value}" for name, value in (params or {}).items()]


def check_sweep_kinds(overrides: Sequence[Any], sweeper: str) -> None:
    """Raise UserError for an interval that Hydra's own sweeper cannot list, and for stages in any other's order."""
    for override in overrides:
        if sweeper == "basic" and override.is_interval_sweep():
            raise UserError(
                f"{override.input_line}: an interval needs a search: add hydra/sweeper=optuna objective=<column>, or "
                f"list values: {override.key_or_group}=<one>,<two>"
            )
        if sweeper != "basic" and override.key_or_group == "stage" and override.is_sweep_override():
            raise UserError(
                f"hydra/sweeper={sweeper} takes values in an order of its own, but stages follow each other: "
                "give one stage"
            )


def job_title(swept: Sequence[Any], lines: Sequence[str], number: int) -> str:
    """Return `job 2 of 5: stage=pretrain`: a job's place in the sweep over the overrides `swept`, and its values.

    Nothing is said of how many there are where a value comes of an interval.
    """
    if any(override.is_interval_sweep() for override in swept):
        return f"job {number + 1}: {' '.join(lines)}"
    total = 1
    for override in swept:
        total *= len(values_of(override))
    return f"job {number + 1} of {total}: {' '.join(lines)}"


def best_of_search(folder: str) -> str:
    """Return a line with the best trial of a search, of which the sweeper writes a file into `folder`."""
    from omegaconf import OmegaConf

    file = Path(folder) / "optimization_results.yaml"
    found = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    if "best_value" not in found:
        return "search finished"
    values = " ".join(f"{name}={value}" for name, value in found["best_params"].items())
    return f"\nbest of the search: {found['best_value']:.6g} with {values}"


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
    base = run_of(cfg)
    own = RunDir(cfg.paths.runs, "-".join([base.name, *parts]))
    cfg.run = own.name
    before = stage_before(cfg)
    if cfg.init_from is None and before and before not in own.finished() and before in base.finished():
        cfg.init_from = f"{base.name}/{before}"


def run_of(cfg: Any) -> RunDir:
    """Return the run that a job works on, named after the depth where no name is given."""
    return RunDir(cfg.paths.runs, cfg.run or f"d{cfg.model.depth}")


def follow_sweep(cfg: Any, stages: Sequence[str]) -> None:
    """Let the stage of a job start from one that a sweep over `stages` trains, where the usual one is not there.

    So `stage=tokenizer,pretrain,sft` finetunes what it has pretrained. Changes `cfg.init_from`. Raises UserError for a
    stage of the sweep that none of its parents comes before, already in the first job.
    """
    if not stages or cfg.init_from is not None:
        return
    run = run_of(cfg)
    for place, name in enumerate(stages[1:], start=1):  # the first one says by itself what it lacks
        row, there = row_or_stranger(name), {*run.finished(), *stages[:place]}
        if row.in_run and row.parents and not there & {*row.parents}:
            raise UserError(
                f"stage={','.join(stages)}: {name} starts from {' or '.join(row.parents)}, which neither comes before "
                f"it nor is finished in run={run.name}: add it to the list, or give {name} a command of its own with "
                "init_from=<run>/<stage>"
            )
    before, there = stage_before(cfg), {*run.finished(), *stages}
    others = [name for name in stage_row(cfg.stage.name).parents if name in there]
    if before is not None and before not in there and others:
        cfg.init_from = f"{run.name}/{others[0]}"


def _short(name: str, value: str) -> str:
    """Return a part of a run's name: the option of a group, or the last part of a key with its value."""
    text = value if "." not in name and not re.fullmatch(r"[-+.\d]+.*", value) else f"{name.rpartition('.')[2]}={value}"
    return re.sub(r"[^\w.+=-]+", "_", text)
