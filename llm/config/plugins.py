"""Import what users add to Fathom: their modules register schemas, stages, tasks, optimizers or rewards.

A plugin is a Python module. It is named by `plugins=[my_package]` on the command line, or installed under the
entry-point group `fathom.plugins`. Plugins are imported before the configuration is composed, so that what they
register can be chosen like what Fathom brings. Imports nothing heavy.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from llm.errors import UserError

ENTRY_POINTS = "fathom.plugins"


def load_plugins(names: Iterable[str]) -> None:
    """Import the installed plugins and those in `names`, each once. The current folder counts as on the path.

    Raises UserError where a module does not exist or fails while it is imported.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    for point in entry_points(group=ENTRY_POINTS):
        _import(point.value, f"entry point {ENTRY_POINTS}: {point.name}")
    for name in names:
        _import(name, f"plugins=[{name}]")


def load_run_plugins(config: Mapping[str, Any]) -> None:
    """Import the plugins that a run was trained with, from its saved configuration.

    One that is missing is told and left out: the run may have needed it for its training only, as an optimizer.
    """
    for name in config.get("plugins") or []:
        try:
            load_plugins([name])
        except UserError as error:
            print(f"note: {error}; the run was trained with it", flush=True)


def plugins_in(argv: Sequence[str]) -> list[str]:
    """Return the modules that `plugins=...` names on a command line: `plugins=my_package` or `plugins=[one,two]`."""
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
