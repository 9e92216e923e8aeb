"""Imports of torchmetrics no more than Lightning needs: all of it takes longer to import than torch itself.

Lightning asks for two classes, `Metric` and `MetricCollection`. The package's own file imports every metric there is,
and with them scipy, matplotlib and transformers. `import_in_part` puts a stand-in in the place of that file, and one in
the place of the module for plots: each is executed as soon as somebody asks for anything else that it holds. Classes
are the same ones either way.
"""

import logging
import sys
import threading
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from types import ModuleType
from typing import Any

PACKAGE, PLOTS = "torchmetrics", "torchmetrics.utilities.plot"
BASE = ("utilities", "metric", "collections")  # submodules that do without the others
_lock = threading.RLock()


def import_in_part() -> None:
    """Let `import torchmetrics` bring the stand-in; does nothing where the package has been imported already."""
    if PACKAGE not in sys.modules and not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


class Finder:
    """Finds the two modules as Python does, and has them begin as stand-ins."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return how to make a stand-in, None for another module. One that needs the whole package gets that first."""
        if name in (PACKAGE, PLOTS):
            spec = PathFinder.find_spec(name, path)
            if spec is not None:
                spec.loader = StandIn(spec.loader)
            return spec
        parts = name.split(".")
        if parts[0] == PACKAGE and parts[1] not in BASE:
            make_whole(sys.modules[PACKAGE])
        return None


class StandIn:
    """Loader of a module that begins with a few names, and is executed by `loader` when another is asked for."""

    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return None, for a module of the usual kind."""

    def exec_module(self, module: ModuleType) -> None:
        """Give the module the names that cost little, and a function that finds the others."""
        module.__loader__ = module.__spec__.loader = self.loader

        def find(name: str) -> Any:
            if not name.startswith("__") or name == "__all__":  # Python itself asks for others
                make_whole(module)
            if name in vars(module):
                return vars(module)[name]
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find
        (begin_package if module.__name__ == PACKAGE else begin_plots)(module)


def make_whole(module: ModuleType) -> None:
    """Execute the file of a module, if a stand-in is in its place."""
    with _lock:
        if vars(module).pop("__getattr__", None) is not None:
            module.__loader__.exec_module(module)


def begin_package(module: ModuleType) -> None:
    """Give the package the two classes, and what their modules and Lightning ask for besides."""
    module.__version__, module._logger = version(PACKAGE), logging.getLogger(PACKAGE)
    import_module(f"{PACKAGE}.utilities")  # imports `metric`, which alone would go in a circle
    module.Metric = sys.modules[f"{PACKAGE}.metric"].Metric
    module.MetricCollection = import_module(f"{PACKAGE}.collections").MetricCollection


def begin_plots(module: ModuleType) -> None:
    """Give the module for plots what the two classes ask for: types of signatures, and a function that draws."""

    def plot_single_or_multi_val(*args: Any, **options: Any) -> Any:
        make_whole(module)
        return module.plot_single_or_multi_val(*args, **options)

    module._AX_TYPE = module._PLOT_OUT_TYPE = object
    module.plot_single_or_multi_val = plot_single_or_multi_val
