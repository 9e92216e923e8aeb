"""The report of a run, `runs/<run>/report.md`, from result files, never from logs.

`python -m llm.report runs/demo` builds it anew.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm import __version__
from llm.config.stages import row_or_stranger
from llm.data.balance import table_column, total, warnings_of
from llm.errors import UserError
from llm.report.methods import draw_methods, methods_of, methods_table
from llm.report.rollouts_page import write_page
from llm.run.best_score import best_line
from llm.run.config_diff import flatten
from llm.run.formats import read_scores
from llm.run.stage_folder import RunDir, read_manifest, read_metrics, saved_plugins, stages_in
from llm.tokenizer.chat_format import readable
from llm.utils.addresses import without_secrets
from llm.utils.environment import environment
from llm.utils.files import write_atomic
from llm.utils.format import amount, duration, markdown_table, percent, value

SAMPLES_PER_STAGE = 8
# Columns of metrics.csv that say how the training ran, not how good the model is.
PROGRESS_KEYS = frozenset("lr tok_per_s ms_per_step mfu data_wait tokens flops seconds train_seconds".split())


def build_report(run_dir: str | os.PathLike[str], redraw: bool = True) -> Path:
    """Write report.md and its figures anew from whatever stages exist so far; returns its path.

    A stage file that cannot be read is named in the report instead of hiding the other stages. redraw=False keeps
    figures that exist: enough where no stage has trained since. Raises UserError for a folder without a stage.
    """
    folder = Path(run_dir)
    stages, problems = read_stages(folder)
    if not stages and not problems:
        raise UserError(f"{folder} has no stage with a run.json: nothing to report; run a stage with train.py first")
    pages, damaged = _rollout_pages(folder, stages)
    problems += damaged
    curves = _draw(folder, stages, redraw)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [f"# Run `{folder.name}`", f"Written by Fathom {__version__} on {now}."]
    parts += [f"> **Problem:** {problem}" for problem in problems]
    parts += ["## Stages", _stage_table(stages), _total_time(stages)]
    models = {name: facts for name, facts in stages.items() if row_or_stranger(name).makes_model}
    parts += _methods(folder, models, redraw)
    parts += ["## Metrics by stage", _metrics_table(models), *_best(models), *_scored(models)]
    parts += [part for name, facts in stages.items() if name not in models for part in _compression(facts)]
    parts += _data(stages)
    parts += ["## Curves", *curves] if curves else []
    parts += ["## Rollouts", *pages] if pages else []
    parts += ["## Samples", *_samples(stages)] if any(s["eval"].get("samples") for s in stages.values()) else []
    parts += ["## Numbers of each stage", _numbers(stages)]
    parts += ["## Configuration", *_configuration(stages)]
    parts += ["## Environment", *_environment(stages)]
    write_atomic(folder / "report.md", without_secrets("\n\n".join(parts)) + "\n")
    return folder / "report.md"


def read_stages(run_dir: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return (stages, problems) of a run folder, the stages in pipeline order.

    stages: {stage: its run.json, plus "eval": its eval.json, "rows": its metrics.csv}; problems: unreadable files and
    stages whose plugin is not loaded, a line each.
    """
    stages, problems = {}, []
    for stage in stages_in(run_dir):
        folder = run_dir / stage
        try:
            manifest = read_manifest(folder) or {}
        except UserError as error:
            problems.append(str(error))
            continue
        if not row_or_stranger(stage).kind:
            plugins = ", ".join(saved_plugins(folder)) or "not named in its run.json"
            problems.append(f"{folder}: no stage of this name is known here, so it comes last; its plugins: {plugins}")
        try:
            scores = read_scores(folder)
        except UserError as error:
            problems.append(str(error))
            scores = {}
        try:
            rows = read_metrics(folder)
        except UserError as error:
            problems.append(str(error))
            rows = []
        stages[stage] = {**manifest, "eval": scores, "rows": rows}
    return stages, problems


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def _stage_table(stages: dict[str, dict]) -> str:
    header = ["stage", "status", "steps", "tokens", "FLOPs", "time", "tok/s", "started from"]
    rows = []
    for stage, facts in stages.items():
        tokens, seconds = facts.get("tokens"), facts.get("seconds")
        speed = (facts.get("metrics") or {}).get("tok_per_s")
        rows.append(
            [
                stage,
                str(facts.get("status", "")),
                value(facts.get("steps")),
                amount(tokens),
                amount(facts.get("flops")),
                duration(seconds),
                amount(speed),
                _parent_name(facts.get("parent")),
            ]
        )
    return markdown_table(header, rows, numeric=range(2, 7))


def _parent_name(parent: str | None) -> str:
    """Return `demo/pretrain` for .../demo/pretrain/model, other paths unchanged."""
    if not parent:
        return "-"
    parts = Path(parent).parts
    return f"`{'/'.join(parts[-3:-1])}`" if len(parts) >= 3 and parts[-1] == "model" else f"`{parent}`"


def _total_time(stages: dict[str, dict]) -> str:
    seconds = sum(facts.get("seconds") or 0 for facts in stages.values())
    flops = sum(facts.get("flops") or 0 for facts in stages.values())
    compute = f", total compute {amount(flops)} FLOPs" if flops else ""
    return f"Total wall-clock: **{duration(seconds)}**{compute}."


def final_metrics(facts: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return {metric: (value, standard error or None)}: of eval.json where it has the metric, else the end of training.

    Tasks are named like those of eval.json (`choice`), all else like the columns of run.json (`bpb`, `loss`, `pass@1`);
    speed and progress are left out.
    """
    merged: dict[str, tuple[float, float | None]] = {}
    for key, number in (facts.get("metrics") or {}).items():
        if isinstance(number, int | float) and key not in PROGRESS_KEYS:
            merged[key.removeprefix("chat/")] = (number, None)
    scores = facts.get("eval") or {}
    for key, number in scores.items():
        if isinstance(number, int | float):
            merged[key] = (number, None)
    for task, result in (scores.get("chat") or {}).items():
        merged[task] = (result["accuracy"], result.get("stderr"))
    for task, result in (scores.get("lm_eval") or {}).items():
        for metric, number in result.items():
            if metric not in ("n", "shots") and not metric.endswith("_stderr"):
                error = result.get(f"{metric}_stderr")  # lm-eval writes a text where there is none
                merged[f"lm_eval/{task}/{metric}"] = (number, error if isinstance(error, int | float) else None)
    return merged


def _is_share(metric: str, tasks: Iterable[str]) -> bool:
    return metric in tasks or metric.startswith(("pass@", "preference/accuracy", "preference/win_rate"))


def task_names(stages: Iterable[dict[str, Any]]) -> list[str]:
    """Return all task names in the stages' results, in order of first appearance."""
    names: dict[str, None] = {}
    for facts in stages:
        in_metrics = (key.removeprefix("chat/") for key in facts.get("metrics") or {} if key.startswith("chat/"))
        names.update(dict.fromkeys([*in_metrics, *((facts.get("eval") or {}).get("chat") or {})]))
    return list(names)


def _metrics_table(stages: dict[str, dict]) -> str:
    """Table with metrics down and stages across; shares in percent with one standard error."""
    columns = {stage: final_metrics(facts) for stage, facts in stages.items()}
    columns = {stage: metrics for stage, metrics in columns.items() if metrics}
    if not columns:
        return "Nothing has been measured yet."
    tasks = task_names(stages.values())
    known = ["loss", "bpb", "bpb_text", "reward"]
    found = list(dict.fromkeys(key for metrics in columns.values() for key in metrics))
    passes = sorted((key for key in found if key.startswith("pass@")), key=lambda key: (len(key), key))
    other = [key for key in found if key not in {*known, *tasks, *passes}]
    order = [key for key in (*known, *other, *tasks, *passes) if key in found]
    rows = []
    for metric in order:
        show = percent if _is_share(metric, tasks) else value
        rows.append([metric, *(show(*metrics.get(metric, (None, None))) for metrics in columns.values())])
    return markdown_table(["metric", *columns], rows, numeric=range(1, len(columns) + 1))


def _methods(folder: Path, stages: dict[str, dict], redraw: bool) -> list[str]:
    """Section that compares the stages where one of them follows finetuning: a table, and bars."""
    methods = methods_of(folder, stages, {name: final_metrics(facts) for name, facts in stages.items()})
    if not methods:
        return []
    figure = draw_methods(folder / "report" / "methods.png", folder.name, methods, redraw)
    shown = [] if figure is None else [f"![Methods of the run]({figure.relative_to(folder).as_posix()})"]
    note = "In brackets: the difference to the stage that it started from. A black line in the bars is that stage."
    return ["## Methods", methods_table(methods, task_names(stages.values())), note, *shown]


def _best(stages: dict[str, dict]) -> list[str]:
    """List of the stages that measured bpb: best and last value, and from which step the weights handed over are."""
    lines = {name: best_line(facts["rows"], facts.get("weights")) for name, facts in stages.items()}
    items = "\n".join(f"- **{name}** {line}" for name, line in lines.items() if line)
    return [items] if items else []


def _scored(stages: dict[str, dict]) -> list[str]:
    """Section that says on which data each score of eval.json was measured; nothing where no eval.json says so.

    Scores of data that is not the stage's own stand here only, not in the table of metrics.
    """
    rows = []
    for stage, facts in stages.items():
        scores = facts["eval"]
        parts = [("", scores), *((f" ({title})", own) for title, own in (scores.get("other_data") or {}).items())]
        for suffix, part in parts:
            for name, origin in (part.get("scored") or {}).items():
                amount_scored = f"{origin['rows']} rows" if "rows" in origin else f"{origin.get('tokens', 0):,} tokens"
                task = (part.get("chat") or {}).get(name.removeprefix("chat/"))
                number = percent(task["accuracy"]) if task else value(part[name]) if name in part else "-"
                where = f"{origin['data']}: {origin['source']}"
                rows.append([stage, name + suffix, number, where, amount_scored, origin.get("fingerprint", "-")])
    if not rows:
        return []
    header = ["stage", "score", "value", "data", "amount", "fingerprint"]
    return ["## What was scored", markdown_table(header, rows, numeric=[2, 4])]


def _compression(tokenizer: dict[str, Any]) -> list[str]:
    """Section that says how many bytes a token stands for, by kind of text; nothing without such numbers."""
    prefix = "bytes_per_token_"
    metrics = tokenizer.get("metrics") or {}
    rows = [[key.removeprefix(prefix), value(metrics[key], digits=2)] for key in metrics if key.startswith(prefix)]
    if not rows:
        return []
    return ["## Tokenizer", markdown_table(["text", "bytes per token"], rows, numeric=[1])]


def _data(stages: dict[str, dict]) -> list[str]:
    """Section on what became of the tokens that each stage read, with its warnings; nothing without such counters."""
    blocks = {name: facts["data"] for name, facts in stages.items() if facts.get("data")}
    balances = {name: total([b["read"] if "read" in b else b.get("expected", {})]) for name, b in blocks.items()}
    if not balances:
        return []
    table = {name: table_column(balance) for name, balance in balances.items()}
    for name, block in blocks.items():
        table[name] |= {f"rows skipped: {cause}": f"{n:,}" for cause, n in block.get("skipped", {}).items()}
        if duplicates := sum((block.get("near_duplicates") or {}).values()):
            table[name]["dropped: near-duplicates"] = f"{duplicates:,} documents"
    keys = dict.fromkeys(key for column in table.values() for key in column)
    rows = [[key, *(column.get(key, "-") for column in table.values())] for key in keys]
    lines = {name: warnings_of(balances[name], block.get("unit", "documents")) for name, block in blocks.items()}
    warnings = [f"> **{name}:** {line}" for name in lines for line in lines[name]]
    return ["## Data", markdown_table(["tokens", *table], rows, numeric=range(1, len(table) + 1)), *warnings]


def _draw(folder: Path, stages: dict[str, dict], redraw: bool) -> list[str]:
    from llm.report.plots import draw_curves

    rows = {stage: facts["rows"] for stage, facts in stages.items()}
    figures = draw_curves(folder / "report", folder.name, rows, redraw)
    return [f"![{caption}]({path.relative_to(folder).as_posix()})" for caption, path in figures]


def _rollout_pages(folder: Path, stages: Iterable[str]) -> tuple[list[str], list[str]]:
    """Write the page of every stage that kept rollouts; return links to them, and problems, a line each."""
    links, problems = [], []
    for stage in stages:
        try:
            page = write_page(folder / stage)
        except UserError as error:
            problems.append(str(error))
            continue
        links += [f"[Answers of {stage} with their rewards]({page.relative_to(folder).as_posix()})"] if page else []
    return links, problems


def _samples(stages: dict[str, dict]) -> list[str]:
    parts = []
    for stage, facts in stages.items():
        samples = facts["eval"].get("samples") or []
        parts += [f"### {stage}"] if samples else []
        for sample in samples[:SAMPLES_PER_STAGE]:
            prompt = "\n".join(f"> {line}" for line in sample["prompt"].strip().splitlines())
            parts.append(fenced(f"{prompt}\n{readable(sample['completion']).strip()}", "text"))
    return parts


def fenced(text: str, language: str = "") -> str:
    """Return a code block that the text cannot close: its fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _numbers(stages: dict[str, dict]) -> str:
    """Table of what was derived from the configuration, and when and from which source it ran, with stages across."""
    columns = {}
    for stage, facts in stages.items():
        origin = {
            "started (UTC)": (facts.get("started") or "")[:19].replace("T", " "),
            "finished (UTC)": (facts.get("finished") or "")[:19].replace("T", " "),
            "commit": re.sub(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", facts.get("commit") or ""),
        }
        columns[stage] = {**(facts.get("derived") or {}), **{key: text for key, text in origin.items() if text}}
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [[key, *(value(column.get(key)) for column in columns.values())] for key in keys]
    return markdown_table(["number", *columns], rows, numeric=range(1, len(columns) + 1))


def _configuration(stages: dict[str, dict]) -> list[str]:
    """Sections of settings: once those that all stages share, then those of each stage alone."""
    configs = {stage: flatten(facts["config"]) for stage, facts in stages.items() if facts.get("config")}
    if not configs:
        return ["No configuration was saved."]
    first = next(iter(configs.values()))
    shared = {k: v for k, v in first.items() if all(k in c and c[k] == v for c in configs.values())}
    parts = [_details("Shared by all stages", shared)]
    for stage, config in configs.items():
        own = {key: setting for key, setting in config.items() if key not in shared}
        parts += [_details(f"Only in {stage}", own)] if own else []
    return parts


def _details(title: str, config: dict[str, Any]) -> str:
    lines = "\n".join(f"{key}: {'null' if item is None else item}" for key, item in sorted(config.items()))
    return f"<details><summary>{title}</summary>\n\n{fenced(lines, 'yaml')}\n\n</details>"


def _environment(stages: dict[str, dict]) -> list[str]:
    """Section on the machine of each stage, from run.json (one table if they agree), else on this machine."""
    machines: list[tuple[list[str], dict]] = []
    for stage, facts in stages.items():
        if not facts.get("environment"):
            continue
        same = next((names for names, machine in machines if machine == facts["environment"]), None)
        if same is None:
            machines.append(([stage], facts["environment"]))
        else:
            same.append(stage)
    if not machines:
        return ["Of the machine that wrote this report:", _machine_table(environment())]
    if len(machines) == 1:
        return [_machine_table(machines[0][1])]
    return [part for names, machine in machines for part in (f"### {', '.join(names)}", _machine_table(machine))]


def _machine_table(machine: dict[str, Any]) -> str:
    gpus = [f"{gpu['name']} ({gpu['memory_gb']} GiB)" for gpu in machine.get("gpus") or []]
    shown = {**machine, "gpus": ", ".join(gpus) or "none"}
    rows = [[key.replace("_gb", " (GiB)").replace("_", " "), str(item)] for key, item in shown.items() if item]
    return markdown_table(["", ""], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild the reports that `argv` names; returns the exit status, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m llm.report", description="Rebuild report.md from the files of runs."
    )
    parser.add_argument("run_dir", nargs="+", help="run folders whose report.md to rebuild")
    options = parser.parse_args(argv)
    try:
        for folder in options.run_dir:
            print(build_report(RunDir(Path(folder).parent, Path(folder).name).path))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
