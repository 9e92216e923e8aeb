"""`rollouts.jsonl`: the answers of the last steps with their rewards, for the page that the report writes."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.utils.files import parse_json, plain, read_bytes, write_atomic

FILE = "rollouts.jsonl"
MOST_PER_STEP = 64  # answers that are kept of a step
MOST_CHARS = 8_000  # of a prompt or an answer


class RolloutLog:
    """Keeps the first answers of the last `steps` steps in the folder of a stage; the file has at most twice as many.

    A resumed training leaves out what was written of steps that come again.
    """

    def __init__(self, folder: Path, steps: int, tokenizer: Any):
        self.path, self.steps, self.tokenizer = folder / FILE, steps, tokenizer
        self.written: int | None = None  # steps in the file; None before the first one

    def add(self, step: int, rows: Sequence[dict]) -> None:
        """Append the answers of a step, of which each row has ids, mask, n_prompt and numbers to be shown."""
        lines = [json.dumps(plain(self.record(step, row))) + "\n" for row in rows[:MOST_PER_STEP]]
        if self.written is None or self.written >= 2 * self.steps:
            kept = self.before(step)
            self.written = len({number for number, _ in kept})
            write_atomic(self.path, "".join(line for _, line in kept))
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error}); or set stage.keep_rollouts=0") from error
        self.written += 1

    def before(self, step: int) -> list[tuple[int, str]]:
        """Return (step, line) of the last steps in the file that come before `step`; a damaged file counts as none."""
        try:
            lines = read_bytes(self.path).decode().splitlines(keepends=True)
            found = [(parse_json(line.encode(), self.path)["step"], line) for line in lines if line.endswith("\n")]
            known = sorted({number for number, _ in found if number < step})[1 - self.steps or len(found) :]
        except (OSError, UserError, ValueError, KeyError, TypeError):
            return []
        return [(number, line) for number, line in found if number in known]

    def record(self, step: int, row: dict) -> dict[str, Any]:
        """Return the line of an answer, its text in pieces [text, 1 where it was sampled, else 0]."""
        row = dict(row)
        ids, mask, n_prompt = row.pop("ids"), row.pop("mask"), row.pop("n_prompt")
        pieces, left = [], MOST_CHARS
        for sampled, run in groupby(zip(ids[n_prompt:], mask[n_prompt:], strict=True), key=lambda pair: pair[1]):
            text = self.tokenizer.decode([one for one, _ in run])[:left]
            pieces, left = [*pieces, [text, sampled]], left - len(text)
        return {"step": step, "prompt": self.tokenizer.decode(ids[:n_prompt])[-MOST_CHARS:], "pieces": pieces, **row}
