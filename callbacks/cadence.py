"""When a periodic callback acts: one rule for all of them."""

import time

import lightning as L


class Periodic(L.Callback):
    """Calls `act(trainer, module, step)` every `every` steps and after the last one; never if `every` is 0.

    With `at_start` also before the first step of a run that is not resumed. Steps are optimizer steps. The time spent
    is added to `module.paused_seconds`, which the throughput leaves out.
    """

    def __init__(self, every: int, at_start: bool = False):
        self.every, self.at_start = every, at_start

    def act(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        raise NotImplementedError

    def on_train_start(self, trainer, module) -> None:
        if self.every > 0 and self.at_start and module.global_step == 0:
            self.timed(trainer, module, 0)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = module.global_step
        if self.every > 0 and (step % self.every == 0 or step == module.context.total_steps):
            self.timed(trainer, module, step)

    def timed(self, trainer, module, step: int) -> None:
        start = time.perf_counter()
        self.act(trainer, module, step)
        module.paused_seconds += time.perf_counter() - start
