"""`llm.train`, `llm.evaluate` and `llm.list_runs`: the commands and the files of runs for notebooks and scripts.

They take the words of the command line, check them as the commands do, and leave the process as they found it. An
error of the user is raised as `llm.errors.UserError`, a line that names the key, its value and the fix.
"""

import gc
import os
import shlex
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm.cli.app import INTERRUPTED, JobFailed, run_command
from llm.cli.compose import quoted
from llm.config.stages import row_or_stranger, stage_row
from llm.errors import UserError, system_problem
from llm.parallel.env import is_one_of_many
from llm.run.stage_folder import read_manifest, read_metrics
from llm.utils.addresses import without_secrets
from llm.utils.environment import keep_private
from llm.utils.restore import process_as_it_was

if TYPE_CHECKING:
    from pandas import DataFrame

    from llm.serving.notebook import Model

Overrides = str | Sequence[str]  # words of a command line, in a list or in one text


class Score(NamedTuple):
    """A score, and one standard error of it where it is the mean over items."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TrainedStage:
    """A stage of a run, as `llm.train` leaves it; all but its names is read from its folder when it is asked for.

    chain: all stages that the call has worked on, in order, this one the last. A stage that makes no run (download,
    check, write_tokens) has an empty `run`, and its folder is that of the data.
    """

    folder: Path
    run: str
    stage: str
    chain: tuple["TrainedStage", ...] = field(default=(), repr=False, compare=False)

    @property
    def status(self) -> str:
        """Return finished, interrupted, running, or missing: before its first start, and of a stage without a run."""
        return str((self.manifest or {"status": "missing"}).get("status", "finished"))

    @property
    def manifest(self) -> dict[str, Any] | None:
        """Return the content of run.json; None where there is none."""
        return read_manifest(self.folder)

    @property
    def scores(self) -> dict[str, Score]:
        """Return the last scores by name, those of eval.json before those of the training."""
        from llm.run.formats import read_scores

        return _scores((self.manifest or {}) | {"eval": read_scores(self.folder)})

    def metrics(self) -> "DataFrame":
        """Return metrics.csv with the step as index; NaN where a column was not measured at that step."""
        from pandas import DataFrame

        frame = DataFrame(read_metrics(self.folder))
        return frame.astype({"step": int}).set_index("step") if len(frame) else frame

    def load(self, adapters: Sequence[str] = ()) -> "Model":
        """Return the model, see `llm.load`. Raises UserError where the stage is not finished or holds no model."""
        from llm.serving.notebook import load

        return load(self.folder, adapters)

    def evaluate(self, overrides: Overrides = ()) -> dict[str, Score]:
        """Score the stage, see `llm.evaluate`."""
        here = [f"paths.runs={quoted(str(self.folder.parents[1]))}"]
        return evaluate(self.run, self.stage, [*_words(overrides), *here])


def train(
    overrides: Overrides = (), *, config_name: str | None = None, config_dir: str | os.PathLike[str] | None = None
) -> TrainedStage:
    """Train a stage, or the stages of a sweep, as `train.py` with these words does; return the last one.

    overrides: what follows `train.py` on a command line, as a list or as one text: "experiment=tiny stage=pretrain",
    or "-m experiment=tiny stage=tokenizer,pretrain". config_name and config_dir are --config-name and --config-dir.

    A stage that is finished is not trained again, and one that was interrupted goes on. Ctrl-C saves and returns the
    stage with status "interrupted"; other stop signals save too, and end the process. Several devices are processes of
    their own. Must be called in the main thread. Raises UserError for what train.py answers with an `error:` line.
    """
    done: list[TrainedStage] = []

    def job(cfg: Any) -> float | None:
        import lightning.pytorch  # noqa: F401  so that what it sets is there to be put back

        from llm.stages.run_stage import own_run, reached, run_stage, work_on_stage

        row = stage_row(cfg.stage.name)
        with process_as_it_was(), _memory_given_back():
            if not row.in_run:
                done.append(TrainedStage(Path(cfg.paths.data).expanduser().absolute(), "", row.name))
                return run_stage(cfg)
            run = own_run(cfg, row)
            done.append(TrainedStage((run.path / row.name).absolute(), run.name, row.name))
            work_on_stage(cfg, row, run)
            return reached(cfg, run)

    places = {"--config-name": config_name, "--config-dir": config_dir}
    words = [word for name, place in places.items() if place for word in (name, os.fspath(place))]
    words += _words(overrides)
    try:
        _run("train", job, words)
    except SystemExit as stop:
        if stop.code != INTERRUPTED:
            raise
    if not done:
        raise UserError(f"{shlex.join(words)}: this trains nothing; leave out what asks for help or shows settings")
    return replace(done[-1], chain=tuple(done))


def evaluate(
    run: str | None = None,
    stage: str | None = None,
    overrides: Overrides = (),
    *,
    config_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Score]:
    """Score a finished stage as `evaluate.py run=... stage=...` does; return all scores of its eval.json by name.

    run: None is the only run there is; stage: None is the last one that is finished. overrides: further words, such as
    ["eval=[bpb,chat]", "paths.runs=/content/runs"], or one text. Shares are between 0 and 1. Raises UserError for what
    evaluate.py answers with an `error:` line.
    """
    done: list[dict[str, Any]] = []

    def job(cfg: Any) -> None:
        from llm.eval.evaluate import run_evaluation

        with process_as_it_was(), _memory_given_back():
            done.append(run_evaluation(cfg))

    named = [f"{key}={quoted(name)}" for key, name in (("run", run), ("stage", stage)) if name is not None]
    words = [*(["--config-dir", os.fspath(config_dir)] if config_dir else []), *named, *_words(overrides)]
    if {"-m", "--multirun"} & set(words):
        raise UserError("llm.evaluate scores one stage: call it once for each, without -m")
    _run("evaluate", job, words)
    if not done:
        raise UserError(f"{shlex.join(words)}: this scores nothing; leave out what asks for help or shows settings")
    return _scores({"eval": done[0]})


def list_runs(folder: str | os.PathLike[str] = "runs") -> "DataFrame":
    """Return a table of all stages of all runs in a folder, as a frame of pandas: one row for each, runs in order.

    Columns: run, stage, status, seed, parent (run/stage), steps, tokens, flops, seconds; then every score that some
    stage has (`bpb`, `loss`, tasks as shares) with its standard error as `<score>_stderr`, those of models first; then
    depth, params, started, finished (UTC), commit and folder. What a stage lacks is NaN, NaT or None. A stage whose
    files cannot be read is named in a warning and left out.
    """
    import pandas

    from llm.experiments.runs import FACTS, ORIGIN, score_names, stage_rows

    rows = list(stage_rows(folder, problem=lambda line: warnings.warn(line, stacklevel=3)))
    names = score_names(sorted(rows, key=lambda row: not row_or_stranger(row["stage"]).makes_model))
    scores = [name for one in names for name in (one, f"{one}_stderr") if any(name in row for row in rows)]
    origin = [name for name in ORIGIN if name != "config"]
    frame = pandas.DataFrame(rows, columns=[*FACTS, *scores, *origin])
    whole = dict.fromkeys(("seed", "steps", "tokens", "depth", "params"), "Int64")
    times = {name: pandas.to_datetime(frame[name], utc=True, format="ISO8601") for name in ("started", "finished")}
    return frame.astype(whole).assign(**times)


def _scores(facts: dict[str, Any]) -> dict[str, Score]:
    from llm.report.results import final_metrics

    return {name: Score(*pair) for name, pair in final_metrics(facts).items()}


def _words(overrides: Overrides) -> list[str]:
    """Return the words of a command line, which may be one text. Raises UserError for a quote that is left open."""
    if not isinstance(overrides, str):
        return [str(word) for word in overrides]
    try:
        return shlex.split(overrides)
    except ValueError as error:
        raise UserError(f"{overrides!r} cannot be read: {error}; give a list of settings instead") from None


def _run(config_name: str, job: Callable[[Any], Any], words: list[str]) -> None:
    """Run the command of an entry point in this process, and put back what it changes there.

    Raises UserError for a mistake of the user's, and an exception of a job as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError("call it in the main thread: only there can Ctrl-C save a training")
    if is_one_of_many():
        raise UserError("torchrun and srun start train.py and evaluate.py themselves; here, trainer.devices=<n> does")
    with process_as_it_was():
        keep_private()
        try:
            run_command(config_name, job, words, in_process=True)
        except JobFailed as failure:
            where = f" [{failure.job}; later jobs were not started]" if failure.job else ""
            error = failure.cause
            problem = str(error) if isinstance(error, UserError) else system_problem(error)
            if problem is None or (isinstance(error, UserError) and not where):
                raise error from error.__cause__
            raise UserError(without_secrets(problem) + where) from None
        except SystemExit as stop:
            if stop.code != 0:  # else Hydra has printed a help text
                raise


@contextmanager
def _memory_given_back() -> Iterator[None]:
    """Free what a training leaves on the GPU, so that the next one in this process finds it."""
    import torch

    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
