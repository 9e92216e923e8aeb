"""Holds what the pages of the panel share: folders, readers, queue and notes, and whether anything may be changed."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llm.cli.compose import quoted
from llm.errors import UserError
from llm.experiments.queue_store import Queue
from llm.panel.columns import Columns
from llm.panel.defaults import defaults
from llm.panel.hardware import Machine
from llm.panel.index import Index
from llm.panel.notes import Notes
from llm.panel.presets import Presets

CACHE = ".panel"  # in paths.runs; may be deleted at any time


def file_stamps(paths: Iterable[Path]) -> tuple[tuple[int, int], ...]:
    """Return (time of the last change in ns, bytes) of each file; (0, 0) where there is none."""
    found = []
    for path in paths:
        try:
            facts = path.stat()
            found.append((facts.st_mtime_ns, facts.st_size))
        except OSError:
            found.append((0, 0))
    return tuple(found)


@dataclass(frozen=True)
class Panel:
    """A panel over one folder of runs. folders: those of `paths.*`, beyond which no path of a setting may lead.

    chat: whether a chat is served beside it, at `/`.
    """

    runs: Path
    queue_file: Path
    folders: tuple[Path, ...]
    readonly: bool = False
    chat: bool = False

    @classmethod
    def of(cls, cfg: Any) -> "Panel":
        """Return the panel that a configuration of serve.py describes."""
        runs, queue = Path(cfg.paths.runs).absolute(), Path(cfg.paths.queue).absolute()
        folders = (runs, Path(cfg.paths.data).expanduser().absolute())
        has_chat = cfg.run is not None or cfg.model is not None
        return cls(runs, queue, folders, bool(cfg.panel.readonly), has_chat)

    @cached_property
    def places(self) -> list[str]:
        """Settings that lead a job to the folders of this panel, where train.py by itself would use others."""
        own, given = {"runs": self.runs, "data": self.folders[-1]}, defaults(())["paths"]
        other = {key: path for key, path in own.items() if Path(given[key]).expanduser().absolute() != path}
        plain = re.compile(r"[\w./\-]+")
        return [
            f"paths.{key}={path if plain.fullmatch(str(path)) else quoted(str(path))}" for key, path in other.items()
        ]

    @cached_property
    def cache(self) -> Path:
        """Folder of the caches: beside the runs, or, where nothing can be written there, one that ends with the panel.

        Runs of others may be looked at too.
        """
        folder = self.runs / CACHE
        if not self.runs.is_dir():
            return folder  # it is made with the first run
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
        if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return folder
        return Path(self._own_folder.name)

    @cached_property
    def _own_folder(self) -> "tempfile.TemporaryDirectory[str]":
        return tempfile.TemporaryDirectory(prefix="fathom_panel_")

    @cached_property
    def columns(self) -> Columns:
        """Cache of all metrics.csv."""
        return Columns(self.cache / "columns")

    @cached_property
    def index(self) -> Index:
        """Rows of all stages."""
        return Index(self.runs, self.cache, self.columns)

    @cached_property
    def notes(self) -> Notes:
        """Tags and notes."""
        return Notes(self.queue_file)

    @cached_property
    def presets(self) -> Presets:
        """Saved states of the form of Train."""
        return Presets(self.queue_file)

    @cached_property
    def machine(self) -> Machine:
        """Load of the machine."""
        return Machine()

    @cached_property
    def queue(self) -> Queue:
        """Jobs that wait, run and have ended."""
        return Queue(self.queue_file)

    def check_may_change(self) -> None:
        """Raise UserError where this panel only shows."""
        if self.readonly:
            raise UserError("panel.readonly=true: this panel shows, and changes nothing")
