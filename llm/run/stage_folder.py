"""The run folder: where a stage writes, how the next stage finds its parent, and how run.json is read and written.

    runs/<run>/report.md                    runs/<run>/<stage>/run.json  metrics.csv  eval.json  checkpoints/  model/

Everything here is paths and small files: no torch at import, so that command lines stay quick.
"""

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.config.renamed import renamed_manifest
from llm.config.schema import STAGES
from llm.errors import UserError
from llm.utils.files import read_json, write_json

MODEL_STAGES = STAGES[1:]  # each stage starts from the one before; only the tokenizer makes no model
MANIFEST = "run.json"


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
        """Folder of one stage; an unknown stage name is an error."""
        if stage not in STAGES:
            raise UserError(f"stage={stage} does not exist; choose one of {', '.join(STAGES)}")
        return self.path / stage

    def model_dir(self, stage: str) -> Path:
        """The stage's hand-over folder, complete once the stage is finished."""
        return self.stage_dir(stage) / "model"

    def manifest(self, stage: str) -> dict[str, Any] | None:
        return read_manifest(self.stage_dir(stage))

    def status(self, stage: str) -> str:
        """`running`, `interrupted`, `finished`, or `missing` when the stage was never started."""
        manifest = self.manifest(stage)
        return "missing" if manifest is None else str(manifest.get("status", "finished"))

    def stages(self) -> list[str]:
        """Stages with a run.json, in pipeline order."""
        return [stage for stage in STAGES if (self.path / stage / MANIFEST).is_file()]

    def finished(self) -> list[str]:
        """Stages that can be a parent: finished and with their model/ folder in place."""
        return [s for s in self.stages() if self.status(s) == "finished" and self.model_dir(s).is_dir()]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_manifest(path: str | Path) -> dict[str, Any] | None:
    """Return run.json of a stage folder (or the file itself), its config under the present names of keys.

    None if the stage was never started. Raises UserError where the file cannot be read.
    """
    path = Path(path)
    manifest = read_json(path if path.name == MANIFEST else path / MANIFEST)
    return None if manifest is None else renamed_manifest(manifest)


def write_manifest(path: str | Path, manifest: dict[str, Any]) -> None:
    """Write run.json into a stage folder (or to the file itself), atomically and synced to disk."""
    path = Path(path)
    write_json(path if path.name == MANIFEST else path / MANIFEST, manifest)


def read_metrics(stage_dir: str | Path) -> list[dict[str, float]]:
    """Rows of metrics.csv by ascending step, without empty or non-numeric cells; [] if there is no file.

    A line that a crash cut short is left out; of two rows for one step the later one wins.
    """
    path = Path(stage_dir) / "metrics.csv"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows: dict[int, dict[str, float]] = {}
    for cells in csv.DictReader(line for line in lines if line.endswith("\n")):
        row = {key: number for key, cell in cells.items() if key and (number := _number(cell)) is not None}
        if "step" in row:
            rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def _number(cell: Any) -> float | None:
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


# ---------------------------------------------------------------------------------------------------------------------
# Finding runs, stages and parents


def list_runs(runs_root: str | Path) -> list[RunDir]:
    """Every run with at least one started stage, in natural order (d4 before d10)."""
    root = Path(runs_root)
    if not root.is_dir():
        return []
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and _is_plain(entry.name)]
    runs = [RunDir(root, name) for name in sorted(names, key=_natural)]
    return [run for run in runs if run.stages()]


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def best_stage(runs_root: str | Path, run: str) -> str | None:
    """The finished model stage furthest along the pipeline (grpo > sft > midtrain > pretrain), or None."""
    finished = [stage for stage in RunDir(runs_root, run).finished() if stage in MODEL_STAGES]
    return finished[-1] if finished else None


def find_stage(runs_root: str | Path, run: str | None, stage: str | None = None) -> Path:
    """Folder of the finished model stage that evaluation and serving should use.

    `stage=None` takes the best one, `run=None` the only run there is. Raises UserError with the list of what exists.
    """
    root = Path(runs_root)
    if run is None:
        runs = [candidate.name for candidate in list_runs(root) if best_stage(root, candidate.name)]
        if len(runs) != 1:
            raise UserError(f"run= is missing: say which run to use. {_existing(root)}")
        run = runs[0]
    folder = RunDir(root, run)
    if stage is None:
        stage = best_stage(root, run)
        if stage is None:
            raise UserError(f"run={run} has no finished model stage in {folder.path}. {_existing(root, run)}")
    elif stage not in MODEL_STAGES:
        raise UserError(
            f"stage={stage} holds no model; choose one of {', '.join(MODEL_STAGES)}. {_existing(root, run)}"
        )
    elif stage not in folder.finished():
        raise UserError(f"stage={stage} of run={run} is {_state(folder, stage)}. {_existing(root, run)}")
    return folder.stage_dir(stage)


def stage_before(cfg: Any) -> str:
    """The stage that `cfg.stage` continues: the one before it, but pretrain for sft where nothing is to be midtrained.

    That is so when `data.mixture.midtrain` names no task with repeats above 0, as in nanochat's recipe of 2026.
    """
    before = STAGES[STAGES.index(cfg.stage.name) - 1]
    return "pretrain" if before == "midtrain" and not any(cfg.data.mixture.midtrain.values()) else before


def find_parent(
    runs_root: str | Path, run: str, stage: str, init_from: str | None = None, before: str | None = None
) -> Path | None:
    """The model/ folder that a stage starts from; None for the tokenizer, which starts from text.

    By default that of the stage `before` (see `stage_before`; None: the previous one) in the same run. `init_from` is a
    run (its stage `before`), a run/stage, or a folder. Raises UserError with the finished stages and the override to
    use.
    """
    here = RunDir(runs_root, run)
    here.stage_dir(stage)
    if stage == "tokenizer":
        if init_from is not None:
            raise UserError(f"init_from={init_from}: stage=tokenizer starts from text, so remove this key")
        return None
    before = before or STAGES[STAGES.index(stage) - 1]
    if init_from is None:
        return _stage_parent(here, before, stage, run)
    name, _, part = init_from.strip("/").partition("/")
    if _is_plain(name) and "/" not in part and RunDir(runs_root, name).stages():
        source = RunDir(runs_root, name)
        if part and part not in STAGES:
            raise UserError(f"init_from={init_from}: there is no stage {part!r}. {_existing(source.root, name)}")
        return _stage_parent(source, part or before, stage, run)
    return _folder_parent(Path(init_from), here, stage)


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[^/\\.\s]([^/\\]*[^/\\\s])?", name) is not None


def _stage_parent(source: RunDir, parent: str, stage: str, run: str) -> Path:
    """model/ of `parent` in the run `source`, checked to be finished and to hold what `stage` needs."""
    if parent not in source.finished():
        runs = sorted(list_runs(source.root), key=lambda candidate: candidate.name != source.name)
        usable = [
            f"{candidate.name}/{s}"
            for candidate in runs
            for s in reversed(candidate.finished())
            if STAGES.index(s) < STAGES.index(stage) and (stage == "pretrain" or s in MODEL_STAGES)
        ]
        fix = f"run it first (the same command with stage={parent})"
        if usable:
            fix += f", or start from another stage: init_from={usable[0]}"
        raise UserError(
            f"stage={stage} of run={run} starts from {source.name}/{parent}, which is {_state(source, parent)}. "
            f"{_existing(source.root, source.name)} {fix[0].upper()}{fix[1:]}"
        )
    return _checked_folder(source.model_dir(parent), f"{source.name}/{parent}", source, stage)


def _folder_parent(folder: Path, here: RunDir, stage: str) -> Path:
    """`init_from` as a folder: a model/ folder itself or the stage folder around it."""
    for candidate in (folder / "model", folder):
        if (candidate / "tokenizer.tiktoken").is_file() or (candidate / "model.safetensors").is_file():
            manifest = read_manifest(candidate.parent) if candidate.name == "model" else None
            if manifest is not None and manifest.get("status") != "finished":
                raise UserError(f"init_from={folder}: that stage is {manifest.get('status')}; finish it first")
            return _checked_folder(candidate, str(folder), here, stage)
    what = "holds no model.safetensors or tokenizer.tiktoken" if folder.is_dir() else "is neither a run nor a folder"
    raise UserError(
        f"init_from={folder} {what}; give <run>, <run>/<stage> or a model folder. {_existing(here.root, here.name)}"
    )


def _checked_folder(model: Path, label: str, source: RunDir, stage: str) -> Path:
    needed = ["tokenizer.tiktoken"] + ([] if stage == "pretrain" else ["model.safetensors"])
    missing = [name for name in needed if not (model / name).is_file()]
    if missing:
        raise UserError(
            f"stage={stage} cannot start from {label}: {model} has no {' and no '.join(missing)}. "
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


def _existing(root: str | Path, run: str | None = None, limit: int = 12) -> str:
    """One sentence listing finished stages, those of `run` first."""
    runs = sorted(list_runs(root), key=lambda candidate: candidate.name != run)
    found = [f"{candidate.name}/{stage}" for candidate in runs for stage in candidate.finished()]
    if not found:
        return f"There are no finished stages in {root}."
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return f"Finished stages in {root}: {', '.join(found[:limit])}{more}."


# ---------------------------------------------------------------------------------------------------------------------
# Comparing configurations
