"""Keeps the files that a user sends by the browser: text and chats of one name, in `<paths.data>/own/<name>`."""

import re
import shutil
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import regex

from llm.data.files import KNOWN, kind_of
from llm.errors import UserError
from llm.panel.state import Panel
from llm.run.stage_folder import RunDir
from llm.serving.guard import MAX_UPLOAD
from llm.utils.words import MARKS

OWN = "own"  # folder in paths.data
TEXT, CHAT = "text", "chat"
MOST_FILES = 500  # of a folder
MOST_BYTES = MAX_UPLOAD  # of a folder
NAME = re.compile(r"[\w][\w.\-]*")
BARE = regex.compile(rf"[^\w.\-{MARKS}]+")


def folder_of(panel: Panel, name: str, kind: str) -> Path:
    """Return the folder of text or chats of a name. Raises UserError for a name that cannot be that of a run."""
    if not NAME.fullmatch(name):
        raise UserError(f"run={name}: give a name of letters, digits, dots, - and _, as in run=letters")
    RunDir(panel.runs, name)
    return panel.folders[-1] / OWN / name / kind


def names(panel: Panel) -> list[str]:
    """Return the names under which files are kept."""
    root = panel.folders[-1] / OWN
    return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def kept(panel: Panel, name: str, kind: str) -> list[Path]:
    """Return the files that are kept of a name."""
    folder = folder_of(panel, name, kind)
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def keep(panel: Panel, name: str, kind: str, sent: Sequence[str | Path]) -> Path:
    """Move files that were sent into the folder of a name and return that folder; what is refused is deleted.

    A file of the same name is replaced. Raises UserError, and keeps none, for a name, a kind, a number or a size that
    is not taken.
    """
    found = [Path(path) for path in sent]
    try:
        panel.check_may_change()
        folder = folder_of(panel, name, kind)
        targets = {folder / _plain(path.name): path for path in found}
        _check(found, targets, kept(panel, name, kind))
        folder.mkdir(parents=True, exist_ok=True)
        for target, path in targets.items():
            shutil.move(path, target)
        return folder
    except OSError as error:
        raise UserError(f"paths.data={panel.folders[-1]}: the files cannot be kept there ({error})") from error
    finally:
        for path in found:
            path.unlink(missing_ok=True)


def _plain(name: str) -> str:
    """Return a file name without blanks and the like, which the list of paths of a setting could not hold.

    One that had to be changed gets a number made of what was sent, so that no other file has the same name.
    """
    name = unicodedata.normalize("NFC", name)
    plain = BARE.sub("_", name).lstrip(".-") or "file"
    if plain == name:
        return plain
    stem, dot, ending = plain.partition(".")
    return f"{stem}-{zlib.crc32(name.encode('utf-8', 'surrogatepass')):08x}{dot}{ending}"


def _check(sent: Sequence[Path], targets: dict[Path, Path], before: Sequence[Path]) -> None:
    if wrong := [path.name for path in sent if kind_of(path.name) is None and path.suffix.lower() != ".zip"]:
        raise UserError(f"{wrong[0]}: is no file that can be read: {KNOWN}")
    if empty := [path.name for path in sent if path.stat().st_size == 0]:
        raise UserError(f"{empty[0]}: is empty")
    if len(targets) < len(sent):
        raise UserError("two files have the same name: rename one")
    stay = [path for path in before if path not in targets]
    if (count := len(stay) + len(sent)) > MOST_FILES:
        raise UserError(f"{count:,} files: at most {MOST_FILES:,} are kept; put the folder into paths.data and name it")
    if (size := sum(path.stat().st_size for path in (*stay, *sent))) > MOST_BYTES:
        advice = f"at most {MOST_BYTES:,} are kept; put the folder into paths.data and name it"
        raise UserError(f"{size:,} bytes of files: {advice}")
