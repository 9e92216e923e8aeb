"""Times of a training's parts, to know how long the next one will take."""

import time

import lightning as L
import torch

from llm.scaling.machine import cpu_share


class Stopwatch(L.Callback):
    """Measures this sitting: the first step, the others, and what evaluations and checkpoints took.

    It stands before the callbacks that act between steps. A step includes its wait for data. share: of its processors'
    time that the process has got in the steps; 1.0 on a GPU.
    """

    def __init__(self):
        self.steps, self.share = 0, 1.0
        self.first_seconds = self.step_seconds = self.pauses = 0.0
        self.first_done: float | None = None  # when it was done
        self.spent = self.used = 0.0  # seconds of the clock and of the processors in the steps

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.begun, self.used_before = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.steps += 1
        if self.first_done is None:
            self.first_done = now(module)
            self.first_seconds, self.paused_before = self.first_done - self.begun, module.progress.paused_seconds
        self.spent += time.perf_counter() - self.begun
        self.used += time.process_time() - self.used_before

    def on_train_end(self, trainer, module) -> None:
        self.pauses = module.progress.paused_seconds
        if module.device.type == "cpu" and self.steps:
            self.share = cpu_share(self.used, self.spent, torch.get_num_threads())
        if self.steps > 1:
            spent = now(module) - self.first_done - (self.pauses - self.paused_before)
            self.step_seconds = spent / (self.steps - 1)


def now(module: L.LightningModule) -> float:
    """Return the time in seconds when the device has done all work that it was given."""
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
