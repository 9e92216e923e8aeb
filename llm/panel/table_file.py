"""Opens a table of the panel's own, which lies in the file of the queue and is made with its first row."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from llm.errors import UserError


@contextlib.contextmanager
def opened(path: Path, table: str, what: str) -> Iterator[sqlite3.Connection]:
    """Open an SQLite file for one transaction; `table` is the statement that makes the table where there is none.

    Raises UserError, which names `what` cannot be kept, where the file cannot be opened or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as db, db:
            db.execute(table)
            yield db
    except (sqlite3.Error, OSError) as error:
        raise UserError(f"paths.queue={path}: {what} cannot be kept there ({error})") from error
