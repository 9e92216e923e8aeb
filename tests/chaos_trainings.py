"""Real trainings of seconds that tests/chaos.py stops and damages: commands, ends, and the comparison of two runs."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import processes
from processes import REPO
from safetensors.numpy import load_file

STAGES = ("tokenizer", "pretrain", "midtrain", "sft", "grpo")
FROM_SFT = ("grpo", "reward", "dpo", "ppo", "distill", "best_of_n")
STEPS = {"pretrain": 60, "midtrain": 60, "sft": 60, "grpo": 24} | dict.fromkeys(FROM_SFT[1:], 12)
ANSWERS = ("stage.rehearsal=2", "stage.reward=length", "stage.reward_options={length: {words: 5}}")
PAIRS = ("stage.preferences=[politeness]", "data.preferences.politeness.size=60")
OWN_KEYS = {
    "pretrain": ("batch.tokens_per_step=1024",),
    "midtrain": ("batch.tokens_per_step=1024",),
    "sft": ("batch.tokens_per_step=1024",),
    "grpo": ("stage.rehearsal=2",),  # so few rewards teach nothing: without it the weights would stay
    "ppo": ANSWERS,
    "best_of_n": (*ANSWERS, "stage.min_reward=0"),
    "distill": (*ANSWERS, "stage.teacher=tiny/pretrain"),
    "reward": PAIRS,
    "dpo": PAIRS,
}
OUTCOMES = {
    "recovered": "weights and metrics are those of a training that was left alone",
    "refused": "one error line and status 2, as it should be",
    "differing": "status 0, other weights or metrics",
    "unreadable": "a restart found no checkpoint to go on from, though one had been written",
    "silent": "status 0 where a refusal or a remark was due",
    "traceback": "Python's, instead of an error line",
    "hang": "no end within an hour, of what takes seconds",
    "left behind": "a process was still there a minute after the end",
    "wrong end": "another status or text than the one that was due",
}
CLOCK = {"tok_per_s", "ms_per_step", "mfu", "data_wait", "seconds"}
CLOCK |= {"rollout_share", "update_share", "rest_share", "rollout_tok_per_s", "update_tok_per_s"}
HANG = 3600.0  # seconds; a machine that is only busy takes less
GRACE = 60.0  # seconds in which what a training has started must end too
SHOWN = 1200  # last characters of an output that are kept of a failure


@dataclass(frozen=True)
class Fault:
    """One thing that was done to a training, and what came of it: one of OUTCOMES, with what was seen of a failure."""

    kind: str  # of training, or of fault
    way: str  # in which it was stopped or damaged
    outcome: str
    said: str = ""

    @property
    def is_failure(self) -> bool:
        return self.outcome not in ("recovered", "refused")


class Failed(Exception):
    """A training that ended as none may: `outcome` says in which way, the text what was seen."""

    def __init__(self, outcome: str, said: str):
        super().__init__(said)
        self.outcome = outcome


class Trainings:
    """Trainings below one folder `root`, which is emptied. `{files}` in settings stands for a folder of files."""

    def __init__(self, root: Path):
        self.root, self.files = root, root / "files"
        self.locks, self.seconds = defaultdict(threading.Lock), {}  # of trainings that are left alone, by name
        shutil.rmtree(root, ignore_errors=True)
        write_files(self.files)
        for stage in STAGES[:-1]:
            self.finish(stage, "tiny", 1)

    def command(self, stage: str, run: str, n: int, *more: str) -> list[str]:
        """Return the command that trains a stage with `n` processes; of the run `tiny` in a few steps."""
        line = ["experiment=tiny", f"stage={stage}", f"run={run}", "trainer=cpu", f"trainer.devices={n}"]
        if run != "tiny" and stage != "tokenizer":
            parent = "sft" if stage in FROM_SFT else STAGES[STAGES.index(stage) - 1]
            line += [f"init_from=tiny/{parent}", f"max_steps={STEPS[stage]}"]
            line += ["stage.eval_every=5", "log_every=3"]
        settings = (text.replace("{files}", str(self.files)).replace("{run}", run) for text in more)
        line += [*OWN_KEYS.get(stage, ()), f"paths.runs={self.root}", *settings]
        return [sys.executable, str(REPO / "train.py"), *line]

    def start(self, *line, env: dict[str, str] | None = None) -> subprocess.Popen:
        """Start a training whose output, both streams, can be read from its stdout."""
        return processes.start(*self.command(*line), stderr=subprocess.STDOUT, env=env)

    def start_warm(self, *line, env: dict[str, str] | None = None):
        """Start a training in a process that has imported torch already, which saves seconds of computing."""
        with self.locks["warm"]:
            return processes.start_warm(*self.command(*line)[1:], stderr=subprocess.STDOUT, env=env)

    def status(self, *line, env: dict[str, str] | None = None) -> tuple[int, str]:
        """Return exit status and output of a training that is left alone."""
        return end_of(self.start(*line, env=env))

    def finish(self, *line, env: dict[str, str] | None = None) -> str:
        """Return the output of a training that ends well. Raises Failed."""
        status, out = self.status(*line, env=env)
        if status != 0:
            raise Failed("wrong end", f"{' '.join(self.command(*line)[2:])} ended with {status}: {out[-SHOWN:]}")
        return out

    def left_alone(self, stage: str, n: int, *settings: str) -> tuple[str, float]:
        """Return name and seconds of a training that nothing happens to; it is run once."""
        run = name_of("straight", stage, str(n), f"{zlib.crc32(' '.join(settings).encode()):08x}" if settings else "")
        with self.locks[run]:
            if run not in self.seconds:
                begin = time.monotonic()
                self.finish(stage, run, n, *settings)
                self.seconds[run] = time.monotonic() - begin
        return run, self.seconds[run]

    def stage_dir(self, run: str, stage: str) -> Path:
        return self.root / run / stage

    def compare(self, stage: str, a: str, b: str) -> None:
        """Raise Failed unless two runs have the same weights, and rows of metrics.csv but for what the clock says."""
        weights = [load_file(self.stage_dir(run, stage) / "model" / "model.safetensors") for run in (a, b)]
        pairs = [(weights[0][name], weights[1][name]) for name in sorted(weights[0] | weights[1])]
        bits = sum(int(np.unpackbits(x.view(np.uint8) ^ y.view(np.uint8)).sum()) for x, y in pairs)
        rows = table(self.stage_dir(a, stage) / "metrics.csv") ^ table(self.stage_dir(b, stage) / "metrics.csv")
        if bits or rows:
            raise Failed("differing", f"{b}: {bits} bits, {len(rows)} rows differ from {a}: {sorted(rows)[:2]}")

    def wait_for_checkpoint(self, run: str, stage: str, process: subprocess.Popen, before: Collection[str] = ()):
        """Return once there is a checkpoint whose name is not in `before`, or the training has ended well."""
        while not names_of_checkpoints(self.stage_dir(run, stage)) - set(before):
            if process.poll() is None:
                time.sleep(0.02)
            elif process.returncode == 0:
                return
            else:
                raise Failed("wrong end", f"{run} ended before its first checkpoint: {end_of(process)[1][-SHOWN:]}")


def judged(kind: str, way: str, test: Callable[..., str], *args) -> Fault:
    """Return the fault with the outcome that `test(*args)` returns, or fails with."""
    try:
        return Fault(kind, way, test(*args))
    except Failed as failed:
        return Fault(kind, way, failed.outcome, str(failed))
    except AssertionError as failed:  # of tests/processes.py
        return Fault(kind, way, "wrong end", str(failed))


def refused(trainings: Trainings, text: str, *line, env: dict[str, str] | None = None) -> str:
    """Return "refused" where a training ends with status 2 and one error line that holds `text`. Raises Failed."""
    status, out = trainings.status(*line, env=env)
    if status == 2 and out.count("error:") == 1 and text in out:
        return "refused"
    raise Failed("wrong end" if status else "silent", f"status {status}, without {text!r}: {out[-SHOWN:]}")


def name_of(*parts: str) -> str:
    """Return the name of a run from some words."""
    return re.sub("[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def names_of_checkpoints(stage_dir: Path) -> set[str]:
    return {path.name for path in stage_dir.glob("checkpoints/*.ckpt")}


def end_of(process: subprocess.Popen) -> tuple[int, str]:
    """Wait for the end of a training; return status and output.

    Raises Failed for a hang, a traceback, or a process that is still there a minute later.
    """
    mark = next(mark for one, mark in processes.started if one is process)
    try:
        out, _ = process.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        processes.kill_marked(mark)
        raise Failed("hang", f"{' '.join(process.args[2:])}: {process.communicate()[0][-SHOWN:]}") from None
    if (at := out.find("Traceback (most recent call last)")) >= 0:
        raise Failed("traceback", out[at:][: 3 * SHOWN])
    end = time.monotonic() + GRACE
    while processes.marked(mark):
        if time.monotonic() > end:
            raise Failed("left behind", f"{len(processes.kill_marked(mark))} processes: {out[-SHOWN:]}")
        time.sleep(0.05)
    return process.returncode, out


def kill(process: subprocess.Popen, what: str) -> str:
    """SIGKILL to all processes of a job (found child by child), its launcher, or a worker; return the output.

    Workers run in sessions of their own, so a signal to the launcher's group would not reach them.
    """
    children = processes.offspring_of(process.pid)
    victims = {"all": [process.pid, *children], "launcher": [process.pid], "one": children[-1:] or [process.pid]}
    for pid in victims[what]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return end_of(process)[1]


def table(path: Path) -> set[tuple]:
    """Return the rows of metrics.csv as tuples of (column, value), without what the clock says and what is empty."""
    with open(path, newline="") as file:
        rows = [tuple(sorted((k, v) for k, v in row.items() if k not in CLOCK and v)) for row in csv.DictReader(file)]
    if len(rows) != len(set(rows)):
        raise Failed("differing", f"{path} holds a row twice")
    return set(rows)


def write_files(folder: Path) -> None:
    """Write text, conversations and questions: text/{a,b,val}.jsonl, chat/ and quiz/{train,val}.jsonl."""
    for name in ("text", "chat", "quiz"):
        (folder / name).mkdir(parents=True)
    for name, count in (("a", 300), ("b", 300), ("val", 40)):
        words = (" ".join(f"word{(i * j) % 97}" for j in range(5 + i % 60)) for i in range(count))
        rows = (json.dumps({"text": f"Story {i} of {name}: {text}"}) for i, text in enumerate(words))
        (folder / "text" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    for name, count in (("train", 200), ("val", 40)):
        pairs = [(f"What is {i} and {i}?", f"Together it is {2 * i}.") for i in range(count)]
        chats = (json.dumps([{"role": "user", "content": a}, {"role": "assistant", "content": b}]) for a, b in pairs)
        (folder / "chat" / f"{name}.jsonl").write_text("\n".join(chats) + "\n")
        rows = (json.dumps({"question": a, "answer": b, "keywords": ["e"]}) for a, b in pairs)
        (folder / "quiz" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
