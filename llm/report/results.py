"""One meaning for every number of a report: what tables write is what plots draw.

A column measured on held-out data counts where the weights that a stage hands over were reached: its last row, or the
best one with `keep_best`. A column of training batches is noisy: it counts smoothed, at its end. What `evaluate.py`
measured of the finished model comes before both.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from llm.config.stages import row_or_stranger
from llm.utils.format import markdown_table, percent, value

Rows = Sequence[dict[str, float]]
Metrics = dict[str, tuple[float, float | None]]  # metric -> (value, standard error or None)

# Columns of metrics.csv that say how the training ran, not how good the model is.
PROGRESS_KEYS = frozenset("lr tok_per_s ms_per_step mfu data_wait tokens flops seconds train_seconds".split())
HELD_OUT = ("bpb", "chat/", "chatcore", "core", "pass@", "preference/")  # beginnings of columns of held-out data
SHARES = ("pass@", "preference/accuracy", "preference/win_rate")  # beginnings of metrics shown in percent
FEW, PART = 20, 12  # fewer values are not smoothed; a mean reaches over this part of them to each side
BOUNDS = ("_low", "_high")  # of a 95 % interval around a metric
# Names of public tasks and of measures as papers write them, in the order of the table of results.
TITLES = {
    "core": "CORE",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
}
BEHIND = {
    "chatcore": "ChatCORE",
    "preference/accuracy": "pairs told apart",
    "preference/win_rate": "wins by rule",
    "preference/win_rate_judge": "wins by judge",
    "preference/win_rate_judge_lc": "wins by judge, equal length",
    "bpb": "bits per byte, chats",
    "bpb_text": "bits per byte, text",
    "preference/margin": "margin of pairs",
    "preference/rule": "mean score by rule",
}


def is_held_out(column: str) -> bool:
    """Return whether a column of metrics.csv is measured on held-out data, not on batches of the training."""
    return column.startswith(HELD_OUT)


def curve(rows: Rows, column: str) -> list[tuple[float, float]]:
    """Return the points (step, value) of a column as they are drawn; those of training batches are smoothed."""
    points = [(row["step"], row[column]) for row in rows if column in row]
    window = _window(column, len(points))
    means = smoothed([number for _, number in points], window) if window else [number for _, number in points]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def _window(column: str, count: int) -> int:
    """Return how many values to each side a point of a column stands for; 0 = it is not smoothed."""
    return 0 if is_held_out(column) or count < FEW else count // PART


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the moving average over `window` values to each side, so that it does not lag.

    Narrow at the start, where curves are steep, one-sided at the end, where they are flat and one value is noise.
    """
    sums, result = [0.0, *accumulate(values)], []  # metrics.csv may have a million rows
    for i in range(len(values)):
        reach = min(window, i)
        first, behind = i - reach, min(i + reach + 1, len(values))
        result.append((sums[behind] - sums[first]) / (behind - first))
    return result


def trained_metrics(facts: dict[str, Any]) -> dict[str, float]:
    """Return {metric: value} of a stage from its own training; tasks are named as in eval.json (`choice`)."""
    rows, handed = facts.get("rows") or [], (facts.get("weights") or {}).get("step")
    found = {key: number for key, number in (facts.get("metrics") or {}).items() if isinstance(number, int | float)}
    chosen = next((row for row in rows if row.get("step") == handed), {})
    for column in dict.fromkeys(key for row in rows for key in row if key != "step"):
        if is_held_out(column) and (column in chosen or column in found):
            found[column] = chosen.get(column, found.get(column))
        else:
            values = [row[column] for row in rows if column in row]
            last = values[-1 - _window(column, len(values)) :]
            found[column] = sum(last) / len(last)
    return {key.removeprefix("chat/"): number for key, number in found.items() if key not in PROGRESS_KEYS}


def evaluated_metrics(facts: dict[str, Any]) -> Metrics:
    """Return the metrics of eval.json, with their standard errors; named like those of `trained_metrics`."""
    scores = facts.get("eval") or {}
    found: Metrics = {key: (number, None) for key, number in scores.items() if isinstance(number, int | float)}
    for task, result in (scores.get("chat") or {}).items():
        found[task] = (result["accuracy"], result.get("stderr"))
    own = {key: number for key, number in (scores.get("preferences") or {}).items() if key != "n"}
    found |= {f"preference/{key}": (number, None) for key, number in own.items()}
    for judge, result in (scores.get("judges") or {}).items():
        numbers = {metric: number for metric, number in result.items() if isinstance(number, int | float)}
        found |= {f"judges/{judge}/{metric}": (number, None) for metric, number in numbers.items()}
    for task, result in (scores.get("lm_eval") or {}).items():
        for metric, number in result.items():
            is_number = isinstance(number, int | float)
            if is_number and metric not in ("n", "shots") and not metric.endswith("_stderr"):
                error = result.get(f"{metric}_stderr")  # lm-eval writes a text where there is none
                found[f"lm_eval/{task}/{metric}"] = (number, error if isinstance(error, int | float) else None)
    return found


def final_metrics(facts: dict[str, Any]) -> Metrics:
    """Return {metric: (value, standard error or None)} of a stage, as tables write and plots draw them.

    facts: its run.json with "eval" (eval.json) and "rows" (metrics.csv). Speed and progress are left out.
    """
    found = {key: (number, None) for key, number in trained_metrics(facts).items()} | evaluated_metrics(facts)
    found.pop("seq_len", None)
    for key in [key for key in found if key.endswith("_stderr") and key.removesuffix("_stderr") in found]:
        error = found.pop(key)[0]
        found[key.removesuffix("_stderr")] = (found[key.removesuffix("_stderr")][0], error)
    return found


def results_of(stage: str, facts: dict[str, Any]) -> Metrics:
    """Return the final metrics of a stage for a table over stages: bits per byte of text are apart from those of chats.

    Names as `final_metrics` has them, but what a stage that trains on text calls `bpb` is `bpb_text`. stage: its name,
    or <run>/<stage>.
    """
    found = final_metrics(facts)
    if row_or_stranger(stage.rpartition("/")[2]).kind == "text" and "bpb" in found:
        found["bpb_text"] = found.pop("bpb")
    return found


def task_names(stages: Iterable[dict[str, Any]]) -> list[str]:
    """Return all task names in the stages' results: public ones as papers list them, then by first appearance."""
    names: dict[str, None] = {}
    for facts in stages:
        in_rows = (key for row in facts.get("rows") or [] for key in row)
        columns = dict.fromkeys([*(facts.get("metrics") or {}), *in_rows])
        in_metrics = (key.removeprefix("chat/") for key in columns if key.startswith("chat/"))
        names.update(dict.fromkeys([*in_metrics, *((facts.get("eval") or {}).get("chat") or {})]))
    return [name for name in (*TITLES, *(name for name in names if name not in TITLES)) if name in names]


def is_share(metric: str, tasks: Iterable[str]) -> bool:
    """Return whether a metric is written in percent. tasks: names of the tasks among the metrics."""
    return metric in tasks or metric.startswith(SHARES)


def plain(number: float | None, error: float | None = None) -> str:
    """Return a number that is no share as tables and plots write it: four decimals, from 1,000 on none."""
    return value(number, error, digits=0 if abs(number or 0) >= 1000 else 4)


def shown(metric: str, metrics: Metrics, tasks: Iterable[str]) -> str:
    """Return a metric as every part of a report writes it: shares in percent, errors behind ±, "-" where it is none."""
    number, error = metrics.get(metric, (None, None))
    form = percent if is_share(metric, tasks) else plain
    text = form(number, error)
    if number is not None and all(metric + bound in metrics for bound in BOUNDS):
        low, high = (form(metrics[metric + bound][0]) for bound in BOUNDS)
        text += f" ({low.removesuffix(' %')} to {high.removesuffix(' %')})"
    return text


def results_table(stages: dict[str, dict[str, Any]]) -> str:
    """Return the table of what was measured on held-out data: benchmarks down, CORE first, stages across."""
    metrics, tasks = _columns(stages), task_names(stages.values())
    found = dict.fromkeys(key for column in metrics.values() for key in column if _is_result(key, tasks))
    passes = sorted((key for key in found if key.startswith("pass@")), key=lambda key: (len(key), key))
    own = [key for key in tasks if key not in TITLES]
    rest = [key for key in found if key not in {*TITLES, *own, *passes, *BEHIND}]
    order = [key for key in (*TITLES, *own, *passes, *BEHIND, *rest) if key in found]
    return _table("benchmark", order, {name: own for name, own in metrics.items() if found.keys() & own.keys()}, tasks)


def training_table(stages: dict[str, dict[str, Any]]) -> str:
    """Return the table of what was measured on the batches of the training: the loss first, stages across."""
    metrics, tasks = _columns(stages), task_names(stages.values())
    for stage, column in metrics.items():  # the loss of pairs or of answers cannot be compared with that of tokens
        renamed = {key: f"{key}, of its own kind" for key in row_or_stranger(stage).no_curves}
        metrics[stage] = {renamed.get(key, key): pair for key, pair in column.items()}
    found = dict.fromkeys(key for column in metrics.values() for key in column if not _is_result(key, tasks))
    order = sorted((key for key in found if not key.endswith(BOUNDS)), key=lambda key: not key.startswith("loss"))
    return _table("metric", order, metrics, tasks)


def _columns(stages: dict[str, dict[str, Any]]) -> dict[str, Metrics]:
    columns = {stage: results_of(stage, facts) for stage, facts in stages.items()}
    return {stage: metrics for stage, metrics in columns.items() if metrics}


def _is_result(metric: str, tasks: Sequence[str]) -> bool:
    if metric.startswith("core/") or metric.endswith(BOUNDS):  # details: core.csv has them, and a cell
        return False
    return metric in tasks or is_held_out(metric) or metric.startswith(("lm_eval/", "judges/"))


def _table(title: str, order: Sequence[str], columns: dict[str, Metrics], tasks: Sequence[str]) -> str:
    names = TITLES | BEHIND
    rows = [[names.get(key, key), *(shown(key, metrics, tasks) for metrics in columns.values())] for key in order]
    if not rows:
        return "Nothing has been measured yet."
    return markdown_table([title, *columns], rows, numeric=range(1, len(columns) + 1))
