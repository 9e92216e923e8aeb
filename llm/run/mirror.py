"""Copies of a run at an address (s3://bucket/prefix and all that fsspec knows), for machines that vanish.

    <save_mirror>/<run>/<stage>/...    the files of the stage folder, and mirror.json: {file: [bytes, time in ns]}

A thread looks every second whether checkpoints/manifest.json has changed, and copies what is new, so that training
never waits. mirror.json is written after the files that it lists and before others are removed, so what it lists is
there whenever a machine vanishes. A failing copy is said and counted, and tried again at the next change.
"""

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from llm.errors import UserError
from llm.run.formats import MIRRORED
from llm.run.stage_folder import MANIFEST, RunDir
from llm.utils.addresses import without_secrets
from llm.utils.files import parse_json
from llm.utils.source import pip_install

LIST = "mirror.json"
LOOK_SECONDS = 1.0
END_SECONDS = 1200.0  # for the last copy; the other processes wait for half an hour at most


def open_store(address: str) -> tuple[Any, str]:
    """Return (file system, path in it) of an address. Raises UserError for an unknown kind or a missing package."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address, use_listings_cache=False)
    except (ImportError, ValueError, OSError) as error:
        advice = f"; {pip_install('s3')}" if address.startswith("s3:") else ""
        raise UserError(f"save_mirror={address}: cannot be used ({error}){advice}") from error


def fetch(address: str, run: RunDir) -> None:
    """Fetch the stages of a run that are at the address and not here. Raises UserError where it cannot be read.

    Several nodes may do so at the same time for one folder: each stage appears whole, from one of them. A folder of a
    stage that holds other files, and no run.json, is not touched.
    """
    store, root = open_store(f"{address.rstrip('/')}/{run.name}")
    try:
        names = [PurePosixPath(path).name for path in store.ls(root, detail=False)] if store.exists(root) else []
        for name in sorted(names):
            if not (run.path / name / MANIFEST).is_file():
                fetch_stage(store, f"{root}/{name}", run.path / name)
    except Exception as error:
        raise UserError(
            f"save_mirror={address}: cannot be read ({_in_words(error)}); mend it, or start without: save_mirror=null"
        ) from error


def fetch_stage(store, source: str, stage_dir: Path) -> None:
    """Copy the files that a stage's mirror.json lists into the folder `stage_dir`, which appears whole."""
    listed = read_list(store, source)
    if not listed:
        return
    new = stage_dir.with_name(f".{stage_dir.name}.{os.getpid()}.fetched")
    try:
        for name, (_, time) in listed.items():
            target = new / name
            if not target.resolve().is_relative_to(new.resolve()):
                raise ValueError(f"{LIST} names {name}, which is outside of its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(f"{source}/{name}", str(target))
            os.utime(target, ns=(time, time))
        try:
            os.rename(new, stage_dir)
        except OSError:
            if not (stage_dir / MANIFEST).is_file():  # else another node was faster
                raise
        else:
            print(f"{stage_dir.parent.name}/{stage_dir.name} was fetched from the mirror", flush=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_list(store, folder: str) -> dict[str, list[int]]:
    """Return mirror.json of a stage at the address, {} where there is none."""
    try:
        listed = parse_json(store.cat_file(f"{folder}/{LIST}"), f"{folder}/{LIST}")
    except FileNotFoundError:
        return {}
    MIRRORED(listed, f"{folder}/{LIST}")
    return listed


def fetch_named(address: str, root: str | Path, value: str) -> None:
    """Fetch the run in which a parent lies that is not here: `value` is <run>, <run>/<stage> or a folder below `root`.

    Other folders are left to those who look for them.
    """
    path = Path(value)
    name, *stage = (path.relative_to(root) if path.is_relative_to(root) else path).parts or (".",)
    try:
        run = RunDir(root, name)
    except UserError:
        return
    if not ((run.path / stage[0] / MANIFEST).is_file() if stage else run.stages()):
        fetch(address, run)


@contextlib.contextmanager
def mirrored(address: str | None, run: RunDir, stage: str, parents: Iterable[Path] = ()) -> Iterator[None]:
    """Keep a copy of a stage folder at the address while the block runs, and at its end one of what it left.

    parents: the model/ folders that the stage starts from. Their stages are copied too, without checkpoints: nobody
    can resume without them.
    """
    if address is None:
        yield
        return
    address = address.rstrip("/")
    mirror = Mirror(f"{address}/{run.name}/{stage}", run.path / stage)
    for folder in (model.parent for model in parents):
        if folder.parent.parent.resolve() == Path(run.root).resolve() and (folder / MANIFEST).is_file():
            mirror.parents.append(Mirror(f"{address}/{folder.parent.name}/{folder.name}", folder, ("checkpoints",)))
        else:
            mirror.say(f"{folder / 'model'} is no stage of a run in {run.root}, so it is not copied: resuming needs it")
    mirror.start()
    try:
        yield
    finally:
        mirror.finish()


class Mirror(threading.Thread):
    """Thread that makes `address` like the folder `stage_dir` whenever a checkpoint is complete, and at the end.

    left_out: parts of the folder that are neither copied nor removed at the address.
    """

    def __init__(self, address: str, stage_dir: Path, left_out: tuple[str, ...] = ()):
        super().__init__(name="fathom-mirror", daemon=True)
        self.left_out, self.parents = left_out, []
        self.store, self.root = open_store(address)
        self.address, self.stage_dir, self.failures = address, stage_dir, 0
        self.listed: dict[str, list[int]] | None = None
        self.seen: int | None = None
        self.ending, self.is_complete = threading.Event(), False

    def run(self) -> None:
        while not self.ending.wait(LOOK_SECONDS):
            with contextlib.suppress(FileNotFoundError):
                changed = os.stat(self.stage_dir / "checkpoints" / "manifest.json").st_mtime_ns
                if changed != self.seen:
                    self.seen = changed
                    self.try_copy()
        self.is_complete = self.try_copy()

    def try_copy(self) -> bool:
        """Copy what is new; returns whether that went well, else the failure is counted and said."""
        try:
            while self.parents:
                self.parents[0].copy()
                del self.parents[0]
            self.copy()
        except Exception as error:  # noqa: BLE001  a store can fail in any way, and no way may end a training
            self.failures += 1
            self.say(f"copy to {self.address} failed ({_in_words(error)}), for the {self.failures}. time")
            return False
        return True

    def copy(self) -> None:
        """Make the address like the folder: new files, then mirror.json, then the end of what is here no more."""
        if self.listed is None:
            self.listed = read_list(self.store, self.root)
        listed, found = dict(self.listed), files_in(self.stage_dir, self.left_out)
        if MANIFEST not in found:  # not begun yet, or deleted by somebody: the copy may be all that there is
            return
        for name, state in found.items():
            if listed.get(name) == state:
                continue
            try:
                self.store.makedirs(str(PurePosixPath(f"{self.root}/{name}").parent), exist_ok=True)
                self.store.put_file(str(self.stage_dir / name), f"{self.root}/{name}")
                listed[name] = state
            except FileNotFoundError:
                if (self.stage_dir / name).exists():
                    raise
                listed.pop(name, None)  # a checkpoint that was replaced by a newer one meanwhile
        gone = {name for name in listed.keys() - found.keys() if name.split("/")[0] not in self.left_out}
        listed = {name: state for name, state in listed.items() if name not in gone}
        self.store.pipe_file(f"{self.root}/{LIST}", json.dumps(listed).encode())
        self.listed = listed
        for name in gone:
            with contextlib.suppress(FileNotFoundError):
                self.store.rm_file(f"{self.root}/{name}")

    def finish(self) -> None:
        """Wait for the last copy, and say what is missing."""
        self.ending.set()
        self.join(END_SECONDS)
        if not self.is_complete:
            self.say(f"{self.address} lacks the newest files of {self.stage_dir}; {self.failures} copies failed")

    @staticmethod
    def say(text: str) -> None:
        print(f"mirror: {without_secrets(text)}", file=sys.stderr, flush=True)


def files_in(stage_dir: Path, left_out: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """Return {path in the folder: [bytes, time of change in ns]}, checkpoints first, without temporary files.

    left_out: names in the folder that do not count, with all below them.
    """
    found = {}
    for path in sorted(_below(stage_dir), key=lambda path: (path.suffix != ".ckpt", path)):
        parts = path.relative_to(stage_dir).parts
        with contextlib.suppress(FileNotFoundError):
            if parts[0] not in left_out and path.is_file():
                state = path.stat()
                found["/".join(parts)] = [state.st_size, state.st_mtime_ns]
    return found


def _below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield what is no folder in a folder and in linked ones, but for hidden names; a link back `above` is left out."""
    real = os.path.realpath(folder)
    if real in above or not folder.is_dir():
        return
    for path in folder.iterdir():
        if not path.name.startswith("."):
            yield from _below(path, (*above, real)) if path.is_dir() else (path,)


def _in_words(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
