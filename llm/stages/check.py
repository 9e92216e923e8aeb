"""Read all text and all tasks that `data` names once, without training, and say what is wrong: stage=check."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path

from llm.config.stages import all_stages
from llm.data.checking import CHARS, GRAM, MARKERS, Checker, Rows
from llm.data.documents import FileDocuments, Shard
from llm.data.documents import texts as texts_of
from llm.data.formats import check_file, read_rows
from llm.data.records import SHOWN, BadRow
from llm.data.sources import build_source, read_with
from llm.data.text_mixture import MixedDocuments
from llm.errors import UserError
from llm.run.stage_folder import find_parent
from llm.stages.common import task_cache
from llm.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from llm.utils.files import write_json
from llm.utils.format import percent, print_table
from tasks.base import Task
from tasks.files import FileRows
from tasks.hub import HubRows
from tasks.registry import all_specs, build_task, place, used_tasks
from tasks.rows import BadRows

PARTS = ("text", "tasks")
# Held-out rows are read first: what training repeats of them is found while training rows pass by.
SPLITS = (("val", "test", "held out"), ("train", "train", "train"))  # of text, of tasks, in the report
Items = Iterable[str | BadRow | None]


def run(cfg) -> None:
    """Check the data, print a line per file and write all counts to `stage.out`. Raises UserError for bad rows."""
    parts = list(cfg.stage.parts)
    if not parts or not set(parts) <= set(PARTS):
        raise UserError(f"stage.parts={parts}: name one or both of {', '.join(PARTS)}")
    tokenizer = find_tokenizer(cfg)
    checker = Checker((*MARKERS, *SPECIAL_TOKENS), None if tokenizer is None else tokenizer.encode)
    files = []
    for of_text, of_tasks, split in SPLITS:
        found = texts(cfg, tokenizer, of_text, split) if "text" in parts else iter(())
        for rows, items in [*found, *(tasks(cfg, of_tasks, split) if "tasks" in parts else ())]:
            files.append(rows)
            read(checker, rows, items)
    checker.finish()
    unit = "characters" if tokenizer is None else "tokens"
    show(files, unit, cfg.model.seq_len, checker.is_complete)
    out = Path(cfg.stage.out or Path(cfg.paths.runs) / "data_check.json")
    write_json(out, {"unit": unit, "complete": checker.is_complete, "files": [rows.to_dict() for rows in files]})
    print(f"all counts: {out}", flush=True)
    raise_for_problems(files, cfg.data.bad_rows)


def raise_for_problems(files: list[Rows], bad_rows: str) -> None:
    """Raise UserError that counts bad rows and what cannot be read, unless `bad_rows` leaves all of them out."""
    bad, unreadable = sum(rows.bad for rows in files), len({rows.unreadable for rows in files if rows.unreadable})
    if bad_rows == "skip":
        failing = sum(rows.failing for rows in files)
        print(f"{bad - failing:,} bad rows are left out of training (data.bad_rows=skip)", flush=True)
        bad = failing
    found = [f"{bad:,} bad rows"] if bad else []
    found += [f"{unreadable:,} files or tasks that cannot be read"] if unreadable else []
    if found:
        advice = ", or leave bad rows out: data.bad_rows=skip" if bad and bad_rows == "stop" else ""
        raise UserError(f"{' and '.join(found)} are listed above; correct them{advice}")


def find_tokenizer(cfg) -> Tokenizer | None:
    """Return the tokenizer of `init_from`, or of the run if it has one; None: lengths are counted in characters."""
    run = cfg.run or f"d{cfg.model.depth}"
    stage = next(row.name for row in all_stages() if row.takes == "tokenizer")
    try:
        return Tokenizer.load(find_parent(cfg.paths.runs, run, stage, cfg.init_from, asking=cfg.stage.name))
    except UserError:
        if cfg.init_from is not None:
            raise
    return None


def read(checker: Checker, rows: Rows, items: Items) -> None:
    """Count all rows of one file, and note what ends the reading early."""
    try:
        for item in items:
            if isinstance(item, BadRow):
                rows.add_bad(item)
            else:
                checker.add(rows, item)
    except UserError as error:
        rows.unreadable = str(error)


def texts(cfg, tokenizer: Tokenizer | None, split: str, shown: str) -> Iterator[tuple[Rows, Items]]:
    """Yield (counts to fill, documents) of every file of text; a source that is not there has a line of its own."""
    try:
        source = read_with(build_source(cfg.data, cfg.paths.data), tokenizer)
        parts = source.sources.values() if isinstance(source, MixedDocuments) else [source]
        for part in parts:
            if not isinstance(part, FileDocuments):
                yield Rows(f"data={cfg.data.name}", shown), texts_of(part, split)
                continue
            left_out = near_duplicates(part) if split == "train" else {}
            for shard in part.shards(split):
                name = str(shard.path)
                yield Rows(name, shown, near_duplicates=left_out.get(name, 0)), documents(part, shard)
    except UserError as error:
        yield Rows("text", shown), failed(error)


def near_duplicates(source: FileDocuments) -> dict[str, int]:
    """Return the near-duplicates among the training documents of a source by file; bad rows are told elsewhere."""
    for each in [] if source.near_duplicates is None else source.near_duplicates.sources:
        each.bad_rows = "skip"
    return source.left_out


def documents(source: FileDocuments, shard: Shard) -> Items:
    """Yield the rows of a shard as they are read, bad ones too."""
    path = source.present(shard.path)
    check_file(path, source.column)
    count = None if shard.stop is None else shard.stop - shard.start
    yield from islice(read_rows(path, source.column, shard.start), count)


def tasks(cfg, split: str, shown: str) -> Iterator[tuple[Rows, Items]]:
    """Yield (counts to fill, conversations as text) of every file of the tasks that data names for a split.

    Rows that are generated, of the hub or of a word list count as one file.
    """
    for name, splits in used_tasks(cfg.data).items():
        if split not in splits:
            continue
        key = place(name, all_specs(cfg.data)[name])
        try:
            task, bad = read_task(cfg, name, split)
        except UserError as error:
            yield Rows(key, shown), failed(error)
            continue
        parts = {} if task is None else by_file(task)
        for file in dict.fromkeys([*parts, *bad]):
            rows = Rows(f"{key}: {file}" if file else key, shown)
            yield rows, conversations(task, parts.get(file, ()), rows, bad.get(file, ()), f"{key}.{split}")


def read_task(cfg, name: str, split: str) -> tuple[Task | None, dict[str, Iterable[str]]]:
    """Return a task without its bad rows, None where no other is left, and the problems of bad rows by file.

    Raises UserError for a task that cannot be built.
    """
    spec = all_specs(cfg.data)[name]
    try:
        task = build_task(name, spec, split, task_cache(cfg), "skip")
        found = task.rows if isinstance(task.rows, FileRows | HubRows) else None
    except BadRows as error:
        if cfg.data.bad_rows == "skip":  # training ends so too
            raise
        task, found = None, error
    bad = {} if found is None else {file: listed(found.problems[file], count) for file, count in found.bad.items()}
    return task, bad if spec.source == "local" else {"": chain(*bad.values())}


def listed(problems: list[str], count: int) -> Iterator[str]:
    """Yield the problems of `count` bad rows of a file; those behind the listed ones have no text."""
    return chain(problems, repeat("", count - len(problems)))


def by_file(task: Task) -> dict[str, range]:
    """Return the numbers of a task's rows by file, "" where they are from none."""
    parts = task.rows.by_file() if isinstance(task.rows, FileRows) else {"": range(len(task))}
    return {file: part[: max(0, len(task) - part.start)] for file, part in parts.items()}


def conversations(task: Task, indices: Iterable[int], rows: Rows, bad: Iterable[str], key: str) -> Items:
    """Count the bad rows of a file of a task, and yield the conversations of the others as text."""
    for problem in bad:
        rows.add_bad(problem)
    for index in indices:
        where = f"{key} row {index + 1}"
        try:
            if task.judges_slowly and rows.split == "held out":  # programs, of which a run tries the first alone
                try:
                    type(task).check_reference(task.rows[task.indices[index]], where)
                except UserError:
                    rows.failing += 1
                    raise
            yield "\n\n".join(plain_text(message["content"]) for message in task[index]["messages"])
        except UserError as error:  # also of a data set of the hub, whose first rows alone were looked at before
            yield BadRow(where, str(error).removeprefix(f"{where}: "))


def plain_text(content: str | list[dict]) -> str:
    """Return the text of a message without the marks of calculator calls."""
    return content if isinstance(content, str) else " ".join(part["text"] for part in content)


def failed(error: UserError) -> Items:
    """Raise `error` when the first row is asked for."""
    raise error
    yield None  # a generator


def show(files: list[Rows], unit: str, seq_len: int, is_complete: bool) -> None:
    """Print the table of files, the bad rows, and one line per warning."""
    more = [] if unit == "characters" else [unit]
    header = ["file", "split", "rows", "bad", "empty", "characters", "bytes", *more, "median", "p95", "max"]
    header.append(f"> {seq_len:,}")  # in tokens
    lines = []
    for rows in files:
        counts = (rows.read, rows.bad, rows.empty, rows.chars, rows.bytes, *([rows.total] if more else []))
        lengths = (rows.quantile(0.5), rows.quantile(0.95), max(rows.lengths, default=0))
        longer = percent(rows.longer_than(seq_len) / max(1, rows.lengths.total())) if more else "-"
        lines.append([rows.name, rows.split, *(f"{number:,}" for number in (*counts, *lengths)), longer])
    print_table(header, lines)
    print(f"lengths are in {unit}" + ("" if more else ": there is no tokenizer yet, or give init_from=<run>"))
    for problem in dict.fromkeys(rows.unreadable for rows in files if rows.unreadable):
        print(f"cannot be read: {problem}")
    for rows in files:
        for problem in rows.first_bad[:SHOWN]:
            print(f"bad: {problem}")
        if rows.bad > SHOWN:
            print(f"bad: and {rows.bad - SHOWN:,} more in {rows.name}")
        for warning in warnings(rows):
            print(f"WARNING: {rows.name} ({rows.split}): {warning}")
    if not is_complete:
        print("WARNING: too many rows to compare them all: repeated rows beyond the first are not counted")


def warnings(rows: Rows) -> Iterator[str]:
    """Yield what a reader should know of a file that can be trained on."""
    if rows.markers:
        marks = ", ".join(f"{marker} in {count:,}" for marker, count in rows.markers.most_common())
        yield f"markers of a chat format stand in its text, as text: rows with {marks}"
    if rows.repeated:
        yield f"{rows.repeated:,} of {rows.read:,} rows stand in this split more than once"
    if rows.leaked:
        yield f"{rows.leaked:,} held-out rows are trained on, word for word"
    if rows.overlapping:
        shared = f"{GRAM} words in a row with training (of text without spaces {CHARS} characters)"
        yield f"{rows.overlapping:,} held-out rows share {shared}"
    if rows.near_duplicates:
        yield f"{rows.near_duplicates:,} near-duplicates, which training leaves out (data.near_duplicates)"
