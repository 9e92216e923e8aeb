"""Lightning's hooks of a validation, around the evaluations of a step: for callbacks that look at their results."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import lightning as L
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor

from callbacks.cadence import Periodic
from llm.errors import UserError

TELLS_LATER = (LearningRateMonitor, DeviceStatsMonitor)  # they name values as they go
ROWS = ("loss", "lr", "tok_per_s", "ms_per_step", "mfu", "data_wait", "tokens", "flops", "seconds")


class ValidationBegin(L.Callback):
    """Fires on_validation_start and on_validation_epoch_start where one of `evaluations` will act on this step."""

    def __init__(self, evaluations: Sequence[Periodic]):
        self.evaluations, self.is_open = evaluations, False

    @property
    def acts(self) -> bool:
        """Return whether anything is evaluated at all."""
        return any(one.every > 0 for one in self.evaluations)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.is_open = any(one.due(module, module.global_step) for one in self.evaluations)
        if self.is_open:
            fire(trainer, module, "on_validation_start", "on_validation_epoch_start")


class ValidationEnd(L.Callback):
    """Fires on_validation_epoch_end and on_validation_end once the results are known; stands behind `MetricsLog`."""

    def __init__(self, begin: ValidationBegin):
        self.begin = begin

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.begin.is_open:
            fire(trainer, module, "on_validation_epoch_end", "on_validation_end")


def fire(trainer: L.Trainer, module: L.LightningModule, *hooks: str) -> None:
    """Call hooks of all callbacks; the module's own belong to Lightning's loop, which does not run here."""
    for hook in hooks:
        for callback in trainer.callbacks:
            getattr(callback, hook)(trainer, module)


@dataclass
class Monitors:
    """Values that callbacks look at, by the config key of the callback."""

    by_key: Mapping[str, str]

    def missing(self, names: Iterable[str]) -> str | None:
        """Return an error line for the first monitor that is not among `names`, None if all are."""
        names = list(names)  # of all values that are logged
        for key, monitor in self.by_key.items():
            if monitor not in names:
                return f"{key}.monitor={monitor}: this training logs no such value; choose from {', '.join(names)}"
        return None


class MonitorCheck(L.Callback):
    """Raises UserError for a monitor that has not appeared by the first evaluation, or the end."""

    def __init__(self, monitors: Monitors, begin: ValidationBegin):
        self.monitors, self.begin, self.is_done = monitors, begin, not monitors.by_key

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if not self.is_done and (self.begin.is_open or module.global_step == module.context.total_steps):
            if problem := self.monitors.missing(trainer.callback_metrics):
                raise UserError(problem)
            self.is_done = True


def known_names(callbacks: Iterable[L.Callback], module) -> set[str] | None:
    """Return the names of all values that a training will log, None where a callback does not tell beforehand."""
    names = set(ROWS)
    if module.objective is not None or any(isinstance(one, TELLS_LATER) for one in callbacks):
        return None
    for callback in callbacks:
        own = callback.names(module) if isinstance(callback, Periodic) else None
        if own is None and not type(callback).__module__.startswith(("callbacks.", "lightning.")):
            return None
        if own is None and isinstance(callback, Periodic):
            return None
        names.update(own or ())
    return names
