"""The run folder: where a stage writes, how the next stage finds its parent, and how run.json is read and written.

    runs/<run>/report.md                    runs/<run>/<stage>/run.json  metrics.csv  eval.json  checkpoints/  model/

Everything here is paths and small files: no torch at import, so that command lines stay quick.
"""

import csv
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm.config.plugins import load_plugins
from llm.config.renamed import renamed_manifest
from llm.config.stages import Stage, row_or_stranger, stage_names, stage_row
from llm.config.trust import check_code
from llm.errors import UserError, reason_of
from llm.run.formats import RUN, check_format
from llm.utils.addresses import public
from llm.utils.files import read_bytes, read_json, write_json

MANIFEST = "run.json"
MOST_METRICS = 1 << 29  # bytes of metrics.csv: a million rows have 200 MB
ITEM_FOLDERS = ("records", "core", "lm_eval")  # of eval=[chat], [core], [lm_eval]: a file per task, item by item
OTHER_DATA = "other_data"  # holds the same folders for every data that is not the stage's own
SCORE_FILES = ("eval.json", "core.csv", *ITEM_FOLDERS, OTHER_DATA)  # all that evaluations leave in a stage folder
HF = "hf:"  # names of models that are no run's, but of Hugging Face, begin with it


@dataclass(frozen=True)
class RunDir:
    """One run: a named chain of stages under `root`. Creates nothing until a file is written."""

    root: str | Path
    name: str

    def __post_init__(self):
        if not _is_plain(self.name):
            raise UserError(f"run={self.name!r} must be a plain folder name: no slash, no leading dot, no outer blanks")

    @property
    def path(self) -> Path:
        return Path(self.root) / self.name

    def __fspath__(self) -> str:
        return str(self.path)

    def stage_dir(self, stage: str) -> Path:
        """Return the folder of a stage. Raises UserError for a name neither in the table nor a stage of this run."""
        folder = self.path / stage
        return folder if _holds_stage(folder) else self.path / stage_row(stage).name

    def model_dir(self, stage: str) -> Path:
        """Return the stage's hand-over folder, complete once the stage is finished."""
        return self.stage_dir(stage) / "model"

    def manifest(self, stage: str) -> dict[str, Any] | None:
        return read_manifest(self.stage_dir(stage))

    def status(self, stage: str) -> str:
        """Return `running`, `interrupted`, `finished`, or `missing` when the stage was never started."""
        manifest = self.manifest(stage)
        return "missing" if manifest is None else str(manifest.get("status", "finished"))

    def stages(self) -> list[str]:
        """Return stages with a run.json in pipeline order; those whose plugin is not loaded come last."""
        return stages_in(self.path)

    def finished(self) -> list[str]:
        """Return stages that can be a parent: finished and with their model/ folder in place."""
        return [s for s in self.stages() if self.status(s) == "finished" and self.model_dir(s).is_dir()]


def stages_in(run: Path) -> list[str]:
    """Return the stages of a run folder in pipeline order, see `RunDir.stages`; none where it may not be read."""
    try:
        found = [entry.name for entry in run.iterdir() if _holds_stage(entry)] if run.is_dir() else []
    except OSError:  # a folder of another user must not hide the others
        return []
    return sorted(found, key=lambda name: (row_or_stranger(name).rank, name))


def _holds_stage(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file()
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_manifest(path: str | Path) -> dict[str, Any] | None:
    """Return run.json of a stage folder (or the file itself), its config under the present names of keys.

    None if the stage was never started. Raises UserError where the file cannot be read or has a wrong value.
    """
    path = Path(path)
    path = path if path.name == MANIFEST else path / MANIFEST
    manifest = read_json(path)
    return None if manifest is None else checked_manifest(manifest, str(path))


def checked_manifest(manifest: Any, where: str) -> dict[str, Any]:
    """Return the content of a run.json, its config under the present names of keys.

    where: the file, for the UserError that a wrong value or a later format raises.
    """
    check_format(manifest, where)
    RUN(manifest, where)
    return renamed_manifest(manifest)


def write_manifest(path: str | Path, manifest: dict[str, Any]) -> None:
    """Write run.json into a stage folder (or to the file itself), atomically and synced to disk, without secrets."""
    path = Path(path)
    write_json(path if path.name == MANIFEST else path / MANIFEST, public(manifest))


def read_metrics(stage_dir: str | Path, finite: bool = True) -> list[dict[str, float]]:
    """Read the rows of metrics.csv by ascending step, without empty or non-numeric cells; [] if there is no file.

    A line that a crash cut short is left out; of two rows for one step the later one wins. finite=False keeps the
    numbers that are NaN or infinite.
    """
    path = Path(stage_dir) / "metrics.csv"
    if not path.is_file():
        return []
    try:
        lines = read_bytes(path, MOST_METRICS).decode("utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error, path)}") from error
    rows: dict[int, dict[str, float]] = {}
    try:
        for cells in csv.DictReader(line for line in lines if line.endswith("\n")):
            row = {key: number for key, cell in cells.items() if key and (number := _number(cell)) is not None}
            row = {key: number for key, number in row.items() if not finite or math.isfinite(number)}
            if math.isfinite(row.get("step", math.nan)):
                rows[int(row["step"])] = row
    except csv.Error as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or move it away") from error
    return [rows[step] for step in sorted(rows)]


def last_values(stage_dir: str | Path) -> dict[str, float]:
    """Return the last logged value of every column of metrics.csv."""
    values: dict[str, float] = {}
    for row in read_metrics(stage_dir):
        values.update(row)
    values.pop("step", None)
    return values


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Finding runs, stages and parents


def list_runs(runs_root: str | Path) -> list[RunDir]:
    """Return every run with at least one started stage, in natural order (d4 before d10)."""
    root = Path(runs_root)
    if not root.is_dir():
        return []
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and _is_plain(entry.name)]
    runs = [RunDir(root, name) for name in sorted(names, key=_natural)]
    return [run for run in runs if run.stages()]


def readable_stages(run: RunDir) -> list[str]:
    """Return the finished stages of one run among many; none where a run.json of it is damaged."""
    try:
        return run.finished()
    except UserError:
        return []


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def best_stages(run: RunDir) -> list[str]:
    """Return the finished servable stages furthest along the pipeline: several if they share a rank."""
    usable = [row for stage in run.finished() if (row := row_or_stranger(stage)).servable]
    return [row.name for row in usable if row.rank == usable[-1].rank]


def find_stage(runs_root: str | Path, run: str | None, stage: str | None = None, any_model: bool = False) -> Path:
    """Return the folder of the finished model stage to evaluate or serve; imports its trusted plugins.

    any_model: take a stage named by `stage` even if its model generates no text, as a reward model. `stage=None` takes
    the one furthest along the pipeline, `run=None` the only run there is. Raises UserError with the list of what
    exists, where two stages are equally far, and where a plugin of the stage cannot be imported or is not named by this
    command.
    """
    root = Path(runs_root)
    if run is None:
        runs = [candidate.name for candidate in list_runs(root) if _may_hold_model(candidate)]
        if len(runs) != 1:
            raise UserError(f"run= is missing: say which run to use. {_existing(root)}")
        run = runs[0]
    folder = RunDir(root, run)
    missing = load_run_plugins(folder)
    if stage is None:
        stage = _only_best(folder)
        for problem in missing:
            print(f"note: {run}/{stage} is used, but not all stages of this run are known ({problem})", file=sys.stderr)
    load_trusted(folder.path / stage)
    _check_usable(folder, stage, missing, any_model)
    return folder.path / stage


def _check_usable(run: RunDir, stage: str, missing: list[str], any_model: bool) -> None:
    """Raise UserError where the stage is unknown, has no model that generates text, or is not finished."""
    row, existing = row_or_stranger(stage), _existing(run.root, run.name)
    if not row.kind and not _holds_stage(run.path / stage):
        stages = ", ".join(name for name in stage_names() if stage_row(name).servable)
        raise UserError(f"stage={stage} does not exist; choose one of {stages}. {existing}")
    if not row.kind:
        raise UserError(
            f"stage={stage} of run={run.name} is not in the table of stages: name the plugin that registers it, "
            f"plugins=[<module>]{''.join(f' ({problem})' for problem in missing)}"
        )
    if not row.servable and not (any_model and row.makes_model):
        existing = _existing(run.root, run.name, suits=lambda name: row_or_stranger(name).servable)
        raise UserError(f"stage={stage} holds no model that generates text; choose another. {existing}")
    if stage not in run.finished():
        raise UserError(f"stage={stage} of run={run.name} is {_state(run, stage)}. {existing}")


def _may_hold_model(run: RunDir) -> bool:
    return any(row.servable or not row.kind for row in map(row_or_stranger, run.finished()))


def _only_best(run: RunDir) -> str:
    best = best_stages(run)
    if len(best) == 1:
        return best[0]
    if best:
        choices = " or ".join(f"stage={name}" for name in best)
        raise UserError(f"run={run.name} has {len(best)} stages at the end of its pipeline: choose {choices}")
    raise UserError(f"run={run.name} has no finished model stage in {run.path}. {_existing(run.root, run.name)}")


def saved_plugins(stage_dir: str | Path) -> list[str]:
    """Return the plugins in the saved configuration of a stage."""
    return list(((read_manifest(stage_dir) or {}).get("config") or {}).get("plugins") or [])


def load_trusted(stage_dir: Path) -> None:
    """Import the plugins that a stage was made with. Raises UserError for one that this command does not name."""
    for name in saved_plugins(stage_dir):
        check_code(name, f"{stage_dir / MANIFEST}: config.plugins")
        load_plugins([name])


def load_run_plugins(run: RunDir) -> list[str]:
    """Import the plugins of a run's stages that this command names too; returns why others were not imported."""
    problems = []
    for name in dict.fromkeys(plugin for stage in run.stages() for plugin in saved_plugins(run.path / stage)):
        try:
            check_code(name, f"{run.path}: a plugin of its stages")
            load_plugins([name])
        except UserError as error:  # it may belong to a stage that nobody asks for
            problems.append(str(error))
    return problems


def stage_before(cfg: Any) -> str | None:
    """Return the stage that `cfg.stage` continues by default; None where it starts from nothing.

    That is the first of the row's parents, without the chat stages that have nothing to train on: sft follows pretrain
    where `data.mixture.midtrain` names no task with repeats above 0, as in nanochat's recipe of 2026.
    """
    parents = stage_row(cfg.stage.name).parents
    return next((name for name in parents[:-1] if _has_work(stage_row(name), cfg)), parents[-1] if parents else None)


def _has_work(row: Stage, cfg: Any) -> bool:
    return row.kind != "chat" or any((cfg.data.mixture.get(row.mixture_key) or {}).values())


def find_parent(
    runs_root: str | Path,
    run: str,
    stage: str,
    init_from: str | None = None,
    before: str | None = None,
    asking: str | None = None,
) -> Path | None:
    """Return the model/ folder that a stage starts from; None for the tokenizer, which starts from text.

    By default that of the stage `before` (see `stage_before`; None: the row's first parent) in the same run.
    `init_from` is a run (its stage `before`), a run/stage, or a folder. Raises UserError with the finished stages and
    the override to use.

    asking: the stage that messages name, where it takes what `stage` would start from.
    """
    here, row = RunDir(runs_root, run), replace(stage_row(stage), name=asking or stage)
    if not row.parents:
        if init_from is not None:
            raise UserError(f"init_from={init_from}: stage={stage} starts from text, so remove this key")
        return None
    before = before or row.parents[0]
    if init_from is None:
        return _stage_parent(here, before, row, run)
    parent = _named_model(here, "init_from", init_from, before, row)
    if parent.resolve() == (here.path / row.name / "model").resolve():
        raise UserError(f"init_from={init_from} is the result of this stage itself: give the new one a run=<name>")
    return parent


def find_further(runs_root: str | Path, run: str, stage: str, key: str, value: str) -> Path:
    """Return the model/ folder that a key of `Stage.other_parents` names, such as stage.teacher=<run>/<stage>.

    `value` is a run (the end of its pipeline), a run/stage, or a folder. Raises UserError where it holds no model.
    """
    here, name = RunDir(runs_root, run), value.strip("/")
    before = _only_best(RunDir(runs_root, name)) if _is_plain(name) and RunDir(runs_root, name).stages() else ""
    return _named_model(here, key, value, before, replace(stage_row(stage), takes="weights"))


def _named_model(here: RunDir, key: str, value: str, before: str, row: Stage) -> Path:
    """Return the model/ folder that `key`=`value` names: a run (its stage `before`), a run/stage, or a folder."""
    name, _, part = value.strip("/").partition("/")
    if _is_plain(name) and "/" not in part and RunDir(here.root, name).stages():
        source = RunDir(here.root, name)
        if part and part not in (*stage_names(), *source.stages()):
            raise UserError(f"{key}={value}: there is no stage {part!r}. {_existing(source.root, name)}")
        return _stage_parent(source, part or before, row, here.name)
    return _folder_parent(Path(value), here, key, row)


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[^/\\.\s]([^/\\]*[^/\\\s])?", name) is not None


def _stage_parent(source: RunDir, parent: str, row: Stage, run: str) -> Path:
    """Return model/ of `parent` in the run `source`, checked to be finished and to hold what `row` needs."""
    if parent not in source.finished():
        usable = [stage for stage in reversed(source.finished()) if _suits(row, stage)]
        fix = f"run it first (the same command with stage={parent}, without its stage.* keys)"
        if usable:
            fix += f", or start from another stage: init_from={source.name}/{usable[0]}"
        elif row.takes == "weights":  # a tokenizer of another run was made for another text: none is proposed
            fix += ", or start from a model of another run: init_from=<run>/<stage>"
        raise UserError(
            f"stage={row.name} of run={run} starts from {source.name}/{parent}, which is {_state(source, parent)}. "
            f"{_existing(source.root, source.name)} {fix[0].upper()}{fix[1:]}"
        )
    return _checked_folder(source.model_dir(parent), f"{source.name}/{parent}", source, row)


def _suits(row: Stage, parent: str) -> bool:
    """Return True if the stage `parent` leaves what `row` takes, at an earlier place of the pipeline."""
    other = row_or_stranger(parent)
    return other.rank < row.rank and (other.makes_model or row.takes != "weights")


def _folder_parent(folder: Path, here: RunDir, key: str, row: Stage) -> Path:
    """Return the model/ folder at `key`=`folder`: that folder itself, or one inside the stage folder."""
    for candidate in (folder / "model", folder):
        if (candidate / "tokenizer.tiktoken").is_file() or (candidate / "model.safetensors").is_file():
            manifest = read_manifest(candidate.parent) if candidate.name == "model" else None
            if manifest is not None and manifest.get("status") != "finished":
                raise UserError(f"{key}={folder}: that stage is {manifest.get('status')}; finish it first")
            return _checked_folder(candidate, str(folder), here, row)
    what = "holds no model.safetensors or tokenizer.tiktoken" if folder.is_dir() else "is neither a run nor a folder"
    raise UserError(
        f"{key}={folder} {what}; give <run>, <run>/<stage> or a model folder. {_existing(here.root, here.name)}"
    )


def _checked_folder(model: Path, label: str, source: RunDir, row: Stage) -> Path:
    needed = ["tokenizer.tiktoken"] + (["model.safetensors"] if row.takes == "weights" else [])
    missing = [name for name in needed if not (model / name).is_file()]
    if missing:
        raise UserError(
            f"stage={row.name} cannot start from {label}: {model} has no {' and no '.join(missing)}. "
            f"{_existing(source.root, source.name)} Choose one that trained a model with init_from=<run>/<stage>"
        )
    return model


def _state(run: RunDir, stage: str) -> str:
    status = run.status(stage)
    if status == "missing":
        return f"missing ({run.stage_dir(stage)} has no run.json)"
    if status == "finished":
        return f"finished but without its folder {run.model_dir(stage)}"
    return f"not finished (status: {status})"


def _existing(
    root: str | Path, run: str | None = None, limit: int = 12, suits: Callable[[str], bool] = lambda stage: True
) -> str:
    """Return one sentence listing finished stages that `suits` takes, those of `run` first."""
    runs = sorted(list_runs(root), key=lambda candidate: candidate.name != run)
    found = [f"{one.name}/{stage}" for one in runs for stage in readable_stages(one) if suits(stage)]
    if not found:
        return f"There are no finished stages in {root} to choose from."
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return f"Finished stages in {root}: {', '.join(found[:limit])}{more}."
