"""Log of metrics: rows of metrics.csv, and the same rows to TensorBoard or wandb."""

import csv
import io
from pathlib import Path

import lightning as L

from llm.errors import UserError, reason_of
from llm.parallel import collectives
from llm.utils.files import write_atomic


class MetricsLog(L.Callback):
    """Writes what the other callbacks put into `module.row`, one row per logged step; it is the last of them.

    A row is written every `log_every` steps, after the last step, and whenever an evaluation left a value. Resuming
    drops the rows of steps that will be done again, and writes that of the checkpoint's step if it is missing: a
    checkpoint is written before its step's row. Rank 0 writes, values of all processes.
    """

    def __init__(self, path: str | Path, log_every: int):
        self.path, self.log_every = Path(path), log_every
        self.columns: list[str] = ["step"]

    def on_fit_start(self, trainer, module) -> None:
        steps = {int(row["step"]) for row in self._read()} if trainer.is_global_zero else None
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

    def _due(self, module, step: int) -> bool:
        return step % self.log_every == 0 or step == module.context.total_steps or bool(module.row)

    def _log(self, trainer, module, step: int) -> None:
        if step > 0:
            module.row.update({"lr": module.lr_frac(step - 1)} | module.step_log.flush())
        row = module.step_log.take_row()
        values = {name: value for name, value in row.items() if value is not None}
        module.step_log.latest.update(values)
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
            logger.log_metrics(values, step)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        reader = csv.DictReader(line for line in lines if line.endswith("\n"))  # not what a crash cut off
        self.columns = list(reader.fieldnames or ["step"])
        return list(reader)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, text.getvalue())


def _cell(value: float | None) -> str:
    return "" if value is None else repr(round(value, 8)) if isinstance(value, float) else str(value)
