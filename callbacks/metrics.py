"""metrics.csv, and the same rows to TensorBoard or wandb."""

import csv
from pathlib import Path

import lightning as L


class MetricsLog(L.Callback):
    """Last of the callbacks: writes what the others put into `module.row`, one row per logged step.

    A row is written every `log_every` steps, after the last step, and whenever an evaluation left a value. Resuming
    drops the rows of steps that will be done again. Rank 0 writes; what it writes is of all processes.
    """

    def __init__(self, path: str | Path, log_every: int):
        self.path, self.log_every = Path(path), log_every
        self.columns: list[str] = ["step"]

    def on_train_start(self, trainer, module) -> None:
        step = module.global_step
        if step % self.log_every == 0:
            module.flush_window()  # a checkpoint is written before its step's row: that row has used the window
        if trainer.is_global_zero:
            rows = self._read() if step > 0 else []
            self._rewrite([row for row in rows if int(row["step"]) <= step])
        if module.row:
            self._log(trainer, module, step)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = module.global_step
        if (
            step % self.log_every == 0
            or step == module.context.total_steps
            or trainer.should_stop
            or "bpb" in module.row
        ):
            module.row["lr"] = module.lr_frac(step - 1)
            module.row.update(module.flush_window())
            self._log(trainer, module, step)

    def _log(self, trainer, module, step: int) -> None:
        row, module.row = module.row, {}
        module.latest.update(row)
        if not trainer.is_global_zero:
            return
        new = [name for name in row if name not in self.columns]
        if new:
            rows = self._read()
            self.columns += new
            self._rewrite(rows)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([step, *(_cell(row.get(name)) for name in self.columns[1:])])
        for logger in trainer.loggers:
            logger.log_metrics(row, step)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row.values()]  # a row cut off by a crash is short
            self.columns = list(reader.fieldnames or ["step"])
        return rows

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


def _cell(value: float | None) -> str:
    return "" if value is None else repr(round(value, 8)) if isinstance(value, float) else str(value)
