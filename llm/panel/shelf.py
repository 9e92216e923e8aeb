"""Put runs away, bring them back, and delete them."""

import os
import shutil
from pathlib import Path

from llm.errors import UserError
from llm.panel.index import process_of
from llm.panel.runs_view import descendants
from llm.panel.state import Panel
from llm.run.lock import is_locked
from llm.run.stage_folder import RunDir

ARCHIVE = ".archive"  # in paths.runs; the readers of runs pass over folders that begin with a dot


def archived(panel: Panel) -> list[str]:
    """Return the names of the runs that were put away."""
    place = panel.runs / ARCHIVE
    return sorted(entry.name for entry in place.iterdir() if entry.is_dir()) if place.is_dir() else []


def archive(panel: Panel, run: str, confirmed: str) -> str:
    """Put a run away; returns what was done. Raises UserError without its name in `confirmed`, or where it is busy."""
    folder = _checked(panel, run, confirmed)
    target = panel.runs / ARCHIVE / run
    if target.exists():
        raise UserError(f"{run}: a run of this name was put away before; bring that one back or delete it first")
    _move(folder, target)
    return f"{run} was put away; Bring back undoes this"


def bring_back(panel: Panel, run: str) -> str:
    """Bring a run back that was put away. Raises UserError where another has its name now."""
    panel.check_may_change()
    source, target = panel.runs / ARCHIVE / RunDir(panel.runs, run).name, panel.runs / run
    if not source.is_dir():
        raise UserError(f"{run} was not put away")
    if target.exists():
        raise UserError(f"{run}: there is a run of this name again; rename one of the two")
    _move(source, target)
    return f"{run} is back"


def delete(panel: Panel, run: str, confirmed: str) -> str:
    """Delete a run for good. Raises UserError without its name in `confirmed`, where it is busy, or others need it."""
    folder = _checked(panel, run, confirmed)
    if needed := descendants(panel.index.rows(), run):
        raise UserError(f"{run}: {', '.join(needed[:4])} started from it; put it away instead, or delete those first")
    gone = panel.runs / f".deleted-{run}"
    try:
        if gone.exists():
            shutil.rmtree(gone)  # of one of this name, whose deletion was cut off
        os.replace(folder, gone)  # at once, so that nobody reads half a run
        shutil.rmtree(gone)
    except OSError as error:
        raise UserError(f"{run}: cannot be deleted ({error})") from error
    return f"{run} was deleted"


def _move(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(exist_ok=True)
        os.replace(source, target)
    except OSError as error:
        raise UserError(f"{source.name}: cannot be moved ({error})") from error


def _checked(panel: Panel, run: str, confirmed: str) -> Path:
    """Return the folder of a run that may be moved."""
    panel.check_may_change()
    if not run:
        raise UserError("open a stage of the run first")
    folder = RunDir(panel.runs, run)
    if confirmed.strip() != run:
        raise UserError(f"write the name of the run, {run}, to confirm")
    if not folder.path.is_dir():
        raise UserError(f"{run}: there is no such run")
    for stage in folder.stages():
        if process_of(folder.path / stage) is not None or is_locked(folder.path / stage):
            raise UserError(f"{run}/{stage} is being written; stop it first")
    return folder.path
