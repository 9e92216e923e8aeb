"""Progress of a training, for the user to see."""

import sys
import time

import lightning as L

FORMATS = {
    "loss": "loss {:.4f}",
    "bpb": "bpb {:.4f}",
    "reward": "reward {:.3f}",
    "pass@1": "pass@1 {:.3f}",
    "lr": "lr x{:.3f}",
    "tok_per_s": "{:,.0f} tok/s",
    "ms_per_step": "{:,.0f} ms/step",
    "mfu": "mfu {:.1%}",
    "data_wait": "data {:.1%}",
}


class Progress(L.Callback):
    """A bar with loss, bpb, learning rate, tok/s and ETA in a terminal; a line per logged step elsewhere.

    It shows values that `MetricsLog` has brought to the host anyway and redraws four times a second, so it adds no
    device synchronisation and no measurable time.
    """

    def __init__(self, log_every: int):
        self.log_every, self.bar, self.task = log_every, None, None

    def on_train_start(self, trainer, module) -> None:
        self.total, self.start_step, self.start = module.context.total_steps, module.global_step, time.perf_counter()
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = ("{task.description}", BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), refresh_per_second=4)
            self.bar.start()
            name = module.context.name
            self.task = self.bar.add_task(name, total=self.total, completed=self.start_step, text="")
        if module.step_log.latest:
            self._line(module, self.start_step)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = module.global_step
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=describe(module.step_log.latest))
        elif step % self.log_every == 0 or step == self.total:
            self._line(module, step)

    def _line(self, module, step: int) -> None:
        left = (time.perf_counter() - self.start) / max(step - self.start_step, 1) * (self.total - step)
        eta = f" | ETA {int(left) // 60}:{int(left) % 60:02d}" if step > self.start_step else ""
        print(f"{module.context.name} step {step}/{self.total} | {describe(module.step_log.latest)}{eta}", flush=True)

    def teardown(self, trainer, module, stage) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def describe(values: dict[str, float]) -> str:
    """Return the values that have a format, in fixed order: `loss 2.3456 | bpb 1.1234 | ...`."""
    return " | ".join(form.format(values[name]) for name, form in FORMATS.items() if name in values)
