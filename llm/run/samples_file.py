"""`samples.jsonl` of a stage: what the model said to the same prompts while it trained, a line for each time.

A line is {"step": 500, "samples": [{"prompt": "The", "completion": " cat sat."}, ...]}.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm.errors import UserError, reason_of
from llm.run.formats import SAMPLED
from llm.utils.files import MOST_BYTES, parse_json, plain, read_bytes, write_atomic

FILE = "samples.jsonl"
LARGE = 1 << 22  # bytes from which on every second step is left out


class SamplesFile:
    """Writes the samples of a stage as they are drawn; one process does.

    Of a training that was resumed, or taken back to a checkpoint, steps that come again are written anew. The file
    stays small: when it has grown to `LARGE`, every second step leaves it, so that the whole training remains in view.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.last = Path(folder), None  # the last step in the file; None before the first call of `add`

    def add(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Append the (prompt, completion) pairs of a step. Raises UserError where the file cannot be written."""
        path = self.folder / FILE
        said = [{"prompt": prompt, "completion": completion} for prompt, completion in samples]
        line = json.dumps(plain({"step": step, "samples": said})) + "\n"
        if self.last is None or step <= self.last:
            kept = [old for number, old in self._lines() if number < step]
            write_atomic(path, "".join([*kept, line]))
        elif path.is_file() and path.stat().st_size + len(line) > LARGE:
            write_atomic(path, "".join([*(old for _, old in self._lines()[::2]), line]))
        else:
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                raise UserError(f"cannot write {path}: {reason_of(error, path)}") from error
        self.last = step

    def _lines(self) -> list[tuple[int, str]]:
        """Return (step, line) of what is in the file; a damaged one counts as empty."""
        try:
            return [(entry["step"], json.dumps(entry) + "\n") for entry in read_samples(self.folder)]
        except UserError:
            return []


def read_samples(folder: str | Path) -> list[dict[str, Any]]:
    """Return [{"step", "samples": [{"prompt", "completion"}]}] of a stage folder, oldest first; [] without a file.

    A last line that is being written is left out. Raises UserError for a file that cannot be read or has a wrong value.
    """
    path = Path(folder) / FILE
    try:
        content = read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error, path)}") from error
    entries = []
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            entry, where = parse_json(line, path), f"{path}: line {number}"
            SAMPLED(entry, where)
            entries.append(entry)
    return entries
