"""Progress of a training, for the user to see."""

import time
from collections.abc import Iterable, Sequence

import lightning as L

from llm.utils.terminal import can_redraw

FORMATS = {
    "loss": "loss {:.4f}",
    "bpb": "bpb {:.4f}",
    "preference/accuracy": "preferred {:.1%}",
    "reward": "reward {:.3f}",
    "pass@1": "pass@1 {:.3f}",
    "lr": "lr x{:.3f}",
    "tok_per_s": "{:,.0f} tok/s",
    "ms_per_step": "{:,.0f} ms/step",
    "mfu": "mfu {:.1%}",
    "data_wait": "data {:.1%}",
}
# What a bar shows first, where the terminal is too narrow for all of it.
IMPORTANT = ("loss", "bpb", "preference/accuracy", "tok_per_s", "reward", "pass@1")
IMPORTANT += ("ms_per_step", "lr", "mfu", "data_wait")
WIDTHS = ((110, 24), (70, 12), (0, 6))  # of a terminal from which on a bar has so many signs
LINES = 100  # of a whole training, where there is no bar,
SILENCE = 300  # and one after so many seconds in any case


class Progress(L.Callback):
    """A bar with step, loss, bpb, tok/s and ETA in a terminal; elsewhere a line now and then, about a hundred in all.

    It shows values that `MetricsLog` has brought to the host anyway and redraws four times a second, so it adds no
    device synchronisation and no measurable time. The bar is there before the first step, and says what training
    waits for: the compiler, an evaluation, a checkpoint. Rank 0 speaks. bar: False = lines in a terminal too.
    """

    def __init__(self, log_every: int, bar: bool = True):
        self.log_every, self.wants_bar, self.bar = log_every, bar, None
        self.module = None  # the one that is trained
        self.begun = self.first_done = None  # when training began, and when its first step was done
        self.first_step = self.last_line = 0  # step at which training began or went on; step of the last line,
        self.last_time = 0.0  # and when it was

    def setup(self, trainer, module, stage) -> None:
        self.module, self.begun, self.first_done, self.set_up = module, None, None, time.perf_counter()
        if self.wants_bar and trainer.is_global_zero and can_redraw():
            from rich.console import Console
            from rich.live import Live

            self.console = Console()
            self.bar = Live(get_renderable=self._drawn, console=self.console, refresh_per_second=4)
            self.bar.start(refresh=True)

    def on_train_start(self, trainer, module) -> None:
        self.first_step, self.begun = module.global_step, time.perf_counter()
        self.last_line, self.last_time = self.first_step, self.begun
        if module.step_log.latest:
            self._say(trainer, self.first_step)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step, total = module.global_step, module.context.total_steps
        if self.first_done is None:
            self.first_done = time.perf_counter()
        if step % self.log_every == 0 or step == total:
            is_due = self.last_line == self.first_step or step == total or step - self.last_line >= total / LINES
            if is_due or time.perf_counter() - self.last_time > SILENCE:
                self._say(trainer, step)

    def _say(self, trainer, step: int) -> None:
        """Print a line in the place of the bar."""
        if self.bar is not None or not trainer.is_global_zero:
            return
        self.last_line, self.last_time = step, time.perf_counter()
        context, eta = self.module.context, self.seconds_left()
        parts = [f"{context.name} step {step}/{context.total_steps}", *described(self.module.step_log.latest)]
        print(" | ".join([*parts, *([] if eta is None else [f"ETA {clock(eta)}"])]), flush=True)

    def seconds_left(self) -> float | None:
        """Return the seconds until the last step at the speed so far, at most `max_minutes`; None before the first."""
        step, budget = self.module.global_step, self.module.budget
        if self.first_done is None or step == self.first_step:
            return None
        is_first = step - self.first_step == 1  # which may have waited for the compiler
        since, first = (self.begun, self.first_step) if is_first else (self.first_done, self.first_step + 1)
        rate = (time.perf_counter() - since) / self.module.whole_steps(first, step)
        left = rate * self.module.whole_steps(step, self.module.context.total_steps)
        return min(left, max(budget.seconds - budget.spent(), 0.0))

    def doing(self) -> str | None:
        """Return what training does at present, where that is no step behind the first."""
        if self.module.progress.doing is not None:
            return self.module.progress.doing
        if self.begun is None:
            return "starting"
        if self.first_done is not None:
            return None
        return "compiling" if self.module.net.training_forward_blocks is not None else "first step"

    def _drawn(self):
        """Return the bar as it is at this moment, for rich."""
        from rich.text import Text

        context, latest = self.module.context, self.module.step_log.latest
        doing, eta, step = self.doing(), self.seconds_left(), self.module.global_step
        is_done = eta is None or step == context.total_steps
        tail = clock(time.perf_counter() - self.set_up) if is_done else f"ETA {clock(eta)}"
        parts = [*([doing] if doing else []), *described(latest, IMPORTANT)]
        signs = "━─" if self.console.encoding.startswith("utf") else "#-"
        line = bar_line(self.console.width, context.name, step, context.total_steps, parts, tail, signs)
        return Text(line, no_wrap=True, overflow="crop")

    def on_exception(self, trainer, module, exception) -> None:
        self._end()

    def teardown(self, trainer, module, stage) -> None:
        self._end()

    def _end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def bar_line(width: int, name: str, step: int, total: int, parts: Sequence[str], tail: str, signs: str = "━─") -> str:
    """Return a line of at most `width` characters: name, bar, step of total, as many `parts` as fit, tail.

    signs: of what is done and what is not.
    """
    length = next(length for columns, length in WIDTHS if width >= columns)
    done = length * step // max(total, 1)
    begin = f"{name} {signs[0] * done}{signs[1] * (length - done)} {step}/{total}"
    shown, room = [], width - 1 - len(begin) - 2 - len(tail)
    for part in parts:
        room -= len(part) + 2
        if room < 0:
            break
        shown.append(part)
    return "  ".join([begin, *shown, tail])[: width - 1]


def clock(seconds: float) -> str:
    """Return a time as 0:07, 12:05 or 3:12:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def described(values: dict[str, float], names: Iterable[str] = FORMATS) -> list[str]:
    """Return the values of `names`, those that have a format, in their order: `loss 2.3456`, `bpb 1.1234`, ..."""
    return [FORMATS[name].format(values[name]) for name in names if name in values]
