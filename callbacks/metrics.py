"""Log of metrics: rows of metrics.csv, which Lightning, its callbacks and all loggers get too."""

import csv
import io
import re
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from callbacks.loggers import log_table
from callbacks.progress import FORMATS
from llm.errors import UserError, reason_of
from llm.parallel import collectives
from llm.run.samples_file import SamplesFile
from llm.run.stage_folder import last_values
from llm.utils.files import write_atomic


class RowLogger(Logger):
    """Lightning's logger of a stage: what other callbacks log, or `self.log`, waits here for the next row.

    Samples go to samples.jsonl. save_dir: folder of the stage, in which callbacks of Lightning put files of their own,
    below lightning/.
    """

    name, version = "", "lightning"

    def __init__(self, save_dir: str | Path):
        super().__init__()
        self._save_dir, self.values, self.samples = str(save_dir), {}, SamplesFile(save_dir)

    @property
    def save_dir(self) -> str:
        return self._save_dir

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        """Keep values for the next row, but for Lightning's count of epochs, which there are none of here.

        Learning rates, lr-<class of the optimizer>/<group> of its LearningRateMonitor, are lr/<group> here.
        """
        named = {re.sub(r"^lr-\w+/", "lr/", name): value for name, value in metrics.items()}
        self.values.update({name: value for name, value in named.items() if name != "epoch"})

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Leave hyperparameters to run.json and config.yaml."""

    def log_table(self, key: str, columns: list[str], data: list[list], step: int) -> None:
        """Keep samples in the folder of the stage; other tables are for the loggers of the user."""
        if key == "samples":
            self.samples.add(step, data)

    def take(self) -> dict:
        """Return the values and begin anew."""
        values, self.values = self.values, {}
        return values


class MetricsLog(L.Callback):
    """Writes what the other callbacks put into `module.row`, one row per logged step; it is the last of them.

    A row is written every `log_every` steps, after the last step, and whenever an evaluation left a value. Resuming
    drops the rows of steps that will be done again, and writes that of the checkpoint's step if it is missing: a
    checkpoint is written before its step's row. Rank 0 writes, values of all processes. All loggers get each row, and
    the last value of each column as the table `final` when the training is over.
    """

    def __init__(self, path: str | Path, log_every: int, logger: RowLogger | None = None):
        self.path, self.log_every = Path(path), log_every
        self.logger = logger or RowLogger(self.path.parent)
        self.columns: list[str] = ["step"]

    def on_fit_start(self, trainer, module) -> None:
        steps = {int(row["step"]) for row in self._read()} if trainer.is_global_zero else None
        module.step_log.is_written = True
        module.step_log.logged_steps = collectives.broadcast_object(steps)

    def on_train_start(self, trainer, module) -> None:
        step = module.global_step
        if trainer.is_global_zero:
            rows = self._read() if step > 0 else []
            self._rewrite([row for row in rows if int(row["step"]) <= step])
        if not module.row_is_missing:
            module.step_log.flush()  # that row has used the window
        elif module.row or (step > 0 and self._due(module, step)):
            self._log(trainer, module, step)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self._due(module, module.global_step):
            self._log(trainer, module, module.global_step)

    def on_fit_end(self, trainer, module) -> None:
        if trainer.is_global_zero and self._is_over(module, module.global_step):
            values = last_values(self.path.parent)
            log_table(trainer.loggers, "final", ["metric", "value"], list(values.items()), module.global_step)

    def _is_over(self, module, step: int) -> bool:
        is_ended = module.trainer.should_stop and not module.votes.is_stopped  # a signal ends a sitting only
        return step == module.context.total_steps or is_ended

    def _due(self, module, step: int) -> bool:
        return step % self.log_every == 0 or self._is_over(module, step) or bool(module.row)

    def _log(self, trainer, module, step: int) -> None:
        if step > 0:
            rate = module.rate_at(step - 1) if module.rate is None else module.rate
            module.row.update({"lr": rate} | module.step_log.flush())
        row = module.step_log.take_row()
        values = {name: value for name, value in row.items() if value is not None}
        module.step_log.latest.update(values)
        publish(trainer, values)
        row = self.logger.take() | row
        if not trainer.is_global_zero:
            return
        new = [name for name in row if name not in self.columns]
        if new:
            rows = self._read()
            self.columns += new
            self._rewrite(rows)
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([step, *(_cell(row.get(name)) for name in self.columns[1:])])
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {reason_of(error, self.path)}") from error
        for logger in trainer.loggers:
            if logger is not self.logger:
                logger.log_metrics(values, step)

    def _read(self) -> list[dict[str, str]]:
        """Return the rows that have a step, a whole number as text: not what a crash cut off or filled with zeros.

        Raises UserError for a file without a column of steps.
        """
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8-sig", errors="replace").splitlines(keepends=True)
        reader = csv.DictReader(line for line in lines if line.endswith("\n"))
        try:
            self.columns = list(reader.fieldnames or ["step"])
            found = [(_step(row.get("step")), row) for row in reader]
        except csv.Error as error:
            raise UserError(f"{self.path} cannot be read ({error}); restore it, or move it away") from error
        if "step" not in self.columns:
            raise UserError(f"{self.path} has no column step in its first line; restore it, or move it away")
        return [{name: row[name] for name in self.columns} | {"step": str(at)} for at, row in found if at is not None]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, text.getvalue())


def publish(trainer: L.Trainer, values: dict[str, float]) -> None:
    """Let Lightning and its callbacks see values of the host: no device is asked."""
    trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in values.items()})
    trainer.logged_metrics.update(values)
    trainer.progress_bar_metrics.update({name: values[name] for name in FORMATS if name in values})


def _step(cell: str | None) -> int | None:
    """Return the step of a row, also where a program has written it as 5.0; None for what is no number."""
    try:
        return int(float(cell or ""))
    except (ValueError, OverflowError):
        return None


def _cell(value: float | None) -> str:
    return "" if value is None else repr(round(value, 8)) if isinstance(value, float) else str(value)
