"""Callbacks with which a test stops a training at a known step, or in a slow write, however busy the machine is.

The configuration is one for runs that are held and runs that are not: the environment decides.
"""

import os
import time
from pathlib import Path

import lightning as L

from llm.checkpoint import resume
from llm.parallel import collectives
from llm.utils.files import write_json

FOLDER = "FATHOM_TEST_HOLD"  # environment variable: where processes tell that they are held; unset: none is
TESTS = str(Path(__file__).parent)


def hold_at(step: int) -> list[str]:
    """The settings that add the callback to a training."""
    return ["+callbacks.hold._target_=holding.Hold", f"+callbacks.hold.step={step}"]


def held(folder: Path, rank: int = 0) -> bool:
    return (folder / f"held_{rank}").exists()


def has_left(folder: Path, rank: int) -> bool:
    return (folder / f"left_{rank}").exists()


def release(folder: Path) -> None:
    """Let all processes go on."""
    (folder / "release").touch()


class Hold(L.Callback):
    """After a step: wait for a signal that asks for the end, or for `release`."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, module, *_) -> None:
        if FOLDER not in os.environ or module.global_step != self.step:
            return
        folder = Path(os.environ[FOLDER])
        (folder / f"held_{collectives.rank()}").touch()
        while not module.votes.stop and not (folder / "release").exists():
            time.sleep(0.02)
        (folder / f"left_{collectives.rank()}").touch()


class SlowDisk(L.Callback):
    """Makes every checkpoint take seconds between the file and its line in the manifest."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_fit_start(self, trainer, module) -> None:
        def write_slowly(*args) -> None:
            time.sleep(self.seconds)
            write_json(*args)

        resume.write_json = write_slowly
