"""Loggers of the user: tables of text that each of them gets by its own call, and two that Lightning lacks.

A row of metrics goes to `log_metrics`, the configuration to `log_hyperparams`, which all loggers have. For tables there
is no such rule in Lightning: here is the one place that knows them.
"""

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from llm.checkpoint.resume import newest_step
from llm.utils.files import plain
from llm.utils.format import markdown_table

Rows = Sequence[Sequence[Any]]


def log_table(loggers: Sequence[Logger], key: str, columns: Sequence[str], rows: Rows, step: int) -> None:
    """Give a table of step `step` to all loggers that can keep one, under the name `key`; one process calls it.

    A logger of one's own gets it by `log_table(key, columns, data, step)`, the method of Lightning's WandbLogger; one
    without such a method is passed over.
    """
    for logger in loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(key=key, columns=list(columns), data=[list(row) for row in rows], step=step)
        elif (write := _writer(logger)) is not None:
            write(logger, key, columns, rows, step)


def _writer(logger: Logger) -> Callable | None:
    known = {CSVLogger: _to_csv, TensorBoardLogger: _to_tensorboard, MLFlowLogger: _to_mlflow, CometLogger: _to_comet}
    found = next((write for kind, write in known.items() if isinstance(logger, kind)), None)
    return _to_aim if found is None and type(logger).__name__ == "AimLogger" else found


def _to_csv(logger: CSVLogger, key: str, columns: Sequence[str], rows: Rows, step: int) -> None:
    path = Path(logger.log_dir) / f"{key}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*([["step", *columns]] if is_new else []), *([step, *row] for row in rows)])


def _to_tensorboard(logger: TensorBoardLogger, key: str, columns: Sequence[str], rows: Rows, step: int) -> None:
    logger.experiment.add_text(key, _markdown(columns, rows), step)


def _to_mlflow(logger: MLFlowLogger, key: str, columns: Sequence[str], rows: Rows, step: int) -> None:
    table = {"step": [step] * len(rows)} | {name: [row[i] for row in rows] for i, name in enumerate(columns)}
    logger.experiment.log_table(logger.run_id, table, f"{key}.json")  # adds to the rows of earlier steps


def _to_comet(logger: CometLogger, key: str, columns: Sequence[str], rows: Rows, step: int) -> None:
    logger.experiment.log_text(_markdown(columns, rows), step=step, metadata={"name": key})


def _to_aim(logger: Any, key: str, columns: Sequence[str], rows: Rows, step: int) -> None:
    from aim import Text

    logger.experiment.track(Text(_markdown(columns, rows)), name=key, step=step)


def _markdown(columns: Sequence[str], rows: Rows) -> str:
    return markdown_table(columns, [[str(cell) for cell in row] for row in rows])


def close(loggers: Sequence[Logger]) -> None:
    """End what a library keeps open in its process, or the next stage there would go on in the run of this one."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._experiment is not None:
            logger.experiment.finish()
        if isinstance(logger, CometLogger) and logger._experiment is not None:
            logger.experiment.end()


class OfflineComet(CometLogger):
    """Writes a zip file for `comet upload` into `save_dir`; needs neither an account nor a network."""

    def __init__(self, save_dir: str, **options: Any):
        super().__init__(online=False, offline_directory=save_dir, **options)

    def _create_experiment(self) -> None:
        from comet_ml import ExperimentConfig

        self._comet_config = ExperimentConfig(**self._kwargs)  # Lightning's own is disabled where it is offline
        super()._create_experiment()


class TrackioLogger(Logger):
    """Logger of Trackio: all runs of a project are in one database, in `folder` unless $TRACKIO_DIR names another.

    A stage that is resumed goes on in its run; `save_dir`, its folder, tells whether it is: it has a checkpoint then.
    """

    version = None

    def __init__(self, project: str, name: str, folder: str, save_dir: str | Path):
        super().__init__()
        os.environ.setdefault("TRACKIO_DIR", folder)  # read once, when the package is imported
        import trackio

        self.trackio, self.project, self.run_name = trackio, project, name
        self.resumes = newest_step(Path(save_dir) / "checkpoints") > 0
        self.config, self._experiment = {}, None

    @property
    def name(self) -> str:
        return self.run_name

    def begun(self) -> Any:
        """Return Trackio's run, which begins with the first value: no `experiment`, which Lightning asks for sooner."""
        if self._experiment is None:
            resume = "allow" if self.resumes else "never"
            options = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
            self._experiment = self.trackio.init(
                self.project, self.run_name, config=self.config, resume=resume, **options
            )
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the hyperparameters for the beginning of the run: they are the configuration it is made with."""
        self.config = plain(dict(params))

    @rank_zero_only
    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        self.begun().log(dict(metrics), step)

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], data: list[list], step: int) -> None:
        """Log a table of text of one step."""
        self.begun().log({key: self.trackio.Table(columns=columns, data=data)}, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run, which waits until all values are in the database."""
        if self._experiment is not None:
            self.trackio.finish()
            self._experiment = None
