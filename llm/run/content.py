"""The content of a model/ folder, `manifest.json`: size, SHA-256 and a fast hash of every file.

SHA-256 is computed once, when the folder is written, and identifies the weights: run.json keeps it. The fast hash is
compared on every loading, so that a flipped bit is found. One core of an AMD EPYC hashes a file in the page cache at
22 GB/s by xxHash, and at 2 GB/s by SHA-256.
"""

import hashlib
from collections.abc import Container
from pathlib import Path
from typing import Any

import xxhash

from llm.errors import UserError
from llm.run.formats import CHECKSUMS, read_form
from llm.run.stage_folder import read_manifest
from llm.utils.files import read_json, write_json

CONTENT = "manifest.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "fathom_tokenizer.json"  # holds the fingerprint of the tokenizer (llm.tokenizer.bpe)
CHUNK = 1 << 22
OTHER = {"tokenizer": "another tokenizer", "weights": "other weights"}


def write_content(folder: Path) -> None:
    """Write manifest.json over the other files of a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CONTENT)
    write_json(folder / CONTENT, {path.name: _sums(path, full=True) for path in files})


def list_file(folder: Path, name: str) -> None:
    """Add a file that was written later to manifest.json, or put its new sums there."""
    write_json(folder / CONTENT, read_content(folder) | {name: _sums(folder / name, full=True)})


def read_content(folder: Path) -> dict[str, dict[str, Any]]:
    """Return manifest.json of a model/ folder; {} for one of an older release or another program."""
    return read_form(folder / CONTENT, CHECKSUMS) or {}


def wrong_file(folder: Path, names: Container[str] | None = None) -> str | None:
    """Say in words which file of a model/ folder is not as it was written; None if all are, or none is listed.

    names: the files to look at, None = all.
    """
    for name, listed in read_content(folder).items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if Path(name).name != name:
            return f"{name[:80]!r} in {CONTENT} is no file of this folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != listed.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes instead of {listed.get('bytes')}"
        if _sums(path, full=False)["xxh3"] != listed.get("xxh3"):
            return f"{name} is not what was written (its checksum is wrong)"
    return None


def check_content(folder: Path, verify: bool = True) -> None:
    """Raise UserError where a model/ folder is not as its stage handed it over.

    verify: compare every file with its checksum in manifest.json. Tokenizer and weights are compared with run.json of
    their stage in any case, by what manifest.json says of them where it lists the weights. Folders of older releases
    lack one of these files or both, and pass.
    """
    if verify and (problem := wrong_file(folder)) is not None:
        raise UserError(f"{folder}: {problem}; copy the folder again, or train the stage again")
    record = read_manifest(folder.parent) if folder.name == "model" else None
    known = (record or {}).get("fingerprints") or {}
    if problem := other_part(folder, known):
        if verify and problem.startswith(OTHER["weights"]) and _has_weights(folder, known["weights"]):
            raise UserError(f"{folder / CONTENT} is damaged, the weights are not; copy it again, or delete it")
        raise UserError(
            f"{folder} holds {problem} than its stage handed over, by {folder.parent / 'run.json'}; put the files of "
            "this stage back, or train it again"
        )


def fingerprints(folder: Path, weigh: bool = False) -> dict[str, str | None]:
    """Return what identifies the content of a model/ folder: `tokenizer` and `weights`, the SHA-256 of each.

    Without manifest.json, as older releases left it, the weights are left out (that would take minutes) but for
    `weigh=True`. A folder that holds a tokenizer alone has weights None.
    """
    found = {"tokenizer": (read_json(folder / TOKENIZER) or {}).get("fingerprint")}
    return found | ({"weights": weights_sum(folder)} if weigh or read_content(folder) else {})


def other_part(folder: Path, known: dict[str, str | None], weigh: bool = True) -> str | None:
    """Say in words which part of a model/ folder has not the known fingerprint; None if all parts have theirs.

    weigh: compute the fingerprint of weights that manifest.json does not list; otherwise these pass.
    """
    present = fingerprints(folder, weigh and bool(known.get("weights")))
    for part in OTHER:
        if known.get(part) and present.get(part, known[part]) != known[part]:
            return f"{OTHER[part]} (fingerprint {str(present[part])[:12]}, not {known[part][:12]})"
    return None


def weights_sum(folder: Path) -> str | None:
    """Return the SHA-256 of the weights in a model/ folder: by its manifest, else of the file; None without weights."""
    if content := read_content(folder):
        if WEIGHTS not in content and (folder / WEIGHTS).exists():
            raise UserError(
                f"{folder / CONTENT}: {WEIGHTS} is missing; copy the folder again, or train the stage again"
            )
        return content.get(WEIGHTS, {}).get("sha256")
    return _sums(folder / WEIGHTS, full=True)["sha256"] if (folder / WEIGHTS).is_file() else None


def _has_weights(folder: Path, known: str) -> bool:
    path = folder / WEIGHTS
    return path.is_file() and _sums(path, full=True)["sha256"] == known


def _sums(path: Path, full: bool) -> dict[str, Any]:
    fast, slow, size = xxhash.xxh3_64(), hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            fast.update(chunk)
            size += len(chunk)
            if full:
                slow.update(chunk)
    return {"bytes": size, "xxh3": fast.hexdigest()} | ({"sha256": slow.hexdigest()} if full else {})
