"""Saved states of the form of the Train tab, by name: a table in the file of the queue, beside tags and notes."""

import contextlib
import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

from llm.errors import UserError
from llm.panel.form import Form
from llm.panel.table_file import opened
from llm.utils.files import parse_json

MOST = 200  # presets
MOST_LETTERS = 100_000  # of one
MOST_NAME = 80  # letters
TABLE = "CREATE TABLE IF NOT EXISTS panel_presets (name TEXT PRIMARY KEY, form TEXT NOT NULL)"


class Presets:
    """The presets in one SQLite file, which is made with the first."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def _open(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return opened(self.path, TABLE, "presets")

    def names(self) -> list[str]:
        """Return the names, in their order."""
        if not self.path.is_file():
            return []
        with self._open() as db:
            return [name for (name,) in db.execute("SELECT name FROM panel_presets ORDER BY name")]

    def save(self, name: str, form: Form) -> None:
        """Keep a form under a name, in place of one before. Raises UserError for no name, and for too many or long."""
        name, content = name.strip(), json.dumps(asdict(form))
        if not 1 <= len(name) <= MOST_NAME:
            raise UserError(f"give the preset a name of 1 to {MOST_NAME} letters")
        if len(content) > MOST_LETTERS:
            raise UserError(f"preset {name}: {len(content):,} letters, at most {MOST_LETTERS:,} are kept")
        before = self.names()
        if name not in before and len(before) >= MOST:
            raise UserError(f"preset {name}: {MOST} are kept at most; delete one first")
        with self._open() as db:
            db.execute("INSERT OR REPLACE INTO panel_presets VALUES (?, ?)", (name, content))

    def load(self, name: str) -> Form:
        """Return a form. Raises UserError where there is none of this name, or what is kept is no form."""
        found = None
        if self.path.is_file():
            with self._open() as db:
                found = db.execute("SELECT form FROM panel_presets WHERE name = ?", (name,)).fetchone()
        if found is None:
            raise UserError(f"there is no preset {name}")
        kept = parse_json(found[0].encode(), self.path)
        if not _is_form(kept):
            raise UserError(f"preset {name}: {self.path} does not hold a form under this name")
        return Form(kept["groups"], kept["values"], kept["sweep"])

    def delete(self, name: str) -> None:
        """Delete a preset. Raises UserError where there is none of this name."""
        if name not in self.names():
            raise UserError(f"there is no preset {name}")
        with self._open() as db:
            db.execute("DELETE FROM panel_presets WHERE name = ?", (name,))


def _is_form(kept: object) -> bool:
    if not isinstance(kept, dict) or set(kept) != {"groups", "values", "sweep"} or type(kept["sweep"]) is not bool:
        return False
    parts = (kept["groups"], kept["values"])
    if not all(isinstance(part, dict) for part in parts):
        return False
    return all(isinstance(word, str) for part in parts for pair in part.items() for word in pair)
