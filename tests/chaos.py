"""Kills, starves and damages real trainings and compares what they end with to trainings that were left alone.

    python tests/chaos.py [--kills 100] [--seed 0] [--folder runs/chaos]        `make chaos`

For every model stage, in one process and in two: a training that is left alone, and trainings that are killed by
SIGKILL at random moments (all processes at once, the launcher, or one process) and started again with the same command
until they end. Weights must be equal bit for bit and metrics.csv row for row, without what the clock says. Before some
of the restarts the newest checkpoint or the manifest is damaged. Then a disk that fills up, and trainings that lose one
of two processes and go on with the other. Prints one table; exits with 1 if anything was lost.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import processes
from safetensors.numpy import load_file

REPO = Path(__file__).resolve().parent.parent
STAGES = ("tokenizer", "pretrain", "midtrain", "sft", "grpo")
STEPS = {"pretrain": 60, "midtrain": 60, "sft": 60, "grpo": 24}
CLOCK = {"tok_per_s", "ms_per_step", "mfu", "data_wait", "seconds"}
DAMAGES = ("flip", "truncate", "manifest", None, None)  # before a restart


@dataclass
class Tally:
    """One row of the table."""

    fault: str
    injected: int = 0
    recovered: int = 0
    compared: int = 0  # finished trainings
    differing_bits: int = 0
    differing_rows: int = 0
    unreadable: int = 0  # restarts that found no usable checkpoint although one had been written
    problems: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        lost = self.injected - self.recovered + self.differing_bits + self.differing_rows + self.unreadable
        return lost > 0 or bool(self.problems)


class Chaos:
    def __init__(self, root: Path, seed: int):
        self.root, self.seed = root, seed

    def command(self, stage: str, run: str, n: int, *more: str) -> list[str]:
        before = STAGES[STAGES.index(stage) - 1] if stage != "tokenizer" else None
        parent = [f"init_from=tiny/{before}"] if before and run != "tiny" else []
        steps = [f"max_steps={STEPS[stage]}"] if run != "tiny" else []
        own = ["batch.tokens_per_step=1024"] if stage in ("pretrain", "midtrain", "sft") else []
        rare = ["stage.eval_every=5", "log_every=3"] if run != "tiny" and stage != "tokenizer" else []
        common = ["experiment=tiny", f"stage={stage}", f"run={run}", "trainer=cpu", f"trainer.devices={n}"]
        line = [*common, *parent, *steps, *own, *rare, f"paths.runs={self.root}", *more]
        return [sys.executable, str(REPO / "train.py"), *line]

    def start(self, *args) -> subprocess.Popen:
        return processes.start(*self.command(*args), stderr=subprocess.STDOUT)

    def status(self, *args) -> tuple[int, str]:
        """Exit status and output of a training that is left alone."""
        process = self.start(*args)
        out, _ = process.communicate(timeout=processes.HANG)
        return process.returncode, out

    def finish(self, *args) -> None:
        status, out = self.status(*args)
        if status != 0:
            raise RuntimeError(f"{' '.join(self.command(*args)[2:])} ended with {status}:\n{out[-2000:]}")

    def parents(self) -> None:
        for stage in STAGES[:-1]:
            self.finish(stage, "tiny", 1)

    # ---- SIGKILL ----------------------------------------------------------------------------------------------------

    def kills(self, stage: str, n: int, count: int) -> tuple[Tally, int]:
        """`count` kills of one kind of training, and how often files were damaged before the restart."""
        rng = random.Random(f"{self.seed} {stage} {n}")
        straight = f"straight-{stage}-{n}"
        begin = time.monotonic()
        self.finish(stage, straight, n)
        seconds = time.monotonic() - begin
        killed, damaged, number = Tally(f"SIGKILL, {stage}, {n} proc."), 0, 0
        while killed.injected < count and not killed.problems:
            number += 1
            run = f"killed-{stage}-{n}-{number}"
            try:
                more, seconds = self.kill_until_finished(stage, run, n, count, seconds, rng, killed)
                damaged += more
                self.compare(stage, straight, run, killed)
                shutil.rmtree(self.root / run)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                killed.problems.append(str(error))
        return killed, damaged

    def kill_until_finished(self, stage, run, n, count, seconds, rng, killed: Tally) -> tuple[int, float]:
        """Start and kill one training until it comes to its end, each time within about `seconds`; how often its files
        were damaged, and how long a training takes now.
        """
        folder, damaged, pending = self.root / run / stage / "checkpoints", 0, 0
        while True:
            had, process, begin = list(folder.glob("*.ckpt")), self.start(stage, run, n), time.monotonic()
            moment = rng.uniform(0.0, 1.2) * seconds if killed.injected + pending < count else processes.HANG
            try:
                out, _ = process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                kill(process, rng.choice(["all", "all", "launcher", "one"]))
                process.stdout.close()
                pending += 1
                damaged += self.damage(folder, rng.choice(DAMAGES), rng)
                continue
            if process.returncode != 0:
                raise RuntimeError(f"{run} ended with {process.returncode}: {out[-800:]}")
            killed.unreadable += bool(had) and "resuming at step" not in out and "is finished" not in out
            killed.injected, killed.recovered = killed.injected + pending, killed.recovered + pending
            return damaged, seconds if pending else time.monotonic() - begin

    def damage(self, folder: Path, how: str | None, rng: random.Random) -> bool:
        """Damage the newest checkpoint, or the manifest, if an older checkpoint is there to be used."""
        found = sorted(folder.glob("step_*.ckpt"))
        if how is None or len(found) < 2:
            return False
        path = folder / "manifest.json" if how == "manifest" else found[-1]
        content = bytearray(path.read_bytes())
        if how == "truncate":
            content = content[: rng.randrange(len(content))]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        return True

    def compare(self, stage: str, a: str, b: str, tally: Tally) -> None:
        tally.compared += 1
        weights = [load_file(self.root / run / stage / "model" / "model.safetensors") for run in (a, b)]
        for x, y in zip(*map(arrays, weights), strict=True):
            tally.differing_bits += int(np.unpackbits(x.view(np.uint8) ^ y.view(np.uint8)).sum())
        ours, theirs = (table(self.root / run / stage / "metrics.csv") for run in (a, b))
        tally.differing_rows += len(ours ^ theirs)

    # ---- other faults -----------------------------------------------------------------------------------------------

    def full_disk(self) -> Tally:
        """Runs on a file system of a few megabytes; once that is larger the same command goes on."""
        tally, disk, stage = Tally("disk full, pretrain, 1 proc."), self.root / "disk", "pretrain"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(disk)]).returncode:
            tally.fault += " (not possible: cannot mount a tmpfs)"
            return tally
        try:
            for megabytes in (6, 9, 12):
                run = f"full-{megabytes}"
                subprocess.run(["mount", "-o", f"remount,size={megabytes}M", str(disk)], check=True)
                line = (stage, run, 1, f"paths.runs={disk}", f"init_from={self.root}/tiny/tokenizer")
                status, out = self.status(*line)
                tally.injected += 1
                if status != 2 or "error: " not in out or "cannot" not in out:
                    tally.problems.append(f"{megabytes} MB: status {status}: {out[-500:]}")
                subprocess.run(["mount", "-o", "remount,size=100M", str(disk)], check=True)
                self.finish(*line)
                tally.recovered += 1
                (self.root / run).symlink_to(disk / run)
                self.compare(stage, f"straight-{stage}-1", run, tally)
                shutil.rmtree(disk / run)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        return tally

    def fewer_processes(self) -> Tally:
        """One of two processes dies; the training goes on alone, to the same number of steps."""
        tally = Tally("a process gone, then 2 -> 1")
        for stage in STAGES[1:]:
            run = f"fewer-{stage}"
            process = self.start(stage, run, 2)
            wait_for_checkpoint(self.root / run / stage, process)
            kill(process, "one")
            process.stdout.close()
            tally.injected += 1
            self.finish(stage, run, 1)
            steps = {int(dict(row)["step"]) for row in table(self.root / run / stage / "metrics.csv")}
            tally.recovered += max(steps) == STEPS[stage]
        return tally


def wait_for_checkpoint(stage_dir: Path, process: subprocess.Popen) -> None:
    while not list(stage_dir.glob("checkpoints/*.ckpt")):
        if process.poll() is not None:
            raise RuntimeError(f"ended before its first checkpoint: {process.stdout.read()[-800:]}")
        time.sleep(0.02)


def kill(process: subprocess.Popen, what: str) -> None:
    """SIGKILL to all processes of a training, its launcher, or one of its processes; returns when none is left."""
    children = processes.children_of(process.pid)
    victims = {"all": [process.pid, *children], "launcher": [process.pid], "one": children[-1:] or [process.pid]}
    for pid in victims[what]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(timeout=processes.HANG)
    processes.wait_until(lambda: not any(map(processes.is_alive, children)))


def arrays(weights: dict) -> list[np.ndarray]:
    return [weights[name] for name in sorted(weights)]


def table(path: Path) -> set[tuple]:
    """The rows of metrics.csv as sets of (column, value), without what the clock says and what is empty."""
    with open(path, newline="") as file:
        rows = [tuple(sorted((k, v) for k, v in row.items() if k not in CLOCK and v)) for row in csv.DictReader(file)]
    if len(rows) != len(set(rows)):
        raise RuntimeError(f"{path} holds a row twice")
    return set(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    args = parser.parse_args()
    processes.mark_all()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    begin, chaos = time.monotonic(), Chaos(args.folder.resolve(), args.seed)
    chaos.parents()
    kinds = [(stage, n) for n in (1, 2) for stage in STAGES[1:]]
    counts = [args.kills // len(kinds) + (i < args.kills % len(kinds)) for i in range(len(kinds))]
    tallies, damaged = [], Tally("damaged checkpoints and manifests")
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda kind, count: chaos.kills(*kind, count), kinds, counts):
            tallies.append(done[0])
            damaged.injected, damaged.recovered = (damaged.injected + done[1], damaged.recovered + done[1])
            print(f"{done[0].fault}: {done[0].recovered} of {done[0].injected}", flush=True)
    tallies += [damaged, chaos.full_disk(), chaos.fewer_processes()]
    total = Tally("**all**")
    for t in tallies:
        for name in ("injected", "recovered", "compared", "differing_bits", "differing_rows", "unreadable"):
            setattr(total, name, getattr(total, name) + getattr(t, name))
    print("\n| fault | injected | recovered | compared | differing bits | differing rows | unreadable |")
    print("|---|---|---|---|---|---|---|")
    for t in [*tallies, total]:
        numbers = (t.injected, t.recovered, t.compared, t.differing_bits, t.differing_rows, t.unreadable)
        print(f"| {t.fault} | {' | '.join(map(str, numbers))} |")
    for t in tallies:
        for problem in t.problems:
            print(f"\n{t.fault}: {problem}")
    print(f"\n{(time.monotonic() - begin) / 60:.0f} minutes, seed {args.seed}")
    sys.exit(any(t.failed for t in tallies))


if __name__ == "__main__":
    main()
