"""Tags and notes on stages: a table in the file of the queue."""

import contextlib
import sqlite3
from pathlib import Path
from typing import NamedTuple

from llm.errors import UserError
from llm.panel.table_file import opened

MOST = 10_000  # characters of a note, and of all tags of a stage
TABLE = "CREATE TABLE IF NOT EXISTS panel_notes (stage TEXT PRIMARY KEY, tags TEXT NOT NULL, note TEXT NOT NULL)"


class Note(NamedTuple):
    """Note on a stage by its user: tags, separated by blanks, and free text."""

    tags: str = ""
    note: str = ""


class Notes:
    """The notes in one SQLite file; it is made with the first note."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def _open(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return opened(self.path, TABLE, "notes")

    def all(self) -> dict[str, Note]:
        """Return the notes by `run/stage`."""
        if not self.path.is_file():
            return {}
        with self._open() as db:
            return {stage: Note(tags, note) for stage, tags, note in db.execute("SELECT * FROM panel_notes")}

    def write(self, stage: str, tags: str, note: str) -> None:
        """Keep tags and note of `run/stage` in place of those before. Raises UserError for more than `MOST` letters."""
        tags, note = " ".join(dict.fromkeys(tags.replace(",", " ").split())), note.strip()
        for name, text in (("tags", tags), ("note", note)):
            if len(text) > MOST:
                raise UserError(f"{name}: {len(text):,} letters, at most {MOST:,} are kept")
        with self._open() as db:
            if tags or note:
                db.execute("INSERT OR REPLACE INTO panel_notes VALUES (?, ?, ?)", (stage, tags, note))
            else:
                db.execute("DELETE FROM panel_notes WHERE stage = ?", (stage,))
