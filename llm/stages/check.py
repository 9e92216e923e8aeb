"""Read all text and all tasks that `data` names once, without training, and say what is wrong: stage=check."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from llm.config.stages import all_stages
from llm.data.checking import MARKERS, Checker, Rows
from llm.data.documents import FileDocuments, Shard
from llm.data.documents import texts as texts_of
from llm.data.formats import check_file, read_rows
from llm.data.records import BadRow
from llm.data.sources import build_source, read_with
from llm.data.text_mixture import MixedDocuments
from llm.errors import UserError
from llm.run.stage_folder import find_parent
from llm.stages.common import task_cache
from llm.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from llm.utils.files import write_json
from llm.utils.format import percent, print_table
from tasks.registry import build_task, used_tasks
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
    unit = "characters" if tokenizer is None else "tokens"
    show(files, unit, cfg.model.seq_len, checker.is_complete)
    out = Path(cfg.stage.out or Path(cfg.paths.runs) / "data_check.json")
    write_json(out, {"unit": unit, "complete": checker.is_complete, "files": [rows.to_dict() for rows in files]})
    print(f"all counts: {out}", flush=True)
    raise_for_problems(files, cfg.data.bad_rows)


def raise_for_problems(files: list[Rows], bad_rows: str) -> None:
    """Raise UserError that counts bad rows and what cannot be read, if there are any."""
    bad, unreadable = sum(rows.bad for rows in files), len({rows.unreadable for rows in files if rows.unreadable})
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
        return Tokenizer.load(find_parent(cfg.paths.runs, run, stage, cfg.init_from))
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
            for shard in part.shards(split):
                yield Rows(str(shard.path), shown), documents(part, shard)
    except UserError as error:
        yield Rows("text", shown), failed(error)


def documents(source: FileDocuments, shard: Shard) -> Items:
    """Yield the rows of a shard as they are read, bad ones too."""
    path = source.present(shard.path)
    check_file(path, source.column)
    count = None if shard.stop is None else shard.stop - shard.start
    yield from islice(read_rows(path, source.column, shard.start), count)


def tasks(cfg, split: str, shown: str) -> Iterator[tuple[Rows, Items]]:
    """Yield (counts to fill, conversations as text) of every task that a mixture, data.eval or data.rl names."""
    for name, splits in used_tasks(cfg.data).items():
        if split in splits:
            rows = Rows(f"data.tasks.{name}", shown)
            yield rows, conversations(cfg, name, split, rows)


def conversations(cfg, name: str, split: str, rows: Rows) -> Items:
    """Yield the conversations of a task as text. Its bad rows are counted in `rows`, and shown as its own check does.

    A task is built twice where rows are bad: once for its list of them, once without them.
    """
    spec, cache = cfg.data.tasks[name], task_cache(cfg)
    try:
        task = build_task(name, spec, split, cache)
    except BadRows as error:
        rows.add_bad(error, error.count)
        try:
            task = build_task(name, spec, split, cache, "skip")
        except UserError:  # no row is left
            return
    for index in range(len(task)):
        where = f"{rows.name}.{split} row {index + 1}"
        try:
            if task.judges_slowly and split == "test":  # programs, which no run tries before it starts
                type(task).check_reference(task.rows[task.indices[index]], where)
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
    header = ["file", "split", "rows", "bad", "empty", "characters", *more, "median", "p95", "max", f"> {seq_len:,}"]
    lines = []
    for rows in files:
        counts = (rows.read, rows.bad, rows.empty, rows.chars, *([sum(rows.lengths)] if more else []))
        lengths = (rows.quantile(0.5), rows.quantile(0.95), max(rows.lengths, default=0))
        longer = percent(rows.longer_than(seq_len) / max(1, len(rows.lengths))) if more else "-"  # seq_len is in tokens
        lines.append([rows.name, rows.split, *(f"{number:,}" for number in (*counts, *lengths)), longer])
    print_table(header, lines)
    print(f"lengths are in {unit}" + ("" if more else ": there is no tokenizer yet, or give init_from=<run>"))
    for problem in dict.fromkeys(rows.unreadable for rows in files if rows.unreadable):
        print(f"cannot be read: {problem}")
    for rows in files:
        for problem in rows.first_bad:
            print(f"bad: {problem}")
        if rows.bad > len(rows.first_bad) and len(rows.first_bad) > 1:
            print(f"bad: and {rows.bad - len(rows.first_bad):,} more in {rows.name}")
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
        yield f"{rows.overlapping:,} held-out rows share 13 words in a row with training"
