"""Bundle of tasks behind the CORE metric: read, checked, and written out as prompts.

CORE is a metric of DataComp-LM (Li et al. 2024, arXiv 2406.11794). A bundle is a folder or zip with `core.yaml`
(the tasks), `eval_meta_data.csv` (accuracy of random guessing) and `eval_data/` (a jsonl file per task). The order of
the examples, the choice of few-shot examples and the text of the prompts are those of nanochat, so that scores compare.
"""

import csv
import json
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from llm.errors import UserError, reason_of
from llm.tokenizer.bpe import without_surrogates

TASKS_FILE, BASELINES_FILE, DATA_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"
SHUFFLE_SEED, SHOTS_SEED = 1337, 1234  # seeds of a task's examples, and of an example's shots (plus its index)
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


@dataclass(frozen=True)
class CoreTask:
    """One task with its examples in the order of evaluation. baseline: accuracy of random guessing, 0 to 1.

    multiple_choice: find which of the `choices` continues the query; schema: find which of the `context_options` the
    continuation follows; language_modeling: check that every token of the continuation is the most likely one.
    """

    name: str
    kind: str
    n_shots: int
    delimiter: str
    baseline: float
    examples: list[dict[str, Any]]  # rows to score, and "line", where in the file
    pool: list[dict[str, Any]]  # all rows of the file in this order, from which few-shot examples are drawn

    @property
    def shots_used(self) -> int:
        """Few-shot examples per prompt: fewer than wanted if the file has no more to offer."""
        return min(self.n_shots, len(self.pool) - 1)


def load_bundle(
    path: str | Path, names: Sequence[str] | None = None, max_per_task: int | None = None
) -> list[CoreTask]:
    """Return the tasks of a bundle in its order, all or those in `names`, shuffled and cut to `max_per_task` examples.

    Few-shot examples come from the whole file, so that a prompt does not depend on the cut. Raises UserError that names
    file and line.
    """
    root = _root(path)
    entries = _entries(root / TASKS_FILE)
    if names is not None:
        if unknown := [name for name in names if name not in entries]:
            raise UserError(f"eval.core_tasks: the bundle has no task {unknown[0]!r}, but {', '.join(entries)}")
        if not names:
            raise UserError("eval.core_tasks=[] measures nothing: name tasks of the bundle, or null for all")
        entries = {name: entry for name, entry in entries.items() if name in names}
    baselines = _baselines(root / BASELINES_FILE)
    tasks = []
    for name, entry in entries.items():
        if name not in baselines:
            raise UserError(f"{root / BASELINES_FILE}: no row of task {name!r}, which {TASKS_FILE} lists")
        kind = entry["icl_task_type"]
        examples = _examples(root / DATA_FOLDER / entry["dataset_uri"], kind)
        random.Random(SHUFFLE_SEED).shuffle(examples)
        shots, delimiter = entry["num_fewshot"][0], entry.get("continuation_delimiter", " ")
        tasks.append(CoreTask(name, kind, shots, delimiter, baselines[name], examples[:max_per_task], examples))
    return tasks


def shots(task: CoreTask, index: int) -> list[dict[str, Any]]:
    """Return the few-shot examples of an example: drawn without itself, equal in every evaluation."""
    drawn = random.Random(SHOTS_SEED + index).sample(range(len(task.pool) - 1), task.shots_used)
    return [task.pool[i + (i >= index)] for i in drawn]


def prompts(task: CoreTask, index: int) -> list[str]:
    """Return the texts to score: one per choice, or the prompt alone and with its continuation (language_modeling)."""
    item, delimiter = task.examples[index], task.delimiter
    before = "".join(_solved(task, shot) + "\n\n" for shot in shots(task, index))
    if task.kind == "multiple_choice":
        return [before + item["query"] + delimiter + choice for choice in item["choices"]]
    if task.kind == "schema":
        return [before + context + delimiter + item["continuation"] for context in item["context_options"]]
    prompt = before + item["context"].strip() + delimiter
    return [prompt.strip(), prompt + item["continuation"]]  # a space at the end belongs to the token after it


def _solved(task: CoreTask, shot: dict[str, Any]) -> str:
    """Return an example with its right answer, as a few-shot example shows it."""
    if task.kind == "multiple_choice":
        return shot["query"] + task.delimiter + shot["choices"][shot["gold"]]
    if task.kind == "schema":
        return shot["context_options"][shot["gold"]] + task.delimiter + shot["continuation"]
    return shot["context"].strip() + task.delimiter + shot["continuation"]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _root(path: str | Path) -> Any:
    """Return the place of core.yaml: the folder or zip itself or its only subfolder, as in the published zip."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; a CORE bundle is a folder or zip with {TASKS_FILE}")
    try:
        root = path if path.is_dir() else zipfile.Path(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: neither a folder nor a zip file ({error})") from error
    inside = [root, *sorted((child for child in root.iterdir() if child.is_dir()), key=lambda child: child.name)]
    found = next((folder for folder in inside if (folder / TASKS_FILE).exists()), None)
    if found is None:
        raise UserError(f"{path}: holds no {TASKS_FILE}, so it is not a CORE bundle")
    return found


def _read(file: Any) -> str:
    """Return the text of a file of the bundle. Raises UserError."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: missing or unreadable ({reason_of(error, file)}); get the bundle again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error}); get the bundle again") from error


def _entries(file: Any) -> dict[str, dict[str, Any]]:
    """Return {label: entry} of core.yaml. Raises UserError for a malformed file."""
    try:
        content = OmegaConf.to_container(OmegaConf.create(_read(file)))
    except YAMLError as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    rows = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: has no list `icl_tasks`")
    entries = {}
    for number, row in enumerate(rows, 1):
        wanted = ("label", "dataset_uri", "num_fewshot", "icl_task_type")
        if missing := [key for key in wanted if not isinstance(row, dict) or key not in row]:
            raise UserError(f"{file}: task {number} has no {missing[0]!r}")
        for key in ("dataset_uri", "continuation_delimiter"):
            if not isinstance(row.get(key, ""), str):
                raise UserError(f"{file}: {row['label']}: {key}={row[key]!r} must be text")
        if row["label"] in entries:
            raise UserError(f"{file}: two tasks have the label {row['label']!r}, so only one would count")
        if row["icl_task_type"] not in FIELDS:
            kinds = ", ".join(FIELDS)
            raise UserError(f"{file}: {row['label']} is of type {row['icl_task_type']!r}; known are {kinds}")
        counts = row["num_fewshot"]
        if not isinstance(counts, list) or not counts or not isinstance(counts[0], int) or counts[0] < 0:
            raise UserError(f"{file}: {row['label']}: num_fewshot={counts!r} must be a list of one number")
        entries[row["label"]] = row
    return entries


def _baselines(file: Any) -> dict[str, float]:
    """Return {task: accuracy of random guessing} as shares; the file gives them in percent."""
    reader = csv.DictReader(_read(file).splitlines())
    for column in ("Eval Task", "Random baseline"):
        if column not in (reader.fieldnames or []):
            raise UserError(f"{file}: line 1: no column {column!r}")
    found = {}
    for row in reader:
        try:
            found[row["Eval Task"]] = float(row["Random baseline"]) / 100
        except (TypeError, ValueError):
            given = row["Random baseline"]
            raise UserError(f"{file}: line {reader.line_num}: Random baseline {given!r} is no number") from None
        if not 0 <= found[row["Eval Task"]] < 1:
            raise UserError(f"{file}: line {reader.line_num}: Random baseline must be from 0 to less than 100 percent")
    return found


def _examples(file: Any, kind: str) -> list[dict[str, Any]]:
    """Return the examples of a jsonl file with their line numbers. Raises UserError for a malformed line."""
    rows = []
    for number, line in enumerate(_read(file).split("\n"), 1):
        if line.strip():
            rows.append(_example(line, kind, f"{file}: line {number}") | {"line": number})
    if not rows:
        raise UserError(f"{file}: has no examples")
    return rows


def _example(line: str, kind: str, where: str) -> dict[str, Any]:
    """Return one row with the fields of its kind as text, a list of texts, and a number. Raises UserError."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    if missing := [name for name in FIELDS[kind] if name not in row]:
        raise UserError(f"{where}: no {missing[0]!r}, which {kind} needs")
    for name in FIELDS[kind]:
        if name in ("choices", "context_options"):
            options = row[name] if isinstance(row[name], list) else []
            row[name] = [_text(option, name, where) for option in options]
            if len(options) < 2:
                raise UserError(f"{where}: {name!r} must be a list of at least two")
            if not isinstance(row["gold"], int) or not 0 <= row["gold"] < len(options):
                raise UserError(f"{where}: 'gold' is {row['gold']!r}, but there are {len(options)} {name}")
        elif name != "gold":
            row[name] = _text(row[name], name, where)
    if not row.get("continuation", "?").strip():
        raise UserError(f"{where}: the continuation is empty")
    return row


def _text(value: Any, name: str, where: str) -> str:
    """Return a string or number as text, half a surrogate pair as U+FFFD. Raises UserError for any other value."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return without_surrogates(str(value))
    raise UserError(f"{where}: {name!r} must be text, not {value!r}")
