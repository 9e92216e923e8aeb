"""Builds the Evaluate tab: scores with standard errors, subjects, and the records of single items."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.panel.index import Row
from llm.panel.markup import Markup, block, page, problem, section, table, text
from llm.panel.records import RIGHT, Item, parts_of, read_items
from llm.panel.runs_view import name_of
from llm.panel.state import Panel
from llm.run.formats import read_scores
from llm.utils.format import percent, value

MOST_STAGES = 12
PER_PAGE = 10  # records
MOST_LETTERS = 6000  # of a prompt or an answer
ANY = "all"
Cells = dict[str, str]  # what a stage has for a score, by the score's name


def evaluated(panel: Panel) -> list[str]:
    """Return the finished stages that have a model, newest last, as run/stage."""
    return [name_of(row) for row in panel.index.rows() if row["status"] == "finished" and _has_model(row)]


def _has_model(row: Row) -> bool:
    return (Path(row["folder"]) / "model" / "config.json").is_file()


def scores_page(panel: Panel, names: Sequence[str]) -> str:
    """Return the scores of stages side by side with one standard error, and what single subjects have."""
    if not names:
        return page("<p>Choose stages above; what evaluations have measured of them stands here.</p>")
    if len(names) > MOST_STAGES:
        return page(problem(f"{len(names)} stages are chosen; {MOST_STAGES} stand side by side at most"))
    scores, subjects, origins, problems = {}, {}, {}, []
    for name in names:
        try:
            found = read_scores(Path(panel.index.row(name)["folder"]))
        except UserError as error:
            problems.append(problem(str(error)))
            found = {}
        scores[name], subjects[name], origins[name] = main_scores(found), subject_scores(found), origin_of(found)
    if not any(scores.values()):
        return page(*problems, "<p>None of them has been evaluated yet: start an evaluation below.</p>")
    return page(
        *problems,
        section("Scores, ± one standard error", _side_by_side("score", scores)),
        section("Subjects", _side_by_side("task: subject", subjects), opened=False),
        section("What was measured on", _side_by_side("score", origins), opened=False),
    )


def _side_by_side(title: str, cells: Mapping[str, Cells]) -> str:
    """Return a table with a line per score and a column per stage; "" where there is none."""
    lines = list(dict.fromkeys(line for own in cells.values() for line in own))
    if not lines:
        return ""
    rows = [[line, *(own.get(line, "-") for own in cells.values())] for line in lines]
    return table([title, *cells], rows, range(1, len(cells) + 1), title)


def main_scores(scores: Mapping[str, Any], suffix: str = "") -> Cells:
    """Return the scores of an eval.json as texts, those of other data behind with its name."""
    cells: Cells = {}
    for name in ("bpb", "bpb_text"):
        if name in scores:
            cells[name + suffix] = value(scores[name])
    for task, own in (scores.get("chat") or {}).items():
        cells[f"{task}{suffix}"] = _accuracy(own)
        more = {name: own[name] for name in own if name.startswith("pass@") and name != "pass@1"}
        cells |= {f"{task} {name}{suffix}": percent(share) for name, share in more.items()}
        wrong = {name: count for name, count in (own.get("verdicts") or {}).items() if name not in ("pass", "fail")}
        if wrong:
            cells[f"{task} other verdicts{suffix}"] = ", ".join(f"{name} {count:,}" for name, count in wrong.items())
    if scores.get("chatcore") is not None:
        cells[f"ChatCORE{suffix}"] = value(scores["chatcore"])
    if scores.get("core") is not None:
        cells[f"CORE{suffix}"] = value(scores["core"])
    for task, own in (scores.get("core_tasks") or {}).items():
        cells[f"core/{task}{suffix}"] = _accuracy(own)
    for kind in ("lm_eval", "judges"):
        for task, own in (scores.get(kind) or {}).items():
            numbers = {name: one for name, one in own.items() if isinstance(one, int | float)}
            errors = {name: numbers.get(f"{name}_stderr") for name in numbers}
            kept = [name for name in numbers if name not in ("n", "shots") and not name.endswith("_stderr")]
            cells |= {f"{kind}/{task} {name}{suffix}": value(numbers[name], errors[name]) for name in kept}
    preferences = scores.get("preferences") or {}
    for name, number in preferences.items():
        if isinstance(number, int | float) and not name.endswith(("_low", "_high", "_stderr")):
            low, high = preferences.get(f"{name}_low"), preferences.get(f"{name}_high")
            between = f" ({percent(low)} to {percent(high)})" if low is not None and high is not None else ""
            shown = percent(number) if name == "accuracy" else value(number, preferences.get(f"{name}_stderr"))
            cells[f"preferences {name}{suffix}"] = shown + between
    for data, part in (scores.get("other_data") or {}).items():
        cells |= main_scores(part, f" ({data})")
    return cells


def _accuracy(own: Mapping[str, Any]) -> str:
    items = f" of {own['n']:,}" if isinstance(own.get("n"), int) else ""
    return percent(own.get("accuracy"), own.get("stderr")) + items


def subject_scores(scores: Mapping[str, Any], suffix: str = "") -> Cells:
    """Return the scores of single subjects."""
    cells: Cells = {}
    for task, own in (scores.get("chat") or {}).items():
        for subject, one in (own.get("subjects") or {}).items():
            cells[f"{task}{suffix}: {subject}"] = _accuracy(one)
    for data, part in (scores.get("other_data") or {}).items():
        cells |= subject_scores(part, f" ({data})")
    return cells


def origin_of(scores: Mapping[str, Any], suffix: str = "") -> Cells:
    """Return what each score was measured on."""
    cells: Cells = {}
    for name, one in (scores.get("scored") or {}).items():
        size = [f"{one[unit]:,} {unit}" for unit in ("rows", "tokens") if isinstance(one.get(unit), int)]
        cells[name + suffix] = ", ".join([str(one.get("source") or one.get("data") or ""), *size])
    for data, part in (scores.get("other_data") or {}).items():
        cells |= origin_of(part, f" ({data})")
    return cells


def parts(panel: Panel, name: str | None) -> list[str]:
    """Return the records that a stage has; [] for none, and for a stage that does not exist."""
    try:
        return parts_of(Path(panel.index.row(name or "")["folder"]))
    except UserError:
        return []


def choices(panel: Panel, name: str | None, part: str | None) -> tuple[list[str], list[str]]:
    """Return the verdicts and the subjects of records, each with `ANY` first."""
    try:
        items = read_items(Path(panel.index.row(name or "")["folder"]), part or "")
    except UserError:
        return [ANY], [ANY]
    verdicts = dict.fromkeys(RIGHT[one.right] for one in items)
    subjects = sorted({one.subject for one in items if one.subject})
    return [ANY, *verdicts], [ANY, *subjects]


def records_page(
    panel: Panel, name: str | None, part: str | None, verdict: str, subject: str, words: str, place: int
) -> tuple[str, int]:
    """Return one page of records that fit, and the place of its first one.

    verdict: one of `RIGHT`, or all. words: each must be in the question or the answer. place: of the first record.
    """
    if not name or not part:
        return page("<p>Choose a stage and a task that has records: every <code>eval=[chat]</code> leaves some.</p>"), 0
    try:
        items = read_items(Path(panel.index.row(name)["folder"]), part)
    except UserError as error:
        return page(problem(str(error))), 0
    wanted = words.lower().split()
    fit = [
        one
        for one in items
        if verdict in (ANY, RIGHT[one.right])
        and subject in (ANY, one.subject)
        and all(word in f"{one.prompt} {one.answer}".lower() for word in wanted)
    ]
    place = max(0, min(place, (len(fit) - 1) // PER_PAGE * PER_PAGE))
    shown = fit[place : place + PER_PAGE]
    about = f"{len(fit):,} of {len(items):,} records" + (f", {place + 1:,} to {place + len(shown):,}" if shown else "")
    return page(f"<p><b>{text(about)}</b></p>", *(record(one) for one in shown)), place


def record(item: Item, title: str = "") -> str:
    """Return an item with its question, its answer and its verdict."""
    facts = [title, f"item {item.index}", item.subject, "" if item.right is not None else item.verdict]
    if item.right is not None and item.verdict not in ("pass", "fail"):
        facts.append(item.verdict)
    head = " · ".join(filter(None, facts))
    return (
        f'<article class="record"><p>{mark(item.right)} <small>{text(head)}</small></p>'
        f"{block(item.prompt[:MOST_LETTERS], 'asked')}{block(item.answer[:MOST_LETTERS] or '(nothing)')}</article>"
    )


def mark(right: bool | None) -> Markup:
    """Return a verdict as a word in its colour."""
    kind = {True: "finished", False: "wrong", None: ""}[right]
    return Markup(f'<span class="state {kind}">{RIGHT[right]}</span>')
