"""Build tasks from their configuration: which rows, from where, in which class."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from types import NoneType
from typing import Any

from llm.config.registries import TASK_TYPES
from llm.config.stages import chat_mixtures
from llm.config.targets import TARGET, load_target
from llm.data.download import Remote, WebFile
from llm.data.stores import is_address
from llm.errors import UserError, reason_of
from tasks.base import Task
from tasks.columns import ColumnReader, Columns
from tasks.files import FileRows, count_rows, existing, find_files, is_web, named_for, read_words
from tasks.hub import Cache, HubRows, HubTask
from tasks.mixture import Mixture, row_count
from tasks.rows import FirstAnswers, RowCheck
from tasks.slices import cut, is_share, share_out
from tasks.spelling import words_of_split

SPLITS = ("train", "test")
GENERATED = ("embedded", "template")
SOURCES = (*GENERATED, "local", "hub")


def build_task(
    name: str, spec: Mapping[str, Any], split: str, cache: Cache | None = None, bad_rows: str = "stop"
) -> Task:
    """Build the task `name` of `data.tasks` for one split ("train" or "test").

    spec: type, a name of `TASK_TYPES`, or _target_, package.module.Class; source "embedded", "template", "local" or
    "hub"; train, test (files of a local source: path, glob, address or list; of the hub: split, or slice of one, of the
    data set that repo, subset and revision name; test: also a share of the rows of train, as 5%, where no name among
    its files holds out); size and test_size (rows to generate, or items to draw from a
    word list); shuffle_seed (hub: order of the rows); question, answer (templates that make the row of other
    columns); limit (use only the first items); options (arguments of a generator, such as steps or maker); fields,
    roles, ignore, merge_neighbours, empty_answers and false_labels (chat rows: `ChatReader`); encoding (of local
    files of text); answer_form (one of the type's `answer_forms`). A file that both splits name belongs to the test,
    except that a word list is divided between them.
    Local rows are all checked here, before any compute, of a hub data set the first 1,000. cache: where fetched data
    lies; without it nothing is fetched. bad_rows: "stop" raises `UserError` for rows that cannot be used, of which it
    shows ten; "skip" leaves them out. The task's `skipped` counts what was left out, by reason. Raises `UserError` for
    a wrong spec and for missing or empty data, too.
    """
    where, spec = place(name, spec), _without_share(name, spec)
    source, task = spec.get("source"), task_class(spec, where)
    kind = spec.get("type") or spec.get(TARGET)
    if source not in SOURCES:
        raise UserError(f"{where}.source={source} does not exist: choose one of {', '.join(SOURCES)}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: must be one of {SPLITS}")
    options = {key: _plain(value) for key, value in dict(spec.get("options") or {}).items()}
    if source not in GENERATED and options:
        raise UserError(f"{where}.options={options}: files take no options, only {' and '.join(GENERATED)} rows do")
    if source == "template" and "template" not in task.generated:
        raise UserError(f"{where}.source=template: only type=identity is made from templates, not type={kind}")
    for option in ("repo", "subset", "revision", "shuffle_seed"):
        if source != "hub" and spec.get(option) is not None:
            raise UserError(f"{where}.{option}={spec[option]}: only source=hub reads it, not source={source}")
    for option in ("question", "answer"):
        if spec.get(option) is not None and (source in GENERATED or task.reads == "words"):
            raise UserError(f"{where}.{option}={spec[option]}: only rows of files and of the hub have columns")
    if spec.get("encoding") is not None and (source != "local" or task.reads == "words"):
        raise UserError(f"{where}.encoding={spec['encoding']}: only rows of local files have an encoding")
    if source == "hub" and task.reads == "words":
        raise UserError(f"{where}.source=hub: type={kind} takes a list of words: source=local, a .txt file or address")
    if (form := spec.get("answer_form")) is not None and form not in task.answer_forms:
        known = f"choose {' or '.join(task.answer_forms)}" if task.answer_forms else "leave it out"
        raise UserError(f"{where}.answer_form={form}: type={kind} has no such form of answers; {known}")
    for given in SPLITS:
        if not all(isinstance(entry, str) for entry in _entries(spec.get(given))):
            raise UserError(f"{where}.{given}={str(spec.get(given))[:80]}: must be a text, or a list of texts")
    try:
        if task.reads == "words":
            return _word_task(task, name, spec, split, options, cache)
        built = _row_task(task, name, spec, split, options, cache, bad_rows)
        built.answer_form = form
        return built
    except UserError as error:
        text, key = str(error), where if source in GENERATED else f"{where}.{split}"
        if text.startswith(where):
            raise
        raise UserError(f"{key}: {text}") from None
    except OSError as error:
        name = str(error.filename or spec.get(split))[:80]
        raise UserError(f"{where}.{split}: {name}: {reason_of(error, name)}") from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        if not options:
            raise
        raise UserError(f"{where}.options={str(options)[:80]}: type={kind} cannot use them ({error})") from error


def build_mixture(
    tasks: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, float],
    split: str,
    seed: int = 42,
    cache: Cache | None = None,
    bad_rows: str = "stop",
    key: str = "data.mixture",
) -> Mixture:
    """Build the mixture of the tasks that `weights` names with repeats above 0, in a global order drawn from `seed`.

    key: where the weights stand. Raises UserError for repeats that come to no row of a task.
    """
    entries = []
    for name, repeats in weights.items():
        if name not in tasks:
            raise UserError(f"{key} names {name!r}, which is not in data.tasks ({', '.join(tasks)})")
        if repeats != 0:  # a task with weight 0 needs no files
            task = build_task(name, tasks[name], split, cache, bad_rows)
            if len(task) and not row_count(task, repeats):
                raise UserError(
                    f"{key}.{name}={repeats}: of {len(task):,} {split} rows that is none; give "
                    f"{ceil(1000 / len(task)) / 1000} or more, or 0 to leave the task out"
                )
            entries.append((task, repeats))
    return Mixture(entries, seed)


def held_out_weights(data, stage: str) -> dict[str, float]:
    """Return {task: repeats of its held-out rows}: `data.mixture.<stage>_val`, or if empty all trained tasks once."""
    chosen = dict(data.mixture.get(f"{stage}_val") or {})
    if any(chosen.values()):
        return chosen
    trained = data.mixture.get(stage) or {}
    return {n: 1 for n, repeats in trained.items() if repeats and has_split(n, data.tasks[n], "test")}


def held_out_mixture(data, stage: str, seed: int, cache: Cache | None = None) -> Mixture:
    """Build the mixture of held-out rows that the chat stage `stage`, a key of `data.mixture`, validates on."""
    weights, key = held_out_weights(data, stage), f"data.mixture.{stage}_val"
    if not weights:
        raise UserError(
            f"none of the tasks of data.mixture.{stage} has held-out rows: name a file val.jsonl, or set "
            "data.tasks.<name>.test for one of them, to files or to a share of its rows: data.tasks.<name>.test=5%"
        )
    return build_mixture(data.tasks, weights, "test", seed, cache, bad_rows(data), key)


def bad_rows(data) -> str:
    """Return what to do with rows that cannot be used; runs from before there was `data.bad_rows` stop at them."""
    return data.get("bad_rows") or "stop"


def place(name: str, spec: Mapping[str, Any]) -> str:
    """Return the place of a task in the configuration, data.tasks.<name> or data.preferences.<name>."""
    return f"data.{'preferences' if spec.get('type') == 'preference' else 'tasks'}.{name}"


def all_specs(data) -> dict[str, Mapping[str, Any]]:
    """Return the configurations of all tasks and sources of preferences by name."""
    return {**data.tasks, **(data.get("preferences") or {})}


def build_preferences(
    data, names: Sequence[str], split: str, cache: Cache | None = None, bad_rows: str = "stop"
) -> list[Task]:
    """Build the sources `names` of `data.preferences` that have rows of a split.

    Raises UserError where none has, or one does not exist.
    """
    specs = data.get("preferences") or {}
    if unknown := [name for name in names if name not in specs]:
        raise UserError(
            f"stage.preferences names {unknown[0]!r}, which is not in data.preferences ({', '.join(specs)})"
        )
    found = [
        build_task(name, specs[name], split, cache, bad_rows)
        for name in names
        if split == "train" or has_split(name, specs[name], split)
    ]
    if not found:
        raise UserError(
            "none of the sources of data.preferences has held-out rows: set data.preferences.<name>.test for one of "
            "them, to files or to a share of its rows, as in data.preferences.<name>.test=5%"
        )
    return found


def has_split(name: str, spec, split: str) -> bool:
    """Return whether the task `name` can give rows of a split: generated ones always can, others if the split is named.

    A folder or glob of `train` also gives the files that are held out by their names.
    """
    if spec.source in GENERATED or spec.get(split) is not None or task_class(spec, place(name, spec)).reads == "words":
        return True
    return split == "test" and spec.source == "local" and bool(_held_out_by_name(name, spec))


def local_files(tasks: Mapping[str, Mapping[str, Any]], names: Sequence[str], split: str) -> list:
    """Return the files on this machine that a split of the tasks `names` names, held-out ones among them.

    No row is read; of a zip archive the list of its files. What lies on the network, and splits that are found by
    names, are left to `build_task`. Raises UserError for the first file that is not there.
    """
    found: list = []
    for name in names:
        if name not in tasks or tasks[name].get("source") != "local":
            continue
        key, spec = f"{place(name, tasks[name])}.{split}", _without_share(name, tasks[name])
        suffixes = (".txt",) if task_class(spec, place(name, spec)).reads == "words" else ()
        for entry in _as_list(cut(_plain(spec.get(split)), key)[0]):
            if not is_address(entry):
                found += existing(entry, key, suffixes)
    return found


def remotes(name: str, spec: Mapping[str, Any], cache: Cache) -> list[Remote]:
    """Return what a task takes from the network: a data set of the hub, files of the web, or nothing."""
    key = place(name, spec)
    if spec.get("source") == "hub":
        return [_hub_task(key, spec, cache)]
    entries = {entry: f"{key}.{split}" for split in SPLITS for entry in _as_list(spec.get(split)) if is_web(entry)}
    return [WebFile(entry, where, cache.folder) for entry, where in entries.items()]


def fetched_tasks(data) -> dict[str, list[str]]:
    """Return the tasks that a stage or evaluation may read from the network, with the splits of each that it reads."""
    cache = Cache("", may_fetch=False)
    specs = all_specs(data)
    return {name: splits for name, splits in used_tasks(data).items() if remotes(name, specs[name], cache)}


def used_tasks(data) -> dict[str, list[str]]:
    """Return the tasks that a stage or evaluation reads, with the splits of each."""
    stages = chat_mixtures()
    trained = [n for stage in stages for n, repeats in (data.mixture.get(stage) or {}).items() if repeats]
    held_out = [n for stage in stages for n, repeats in held_out_weights(data, stage).items() if repeats]
    rl = [data.rl] if data.rl else []
    reads = {"train": {*trained, *rl}, "test": {*held_out, *data.eval, *rl}}
    used = {name: [split for split in SPLITS if name in reads[split]] for name in data.tasks}
    preferred = data.get("preferences") or {}
    used |= {n: [split for split in SPLITS if split == "train" or has_split(n, preferred[n], split)] for n in preferred}
    return {name: splits for name, splits in used.items() if splits}


def task_class(spec: Mapping[str, Any], where: str) -> type[Task]:
    """Return the class of a task: that of its `type`, or the user's own that `_target_` names.

    where: its place in the configuration. Raises UserError where there is none, or it is not a subclass of Task.
    """
    kind, own = spec.get("type"), spec.get(TARGET)
    if (kind is None) == (own is None):
        given = "gives both" if own else "gives neither"
        raise UserError(f"{where}: give either type=<name> or {TARGET}=package.module.Class; it {given}")
    return load_target(spec, where, Task) if own else TASK_TYPES.get(kind, f"{where}.type")


def _row_task(
    task: type[Task],
    name: str,
    spec: Mapping[str, Any],
    split: str,
    options: dict,
    cache: Cache | None,
    bad_rows: str,
) -> Task:
    limit, key, columns = spec.get("limit"), place(name, spec), Columns.of(spec, place(name, spec))
    if spec["source"] in GENERATED:
        return task(task.generate(spec["source"], split, _size(task, spec, split), **options), name, stop=limit)
    reader = task.row_reader(spec, key)
    reader = reader if columns is None else ColumnReader(columns, reader)
    check = partial(task.check, split=split)
    if task.judges_slowly and spec["source"] == "local" and bad_rows == "stop":  # rows left out must not depend on time
        check = FirstAnswers(task, check)
    check = RowCheck(f"{key}.{split}", reader, check, bad_rows)
    rows = (_hub_rows if spec["source"] == "hub" else _local_rows)(name, spec, split, check, cache)
    return task(rows, name, stop=limit)


def _local_rows(name: str, spec: Mapping[str, Any], split: str, check: RowCheck, cache: Cache | None) -> FileRows:
    """Return the rows of a split's files, or the part of them that the split names."""
    key, files, limit = place(name, spec), _files(name, spec, split, cache), spec.get("limit")
    part, encoding = cut(_plain(spec.get(split)), f"{key}.{split}")[1], spec.get("encoding") or "utf-8"
    held_out, held_part = cut(_plain(spec.get("test")), f"{key}.test")
    shared = []
    if split == "train" and held_part is not None:  # a whole file of the test is not among the files
        tested = find_files(held_out, f"{key}.test", cache=cache)
        shared = [path for path in files if path.resolve() in {other.resolve() for other in tested}]
    if part is None and not shared:
        return FileRows(files, check, limit, encoding=encoding)
    count = count_rows(files, encoding)
    wanted = range(count) if part is None else part.rows(count)
    if shared and files != tested and cut(_plain(spec["train"]), f"{key}.train")[0] == held_out:
        raise UserError(
            f"{key}: train={spec['train']} and test={spec['test']} cut files that their names divide already; give "
            f"train={held_out} with test=null, or name the files to cut"
        )
    if shared and (files != tested or set(wanted) & set(held_part.rows(count))):
        raise UserError(
            f"{key}: train={spec['train']} and test={spec['test']} share rows, which would be trained on; cut one file "
            "in two, as in train=rows.jsonl[:-500] with test=rows.jsonl[-500:]"
        )
    if not wanted:
        raise UserError(f"{key}.{split}={spec[split]}: there is no such row among the {count:,} of {files[0]}")
    return FileRows(files, check, limit, wanted, encoding)


def _hub_rows(name: str, spec: Mapping[str, Any], split: str, check: RowCheck, cache: Cache | None) -> HubRows:
    if cache is None:
        raise ValueError(f"{place(name, spec)}: a task of the hub needs a cache")
    source, rows = _hub_task(place(name, spec), spec, cache), spec.get(split)
    if not isinstance(rows, str):
        raise UserError(
            f"{source.key}.{split}={rows}: with source=hub write a split of {source.repo}, such as {split} or "
            f"{split}[:1000], or leave the task out"
        )
    trained, held_out = spec.get("train"), spec.get("test")
    if split == "train" and isinstance(held_out, str) and source.overlap(trained, held_out):
        raise UserError(
            f"{source.key}: train={trained} and test={held_out} share rows, which would be trained on; write "
            "train=train[:-500] with test=train[-500:], for one"
        )
    return HubRows(source, rows, split, check, spec.get("shuffle_seed"), spec.get("limit"))


def _hub_task(key: str, spec: Mapping[str, Any], cache: Cache) -> HubTask:
    if not spec.get("repo"):
        raise UserError(f"{key}.repo is null: source=hub needs the data set's name, <owner>/<name>")
    return HubTask(spec["repo"], spec.get("subset"), spec.get("revision"), key, cache)


def _word_task(
    task: type[Task], name: str, spec: Mapping[str, Any], split: str, options: dict, cache: Cache | None
) -> Task:
    size = _size(task, spec, split)
    if spec["source"] in GENERATED:
        words = [row["word"] for row in task.generate(spec["source"], split, size, **options)]
    elif spec.get("train") is not None and spec.get("test") is not None:
        words = read_words(_files(name, spec, split, cache), f"{place(name, spec)}.{split}")
    else:
        entries = _plain(spec.get("train") or spec.get("test") or [])
        key = f"{place(name, spec)}.train"
        words = words_of_split(read_words(find_files(entries, key, cache=cache), key), split)
        if not words:
            raise UserError(f"data.tasks.{name}: no word of the list falls to the {split} split; give a longer list")
    return task.from_words(words, name, size, split, spec["source"], spec.get("limit"))


def _files(name: str, spec: Mapping[str, Any], split: str, cache: Cache | None) -> list:
    """Return the files of a split; those of the test are left out of the training split."""
    key = f"{place(name, spec)}.{split}"
    suffixes = (".txt",) if task_class(spec, place(name, spec)).reads == "words" else ()
    if spec.get(split) is None:
        if split == "test" and (held_out := _held_out_by_name(name, spec)):
            return held_out
        raise UserError(f"{key} is null: name the files of this split (words: .txt), or leave the task out")
    exclude, (entries, _) = [], cut(_plain(spec[split]), key)
    held_out, part = cut(_plain(spec.get("test")), f"{place(name, spec)}.test")
    if split == "train" and held_out is not None and part is None:
        exclude = find_files(held_out, f"{place(name, spec)}.test", (), cache, "test", suffixes)
    return find_files(entries, key, exclude, cache, split, suffixes)


def _without_share(name: str, spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a spec whose `test` is no share: null where names in `train` hold files out, else a cut of its rows."""
    share, key = spec.get("test"), place(name, spec)
    if not is_share(share) or spec.get("source") != "local":
        return spec
    if task_class(spec, place(name, spec)).reads == "words":
        raise UserError(f"{key}.test={share}: a word list is divided by itself; set {key}.test=null")
    parts = {"test": None} if _held_out_by_name(name, spec) else share_out(_plain(spec.get("train")), share, key)
    return {**spec, **parts}


def _held_out_by_name(name: str, spec: Mapping[str, Any]) -> list:
    """Return the files among those of `train` whose names say that they are held out, where `test` is null.

    Where none would be left of an entry, all of it is trained on.
    """
    key, entries = f"{place(name, spec)}.train", [one for one in _as_list(spec.get("train")) if not is_web(one)]
    divided = [entry for entry in entries if named_for(entry, "train", key)]
    return [path for entry in divided for path in named_for(entry, "test", key)]


def _size(task: type[Task], spec: Mapping[str, Any], split: str) -> int:
    size = spec.get("size" if split == "train" else "test_size")
    return task.sizes[split] if size is None else size


def _entries(value: Any) -> list:
    """Return what a split names; of no text and no list that value itself."""
    return [value] if isinstance(value, Mapping) or not isinstance(value, Sequence | NoneType) else _as_list(value)


def _as_list(value: Any) -> list:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _plain(value: Any) -> Any:
    """Return lists and mappings of a composed configuration as plain ones."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
