"""Files and folders that are replaced as a whole or not at all, and JSON."""

import contextlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm.errors import UserError, reason_of

MEND = "restore it, or delete it and run the stage again"
MOST_BYTES = 1 << 26  # of a JSON file of a run: the largest real ones, eval.json with samples, have a few MB
DEEPEST = 64  # mappings and lists one in the other


@contextmanager
def replaced_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a new empty folder that replaces `folder` if the block succeeds, and is deleted if it fails.

    The files are forced to disk before the rename, so neither a full disk nor a power cut leaves half a folder behind.
    Where `folder` is a link, what it leads to is replaced. Raises UserError if the disk refuses.
    """
    place = Path(os.path.realpath(folder))
    new, old = (place.with_name(f".{place.name}.{suffix}") for suffix in ("new", "old"))

    try:
        put_back_folder(place)
        for leftover in (new, old):
            _remove(leftover)
        new.mkdir(parents=True)
        yield new
        for path in new.iterdir():
            sync(path)
        if place.exists():
            place.rename(old)
        new.rename(place)
        sync_folder(place.parent)
    except OSError as error:
        reason = reason_of(error, place)
        raise UserError(f"{folder}: cannot be written: {reason}. Then run the same command again") from error
    finally:
        put_back_folder(place)
        for leftover in (new, old):
            _remove(leftover)


def _remove(leftover: Path) -> None:
    """Remove a folder, or a link to one, if it can be removed."""
    with contextlib.suppress(OSError):
        leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover, ignore_errors=True)


def put_back_folder(folder: Path) -> None:
    """Rename the old folder back where `replaced_folder` was stopped between its two renames."""
    folder = Path(os.path.realpath(folder))
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


def check_writable(folder: Path) -> None:
    """Raise UserError where no file can be written into a folder, or into the one in which it is to be made."""
    place = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1 << 12))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {reason_of(error, place)}") from error


def write_atomic(path: str | Path, text: str | bytes) -> None:
    """Replace a file in one step: a crash or a full disk leaves the old or the new text, never a part.

    Raises UserError if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode(errors="replace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason_of(error, path)}; the file is as it was") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any] | None:
    """Return the object in a JSON file of a run, None if there is no file. Raises UserError if it is unreadable.

    The file may come from anybody: it is read up to `most_bytes`, and strictly (see `parse_json`).
    """
    try:
        content = read_bytes(path, most_bytes)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error, path)}") from error
    value = parse_json(content, path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}; delete it and run again")
    return value


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the content of an ordinary file. Raises OSError, and UserError for a larger or another kind of file.

    A pipe in the place of a file of a run would wait for ever, and a device or a file with holes would fill the memory.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        state = os.fstat(file.fileno())
        check_ordinary(path, state.st_mode)
        if state.st_size <= most_bytes and len(content := file.read(most_bytes + 1)) <= most_bytes:
            return content
    raise UserError(f"{path} is larger than {most_bytes:,} bytes; {MEND}")


def check_ordinary(path: Path, mode: int | None = None) -> None:
    """Raise UserError where a path is neither an ordinary file nor a folder: opening a pipe would wait for ever.

    mode: of the file, where it is open already. Raises OSError where there is nothing.
    """
    mode = os.stat(path).st_mode if mode is None else mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is a pipe, a socket or a device, but must be a file; {MEND}")


def parse_json(content: bytes, path: str | Path) -> Any:
    """Return the value of a JSON text, of standard JSON only: no NaN or infinity, no key twice, no deep nesting.

    Raises UserError that names the file, for any content.
    """
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=once, parse_constant=_no_number, parse_float=_finite
        )
        _check_values(value)
        return value
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} cannot be read ({reason}); {MEND}") from error


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises ValueError for a key that stands there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice[:80]!r} stands there twice")
    return found


def _check_values(value: Any) -> None:
    """Raise RecursionError for a value with more than `DEEPEST` levels, ValueError for half a UTF-16 pair in a text."""
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > DEEPEST:
            raise RecursionError
        for text in (text for part in level for text in (part if isinstance(part, dict) else (part,))):
            if isinstance(text, str) and not text.isascii():
                text.encode()
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        level = [item for items in inner for item in items]


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write an object as indented JSON, in one step. Raises UserError if the file cannot be written."""
    write_atomic(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")
