"""Labels pairs of answers: which of two is better. They are saved as the rows that stage=reward and stage=dpo read.

A set of labels has two files below paths.data: labels/<name>.jsonl, rows {prompt, chosen, rejected} of what was
preferred, and votes/<name>.jsonl, every decision with both answers and who wrote them, from which the rows are made.
"""

import json
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.panel.form import assigned
from llm.panel.models import PanelModels
from llm.panel.records import read_items
from llm.panel.state import Panel
from llm.run.lock import waiting_lock
from llm.tokenizer.chat_format import PART_MARKS, message_parts
from llm.utils.files import parse_json, read_bytes, write_atomic
from tasks.preferences import PreferenceReader

CHOICES = ("left", "right", "tie", "skip")
NAME = re.compile(r"[A-Za-z0-9][\w-]{0,60}")
MOST_QUESTIONS = 16  # that are answered at once
MOST_VOTES = 100_000  # of one set
MOST_BYTES = 1 << 28
TEST = "5%"  # of the rows are held out, as docs/data.md has it for preferences


@dataclass(frozen=True)
class Pair:
    """Two answers to a question, in the order in which they are shown; left_from, right_from: who wrote them."""

    question: str
    left: str
    right: str
    left_from: str
    right_from: str


class Labels:
    """A set of labels by its name. Every method that writes is refused where the panel only shows."""

    def __init__(self, panel: Panel, name: str) -> None:
        name = name.strip()
        if not NAME.fullmatch(name):
            raise UserError(f"{name[:40]!r}: a set of labels has a name of letters, digits, - and _")
        self.panel, self.name = panel, name
        folder = panel.folders[-1]
        self.rows_file, self.votes_file = folder / "labels" / f"{name}.jsonl", folder / "votes" / f"{name}.jsonl"

    def votes(self) -> list[dict[str, Any]]:
        """Return all decisions, the oldest first: the fields of a pair, `choice` and `time`."""
        try:
            lines = read_bytes(self.votes_file, MOST_BYTES).splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.votes_file} cannot be read ({error.strerror})") from error
        found = [parse_json(line, self.votes_file) for line in lines if line.strip()]
        wanted = {*Pair.__dataclass_fields__, "choice"}
        if wrong := [vote for vote in found if not isinstance(vote, dict) or not wanted <= vote.keys()]:
            raise UserError(f"{self.votes_file}: {str(wrong[0])[:80]} is no decision; move the file away")
        return found

    def add(self, pair: Pair, choice: str) -> None:
        """Keep a decision. Raises UserError for an unknown one, and for a pair that no stage could be trained on."""
        self.panel.check_may_change()
        if choice not in CHOICES:
            raise UserError(f"{choice}: choose one of {', '.join(CHOICES)}")
        vote = asdict(pair) | {"choice": choice, "time": round(time.time())}
        if (row := row_of(vote)) is not None:
            PreferenceReader({}, "data.preferences").read(row, "this pair")
        self.votes_file.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(self.votes_file.with_suffix(".lock")):
            votes = self.votes()
            if len(votes) >= MOST_VOTES:
                raise UserError(f"{self.name} has {len(votes):,} decisions; begin another set")
            self._write([*votes, vote])

    def undo(self) -> Pair | None:
        """Take the last decision back and return its pair; None where there is none."""
        self.panel.check_may_change()
        if not self.votes_file.is_file():
            return None
        with waiting_lock(self.votes_file.with_suffix(".lock")):
            votes = self.votes()
            if not votes:
                return None
            last = votes.pop()
            self._write(votes)
        return Pair(**{key: last[key] for key in Pair.__dataclass_fields__})

    def _write(self, votes: Sequence[dict[str, Any]]) -> None:
        """Write both files: a crash between the two is mended by the next decision."""
        self.rows_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.votes_file, _lines(votes))
        write_atomic(self.rows_file, _lines([row for vote in votes if (row := row_of(vote)) is not None]))


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def sets_of(panel: Panel) -> list[str]:
    """Return the names of all sets of labels."""
    return sorted(path.stem for path in (panel.folders[-1] / "votes").glob("*.jsonl"))


def row_of(vote: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of preferences that a decision makes; None for a tie and for a pair that was skipped."""
    if vote["choice"] not in ("left", "right"):
        return None
    other = "right" if vote["choice"] == "left" else "left"
    return {"prompt": vote["question"], "chosen": _answer(vote[vote["choice"]]), "rejected": _answer(vote[other])}


def _answer(content: str) -> str | list[dict[str, Any]]:
    """Return an answer as a row has it: a text, or a message of parts where a tool was called in it."""
    if not any(mark in content for marks in PART_MARKS.values() for mark in marks):
        return content
    return [{"role": "assistant", "content": message_parts(content)}]


def tally(votes: Sequence[dict[str, Any]]) -> list[tuple[str, str, int, int, int]]:
    """Return (A, B, wins of A, ties, wins of B) of each pair of writers; pairs of one stage alone are left out."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for vote in votes:
        writers = vote["left_from"], vote["right_from"]
        if writers[0] == writers[1] or vote["choice"] == "skip":
            continue
        a, b = sorted(writers)
        winner = {"left": writers[0], "right": writers[1]}.get(vote["choice"], "tie")
        counts.setdefault((a, b), Counter())[winner] += 1
    return [(a, b, found[a], found["tie"], found[b]) for (a, b), found in counts.items()]


def draw_pairs(
    models: PanelModels, questions: Sequence[str], one: str, other: str, temperature: float, length: int, seed: int
) -> tuple[list[Pair], int]:
    """Return pairs of answers in a random order of sides, and how many questions got two equal answers.

    one, other: stages that answer; one that is named twice answers twice. seed: of answers and sides.
    """
    questions = [question.strip() for question in questions if question.strip()]
    if not 1 <= len(questions) <= MOST_QUESTIONS:
        raise UserError(f"{len(questions)} questions are given; 1 to {MOST_QUESTIONS} are answered at once")
    if one == other and temperature <= 0:
        raise UserError("temperature 0 gives one answer twice: raise the temperature, or choose a second stage")
    params = SamplingParams(temperature=temperature, max_new_tokens=length, seed=seed)
    if one == other:
        answers = models.texts(one, questions, params, samples=2)
    else:
        both = [models.texts(name, questions, params) for name in (one, other)]
        answers = [[a, b] for (a,), (b,) in zip(*both, strict=True)]
    sides, pairs = random.Random(seed), []
    for question, (a, b) in zip(questions, answers, strict=True):
        sided = [(a.strip(), one), (b.strip(), other)]
        sides.shuffle(sided)
        (left, left_from), (right, right_from) = sided
        if left and right and left != right:
            pairs.append(Pair(question, left, right, left_from, right_from))
    return pairs, len(questions) - len(pairs)


def recorded_questions(panel: Panel, name: str, part: str, n: int, seed: int) -> list[str]:
    """Return `n` questions of the records of a stage, drawn by `seed`."""
    found = list(dict.fromkeys(one.prompt for one in read_items(Path(panel.index.row(name)["folder"]), part)))
    return random.Random(seed).sample(found, min(n, len(found)))


def settings_for(labels: Labels, data: str) -> list[str]:
    """Return the settings by which stage=reward and stage=dpo train on a set, where a data option takes it so.

    data: name of the option, as run.json has it under `options`. [] where a file must describe the source, `option_of`.
    """
    if data != "embedded":
        return []
    source = "data.preferences.politeness"  # one of its own sources makes room
    changed = {"source": "local", "train": labels.rows_file, "test": TEST}
    words = [assigned(f"{source}.{key}", content) for key, content in changed.items()]
    return [*words, f"~{source}.options.rule", "stage.preferences=[politeness]"]


def option_of(labels: Labels, data: str) -> str:
    """Return a data option, the text of a file data/<name>.yaml, that adds a set to the option `data`."""
    path = json.dumps(str(labels.rows_file), ensure_ascii=False)
    source = f"{{type: preference, source: local, train: {path}, test: {TEST}}}"
    return f"defaults:\n  - {data}\n  - _self_\npreferences:\n  {labels.name}: {source}\n"
