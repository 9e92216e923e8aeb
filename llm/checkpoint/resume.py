"""Resume checkpoints: `checkpoints/step_<n>.ckpt`, everything needed to go on, written whole or not at all.

    python -m llm.checkpoint <run folder>      list a run's files, verify checksums; status 1 if one is damaged

A checkpoint holds only tensors and primitives, so it loads with `weights_only=True`. The model for the next stage is
another artifact (`llm.checkpoint.model_folder`). `checkpoints/manifest.json` holds size and SHA-256 of each file. A
step waits for a copy of the state in host memory. A thread does checksum, disk and renaming.
"""

import argparse
import contextlib
import hashlib
import logging
import os
import re
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from llm.config.renamed import renamed_checkpoint
from llm.errors import UserError, reason_of
from llm.run.content import check_content
from llm.run.formats import CHECKSUMS, read_form
from llm.run.notes import content_note
from llm.run.stage_folder import checked_manifest, read_manifest, read_metrics, stages_in
from llm.tokenizer.bpe import Tokenizer
from llm.utils.files import check_ordinary, plain, sync_folder, write_json

log = logging.getLogger(__name__)
NAME = re.compile(r"step_(\d+)\.ckpt")
MANIFEST = "manifest.json"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the file of the checkpoint after `step` optimizer steps."""
    return folder / f"step_{step:06d}.ckpt"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """List the complete checkpoints of a folder as (step, path), oldest first."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("*.ckpt")
        if (match := NAME.fullmatch(path.name)) and path.is_file()
    ]
    return sorted(found)


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint of a folder, sound or not; 0 without one."""
    return max((step for step, _ in list_checkpoints(folder)), default=0)


# ---- writing --------------------------------------------------------------------------------------------------------


class CheckpointWriter(TorchCheckpointIO):
    """Lightning's CheckpointIO that never leaves half a checkpoint and keeps the newest `keep`.

    asynchronous: a thread writes while training goes on, one checkpoint at a time. Its errors are raised by the next
    call of `check`, `save_checkpoint` or `finish`.
    """

    def __init__(self, keep: int = 2, asynchronous: bool = True):
        self.keep, self.asynchronous = keep, asynchronous
        self.thread: ThreadPoolExecutor | None = None
        self.writing: Future | None = None
        self.host_copy = HostCopy()

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        self.finish()
        if not self.asynchronous:
            return write_checkpoint(checkpoint, Path(path), self.keep)
        copy = self.host_copy.of(checkpoint)
        self.thread = self.thread or ThreadPoolExecutor(1, "fathom-checkpoint")
        self.writing = self.thread.submit(write_checkpoint, copy, Path(path), self.keep)
        return None

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return load_checkpoint(Path(path))

    def check(self) -> None:
        """Raise the error of a write that has failed in the thread; do not wait for one under way."""
        if self.writing is not None and self.writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint under way is on the disk. Raises UserError where that failed."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def teardown(self) -> None:
        """Finish, and end the thread. Lightning calls it at the end of a fit, also one that failed."""
        thread, self.thread = self.thread, None
        try:
            self.finish()
        finally:
            if thread is not None:
                thread.shutdown()


class HostCopy:
    """Copies checkpoints to host memory, into the buffers of the copy before: fresh pages are touched only once."""

    def __init__(self):
        self.buffers: dict[tuple, torch.Tensor] = {}

    def of(self, checkpoint: Any) -> Any:
        """Copy nested dicts, lists and tuples with the tensors in them; two views of one memory stay one."""
        old, self.buffers, seen = self.buffers, {}, {}

        def copied(thing: Any, place: tuple) -> Any:
            if isinstance(thing, dict):
                return {key: copied(value, (*place, key)) for key, value in thing.items()}
            if isinstance(thing, list | tuple):
                return type(thing)(copied(value, (*place, i)) for i, value in enumerate(thing))
            if not isinstance(thing, torch.Tensor):
                return thing
            same = (thing.data_ptr(), thing.shape, thing.stride(), thing.dtype)
            if thing.numel() == 0 or same not in seen:
                buffer = old.get(place)
                if buffer is None or buffer.shape != thing.shape or buffer.dtype != thing.dtype:
                    buffer = torch.empty(thing.shape, dtype=thing.dtype, pin_memory=thing.is_cuda)
                seen[same] = self.buffers[place] = buffer.copy_(thing.detach(), non_blocking=thing.is_cuda)
            return seen[same]

        copy = copied(checkpoint, ())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copy


class Hashed:
    """Binary file that knows size and SHA-256 of all bytes written to it."""

    def __init__(self, file):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(checkpoint: dict, path: Path, keep: int) -> None:
    """Write a temporary file, sync it, rename it to `path`, note the checksum, remove all but the newest `keep`.

    A crash between any two of these steps leaves a usable checkpoint. Raises UserError where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        is_ours = NAME.fullmatch(path.name) is not None  # and not of a callback with a folder of its own
        path.parent.mkdir(exist_ok=True, parents=not is_ours)  # not the run's folder: one that was deleted stays so
        with open(temporary, "wb") as file:
            torch.save(checkpoint, hashed := Hashed(file))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = list_checkpoints(path.parent)
        state = f"the checkpoint of step {kept[-1][0]} is intact" if kept else "no earlier checkpoint exists"
        reason = reason_of(error, path)
        raise UserError(f"cannot write {path}: {reason}; {state}. The same command resumes") from error
    old = list_checkpoints(path.parent)[:-keep]
    listed = {name: entry for name, entry in checksums(path.parent).items() if (path.parent / name).is_file()}
    for _, removed in old:
        listed.pop(removed.name, None)
    saved = datetime.now(UTC).isoformat(timespec="seconds")
    listed[path.name] = {"bytes": hashed.bytes, "sha256": hashed.sha256.hexdigest(), "saved": saved}
    write_json(path.parent / MANIFEST, listed)
    for leftover in [*(removed for _, removed in old), *path.parent.glob(".*.tmp")]:
        leftover.unlink(missing_ok=True)


# ---- reading --------------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path) -> dict:
    """Return a checkpoint under the present names of keys, its tensors mapped into memory.

    A tensor is read from the disk when it is copied. Raises what torch.load raises for a damaged file.
    """
    return renamed_checkpoint(torch.load(path, map_location="cpu", mmap=True, weights_only=True))


def checksums(folder: Path) -> dict[str, dict]:
    """Read manifest.json of a folder of checkpoints: {file: {bytes, sha256, saved}}; {} if missing or damaged."""
    try:
        return read_form(folder / MANIFEST, CHECKSUMS) or {}
    except UserError as error:
        log.warning("%s", error)
        return {}


def damage(path: Path, listed: dict[str, dict]) -> str | None:
    """Say in words how a checkpoint is damaged, None if it is sound: by the manifest, else by the CRCs in the file."""
    entry = listed.get(path.name)
    try:
        if entry is None:
            with zipfile.ZipFile(path) as archive:
                if (name := archive.testzip()) is not None:
                    return f"not in the manifest, and the CRC of {name} is wrong"
        else:
            if (size := path.stat().st_size) != entry["bytes"]:
                return f"{size} bytes instead of {entry['bytes']}"
            if not zipfile.is_zipfile(path):  # before hours over a file full of holes
                return "it is no checkpoint"
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return "its checksum is wrong"
        return lacks(load_checkpoint(path))
    except Exception as error:  # noqa: BLE001  any damage means the same: this one cannot be used
        return (str(error).splitlines() or [type(error).__name__])[0][:200]


def lacks(checkpoint: Any) -> str | None:
    """Say in words which part a checkpoint lacks, None if it has all that a stage goes on from."""
    if not isinstance(checkpoint, dict):
        return "it holds no parts by name"
    weights, states = checkpoint.get("state_dict"), checkpoint.get("optimizer_states")
    step, data = checkpoint.get("global_step"), checkpoint.get("StepData")
    if not isinstance(weights, dict) or not weights or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        return "it has no weights (state_dict)"
    if (
        not isinstance(states, list)
        or not states
        or not all(isinstance(state, dict) and {"state", "param_groups"} <= set(state) for state in states)
    ):
        return "it has no state of the optimizer (optimizer_states)"
    if not isinstance(data, dict) or not isinstance(data.get("positions"), list) or not data["positions"]:
        return "it has no position in the data (StepData)"
    if isinstance(step, bool) or not isinstance(step, int) or step < 0 or "loops" not in checkpoint:
        return "it does not say after which step it was saved (global_step, loops)"
    return None


def origins(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return what the checkpoints of a folder say of the trainings that saved them, as keys of run.json.

    Those of older releases say nothing and are left out, as are those that cannot be read; no tensor is read. Raises
    UserError for a wrong value.
    """
    found = []
    for _, path in list_checkpoints(folder):
        try:
            with zipfile.ZipFile(path) as archive:  # reading the record compares its CRC
                archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
            origin = plain(load_checkpoint(path)["fathom"]["origin"])
        except Exception:  # noqa: BLE001  damage is looked for where the checkpoint is to be used
            continue
        if origin:
            found.append((path, checked_manifest(origin, f"{path}: origin")))
    return found


def newest_checkpoint(folder: Path, misfit: Callable[[Any], str | None] | None = None) -> tuple[int, Path] | None:
    """Find the newest sound checkpoint, as (step, path); damaged ones are skipped with a warning. None if none is.

    misfit: says in words why one cannot be used, which is skipped too. Raises UserError where that leaves none: it is
    not this program's to throw away.
    """
    listed, misfits = checksums(folder), []
    for _, path in reversed(list_checkpoints(folder)):
        problem = damage(path, listed)
        if problem is None:
            checkpoint = load_checkpoint(path)
            problem = None if misfit is None else misfit(checkpoint)
            if problem is None:
                return checkpoint["global_step"], path
            misfits.append(f"{path}: {problem}")
        log.warning("%s is damaged (%s): using the checkpoint before it", path, problem)
    if misfits:
        raise UserError(f"{misfits[0]}; no other checkpoint can be used: restore it, or set overwrite=true")
    return None


def set_aside(folder: Path, used: tuple[int, Path] | None) -> None:
    """Rename the checkpoints that were skipped for the one `used`: they would count among the newest that are kept."""
    paths = [path for _, path in list_checkpoints(folder)]
    for path in paths if used is None else paths[paths.index(used[1]) + 1 :]:
        path.replace(path.with_suffix(".damaged"))


# ---- looking at a run -----------------------------------------------------------------------------------------------


def inspect(run: Path) -> bool:
    """Print all checkpoints and weights of a run with their state; return whether all are sound.

    Raises UserError where `run` is no folder of a run.
    """
    stages = [run / stage for stage in stages_in(run)]
    if not stages:
        raise UserError(f"{run} holds no stage (no <stage>/run.json); give a run folder, such as runs/demo")
    sound = True
    for stage in stages:
        manifest, rows = read_manifest(stage) or {}, read_metrics(stage)
        parts = [str(manifest.get("status")), *([f"metrics to step {rows[-1]['step']:.0f}"] if rows else [])]
        print(f"{run.name}/{stage.name}: {', '.join(parts)}")
        listed = checksums(stage / "checkpoints")
        for _, path in list_checkpoints(stage / "checkpoints"):
            problem, saved = damage(path, listed), listed.get(path.name, {}).get("saved", "not in the manifest")
            holds = contents(path) if problem is None else "DAMAGED: " + problem
            print(f"  checkpoints/{path.name}  {size_of(path) / 1e6:10.1f} MB  {saved}  {holds}")
            sound = sound and problem is None
        if (model := stage / "model").is_dir():
            problem = damaged_model(model)
            size = sum(size_of(path) for path in model.iterdir())
            state = problem or content_note(model) or "every file is as it was written"
            print(f"  model/  {size / 1e6:10.1f} MB  {'DAMAGED: ' if problem else ''}{state}")
            sound = sound and problem is None
    return sound


def size_of(path: Path) -> int:
    """Return the size of a file in bytes; 0 where there is none, as behind a broken link."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def contents(path: Path) -> str:
    """Describe a sound checkpoint: number of weights, of optimizer groups, and of processes with a data position."""
    checkpoint = load_checkpoint(path)
    weights = sum(t.numel() for t in checkpoint["state_dict"].values())
    groups = len(checkpoint["optimizer_states"][0]["param_groups"])
    processes = len(checkpoint["StepData"]["positions"])
    return f"sound; {weights / 1e6:.1f} M weights, {groups} optimizer groups, data positions of {processes}"


def damaged_model(folder: Path) -> str | None:
    """Say in words how a model/ folder is damaged, or not that of its stage; None if nothing of the kind is found."""
    try:
        Tokenizer.load(folder)
        check_content(folder)
    except UserError as error:
        return str(error)
    return next(filter(None, map(damaged_weights, sorted(folder.glob("*.safetensors")))), None)


def damaged_weights(path: Path) -> str | None:
    """Say in words how a safetensors file is damaged; None if all tensors can be read and are finite."""
    from safetensors import SafetensorError, safe_open

    try:
        check_ordinary(path)
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not file.get_tensor(name).isfinite().all()]  # noqa: SIM118
    except (OSError, SafetensorError, UserError) as error:
        return f"{path.name}: {error}"
    return f"{path.name} has values that are not finite: {', '.join(names[:5])}" if names else None


def main() -> None:
    """Inspect the run named on the command line. Exit status: 0 sound, 1 damaged, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m llm.checkpoint", description="List what a run holds and verify every checksum."
    )
    parser.add_argument("run_dir", type=Path, help="run folder, such as runs/demo")
    options = parser.parse_args()
    try:
        sys.exit(0 if inspect(options.run_dir) else 1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
