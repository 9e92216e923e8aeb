"""Builds the Runs tab: the table of stages, and the page of one of them."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.panel.chart import Line, draw
from llm.panel.columns import Columns
from llm.panel.curves import curve, fewer
from llm.panel.defaults import differences_from_defaults
from llm.panel.index import Row
from llm.panel.markup import Markup, block, page, problem, section, table, text
from llm.panel.notes import Note
from llm.panel.state import Panel
from llm.run.config_diff import diff_configs
from llm.run.content import read_content
from llm.run.formats import read_scores
from llm.run.samples_file import read_samples
from llm.run.stage_folder import read_manifest
from llm.tokenizer.chat_format import readable
from llm.utils.format import amount, dollars, duration, in_bytes, value

HEADER = ("stage", "state", "steps", "tokens", "bpb", "loss", "minutes", "dollars", "parent", "tags", "note")
NUMERIC = ("steps", "tokens", "bpb", "loss", "minutes", "dollars")
MOST_SCORES = 8  # columns of the table for scores beside bpb and loss
MOST_CHARTS = 12
MOST_SAMPLES = 12
MOST_TIMES = 8  # steps of which samples are shown
FIRST = ("bpb", "loss", "reward", "lr", "tok_per_s", "ms_per_step")  # curves
NOT_DRAWN = ("tokens", "flops", "seconds")  # axes of curves
CONDITION = re.compile(r"([^<>=!\s]+?)(<=|>=|!=|=|<|>)(\S+)")
NO_NOTE = Note()


def name_of(row: Row) -> str:
    """Return run/stage."""
    return f"{row['run']}/{row['stage']}"


def states_of(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    """Return (name, state) of every stage."""
    return tuple((name_of(row), row["status"]) for row in rows)


def run_table(
    rows: Sequence[Row], notes: Mapping[str, Note], query: str = "", state: str = "all"
) -> tuple[list[str], list[list[Any]]]:
    """Return (header, lines) of the table: stages that fit a query, newest first.

    query: words that name, tags or note contain, and conditions on facts and scores such as bpb<1.5. state: running,
    interrupted or finished; all = any. Raises UserError for a condition without a number where it takes one.
    """
    shown = [row for row in rows if state in ("all", row["status"])]
    shown = [row for row in shown if _fits(row, notes.get(name_of(row), NO_NOTE), query)]
    shown.sort(key=lambda row: row["started"] or "", reverse=True)
    counts: dict[str, int] = {}
    for row in shown:
        for score in row["scores"]:
            counts[score] = counts.get(score, 0) + 1
    more = sorted((name for name in counts if _is_score(name)), key=lambda name: -counts[name])[:MOST_SCORES]
    lines = []
    for row in shown:
        note, scores = notes.get(name_of(row), NO_NOTE), row["scores"]
        total = f" of {row['total']}" if row["status"] != "finished" and row["total"] else ""
        minutes = None if row["seconds"] is None else round(row["seconds"] / 60, 1)
        cells = [name_of(row), row["status"] + total, row["steps"], row["tokens"], _rounded(scores.get("bpb"))]
        cells += [_rounded(scores.get("loss")), minutes, _rounded(row["cost"]), row["parent"] or "", *note]
        lines.append([*cells, *(_rounded(scores.get(name)) for name in more)])
    return [*HEADER, *more], lines


def _is_score(name: str) -> bool:
    return name not in ("bpb", "loss", "lr", *NOT_DRAWN) and not name.startswith(("core/", "lr/", "bytes_per_token_"))


def _rounded(number: Any) -> Any:
    return float(f"{number:.5g}") if isinstance(number, float) else number


def _fits(row: Row, note: Note, query: str) -> bool:
    where = f"{name_of(row)} {note.tags} {note.note} {row['status']}".lower()
    known = {**row, **row["scores"], "tags": note.tags, "note": note.note}
    for word in query.split():
        condition = CONDITION.fullmatch(word)
        if condition is None or condition[1] not in known:
            if word.lower() not in where:
                return False
        elif not _holds(known.get(condition[1]), condition[2], condition[3], word):
            return False
    return True


def _holds(found: Any, sign: str, wanted: str, word: str) -> bool:
    try:
        number = float(wanted)
    except ValueError:
        if sign not in ("=", "!="):
            raise UserError(f"{word}: {sign} needs a number, as in bpb{sign}1.5") from None
        return (str(found) == wanted) == (sign == "=")
    if not isinstance(found, int | float):
        return sign == "!="
    low, equal = found < number, found == number
    return {"<": low, "<=": low or equal, ">": not (low or equal), ">=": not low, "=": equal, "!=": not equal}[sign]


def live_page(panel: Panel, name: str) -> str:
    """Return what changes while a stage trains: state, progress, scores, curves and samples."""
    try:
        row = panel.index.row(name)
        parts = [section("Scores", scores_table([row])), section("Curves", curves(panel.columns, row))]
        parts.append(section("Samples over time", samples_over_time(Path(row["folder"]))))
    except UserError as error:
        return page(problem(str(error)))
    return page(f"<h3>{text(name)}</h3>", progress(row), *parts)


def rest_page(panel: Panel, name: str, other: str | None = None) -> str:
    """Return the rest of the page of a stage. other: run/stage whose configuration it is compared with."""
    try:
        row = panel.index.row(name)
        manifest = read_manifest(row["folder"]) or {}
    except UserError:
        return ""  # `live_page` says why
    folder = Path(row["folder"])
    return page(
        section("Facts", facts(row, manifest)),
        section("Lineage", lineage(panel.index.rows(), name)),
        section("Samples of the last evaluation", samples(folder)),
        section("Configuration: what differs from the defaults", _changed(manifest, row)),
        section(f"Configuration: what differs from {other}", _against(panel, manifest, other)) if other else "",
        section("Files", files(folder), opened=False),
    )


def progress(row: Row) -> str:
    """Return a line with state and steps, with a bar where the end is known."""
    state = f'<span class="state {text(row["status"])}">{text(row["status"])}</span>'
    steps, total = row["steps"], row["total"]
    if not total or steps is None:
        return f"<p>{state}</p>"
    share = min(1.0, steps / total)
    left = ""
    if row["status"] == "running" and row["seconds"] and steps:
        left = f", about {duration(row['seconds'] / steps * (total - steps))} left"
    bar = f'<progress value="{share:.4f}" max="1" aria-label="progress of the training"></progress>'
    return f"<p>{state} step {steps:,} of {total:,}{text(left)}</p>{bar}"


def facts(row: Row, manifest: Mapping[str, Any]) -> str:
    """Return a table of what a stage is, took and cost."""
    derived, machine = manifest.get("derived") or {}, manifest.get("environment") or {}
    gpus = [gpu["name"] for gpu in machine.get("gpus") or []]
    lines = {
        "parameters": amount(row["params"]) if row["params"] else None,
        "depth": row["depth"],
        "tokens": amount(row["tokens"]),
        "FLOPs": amount(row["flops"]),
        "time": duration(row["seconds"]),
        "dollars": None if row["cost"] is None else dollars(row["cost"]),
        "passes over the text": value(derived.get("text_passes"), digits=2),
        "seed": row["seed"],
        "started": (row["started"] or "")[:19].replace("T", " "),
        "finished": (row["finished"] or "")[:19].replace("T", " "),
        "machine": ", ".join(gpus) or machine.get("cpu"),
        "commit": (row["commit"] or "")[:10],
        "folder": row["folder"],
    }
    return table(["", ""], [[key, content] for key, content in lines.items() if content not in (None, "", "-")])


def scores_table(rows: Sequence[Row]) -> str:
    """Return the scores of stages side by side, with their standard errors; "" where nothing was measured."""
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    lines = []
    for name in names:
        cells = []
        for row in rows:
            number = row["scores"].get(name)
            cells.append(value(number, row["errors"].get(name)) if isinstance(number, int | float) else number or "-")
        lines.append([name, *cells])
    if not lines:
        return ""
    return table(["score", *map(name_of, rows)], lines, range(1, len(rows) + 1), "scores")


def curves(columns: Columns, row: Row, most: int = MOST_CHARTS) -> str:
    """Return charts of what metrics.csv holds of a stage."""
    names = [name for name in columns.names(row["folder"]) if name not in NOT_DRAWN]
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    charts = []
    for name in names[:most]:
        charts.append(draw(name, [Line(name_of(row), *fewer(*curve(columns, row["folder"], name)))], "step"))
    more = f"<p>Not drawn here: {text(', '.join(names[most:]))}; Compare draws them.</p>" if names[most:] else ""
    return f'<div class="charts">{"".join(charts)}</div>{more}' if charts else ""


def lineage(rows: Sequence[Row], name: str) -> str:
    """Return the tree from the first ancestor of a stage down to all that was made from it."""
    parents = {name_of(row): row["parent"] for row in rows}
    root, seen = name, {name}
    while (above := parents.get(root)) and above not in seen:
        root = above
        seen.add(above)
    states = {name_of(row): row for row in rows}
    children: dict[str, list[str]] = {}
    for child, parent in parents.items():
        children.setdefault(parent or "", []).append(child)

    def branch(at: str, above: tuple[str, ...]) -> str:
        row = states.get(at)
        bpb = row["scores"].get("bpb") if row else None
        more = f" bpb {bpb:.4g}" if isinstance(bpb, int | float) else ""
        state = f"{row['status']}{more}" if row else "not in this folder"
        own = f"<b>{text(at)}</b>" if at == name else text(at)
        below = "".join(branch(child, (*above, at)) for child in children.get(at, ()) if child not in (*above, at))
        return f"<li>{own} <small>{text(state)}</small>{f'<ul>{below}</ul>' if below else ''}</li>"

    return f'<ul class="tree">{branch(root, ())}</ul>'


def descendants(rows: Sequence[Row], run: str) -> list[str]:
    """Return the stages of other runs that start from one of this run."""
    return [name_of(row) for row in rows if row["run"] != run and (row["parent"] or "").partition("/")[0] == run]


def samples(folder: Path) -> str:
    """Return the answers that the last evaluation has kept."""
    try:
        found = read_scores(folder).get("samples") or []
    except UserError as error:
        return problem(str(error))
    pairs = (f"{one['prompt'].strip()}\n→ {readable(one['completion']).strip()}" for one in found[:MOST_SAMPLES])
    return "".join(block(pair) for pair in pairs)


def samples_over_time(folder: Path) -> str:
    """Return what the model said to each prompt while it trained, the latest step first; "" where nothing was kept.

    Of many steps the first and the last are shown, and as many between, evenly chosen.
    """
    try:
        entries = read_samples(folder)
    except UserError as error:
        return problem(str(error))
    said: dict[str, list[list[str]]] = {}
    for entry in entries:
        for one in entry["samples"]:
            said.setdefault(one["prompt"], []).append([f"{entry['step']:,}", one["completion"].strip()])
    parts = []
    for prompt, rows in list(said.items())[:MOST_SAMPLES]:
        last, most = len(rows) - 1, MOST_TIMES - 1
        places = range(len(rows)) if last <= most else [round(number * last / most) for number in range(MOST_TIMES)]
        shown = [rows[place] for place in reversed(places)]
        parts.append(f"<h4>{text(prompt.strip())}</h4>{table(['step', 'answer'], shown, (0,), 'samples by step')}")
    return "".join(parts)


def files(folder: Path) -> str:
    """Return the table of the files of a stage, with size and, where manifest.json lists it, the checksum."""
    sums: dict[str, dict[str, Any]] = {}
    lines = []
    try:
        sums = read_content(folder / "model")
    except UserError as error:
        lines.append([str(error), "", ""])
    for path in sorted(Path(inner, name) for inner, _, names in os.walk(folder) for name in names):
        try:
            size = path.stat().st_size
        except OSError:
            continue  # a training has replaced it meanwhile
        listed = sums.get(path.name, {}) if path.parent == folder / "model" else {}
        code = Markup(f"<code>{text(listed['sha256'])}</code>") if listed.get("sha256") else ""
        lines.append([path.relative_to(folder).as_posix(), in_bytes(size), code])
    return table(["file", "size", "SHA-256"], lines, (1,), "files")


def _changed(manifest: Mapping[str, Any], row: Row) -> str:
    try:
        found = differences_from_defaults(manifest.get("config") or {}, row["stage"])
    except UserError as error:
        return problem(str(error))
    return _differences(found, "default", "here")


def _against(panel: Panel, manifest: Mapping[str, Any], other: str) -> str:
    try:
        before = (read_manifest(panel.index.row(other)["folder"]) or {}).get("config") or {}
    except UserError as error:
        return problem(str(error))
    return _differences(diff_configs(before, manifest.get("config") or {}, ()), other, "here")


def _differences(found: Sequence[tuple[str, Any, Any]], before: str, after: str) -> str:
    if not found:
        return "<p>Nothing.</p>"
    return table(["key", before, after], [[key, _shown(old), _shown(new)] for key, old, new in found], name="keys")


def _shown(setting: Any) -> str:
    return "null" if setting is None else str(setting)
