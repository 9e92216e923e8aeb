"""A mixture of tasks as one shuffled sequence of conversations."""

from collections.abc import Iterator, Sequence
from math import floor

import numpy as np

from llm.errors import UserError
from tasks.base import Task


class Mixture:
    """Conversations of several tasks in one global, deterministic order.

    entries: (task, repeats) pairs. `repeats` 2 shows every conversation twice, 0.5 only the first half of the task, 1.5
    all of it and the first half again, 0 none. The order is a permutation drawn from `seed`, 8 bytes per conversation.
    """

    def __init__(self, entries: Sequence[tuple[Task, float]], seed: int = 42):
        for task, repeats in entries:
            if not repeats >= 0:
                raise UserError(f"mixture: repeats of {task.name} are {repeats}, they cannot be negative")
        self.tasks = [task for task, _ in entries]
        counts = [row_count(task, repeats) for task, repeats in entries]
        self.starts = np.cumsum([0, *counts])
        self.order = np.random.default_rng(seed).permutation(int(self.starts[-1]))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict:
        entry, row = self.locate(index)
        return self.tasks[entry][row]

    def __iter__(self) -> Iterator[dict]:
        return (self[i] for i in range(len(self)))

    def locate(self, index: int) -> tuple[int, int]:
        """Return (number of the task, number of its row) at `index`. Raises IndexError."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        position = self.order[index]
        entry = int(np.searchsorted(self.starts, position, side="right")) - 1
        return entry, int(position - self.starts[entry]) % len(self.tasks[entry])


def row_count(task: Task, repeats: float) -> int:
    """Return how many conversations of a task a mixture holds."""
    return floor(len(task) * repeats + 1e-9)
