"""`Periodic`: one rule for when callbacks act that do so every so many steps."""

import time
from collections.abc import Iterable

import lightning as L


class Periodic(L.Callback):
    """Calls `act(trainer, module, step)` every `every` steps and after the last one; never if `every` is 0.

    With `at_start` also before the first step. A run that was killed between a checkpoint and the row of metrics of
    the same step acts again when it resumes (`module.row_is_missing`), unless `repeats` is False. Steps are optimizer
    steps. The time spent is added to `module.progress`, which the throughput leaves out.
    """

    repeats = True
    doing = "evaluating"  # what a bar shows meanwhile

    def __init__(self, every: int, at_start: bool = False):
        self.every, self.at_start = every, at_start

    def names(self, module: L.LightningModule) -> Iterable[str] | None:
        """Return the names of the values that `act` puts into `module.row`, None where they are not known before."""
        return None

    def act(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Do what the callback is for; `step` is the number of steps done."""
        raise NotImplementedError

    def due(self, module: L.LightningModule, step: int) -> bool:
        """Return whether to act when `step` steps are done."""
        if step == 0:
            return self.at_start and self.every > 0
        return self.every > 0 and (step % self.every == 0 or step == module.context.total_steps)

    def on_train_start(self, trainer, module) -> None:
        if self.repeats and module.row_is_missing and self.due(module, module.global_step):
            self.timed(trainer, module, module.global_step)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.due(module, module.global_step):
            self.timed(trainer, module, module.global_step)

    def timed(self, trainer, module, step: int) -> None:
        """Act, and add the time it takes to `module.progress.paused_seconds`."""
        start, module.progress.doing = time.perf_counter(), self.doing
        self.act(trainer, module, step)
        module.progress.doing = None
        module.progress.paused_seconds += time.perf_counter() - start
