"""`Registry`: a table of names that users can add to, for everything a configuration chooses by name."""

import difflib
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from llm.errors import UserError


class Registry:
    """Names and what each stands for. An entry may be a dotted name, which is imported when it is first asked for.

    what: a word for the kind of entry, used in errors. Names that are not in the table but hold a dot are taken as
    `package.module.Thing` and imported, so that a user's thing need not be registered to be named.
    """

    def __init__(self, what: str, entries: Mapping[str, Any]):
        self.what, self.entries = what, dict(entries)

    def register(self, name: str, thing: Any) -> None:
        """Add an entry. Raises UserError where the name holds a dot, or is taken by another entry."""
        if not name or "." in name:
            raise UserError(f"{self.what} {name!r}: cannot be registered; give a name without a dot")
        if self.entries.setdefault(name, thing) is not thing:
            raise UserError(f"{self.what} {name!r} exists already: register yours under another name")

    def __contains__(self, name: object) -> bool:
        """Return whether `name` is registered or dotted; a dotted one is not imported here, and may not exist."""
        return isinstance(name, str) and (name in self.entries or "." in name)

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
            raise UserError(
                f"{where} does not exist{hint} Choose one of {', '.join(self.entries)}, or write package.module.Name "
                f"for your own {self.what} (docs/extend.md)"
            )
        if name not in self.entries:
            return imported(name, where)
        if isinstance(self.entries[name], str):
            self.entries[name] = imported(self.entries[name], where)
        return self.entries[name]


def imported(name: str, where: str) -> Any:
    """Import `package.module.Thing`. Raises UserError, beginning with `where`, if there is no such module or thing."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(sys.modules.get(module) or import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: no module {error.name!r}; put its folder on PYTHONPATH, or install it") from error
    except AttributeError as error:
        raise UserError(f"{where}: {module} has no {attribute!r} ({error})") from error
    except Exception as error:
        raise UserError(f"{where}: importing {module} failed ({type(error).__name__}: {error})") from error
