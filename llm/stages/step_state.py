"""State of a training from step to step beside weights and optimizer: values to log, progress, wishes, losses.

`StepModule` holds one of each; callbacks read and write them. What a resumed run needs of them is in its checkpoints.
"""

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from llm.errors import BadLoss
from llm.parallel import collectives


@dataclass
class StepLog:
    """Values on their way to metrics.csv: the row of this step, and the losses since the last row."""

    row: dict[str, float | None] = field(default_factory=dict)  # values of the current step waiting to be logged
    latest: dict[str, float] = field(default_factory=dict)  # last value of everything logged so far
    logged_steps: set[int] = field(default_factory=set)  # those with a row in metrics.csv when the training began
    nats: float = 0.0  # summed loss since the last row
    trained: int = 0  # tokens with a loss since the last row
    is_written: bool = False  # by `MetricsLog`: rows go to metrics.csv and to Lightning
    numbers: dict[str, list[float]] = field(default_factory=dict)  # that came with the batches since the last row

    def add_step(self, nats: float, trained: int, numbers: dict[str, float]) -> None:
        """Count a step: its summed loss over `trained` tokens, and the numbers that came with its batch."""
        self.nats += nats
        self.trained += trained
        self.add_numbers(numbers)

    def add_numbers(self, numbers: dict[str, float]) -> None:
        """Note further numbers of a step, whose means since the last row are logged."""
        for name, value in numbers.items():
            self.numbers.setdefault(name, []).append(value)

    def flush(self) -> dict[str, float]:
        """Return mean training loss per token in nats, and means of the batches' numbers, since the last flush."""
        values = {name: sum(seen) / len(seen) for name, seen in self.numbers.items()}
        if self.trained:
            values["loss"] = self.nats / self.trained
        self.nats, self.trained, self.numbers = 0.0, 0, {}
        return values

    def take_row(self) -> dict[str, float | None]:
        """Return the row of this step and begin an empty one."""
        row, self.row = self.row, {}
        return row

    def state_dict(self) -> dict:
        return {"nats": self.nats, "trained": self.trained, "metrics": self.numbers}

    def load_state_dict(self, state: dict) -> None:
        self.nats, self.trained, self.numbers = state["nats"], state["trained"], state["metrics"]


class Sent:
    """Numbers of a device on their way to the host, which do not wait for what the device is given to do after them."""

    def __init__(self, numbers: torch.Tensor):
        self.arrived = torch.cuda.Event() if numbers.device.type == "cuda" else None
        if self.arrived is None:
            self.numbers = numbers
        else:
            self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.arrived.record()

    def get(self) -> torch.Tensor:
        """Wait until the numbers are here, and return them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers


@dataclass
class Progress:
    """Tokens trained so far, and the time that went elsewhere."""

    tokens: int = 0  # positions trained on by all processes
    paused_seconds: float = 0.0  # spent in evaluations and checkpoints, see callbacks.cadence
    doing: str | None = None  # which of them, in a word, at this moment


@dataclass
class Votes:
    """Wishes of this process, and how many processes have each of them, as all of them know after a step."""

    stop: bool = False
    checkpoint: bool = False
    stop_count: int = 0
    checkpoint_count: int = 0
    is_stopped: bool = False  # whether a signal ends this sitting, as all of them have agreed

    def cast(self) -> list[float]:
        """Return the wishes as numbers to be summed over the processes."""
        return [float(self.stop), float(self.checkpoint)]

    def count(self, sums: list[float]) -> None:
        """Take the sums of what all processes have cast."""
        self.stop_count, self.checkpoint_count = (int(number) for number in sums)


class Budget:
    """Wall-clock budget of a training in seconds, over all its sittings: the schedules end when it does.

    used: share that is spent, as all processes agreed in the last step, or read from a checkpoint.
    """

    def __init__(self, minutes: float | None):
        self.seconds = math.inf if minutes is None else 60 * minutes
        self.before, self.begun, self.used = 0.0, time.perf_counter(), 0.0

    def start(self) -> None:
        """Begin to count: the first step is next."""
        self.begun = time.perf_counter()

    def resume(self, seconds: float) -> None:
        """Go on behind earlier sittings of that many seconds."""
        self.before, self.used = seconds, seconds / self.seconds

    def spent(self) -> float:
        """Return the seconds that this process has trained, in earlier sittings too."""
        return self.before + time.perf_counter() - self.begun

    def place(self, step: int, total: int) -> float:
        """Return the step of `total` that the schedules are at: by the clock where that is further than `step`."""
        return max(step, min(self.used, 1.0) * total)


class Sums:
    """Adds up numbers of a step over micro-batches and processes; of a name that ends in _max the largest is kept."""

    def __init__(self):
        self._values: dict[str, torch.Tensor] = {}
        self._sent: Sent | None = None

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add numbers, tensors () on the device, of one micro-batch."""
        for name, value in values.items():
            old = self._values.get(name)
            both = torch.maximum if name.endswith("_max") else torch.add
            self._values[name] = value if old is None else both(old, value)

    def send(self) -> None:
        """Send the numbers to the host: no more are added. `total` does it where nobody did before."""
        if self._values:
            self._sent = Sent(torch.stack([value.float() for value in self._values.values()]))

    def total(self) -> dict[str, float]:
        """Return the numbers of all processes together."""
        if self._sent is None:
            self.send()
        numbers = [] if self._sent is None else self._sent.get().tolist()
        every = collectives.all_gather_object(dict(zip(self._values, numbers, strict=True)))
        names = dict.fromkeys(name for one in every for name in one)
        return {n: (max if n.endswith("_max") else sum)(one[n] for one in every if n in one) for n in names}


class LossWatch:
    """Judges mean losses per step: `limit` nats above the median of the last 50 is a jump that no training has."""

    def __init__(self, limit: float = math.inf):
        self.limit = limit
        self.recent: deque[float] = deque(maxlen=50)

    def check(self, loss: float, step: int) -> None:
        """Remember the mean loss of the optimizer step `step`. Raises `BadLoss` where it jumped."""
        if len(self.recent) == self.recent.maxlen:
            usual = statistics.median(self.recent)
            if loss > usual + self.limit:
                limit = f"by more than watch.loss_jump={self.limit}"
                problem = f"the training loss jumped from {usual:.3f} to {loss:.3f} in step {step}, {limit}"
                raise BadLoss(step, problem, True)
        self.recent.append(loss)
