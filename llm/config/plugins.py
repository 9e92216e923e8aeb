"""Import what users add to Fathom: their modules register schemas, stages, tasks, optimizers or rewards.

A plugin is a Python module. It is named by `plugins=[my_package]` on the command line, or installed under the
entry-point group `fathom.plugins`. Plugins are imported before the configuration is composed, so that what they
register can be chosen like what Fathom brings. Imports nothing heavy.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

from llm.errors import UserError

ENTRY_POINTS = "fathom.plugins"


def load_plugins(names: Iterable[str]) -> None:
    """Import the installed plugins and those in `names`, each once. The current folder counts as on the path.

    Raises UserError where a module does not exist or fails while it is imported.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    if _some_are_installed():
        from importlib.metadata import entry_points

        for point in entry_points(group=ENTRY_POINTS):
            _import(point.value, f"entry point {ENTRY_POINTS}: {point.name}")
    for name in names:
        _import(name, f"plugins=[{name}]")


def _some_are_installed() -> bool:
    """Return whether an installed package names a plugin: a look at the files costs 3 ms, importlib.metadata 20."""
    for folder in filter(os.path.isdir, sys.path):
        for entry in os.scandir(folder):
            if entry.name.endswith((".dist-info", ".egg-info")):
                path = os.path.join(entry.path, "entry_points.txt")
                if os.path.isfile(path) and f"[{ENTRY_POINTS}]" in Path(path).read_text(encoding="utf-8"):
                    return True
    return False


def plugins_in(argv: Sequence[str]) -> list[str]:
    """Return the modules that `plugins=[one,two]` names on a command line."""
    value = next((arg.partition("=")[2] for arg in reversed(argv) if arg.startswith(("plugins=", "+plugins="))), "")
    names = [name.strip() for name in value.strip("[]").split(",")]
    return [name for name in names if name and name != "null"]


def _import(name: str, where: str) -> None:
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        hint = "put its folder on PYTHONPATH, or install it" if error.name == name.partition(".")[0] else "install that"
        raise UserError(f"{where}: no module {error.name!r}; {hint}") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: importing it failed ({type(error).__name__}: {error})") from error
