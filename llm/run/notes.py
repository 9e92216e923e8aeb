"""Lines about a stage that are no reason to refuse: other code made it, or its content can be compared with nothing."""

import sys
from pathlib import Path
from typing import Any

from llm.run.content import CONTENT, read_content
from llm.run.stage_folder import MANIFEST, read_manifest
from llm.utils.environment import code_version


def say(*notes: str | None) -> None:
    """Print a line on standard error for each note that is not None."""
    for note in filter(None, notes):
        print(f"note: {note}", file=sys.stderr, flush=True)


def stage_notes(stage_dir: Path) -> tuple[str | None, str | None]:
    """Return what should be known of a finished stage before it is evaluated or answers."""
    return code_note(read_manifest(stage_dir) or {}, stage_dir), content_note(stage_dir / "model")


def code_note(record: dict[str, Any], where: Path) -> str | None:
    """Say that other code made a stage or saved a checkpoint; None if it is the present code, or not known.

    record: run.json, or what a checkpoint repeats of it. Two states of one commit with changes count as equal.
    """
    now = code_version()
    if not any(record.get(key) and now[key] and record[key] != now[key] for key in now):
        return None
    return f"{where} was made by other code: {_in_words(record)}; this is {_in_words(now)}"


def _in_words(code: dict[str, Any]) -> str:
    name, dash, dirty = (code.get("commit") or "").partition("-")
    commit = f", commit {name[:12]}{dash}{dirty}" if name else ""
    return f"Fathom {code.get('version') or 'of unknown version'}{commit}"


def content_note(folder: Path) -> str | None:
    """Say of a model/ folder that it could not be compared with what its stage wrote; None if it could."""
    record = read_manifest(folder.parent) if folder.name == "model" else None
    is_listed, is_known = bool(read_content(folder)), bool((record or {}).get("fingerprints"))
    lacking = [] if is_listed else [f"no {CONTENT}"]
    lacking += [f"no fingerprints in {MANIFEST}"] if record is not None and not is_known else []
    if not lacking:
        return None
    what = "only tokenizer and weights" if is_known else "not all of it" if is_listed else "nothing of it"
    return f"{folder}: {what} could be compared with what was written ({' and '.join(lacking)}: an older release?)"
