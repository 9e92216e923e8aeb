"""The two sides of a comparison: which runs they are, whether they may be compared, and in what they differ."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm.config.stages import row_or_stranger
from llm.errors import UserError
from llm.experiments.curves import Curve, read_curve
from llm.experiments.runs import MOST_NAMED, Row, runs_named, settings_of, stage_row_of, unlike
from llm.run.config_diff import NEUTRAL_KEYS, covers, flatten
from llm.run.stage_folder import RunDir, read_manifest

# Keys that say what tasks are measured on; for bits per byte `stage.eval_tokens` and the held-out text do.
MEASURED_BY = ("data.tasks", "data.rl", "stage.task", "stage.chat_max_per_task", "stage.core_*")
NOT_MEASURED = (*(pattern for pattern in NEUTRAL_KEYS if pattern.startswith("data.")), "data.shuffle", "data.packing")


@dataclass(frozen=True)
class Side:
    """Runs of one configuration with different seeds. left_out: (run, why) of those that cannot be compared."""

    name: str
    stage: str
    rows: list[Row]
    curves: list[Curve]
    left_out: list[tuple[str, str]] = field(default_factory=list)


def load_side(root: str | Path, text: str, stage: str, metric: str) -> Side:
    """Read the runs that `text` names (see `runs_named`), with the curves of a metric.

    Raises UserError where there is none, where they differ in more than the seed, and where a seed is there twice.
    """
    rows = [stage_row_of(RunDir(root, run).path / stage) for run in runs_named(root, text, [stage])]
    _check_one_configuration(text, rows)
    curves, left_out = [], []
    for row in rows:
        curve = read_curve(row, metric)
        if (reason := _why_not(row, curve, metric)) is None:
            curves.append(curve)
        else:
            left_out.append((row["run"], reason))
    seeds = [curve.seed for curve in curves if curve.seed is not None]
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if twice is not None:
        names = " and ".join(curve.run for curve in curves if curve.seed == twice)
        raise UserError(f"{text}: {names} have the same seed {twice}; give each seed once")
    return Side(text, stage, rows, curves, left_out)


def common_stage(root: str | Path, texts: Sequence[str]) -> str:
    """Return the last stage in the pipeline that all named runs have. Raises UserError where there is none."""
    each = [RunDir(root, name).stages() for text in texts for name in runs_named(root, text)]
    shared = [stage for stage in each[0] if row_or_stranger(stage).makes_model and all(stage in one for one in each)]
    if not shared:
        raise UserError(f"{' and '.join(texts)}: the runs have no stage in common; name one with --stage")
    return shared[-1]


def _check_one_configuration(text: str, rows: Sequence[Row]) -> None:
    first, *others = settings_of(rows)
    for row, other in zip(rows[1:], others, strict=True):
        differing = changed(first, other)
        if differing:
            keys = ", ".join(list(differing)[:MOST_NAMED])
            raise UserError(
                f"{text}: {rows[0]['run']} and {row['run']} differ in {keys}; one side may differ in the seed only: "
                "name its runs by a narrower pattern"
            )


def _why_not(row: Row, curve: Curve, metric: str) -> str | None:
    """Say why a run cannot be compared; None if it can."""
    reached = f" at step {curve.steps[-1]}" if curve.steps else ""
    if row["status"] != "finished":
        return f"{row['status']}{reached}"
    if not curve.steps:
        return f"no {metric} was measured"
    wrong = [step for step, number in zip(curve.steps, curve.values, strict=True) if not abs(number) < float("inf")]
    return f"{metric} is no number at step {wrong[0]}" if wrong else None


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {key: (before, after)} of what differs in two flat mappings; None stands for an absent key."""
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def differences(a: Side, b: Side) -> dict[str, tuple[Any, Any]]:
    """Return {key: (of A, of B)}: the commits and settings in which the sides differ, beside the seed."""
    commits = [sorted({(row["commit"] or "unknown")[:10] for row in side.rows}) for side in (a, b)]
    shown = tuple(", ".join(names) for names in commits)
    return ({"commit": shown} if shown[0] != shown[1] else {}) | changed(*settings_of([a.rows[0], b.rows[0]]))


def incomparable(a: Side, b: Side, metric: str) -> list[str]:
    """Return why numbers of the metric were not measured on the same things, a reason each; [] if they were.

    What an old run does not say counts as equal, but for the held-out text: settings of the data stand for that.
    """
    facts = [read_manifest(row["folder"]) or {} for side in (a, b) for row in side.rows]
    tokenizers = [((fact.get("parents") or {}).get("init_from") or {}).get("tokenizer") for fact in facts]
    reasons = [_several("tokenizer", tokenizers)]
    patterns: tuple[str, ...] = MEASURED_BY
    if metric.startswith("bpb") or metric.endswith("loss"):
        texts = [(fact.get("data") or {}).get("held_out_text") for fact in facts]
        reasons.append(_several("held-out text", texts))
        patterns = ("stage.eval_tokens",) if all(texts) else ("stage.eval_tokens", "data")
    ways = unlike(curve.way or ("the training", None) for side in (a, b) for curve in side.curves)
    reasons.append(ways and f"it was measured {ways}")
    configs = [flatten(row["config"]) for side in (a, b) for row in side.rows]
    for key in sorted({key for config in configs for key in config}):
        before, *others = (config[key] for config in configs if key in config)
        after = next((value for value in others if value != before), before)
        if after != before and any(covers(pattern, key) for pattern in patterns):
            if not any(covers(pattern, key) for pattern in NOT_MEASURED):
                reasons.append(f"{key} is {before} and {after}")
    return [reason for reason in reasons if reason]


def _several(name: str, fingerprints: Sequence[str | None]) -> str | None:
    """Say that fingerprints differ; None where those that are known agree."""
    found = list(dict.fromkeys(filter(None, fingerprints)))
    return f"the {name} differs ({' and '.join(text[:8] for text in found[:2])})" if len(found) > 1 else None


def machines(sides: Iterable[Side]) -> set[str]:
    """Return the machines on which the runs were made, in words."""
    found = set()
    for row in (row for side in sides for row in side.rows):
        place = (read_manifest(row["folder"]) or {}).get("environment") or {}
        gpus = [gpu["name"] for gpu in place.get("gpus") or []]
        found.add(" ".join(filter(None, [place.get("cpu"), f"{place.get('cpu_threads')} threads", *gpus])))
    return found
