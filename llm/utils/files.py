"""Files and folders that are replaced as a whole or not at all, and JSON."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm.errors import UserError


@contextmanager
def replaced_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a new empty folder that replaces `folder` if the block succeeds, and is deleted if it fails.

    The files are forced to disk before the rename, so neither a full disk nor a power cut leaves half a folder behind.
    Raises UserError if the disk refuses.
    """
    folder = Path(folder)
    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))

    try:
        put_back_folder(folder)
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
        put_back_folder(folder)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def put_back_folder(folder: Path) -> None:
    """Rename the old folder back where `replaced_folder` was stopped between its two renames."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a rename durable. Some file systems (and Windows) do not allow it; they are left alone."""
    with contextlib.suppress(OSError):
        sync(folder)


def plain(value: Any) -> Any:
    """Return a copy that JSON can hold: scalars of numpy and torch become numbers, non-finite numbers null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if not isinstance(value, float) and hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def write_atomic(path: str | Path, text: str | bytes) -> None:
    """Replace a file in one step: a crash or a full disk leaves the old or the new text, never a part.

    Raises UserError if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {path}: {reason}{_free_space(path.parent)}; the file is as it was") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _free_space(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 1e9:.2f} GB free)"
    except OSError:
        return ""


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None if there is no file. Raises UserError if it is unreadable."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or delete it and run the stage again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}; delete it and run again")
    return value


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write an object as indented JSON, in one step. Raises UserError if the file cannot be written."""
    write_atomic(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")
