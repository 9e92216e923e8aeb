"""The stages of a run beside each other: what each method gained over the stage that it began with, and what it cost.

Differences are to the parent: to its own evaluation for scores of an evaluation, else to what the stage itself measured
before its first step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.config.stages import row_or_stranger
from llm.report.plots import COLOURS, draw_bars
from llm.report.results import BEHIND, TITLES, Metrics, is_share
from llm.utils.format import duration, markdown_table, percent, value

POST_TRAINING = ("rl", "preference")  # kinds of stages
UNDRAWN = ("bpb", "preference/margin", "preference/rule")
DRAWN = ("pass@1", *(name for name in BEHIND if name not in UNDRAWN))


@dataclass(frozen=True)
class Method:
    """A stage in the comparison: its facts (run.json and more, as the report reads them), metrics, and its parent's."""

    name: str
    facts: Mapping[str, Any]
    metrics: Metrics
    before: Mapping[str, float]

    @property
    def label(self) -> str:
        """Return the name of the stage with the loss and the advantage that were chosen, where it has such keys."""
        stage = (self.facts.get("config") or {}).get("stage") or {}
        chosen = [str(stage[key]) for key in ("loss", "advantage", "divergence") if stage.get(key)]
        return f"{self.name} ({', '.join(chosen)})" if chosen and chosen != [self.name] else self.name

    def cell(self, metric: str, is_share: bool) -> str:
        """Return a value with its difference to the parent's, as in `68.3 % (+22.9)`; "-" where it is not known."""
        if metric not in self.metrics:
            return "-"
        number = self.metrics[metric][0]
        shown = percent(number) if is_share else value(number)
        if metric not in self.before:
            return shown
        difference = number - self.before[metric]
        return f"{shown} ({100 * difference:+.1f})" if is_share else f"{shown} ({difference:+.4f})"


def methods_of(folder: Path, stages: Mapping[str, dict], metrics: Mapping[str, Metrics]) -> list[Method]:
    """Return the stages of a run that can be compared; none where no stage follows finetuning.

    stages: {stage: its run.json with its "eval" and "rows"}; metrics: what `results_of` gives for each of them.
    """
    if not any(row_or_stranger(name).kind in POST_TRAINING for name in stages):
        return []
    return [
        Method(name, facts, metrics[name], _before(folder, name, facts, stages, metrics))
        for name, facts in stages.items()
    ]


def _before(folder: Path, name: str, facts: Mapping, stages: Mapping, metrics: Mapping[str, Metrics]) -> dict:
    """Return the parent's values of the metrics of a stage behind finetuning: evaluated ones as it was evaluated."""
    if row_or_stranger(name).kind not in POST_TRAINING:
        return {}
    parts = Path(facts.get("parent") or "").parts
    parent = parts[-2] if len(parts) > 2 and parts[-3] == folder.name and parts[-2] in stages else None
    known = {key: pair[0] for key, pair in metrics.get(parent, {}).items()}
    rows, scores = facts.get("rows") or [], facts.get("eval") or {}
    first = rows[0] if rows and rows[0].get("step") == 0 else {}
    own = {key.removeprefix("chat/"): number for key, number in first.items()}
    evaluated = {*scores, *(scores.get("chat") or {})}
    return known | {key: number for key, number in own.items() if key not in evaluated or key not in known}


def methods_table(methods: Sequence[Method], tasks: Sequence[str]) -> str:
    """Return a table with a column for each stage: its steps and time, scores and their differences.

    tasks: names of the tasks among the metrics.
    """
    found = dict.fromkeys(key for method in methods for key in method.metrics)
    passes = sorted((key for key in found if key.startswith("pass@")), key=lambda key: (len(key), key))
    shown = [key for key in (*passes, *tasks, *BEHIND) if key in found]
    facts = [method.facts for method in methods]
    rows = [["steps", *(value(one.get("steps")) for one in facts)]]
    rows += [["time", *(duration(one.get("seconds")) for one in facts)]]
    names = TITLES | BEHIND
    rows += [[names.get(key, key), *(method.cell(key, is_share(key, tasks)) for method in methods)] for key in shown]
    return markdown_table(["measure", *(method.label for method in methods)], rows, numeric=range(1, len(methods) + 1))


def draw_methods(path: Path, run: str, methods: Sequence[Method], redraw: bool = True) -> Path | None:
    """Draw a panel of bars for every measure that a stage has, a bar for each stage, with a line at its parent's value.

    Returns `path`, None where there is nothing to draw. redraw=False keeps a figure that exists.
    """
    panels = {}
    for key in DRAWN:
        scale = 1.0 if key in ("chatcore", "bpb_text") else 100.0
        bars = [
            (m.name, m.metrics[key][0] * scale, m.before[key] * scale if key in m.before else None, COLOURS[i % 8])
            for i, m in enumerate(methods)
            if key in m.metrics
        ]
        if bars:
            panels[BEHIND.get(key, key) + ("" if scale == 1 else " (%)")] = bars
    if not panels:
        path.unlink(missing_ok=True)
        return None
    if redraw or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_bars(path, f"Methods: {run}", panels)
    return path
