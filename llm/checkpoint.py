"""Resume checkpoints: `checkpoints/step_<n>.ckpt`, everything needed to go on, written whole or not at all.

They hold only tensors and primitives, so they load with `weights_only=True`; the model for the next stage is another
artifact (`llm.model_folder`).
"""

import contextlib
import logging
import os
import re
from pathlib import Path

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from llm.errors import UserError

log = logging.getLogger(__name__)
NAME = re.compile(r"step_(\d+)\.ckpt")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.ckpt"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete checkpoints in a folder, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("*.ckpt") if (match := NAME.fullmatch(path.name))]
    return sorted(found)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams to a temporary file, syncs it to disk and renames it, so a crash never leaves half a checkpoint."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            with contextlib.suppress(OSError):
                temporary.unlink()
            kept = list_checkpoints(path.parent)
            state = f"the checkpoint of step {kept[-1][0]} is intact" if kept else "no earlier checkpoint exists"
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(
                f"cannot write {path}: {reason}; {state}. Free some space and run again to resume"
            ) from error

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """The newest readable checkpoint of a folder; unreadable newer ones are skipped with a warning."""
    for step, path in reversed(list_checkpoints(folder)):
        try:
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return step, path
        except Exception as error:  # noqa: BLE001  any damage means the same: take the one before
            log.warning(
                "%s cannot be read (%s): using the checkpoint before it", path, str(error).splitlines()[0][:200]
            )
    return None


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted write left behind."""
    for _, path in list_checkpoints(folder)[:-keep]:
        path.unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
