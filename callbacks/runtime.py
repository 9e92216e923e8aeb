"""Process-wide concerns: a clean stop on signals, and no garbage collector in steps."""

import gc
import signal

import lightning as L

from llm.parallel import collectives
from llm.parallel.env import STOP_SIGNALS


class CleanStop(L.Callback):
    """Ends a training cleanly on the first of `STOP_SIGNALS`: finishes the step, saves, ends the loop.

    A second SIGINT ends at once.

    `signum` tells the caller afterwards which signal ended the training, on all processes alike; None if something else
    did, though a signal may have come behind the last vote of the processes.
    """

    def __init__(self, checkpoint):
        self.checkpoint, self.signum, self._asked, self._previous = checkpoint, None, None, {}

    def setup(self, trainer, module, stage) -> None:
        self._previous = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}

    @property
    def asked(self) -> int | None:
        """Return the signal that all processes know of; in a single one also what came behind the last vote."""
        return self._asked if collectives.world_size() == 1 else self.signum

    def on_train_start(self, trainer, module) -> None:
        self.module = module
        for signum in self._previous:  # only now: Lightning sets its own handlers after on_fit_start
            signal.signal(signum, self._request)

    def _request(self, signum, frame) -> None:
        if self._asked is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked, self.module.votes.stop = signum, True
        print("\nstopping after this step; press Ctrl-C again to stop at once", flush=True)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        alone = collectives.world_size() == 1
        if (module.votes.stop if alone else module.votes.stop_count) and not trainer.should_stop:
            self.signum = max(signum or 0 for signum in collectives.all_gather_object(self._asked))
            self.checkpoint.save_now(trainer, module)
            trainer.should_stop = module.votes.is_stopped = True

    def teardown(self, trainer, module, stage) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}


class GarbageControl(L.Callback):
    """Collects garbage every `every` steps and not whenever Python feels like it, which would stall a step."""

    def __init__(self, every: int = 1000):
        self.every = every

    def on_train_start(self, trainer, module) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if module.global_step % self.every == 0:
            gc.collect()

    def teardown(self, trainer, module, stage) -> None:
        gc.unfreeze()
        gc.enable()
