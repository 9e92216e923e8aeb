"""Models that a chat can switch to: the finished stages of the runs folder, loaded when they are wanted."""

import threading
from collections import OrderedDict, defaultdict
from pathlib import Path

from llm.config.stages import row_or_stranger
from llm.errors import UserError
from llm.run.stage_folder import RunDir, find_stage, list_runs, readable_stages
from llm.serving.chat import ChatModel, load_chat_model

KEPT = 2  # models in memory: as many as are compared side by side


class MadeRoom(UserError):
    """A model had to make room for another just before it was asked; `Models.get` loads it again."""


class Models:
    """Chat models by name, run/stage: the one that is there, and finished stages, of which `KEPT` stay in memory.

    Adapters beside the first model are answered by its engine, and stay with it.
    root: folder of runs whose finished stages are offered too; None = only the first model is. compute, verify,
    weights: how these are loaded, see `load_chat_model`.
    """

    at_once = 1  # answers that may be under way: an engine belongs to one thread at a time

    def __init__(
        self,
        first: ChatModel,
        root: str | Path | None = None,
        verify: bool = True,
        compute: str = "auto",
        weights: str | None = None,
    ):
        self.first, self.root = first.name, root
        self._how = {"compute": compute, "verify": verify, "weights": weights}
        self._loaded = OrderedDict({first.name: first})
        self._beside = {one.name: one for one in first.beside}
        self._lock = threading.Lock()  # of `_loaded`
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # of who loads a model
        self._places = threading.Semaphore(KEPT)

    def names(self) -> list[str]:
        """Return the names of all models there are now: of the first one's run, then of the other runs."""
        own = self.first.partition("/")[0]
        found = [name for run in list_runs(self.root) for name in _servable(run)] if self.root is not None else []
        found.sort(key=lambda name: name.partition("/")[0] != own)
        return list(dict.fromkeys([self.first, *self._beside, *found]))

    def get(self, name: str) -> ChatModel:
        """Return a model, loaded if it was not. Raises UserError for a name that is not offered, or will not load.

        Who wants a model that is there does not wait for others to be loaded; `KEPT` of them are loaded at a time.
        """
        if (model := self._find(name)) is not None:
            return model
        if name not in (names := self.names()):
            raise UserError(f"there is no model {name[:80]!r} here; choose one of {', '.join(names)}")
        with self._locks[name], self._places:
            if (model := self._find(name)) is None:  # nobody else has loaded it meanwhile
                model = self._load(name)
                self._keep(name, model)
        return model

    def _find(self, name: str) -> ChatModel | None:
        """Return a model that is there, from now on the last one to go; None for any other."""
        with self._lock:
            if name in self._loaded:
                self._loaded.move_to_end(name)
            return self._beside.get(name) or self._loaded.get(name)

    def _keep(self, name: str, model: ChatModel) -> None:
        """Put a model among those that are there; others make room."""
        with self._lock:
            while (out := self._surplus()) is not None:
                self._unload(self._loaded.pop(out))
            self._loaded[name] = model

    def _load(self, name: str) -> ChatModel:
        """Load a model that is offered. Raises UserError where it cannot be loaded."""
        return load_chat_model(find_stage(self.root, *name.split("/")), **self._how)

    def _surplus(self) -> str | None:
        """Return the name of the model that must make room for one more; None where there is room."""
        return next(iter(self._loaded)) if len(self._loaded) >= KEPT else None

    def _unload(self, model: ChatModel) -> None:
        """Let go of what a model holds beside this process's memory: nothing."""


def _servable(run: RunDir) -> list[str]:
    """Return the names of a run's finished models, the most advanced first."""
    return [f"{run.name}/{stage}" for stage in reversed(readable_stages(run)) if row_or_stranger(stage).servable]
