"""Folders that are replaced as a whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm.errors import UserError


@contextmanager
def replaced_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A new empty folder that takes the place of `folder` when the block ends well, and vanishes when it does not.

    The files are forced to disk before the rename, so neither a full disk nor a power cut leaves half a folder behind.
    Raises UserError where the disk refuses.
    """
    folder = Path(folder)
    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))

    def put_back() -> None:
        if old.exists() and not folder.exists():  # stopped between the two renames
            old.rename(folder)

    try:
        put_back()
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        for path in new.iterdir():
            sync(path)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error}); free disk space or choose another paths.runs, "
            "then run the same command again"
        ) from error
    finally:
        put_back()
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a rename durable; not every file system (or Windows) allows it, and then there is nothing to do."""
    with contextlib.suppress(OSError):
        sync(folder)
