"""The report of a run, `runs/<run>/report.md`, from result files, never from logs.

`python -m llm.report runs/demo` builds it anew.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llm import __version__
from llm.config.stages import row_or_stranger
from llm.data.balance import table_column, total, warnings_of
from llm.errors import UserError
from llm.report.methods import draw_methods, methods_of, methods_table
from llm.report.results import results_of, results_table, task_names, training_table
from llm.report.rollouts_page import write_page
from llm.report.summary import key_figures, short_commit, stage_table
from llm.run.best_score import best_line
from llm.run.config_diff import flatten
from llm.run.formats import read_scores
from llm.run.stage_folder import RunDir, read_manifest, read_metrics, saved_plugins, stages_in
from llm.tokenizer.chat_format import readable
from llm.utils.addresses import without_secrets
from llm.utils.environment import environment
from llm.utils.files import write_atomic
from llm.utils.format import in_markdown, in_one_line, markdown_table, percent, value

SAMPLES_PER_STAGE = 8
NOTHING = ("-", "0", "0 (0.0 %)", "0.0 %")  # cells that say nothing
RESULTS = (
    "Measured on held-out data: by `evaluate.py` of the finished model where that was done, else at the end of the "
    "training, on as much as its evaluations take. ± is one standard error, brackets are a 95 % interval, and - means "
    "not measured."
)
TRAINING = (
    "Measured on the batches of the training: means over the last twelfth of the rows of metrics.csv where it has at "
    "least 20, else its last row. Nothing here was held out."
)
BEST = (
    "Bits per byte while training, on fewer tokens than `evaluate.py` takes; *overfitting* means that the last value "
    "is worse than the best, which behind finetuning is what the method costs elsewhere:"
)
METHODS = (
    "In brackets: the difference to the stage that each started from. The bars are the same numbers; a black line is "
    "the value of that stage, and - means not measured."
)
BALANCE = (
    "What became of every token that was read: read + repeated = trained + masked + cut + dropped + waiting. Masked "
    "tokens are context and not targets (questions, first tokens of rows), cut ones did not fit into their row, "
    "dropped ones had nothing to teach, waiting ones were read for a step that did not come. Padding is the empty part "
    "of the rows. Lines of zeros and stages that count no tokens are left out."
)


def build_report(run_dir: str | os.PathLike[str], redraw: bool = True) -> Path:
    """Write report.md and its figures anew from whatever stages exist so far; returns its path.

    A stage file that cannot be read is named in the report instead of hiding the other stages. redraw=False keeps
    figures that exist: enough where no stage has a new score since. Raises UserError for a folder without a stage.
    """
    folder = Path(run_dir)
    stages, problems = read_stages(folder)
    if not stages and not problems:
        raise UserError(f"{folder} has no stage with a run.json: nothing to report; run a stage with train.py first")
    pages, damaged = _rollout_pages(folder, stages)
    problems += damaged
    first, curves = _draw(folder, stages, redraw)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    models = {name: facts for name, facts in stages.items() if row_or_stranger(name).makes_model}
    parts = [f"# Run `{in_markdown(folder.name)}`", f"Written by Fathom {__version__} on {now}."]
    parts += [f"> **Problem:** {in_markdown(problem)}" for problem in problems]
    parts += ["## Summary", key_figures(stages), "## Results", results_table(models), RESULTS, *first]
    parts += ["## Stages", stage_table(stages, folder.name)]
    parts += _methods(folder, models, redraw)
    parts += ["## Curves", *curves] if curves else []
    parts += ["## Training", training_table(models), TRAINING, *_best(models)]
    parts += _scored(models)
    parts += [part for name, facts in stages.items() if name not in models for part in _compression(facts)]
    parts += _data(stages)
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


def _methods(folder: Path, stages: dict[str, dict], redraw: bool) -> list[str]:
    """Section that compares the stages where one of them follows finetuning: a table, and bars."""
    methods = methods_of(folder, stages, {name: results_of(name, facts) for name, facts in stages.items()})
    if not methods:
        return []
    figure = draw_methods(folder / "report" / "methods.png", folder.name, methods, redraw)
    shown = [] if figure is None else [_image(folder, "Methods of the run", figure)]
    return ["## Methods", methods_table(methods, task_names(stages.values())), *shown, METHODS]


def _best(stages: dict[str, dict]) -> list[str]:
    """List of the stages that measured bpb: best and last value, and from which step the weights handed over are."""
    lines = {name: best_line(facts["rows"], facts.get("weights")) for name, facts in stages.items()}
    items = "\n".join(f"- **{in_markdown(name)}** {in_markdown(line)}" for name, line in lines.items() if line)
    return [BEST, items] if items else []


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
    blocks = {name: block for name, block in blocks.items() if block.get("read") or block.get("expected")}
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
    warnings = [f"> **{in_markdown(name)}:** {in_markdown(line)}" for name in lines for line in lines[name]]
    shown = [row for row in rows if any(cell not in NOTHING for cell in row[1:])]
    table_text = markdown_table(["tokens", *table], shown, numeric=range(1, len(table) + 1))
    return ["## Balance of tokens", table_text, BALANCE, *warnings]


def _draw(folder: Path, stages: dict[str, dict], redraw: bool) -> tuple[list[str], list[str]]:
    """Draw the figures; return the accuracy of all stages with its text, [] without it, and all others with theirs."""
    from llm.report.plots import draw_curves

    parts = {
        one.path.name: [_image(folder, one.caption, one.path), one.text]
        for one in draw_curves(folder / "report", folder.name, stages, redraw)
    }
    first = parts.pop("chat.png", [])
    return first, [text for pair in parts.values() for text in pair]


def _image(folder: Path, caption: str, path: Path) -> str:
    return f"![{caption}]({path.relative_to(folder).as_posix()})"


def _rollout_pages(folder: Path, stages: Iterable[str]) -> tuple[list[str], list[str]]:
    """Write the page of every stage that kept rollouts; return links to them, and problems, a line each."""
    links, problems = [], []
    for stage in stages:
        try:
            page = write_page(folder / stage)
        except UserError as error:
            problems.append(str(error))
            continue
        if page is not None:
            address = quote(page.relative_to(folder).as_posix())
            links.append(f"[Answers of {in_markdown(stage)} with their rewards]({address})")
    return links, problems


def _samples(stages: dict[str, dict]) -> list[str]:
    parts = []
    for stage, facts in stages.items():
        samples = facts["eval"].get("samples") or []
        parts += [f"### {in_markdown(stage)}"] if samples else []
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
        code = facts.get("code") or {}
        origin = {
            "started (UTC)": (facts.get("started") or "")[:19].replace("T", " "),
            "finished (UTC)": (facts.get("finished") or "")[:19].replace("T", " "),
            "commit": short_commit(facts.get("commit")),
            **{name: value(number) for name in ("branch", "changed") if (number := code.get(name)) is not None},
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
    return f"<details><summary>{escape(in_one_line(title))}</summary>\n\n{fenced(lines, 'yaml')}\n\n</details>"


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
    return [
        part
        for names, machine in machines
        for part in (f"### {in_markdown(', '.join(names))}", _machine_table(machine))
    ]


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
