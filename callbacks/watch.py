"""Watches over a training: a loss that no training has, processes that hold different weights, one that is slow."""

import socket
import statistics
import time
from pathlib import Path

import lightning as L

from callbacks.checkpoint import compare_processes, not_finite
from llm.errors import BadLoss
from llm.parallel import collectives


class LossGuard(L.Callback):
    """Writes the text that a step with a bad loss was fed, and saves the step before where its weights are sound.

    saves: whether training is to stop here; where it goes back to an older checkpoint nothing is saved.
    """

    def __init__(self, checkpoint, folder: str | Path, saves: bool = True):
        self.checkpoint, self.folder, self.saves = checkpoint, Path(folder), saves

    def on_exception(self, trainer, module, exception) -> None:
        if not isinstance(exception, BadLoss):
            return
        path, text = None, ""
        if exception.documents is not None:
            decode, process = module.context.tokenizer.decode, collectives.rank()
            of = f"_process_{process}" if process else ""  # several may have such a loss
            path = self.folder / f"bad_loss_step_{exception.step}{of}.txt"
            path.write_text("\n\n".join(decode(row.tolist()) for row in exception.documents), encoding="utf-8")
        if written := [str(one) for one in collectives.all_gather_object(path) if one is not None]:
            text = f"; its text is in {', '.join(written)}"
        if self.saves and not exception.finite:
            if not_finite(module.net):
                text += f"; the weights of step {module.global_step} are not finite either, so nothing was saved"
            else:
                self.checkpoint.save_now(trainer, module)
                text += f"; step {module.global_step} was saved"
        exception.args = (f"{exception.args[0]}{text}",)


class ProcessWatch(L.Callback):
    """Compares the processes every `every` steps: same weights, similar speed?

    slow: how many times the others' time for its part of a step makes a process worth a line. Nothing in one process.
    """

    def __init__(self, every: int, slow: float):
        self.every, self.slow = every, slow

    def on_train_start(self, trainer, module) -> None:
        self._begin_window(module)

    def _begin_window(self, module) -> None:
        self.start = time.perf_counter() - collectives.waited_seconds() - module.progress.paused_seconds
        self.first_step = module.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = module.global_step
        if collectives.world_size() == 1 or step % self.every:
            return
        compare_processes(trainer, module, step)
        busy = time.perf_counter() - collectives.waited_seconds() - module.progress.paused_seconds - self.start
        report = slow_processes(1000 * busy / (step - self.first_step), self.slow)
        if report:
            print(f"step {step}: {report}", flush=True)
        self._begin_window(module)


def slow_processes(milliseconds: float, slow: float) -> str | None:
    """Return a line about processes that take over `slow` times the median for their part of a step, or None."""
    times = collectives.all_gather_object((milliseconds, socket.gethostname()))
    median = statistics.median_low([own for own, _ in times])
    late = [f"process {k} on {host} {own:.0f} ms" for k, (own, host) in enumerate(times) if own > slow * median]
    return f"slow processes: {', '.join(late)}; the others {median:.0f} ms a step" if late else None
