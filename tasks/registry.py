"""From a task's configuration to the task: which rows, from where, in which class."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm.data.embedded import rows as embedded_rows
from llm.errors import UserError
from tasks.base import Task
from tasks.chat import Chat, Identity, check_chat, check_identity, check_scored_identity
from tasks.files import JsonlRows, find_files, read_words
from tasks.gsm8k import GSM8K
from tasks.gsm8k import check_row as check_gsm8k
from tasks.humaneval import HumanEval
from tasks.humaneval import check_row as check_humaneval
from tasks.mixture import Mixture
from tasks.multiple_choice import MultipleChoice
from tasks.multiple_choice import check_row as check_choice
from tasks.spelling import ALL_LANGUAGES, ENGLISH, SimpleSpelling, SpellingBee, words_of_split

SPLITS = ("train", "test")
# Rows where the config says null; there are fewer different sentences about oneself, and fewer tiny programs.
DEFAULT_SIZE = {"train": 8_000, "test": 500}
SMALL_SIZE = {"train": 600, "test": 80}

# type -> (class, check of a train row, check of a test row, kind of embedded rows, default sizes)
ROW_TASKS: dict[str, tuple[type[Task], Callable, Callable, str, dict[str, int]]] = {
    "multiple_choice": (MultipleChoice, check_choice, check_choice, "choice", DEFAULT_SIZE),
    "gsm8k": (GSM8K, check_gsm8k, check_gsm8k, "arithmetic", DEFAULT_SIZE),
    "humaneval": (HumanEval, check_humaneval, check_humaneval, "programs", SMALL_SIZE),
    "identity": (Identity, check_identity, check_scored_identity, "identity", SMALL_SIZE),
    "chat": (Chat, check_chat, check_chat, "smalltalk", DEFAULT_SIZE),
}
WORD_TASKS = {"simple_spelling": SimpleSpelling, "spelling_bee": SpellingBee}
TYPES = (*ROW_TASKS, *WORD_TASKS)


def build_task(name: str, spec: Mapping[str, Any], split: str) -> Task:
    """The task `name` of `data.tasks` for one split ("train" or "test").

    spec: type; source "embedded" or "local"; train, test (files of a local source: path, glob or list); size and
    test_size (rows to generate, or items to draw from a word list); limit (use only the first items); options
    (embedded: arguments of the generator, such as steps or maker). A file that both splits name belongs to the test,
    except that a word list is divided between them. Local rows are all checked here, before any compute.
    Raises `UserError` for a wrong spec and for missing, empty or broken files.
    """
    where = f"data.tasks.{name}"
    kind, source = spec.get("type"), spec.get("source")
    if kind not in TYPES:
        raise UserError(f"{where}.type={kind} does not exist: choose one of {', '.join(TYPES)}")
    if source not in ("embedded", "local"):
        raise UserError(f"{where}.source={source} does not exist: choose embedded or local")
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: must be one of {SPLITS}")
    options = {key: _plain(value) for key, value in dict(spec.get("options") or {}).items()}
    if source == "local" and options:
        raise UserError(f"{where}.options={options}: files take no options, only source=embedded does")
    build = _word_task if kind in WORD_TASKS else _row_task
    try:
        return build(name, spec, split, options)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(where) else f"{where}: {text}") from None


def build_mixture(
    tasks: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float], split: str, seed: int = 42
) -> Mixture:
    """The mixture of the tasks that `weights` names with repeats above 0, in a global order drawn from `seed`."""
    entries = []
    for name, repeats in weights.items():
        if name not in tasks:
            raise UserError(f"data.mixture names {name!r}, which is not in data.tasks ({', '.join(tasks)})")
        if repeats != 0:  # a task with weight 0 needs no files
            entries.append((build_task(name, tasks[name], split), repeats))
    return Mixture(entries, seed)


def held_out_mixture(data, weights: Mapping[str, float], seed: int) -> Mixture:
    """One pass over the held-out rows of the tasks that are trained on and have some."""
    names = [n for n, w in weights.items() if w and has_split(data.tasks[n], "test")]
    if not names:
        raise UserError("none of the tasks in the mixture has held-out rows: set data.tasks.<name>.test for one")
    return build_mixture(data.tasks, dict.fromkeys(names, 1), "test", seed)


def has_split(spec, split: str) -> bool:
    """Whether a task can give rows of a split: generated ones always can, local ones if a file is named."""
    return spec.source == "embedded" or spec.type in ("spelling_bee", "simple_spelling") or spec[split] is not None


def _row_task(name: str, spec: Mapping[str, Any], split: str, options: dict) -> Task:
    task, check_train, check_test, kind, sizes = ROW_TASKS[spec["type"]]
    limit = spec.get("limit")
    if spec["source"] == "embedded":
        rows = embedded_rows(kind, split, _size(spec, split, sizes), **options)
        return task(rows, name, stop=limit)
    check = check_test if split == "test" else check_train
    return task(JsonlRows(_files(name, spec, split), check, limit), name)


def _word_task(name: str, spec: Mapping[str, Any], split: str, options: dict) -> Task:
    size, questions = _size(spec, split, DEFAULT_SIZE), ALL_LANGUAGES
    if spec["source"] == "embedded":
        words = [row["word"] for row in embedded_rows("words", split, size, **options)]
        questions = ENGLISH  # the world's text is English
    elif spec.get("train") is not None and spec.get("test") is not None:
        words = read_words(_files(name, spec, split))
    else:
        files = find_files(_plain(spec.get("train") or spec.get("test") or []), f"data.tasks.{name}.train")
        words = words_of_split(read_words(files), split)
        if not words:
            raise UserError(f"data.tasks.{name}: no word of the list falls to the {split} split; give a longer list")
    stop = spec.get("limit")
    if spec["type"] == "simple_spelling":
        return SimpleSpelling(words, name, size, stop=stop)
    return SpellingBee(words, name, size, split, questions, stop=stop)


def _files(name: str, spec: Mapping[str, Any], split: str) -> list:
    """The files of a split; those of the test are left out of the training split."""
    key = f"data.tasks.{name}.{split}"
    if spec.get(split) is None:
        raise UserError(f"{key} is null: name the .jsonl (words: .txt) files of this split, or leave the task out")
    exclude = []
    if split == "train" and spec.get("test") is not None:
        exclude = find_files(_plain(spec["test"]), f"data.tasks.{name}.test")
    return find_files(_plain(spec[split]), key, exclude)


def _size(spec: Mapping[str, Any], split: str, defaults: dict[str, int]) -> int:
    size = spec.get("size" if split == "train" else "test_size")
    return defaults[split] if size is None else size


def _plain(value: Any) -> Any:
    """Lists of a composed configuration as plain lists."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
