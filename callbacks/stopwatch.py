"""Times of a training's parts, to know how long the next one will take."""

import time

import lightning as L
import torch

from llm.scaling.machine import cpu_share


class Stopwatch(L.Callback):
    """Measures this sitting: the first step, the others, and what evaluations and checkpoints took.

    It stands before the callbacks that act between steps. A step includes its wait for data. share: of its processors'
    time that the process has got; 1.0 on a GPU.
    """

    def __init__(self):
        self.begun: float | None = None  # when the first step began,
        self.second: float | None = None  # and when it was done
        self.steps, self.share = 0, 1.0
        self.first_seconds = self.step_seconds = self.pauses = 0.0

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.begun is None:
            self.begun, self.used = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.steps += 1
        if self.second is None:
            self.second, self.first_seconds = now(module), now(module) - self.begun
            self.paused_before = module.progress.paused_seconds

    def on_train_end(self, trainer, module) -> None:
        self.pauses = module.progress.paused_seconds
        if module.device.type == "cpu" and self.begun is not None:
            spent, used = time.perf_counter() - self.begun, time.process_time() - self.used
            self.share = cpu_share(used, spent, torch.get_num_threads())
        if self.steps > 1:
            spent = now(module) - self.second - (self.pauses - self.paused_before)
            self.step_seconds = spent / (self.steps - 1)


def now(module: L.LightningModule) -> float:
    """Return the time in seconds when the device has done all work that it was given."""
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
