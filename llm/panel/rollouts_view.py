"""Builds the Rollouts tab: answers of reinforcement learning, question by question, rewards by source, advantages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import UserError
from llm.panel.chart import Line, draw
from llm.panel.curves import curve, fewer
from llm.panel.index import Row
from llm.panel.markup import block, page, problem, section, table, text
from llm.panel.runs_view import name_of
from llm.panel.state import Panel
from llm.report.rollouts_page import FILE, from_rows, readable_pieces
from llm.tokenizer.chat_format import readable

LAST = "last"  # the latest step that the file has
ALL, MIXED, SAME = "all", "answers that differ", "all alike"
PER_PAGE = 4  # questions
DRAWN = ("reward", "reward_std", "response_len", "truncated", "entropy", "kl")  # columns of metrics.csv
MOST_LETTERS = 6000
ROLES = {"<|user_start|>": "", "<|user_end|>": "\n", "<|assistant_start|>": "", "<|bos|>": "", "<|assistant_end|>": ""}


@dataclass(frozen=True)
class Rollout:
    """An answer of a step. pieces: (text, whether it was sampled); rewards: by source; advantage: of its tokens."""

    step: int
    question: int
    prompt: str
    pieces: tuple[tuple[str, bool], ...]
    rewards: dict[str, float]
    reward: float
    advantage: float
    length: int
    finish: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Rollout":
        """Read a line of rollouts.jsonl. Raises KeyError, TypeError or ValueError for one that is none."""
        pieces = [(str(content), bool(sampled)) for content, sampled in row["pieces"]]
        shown = zip(readable_pieces([content for content, _ in pieces]), pieces, strict=True)
        rewards = {str(name): float(number) for name, number in row["rewards"].items()}
        numbers = float(row["reward"]), float(row["advantage"]), int(row["length"])
        own = tuple((content, sampled) for content, (_, sampled) in shown)
        return cls(
            int(row["step"]), int(row["question"]), str(row["prompt"]), own, rewards, *numbers, str(row["finish"])
        )


def with_rollouts(panel: Panel) -> list[str]:
    """Return the stages that have kept rollouts, as run/stage."""
    return [name_of(row) for row in panel.index.rows() if (Path(row["folder"]) / FILE).is_file()]


def read_rollouts(row: Row) -> tuple[Rollout, ...]:
    """Return the answers of a stage, the latest step first. Raises UserError where its file cannot be read."""
    folder = Path(row["folder"])
    try:
        return _read(folder, (folder / FILE).stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{folder / FILE} cannot be read ({error.strerror})") from error


@lru_cache(maxsize=4)
def _read(folder: Path, changed: int) -> tuple[Rollout, ...]:
    found = from_rows(folder, lambda rows: [Rollout.of(row) for row in rows])
    return tuple(sorted(found, key=lambda one: -one.step))  # stable: questions stay in the order of the step


def steps_of(panel: Panel, name: str | None) -> list[str]:
    """Return the steps that a stage has answers of, latest first, as metrics.csv numbers them; [] for none."""
    try:
        return [str(step + 1) for step in dict.fromkeys(one.step for one in read_rollouts(panel.index.row(name or "")))]
    except UserError:
        return []


def stamp_of(panel: Panel, name: str | None) -> tuple:
    """Return what changes whenever the rollouts of a stage do; the name comes first."""
    try:
        facts = (Path(panel.index.row(name or "")["folder"]) / FILE).stat()
    except (UserError, OSError):
        return (name, 0, 0)
    return (name, facts.st_mtime_ns, facts.st_size)


def rollouts_page(panel: Panel, name: str | None, step: str, kind: str, place: int) -> tuple[str, int]:
    """Return curves of the rewards and one page of questions of a step, and the place of its first question.

    step: as `steps_of` has it, or last. kind: all questions, those whose answers got different rewards, or one reward.
    """
    if not name:
        return page(
            "<p>Choose a stage of reinforcement learning: grpo, ppo and their kin keep their last steps.</p>"
        ), 0
    try:
        row = panel.index.row(name)
        found = read_rollouts(row)
        charts = section("Curves", _curves(panel, row))
    except UserError as error:
        return page(problem(str(error))), 0
    if not found:
        return page(charts, "<p>No step has been kept yet.</p>"), 0
    latest = found[0].step if step in ("", LAST) or not step.isdecimal() else int(step) - 1
    own = [one for one in found if one.step == latest]
    groups = [list(group) for _, group in groupby(own, key=lambda one: one.question)]
    fit = [group for group in groups if kind == ALL or (len({one.reward for one in group}) > 1) == (kind == MIXED)]
    place = max(0, min(place, (len(fit) - 1) // PER_PAGE * PER_PAGE))
    shown = fit[place : place + PER_PAGE]
    largest = max((abs(one.advantage) for one in own), default=0.0) or 1.0
    span = min((one.reward for one in own), default=0.0), max((one.reward for one in own), default=0.0)
    count = f"step {latest + 1}: {len(fit)} of {len(groups)} questions"
    count += f", {place + 1} to {place + len(shown)}" if shown else ""
    legend = "Dotted text was written by a tool or the task and is not trained on. Green is good, red is bad."
    return page(
        charts,
        section("Rewards by source", by_source(own)),
        f"<p><b>{text(count)}</b>. {legend}</p>",
        *(_question(group, largest, span) for group in shown),
    ), place


def by_source(rollouts: Sequence[Rollout]) -> str:
    """Return a table of rewards: mean, standard error, lowest and highest of each source; "" without answers.

    Answers to one question are much alike, so the error is that of the means of the questions.
    """
    if not rollouts:
        return ""
    sources = {"all together": [(one.question, one.reward) for one in rollouts]}
    for name in dict.fromkeys(name for one in rollouts for name in one.rewards):
        sources[name] = [(one.question, one.rewards[name]) for one in rollouts if name in one.rewards]
    lines = []
    for name, pairs in sources.items():
        of_question: dict[int, list[float]] = {}
        for question, number in pairs:
            of_question.setdefault(question, []).append(number)
        means, numbers = [np.mean(own) for own in of_question.values()], [number for _, number in pairs]
        error = f"{np.std(means, ddof=1) / len(means) ** 0.5:.3g}" if len(means) > 1 else "-"
        mean, low, high = (f"{number:.4g}" for number in (np.mean(numbers), min(numbers), max(numbers)))
        lines.append([name, mean, error, low, high, len(numbers)])
    return table(["source", "mean", "s.e.", "lowest", "highest", "answers"], lines, range(1, 6), "rewards by source")


def _curves(panel: Panel, row: Row) -> str:
    """Return charts of the columns that tell of rewards and answers."""
    names = [name for name in panel.columns.names(row["folder"]) if name in DRAWN or name.startswith("reward/")]
    names.sort(key=lambda name: DRAWN.index(name) if name in DRAWN else 0)
    lines = {name: Line(name_of(row), *fewer(*curve(panel.columns, row["folder"], name))) for name in names}
    charts = "".join(draw(name, [line], "step") for name, line in lines.items())
    return f'<div class="charts">{charts}</div>' if charts else ""


def _question(group: Sequence[Rollout], largest: float, span: tuple[float, float]) -> str:
    """Return a question with its answers, those with the highest advantage first; equal ones stand there once."""
    mean = float(np.mean([one.reward for one in group]))
    alike: dict[tuple[Any, ...], list[Rollout]] = {}
    for one in sorted(group, key=lambda one: -one.advantage):
        alike.setdefault((one.pieces, one.advantage, one.reward, one.finish), []).append(one)
    answers = "".join(_answer(same[0], len(same), largest, span) for same in alike.values())
    return (
        f'<article class="record"><p><b>question {group[0].question}</b> <small>{len(group)} answers, mean reward '
        f"{mean:.3g}</small></p>{block(_asked(group[0].prompt), 'asked')}{answers}</article>"
    )


def _asked(prompt: str) -> str:
    """Return a rendered prompt as a person reads it: without the marks of turns."""
    for mark, sign in ROLES.items():
        prompt = prompt.replace(mark, sign)
    return readable(prompt).strip()[-MOST_LETTERS:]


def _answer(one: Rollout, times: int, largest: float, span: tuple[float, float]) -> str:
    low, high = span
    place = (one.reward - low) / (high - low) * 2 - 1 if high > low else 0.0
    several = len(one.rewards) > 1 or list(one.rewards.values()) != [one.reward]
    sources = "".join(f"<span>{text(name)} {number:.3g}</span>" for name, number in one.rewards.items() if several)
    count = f"<b>× {times}</b>" if times > 1 else ""
    cut = "" if one.finish == "stop" else f"<span>ended by {text(one.finish)}</span>"
    shown, left = [], MOST_LETTERS
    for content, sampled in one.pieces:
        for mark, sign in ROLES.items():
            content = content.replace(mark, sign)
        piece = text(content[: max(left, 0)])
        shown.append(piece if sampled else f'<span class="forced">{piece}</span>')
        left -= len(content)
    return (
        f'<div class="rollout">{count}{coloured(f"advantage {one.advantage:+.3g}", one.advantage / largest)}'
        f"{coloured(f'reward {one.reward:.3g}', place)}{sources}<span>{one.length:,} tokens</span>{cut}"
        f'<pre class="block" tabindex="0">{"".join(shown)}</pre></div>'
    )


def coloured(content: str, place: float) -> str:
    """Return a text on a colour. place: from -1 (bad) over 0 (none) to 1 (good)."""
    kind, strength = ("good" if place >= 0 else "bad"), round(min(abs(place), 1.0) * 45)
    return f'<span class="tint {kind}" style="--much: {strength}%">{text(content)}</span>'
