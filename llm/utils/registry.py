"""`Registry`: a table of names that users can add to, and the import of what a dotted name stands for."""

import difflib
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from llm.errors import UserError, is_out_of_memory


class Registry:
    """Names and what each stands for. An entry may be a dotted name, which is imported when it is first asked for.

    what: a word for the kind of entry, used in errors. own: how a user brings one of their own, used in errors.
    """

    def __init__(self, what: str, entries: Mapping[str, Any], own: str = "a plugin registers yours (docs/extend.md)"):
        self.what, self.entries, self.own = what, dict(entries), own

    def register(self, name: str, thing: Any) -> None:
        """Add an entry. Raises UserError where the name holds a dot, or is taken by another entry."""
        if not name or "." in name:
            raise UserError(f"{self.what} {name!r}: cannot be registered; give a name without a dot")
        if self.entries.setdefault(name, thing) is not thing:
            raise UserError(f"{self.what} {name!r} exists already: register yours under another name")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def get(self, name: str, key: str = "") -> Any:
        """Return the entry `name`. key: the place in the configuration that names it, for the error.

        Raises UserError with all names, and the nearest one, for a name that does not exist or cannot be imported.
        """
        where = f"{key or self.what}={name}"
        if name not in self:
            near = difflib.get_close_matches(str(name), self.entries, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UserError(f"{where} does not exist{hint} Choose one of {', '.join(self.entries)}; {self.own}")
        if isinstance(self.entries[name], str):
            self.entries[name] = imported(self.entries[name], where)
        return self.entries[name]


def resolved(thing: Any, where: str) -> Any:
    """Return what a dotted name stands for, see `imported`; anything else as it is."""
    return imported(thing, where) if isinstance(thing, str) else thing


def imported(name: str, where: str) -> Any:
    """Import what a dotted name stands for: `package.module.Thing`, also `package.module.Class.method`.

    where: begins the UserError that is raised if there is no such module or thing, or the module fails.
    """
    parts = name.split(".")
    if len(parts) < 2 or not all(parts):
        raise UserError(f"{where}: write package.module.Name, the module that holds it and its name")
    found = _module(parts[0], where)
    for number, part in enumerate(parts[1:], start=2):
        inner = ".".join(parts[:number])
        if number < len(parts) and hasattr(found, "__path__") and (inner in sys.modules or find_spec(inner)):
            found = _module(inner, where)
        elif hasattr(found, part):
            found = getattr(found, part)
        else:
            raise UserError(f"{where}: {_nothing(found, part)}")
    return found


def _module(name: str, where: str) -> Any:
    """Return a module, imported if it is not there yet. Raises UserError where that fails."""
    try:
        return sys.modules.get(name) or import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: no module {error.name!r}; put its folder on PYTHONPATH, or install it") from error
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{where}: importing {name} failed ({type(error).__name__}: {error})") from error


def _nothing(holder: Any, name: str) -> str:
    """Say that a module or class has no such name, with the nearest one that it has."""
    holder_name = getattr(holder, "__name__", str(holder))
    text = f"{holder_name} has no {name!r}"
    if near := difflib.get_close_matches(name, [one for one in dir(holder) if not one.startswith("_")], 1):
        text += f"; did you mean {near[0]}?"
    if holder_name == "__main__":
        text += "; other processes do not see a class of a notebook: put it into a file"
    return text
