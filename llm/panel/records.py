"""Reads what evaluations leave item by item, in one form: question, answer, verdict. Compares two stages by item."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.run.stage_folder import ITEM_FOLDERS, OTHER_DATA
from llm.tokenizer.chat_format import readable
from llm.utils.files import parse_json, read_bytes

MOST_BYTES = 1 << 28
RIGHT = {True: "right", False: "wrong", None: "no verdict"}


@dataclass(frozen=True)
class Item:
    """An item of a task and one answer to it. right: None where nothing says whether it is right.

    filter: of lm-eval, which reads some answers in several ways, a line each; "" for all others.
    """

    index: int
    prompt: str
    answer: str
    right: bool | None
    verdict: str
    subject: str = ""
    filter: str = ""


def parts_of(folder: Path) -> list[str]:
    """Return the files of items that a stage has, as `records/choice`, those of its own data first."""
    found = [path for name in ITEM_FOLDERS for path in sorted((folder / name).glob("*.jsonl"))]
    found += [path for name in ITEM_FOLDERS for path in sorted((folder / OTHER_DATA).glob(f"*/{name}/*.jsonl"))]
    return [path.relative_to(folder).with_suffix("").as_posix() for path in found]


def read_items(folder: Path, part: str) -> tuple[Item, ...]:
    """Return the items of one of `parts_of`, in the order of the file. Raises UserError for any other name."""
    if part not in parts_of(folder):
        raise UserError(f"{part}: there are no such records in {folder}")
    path = folder / f"{part}.jsonl"
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


@lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> tuple[Item, ...]:
    kind, lines = path.parent.name, read_bytes(path, MOST_BYTES).decode("utf-8", errors="replace").split("\n")
    try:
        return tuple(_item(kind, parse_json(line.encode(), path)) for line in lines if line.strip())
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate again to write the file anew") from error


def _item(kind: str, row: Mapping[str, Any]) -> Item:
    """Return a line of a file of records as an item."""
    if kind == "records":
        right = row["verdict"] == "pass"
        subject = str(row.get("subject") or "")
        return Item(int(row["index"]), str(row["prompt"]), readable(row["output"]), right, str(row["verdict"]), subject)
    if kind == "core":
        right, about = bool(row["correct"]), f"line {row['line']} of the task's file"
        return Item(int(row["index"]), about, f"{row['prediction']}", right, f"wanted {row['gold']}")
    numbers = {name: row[name] for name in row if name not in ("index", "target", "arguments", "responses", "filter")}
    first = next(
        (bool(numbers[name]) for name in ("exact_match", "acc", "pass@1") if numbers.get(name) in (0, 1)), None
    )
    told = ", ".join(f"{name} {number}" for name, number in numbers.items())
    name = "" if row.get("filter") in (None, "none") else str(row["filter"])  # a subject too: the tab finds it by that
    asked, answer = _first_text(row["arguments"]), _first_text(row["responses"])
    return Item(int(row["index"]), asked, answer, first, told, subject=name, filter=name)


def _first_text(content: Any) -> str:
    """Return the first text in what lm-eval wrote as nested lists; the whole as it stands where there is none."""
    inner = content
    while isinstance(inner, Mapping | Sequence) and not isinstance(inner, str) and inner:
        inner = next(iter(inner.values())) if isinstance(inner, Mapping) else inner[0]
    return inner if isinstance(inner, str) else str(content)


@dataclass(frozen=True)
class Pairing:
    """Counts of what two stages did with the items of a task that both have, and the items where they differ.

    both, neither: items that both have right, or none; only_a, only_b: (item of A, item of B) where one has. An item
    with several answers counts as right where more than half of them are. other: items of one of the two only, or
    without a verdict.
    """

    both: int
    neither: int
    only_a: list[tuple[Item, Item]]
    only_b: list[tuple[Item, Item]]
    other: int


def by_filter(a: Sequence[Item], b: Sequence[Item]) -> dict[str, tuple[list[Item], list[Item]]]:
    """Return the items of two stages by their filter: an item stands there once for each, with another verdict."""
    names = dict.fromkeys(one.filter for one in (*a, *b)) or [""]
    return {name: tuple([one for one in side if one.filter == name] for side in (a, b)) for name in names}


def compare_items(a: Sequence[Item], b: Sequence[Item]) -> Pairing:
    """Compare two stages item by item, with one filter; an item is known by its index and question."""
    left, right = _by_question(a), _by_question(b)
    both, neither, other, only_a, only_b = 0, 0, len(left.keys() ^ right.keys()), [], []
    for key in left.keys() & right.keys():
        verdicts = [_is_right(side[key]) for side in (left, right)]
        if None in verdicts:
            other += 1
        elif verdicts == [True, True]:
            both += 1
        elif verdicts == [False, False]:
            neither += 1
        else:
            winner = only_a if verdicts[0] else only_b
            winner.append((_typical(left[key], verdicts[0]), _typical(right[key], verdicts[1])))
    for found in (only_a, only_b):
        found.sort(key=lambda pair: pair[0].index)
    return Pairing(both, neither, only_a, only_b, other)


def sign_test(a: int, b: int) -> float:
    """Return the two-sided p-value of counts that chance alone would make equal (McNemar 1947, in its exact form)."""
    n, ways, total = a + b, 1, 0  # ways: n over k
    for k in range(min(a, b) + 1):
        total += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * (total / 2**n))


def _by_question(items: Sequence[Item]) -> dict[tuple[int, str], list[Item]]:
    found: dict[tuple[int, str], list[Item]] = defaultdict(list)
    for one in items:
        found[one.index, one.prompt].append(one)
    return found


def _is_right(answers: Sequence[Item]) -> bool | None:
    known = [one.right for one in answers if one.right is not None]
    return None if not known else 2 * sum(known) > len(known)


def _typical(answers: Sequence[Item], right: bool) -> Item:
    """Return the first answer with the verdict of the item as a whole."""
    return next((one for one in answers if one.right == right), answers[0])
