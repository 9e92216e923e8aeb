"""Kills, starves and damages real trainings and compares what they end with to trainings that were left alone.

    python tests/chaos.py [--kills 200] [--seed N] [--folder runs/chaos] [--only WORD]        `make chaos`

For every case of the table `CASES`: a training that is left alone, and trainings that are stopped at random moments
(SIGKILL to all processes of the job, to the launcher or to one process; SIGTERM, SIGHUP) and started again with the
same command until they end. Weights must be equal bit for bit and metrics.csv row for row, without what the clock says.
Before some of the restarts the newest checkpoint or the manifest is damaged. A chain is stopped three times, each time
after a new checkpoint. Then the faults of `OTHERS`. The seed is drawn anew each time and printed; prints one table;
exits with 1 if anything was lost.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
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
STOPS = ("all", "all", "launcher", "one", "SIGTERM", "SIGHUP")
FSDP, DDP = "strategy=fsdp", "strategy=ddp"


@dataclass(frozen=True)
class Case:
    """A kind of training. `{text}` and `{chat}` in settings stand for folders with files of ours."""

    stage: str
    processes: int
    settings: tuple[str, ...] = ()
    chain: bool = False  # stopped three times, each time after a new checkpoint

    @property
    def name(self) -> str:
        own = "".join(f", {s.split('{')[0].rstrip('=')}" for s in self.settings if not s.startswith("data.path"))
        return f"{self.stage}, {self.processes} proc.{own}{', chain of 3' if self.chain else ''}"

    @property
    def run(self) -> str:
        return re.sub("[^a-z0-9]+", "-", self.name.lower()).strip("-")


LOCAL = ("data=local", "data.path={text}", "data.packing=best_fit", "data.token_cache=true")
OWN = ("data=own", "data.path={text}", "data.tasks_path={chat}")
MIXTURE = ("data=mixture", "data.sources={{a:{{path:{text}/a.jsonl,weight:2}},b:{{path:{text}/b.jsonl,weight:1}}}}")
OTHERS = ("full_disk", "fewer_processes", "twins", "swapped_parent", "flipped_weights", "cut_libraries")
CASES = (
    *(Case(stage, n) for n in (1, 2) for stage in STAGES[1:]),
    *(Case(stage, 2, (FSDP,)) for stage in STAGES[1:]),
    Case("pretrain", 1, LOCAL),
    Case("pretrain", 2, (*LOCAL, FSDP)),
    Case("pretrain", 2, MIXTURE),
    Case("midtrain", 2, (*OWN, FSDP)),
    *(Case("pretrain", n, s, chain=True) for n, s in ((1, ()), (2, ()), (3, ()), (2, (DDP,)), (3, (DDP,)))),
    *(Case("pretrain", n, (FSDP,), chain=True) for n in (2, 3)),
)


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
        self.root, self.seed, self.stopped = root, seed, dict.fromkeys(STOPS, 0)
        self.folders = {"text": str(root / "text"), "chat": str(root / "files")}
        write_files(root)

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

    # ---- stops ------------------------------------------------------------------------------------------------------

    def stops(self, case: Case, count: int) -> tuple[Tally, int]:
        """`count` stops of one kind of training, and how often files were damaged before the restart."""
        rng = random.Random(f"{self.seed} {case.name}")
        tally, damaged, number = Tally(case.name), 0, 0
        settings = [setting.format(**self.folders) for setting in case.settings]
        try:
            begin = time.monotonic()
            straight = f"straight-{case.run}"
            self.finish(case.stage, straight, case.processes, *settings)
            seconds = time.monotonic() - begin
            while tally.injected < count:
                number += 1
                run = f"stopped-{case.run}-{number}"
                damaged += self.stop_until_finished(case, run, settings, count, seconds, rng, tally)
                self.compare(case.stage, straight, run, tally)
                shutil.rmtree(self.root / run)
        except (RuntimeError, AssertionError, subprocess.TimeoutExpired) as error:
            tally.problems.append(str(error))
        return tally, damaged

    def stop_until_finished(self, case: Case, run: str, settings, count, seconds, rng, tally: Tally) -> int:
        """Start and stop one training until it comes to its end; returns how often its files were damaged.

        seconds: how long it takes when it is left alone.
        """
        folder, damaged, pending = self.root / run / case.stage / "checkpoints", 0, 0
        while True:
            before = {path.name for path in folder.glob("*.ckpt")}
            process = self.start(case.stage, run, case.processes, *settings)
            if pending < 3 if case.chain else tally.injected + pending < count:
                moment = rng.uniform(0.0, 0.5 if case.chain else 1.2 * seconds)
                if case.chain:
                    wait_for_checkpoint(self.root / run / case.stage, process, before)
            else:
                moment = processes.HANG
            try:
                out, _ = process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                self.stop(process, how := rng.choice(STOPS))
                pending += 1
                self.stopped[how] += 1
                damaged += self.damage(folder, None if case.chain else rng.choice(DAMAGES), rng)
                continue
            if process.returncode != 0:
                raise RuntimeError(f"{run} ended with {process.returncode}: {out[-800:]}")
            tally.unreadable += bool(before) and "resuming at step" not in out and "is finished" not in out
            tally.injected, tally.recovered = tally.injected + pending, tally.recovered + pending
            return damaged

    def stop(self, process: subprocess.Popen, how: str) -> None:
        """Stop a training in one of the ways of `STOPS`, and return when none of its processes is left."""
        if not how.startswith("SIG"):
            kill(process, how)
            process.stdout.close()
            return
        process.send_signal(getattr(signal, how))
        out, _ = process.communicate(timeout=processes.HANG)
        if saved := re.search(r"at step (\d+), checkpoint saved", out):
            found = re.search(r"run=(\S+)", " ".join(process.args))[1]
            manifests = self.root.glob(f"{found}/*/checkpoints/manifest.json")
            if not any(f"step_{int(saved[1]):06d}.ckpt" in path.read_text() for path in manifests):
                raise RuntimeError(f"{found}: said that step {saved[1]} is saved, but the manifest lacks it")

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
                self.compare(stage, f"straight-{stage}-1-proc", run, tally)
                shutil.rmtree(disk / run)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        return tally

    def twins(self) -> Tally:
        """The command of a running stage, once more and with overwrite=true: refused, and the first one goes on."""
        tally, run = Tally("twins on one folder"), "twins"
        first = self.start("pretrain", run, 1)
        wait_for_checkpoint(self.root / run / "pretrain", first)
        for more in ((), ("overwrite=true",)):
            tally.injected += 1
            status, out = self.status("pretrain", run, 1, *more)
            refused = status == 2 and out.count("error:") == 1 and "is being written by" in out
            tally.recovered += refused
            if not refused:
                tally.problems.append(f"second start {more}: status {status}: {out[-300:]}")
        out, _ = first.communicate(timeout=processes.HANG)
        if first.returncode:
            tally.problems.append(f"first start: status {first.returncode}: {out[-300:]}")
        else:
            self.compare("pretrain", "straight-pretrain-1-proc", run, tally)
        return tally

    def swapped_parent(self) -> Tally:
        """The parent of an unfinished stage is replaced by a model of the same shape: refused."""
        tally, run, parent = Tally("parent swapped"), "swapped", self.root / "swap" / "pretrain" / "model"
        shutil.copytree(self.root / "tiny" / "pretrain", self.root / "swap" / "pretrain")
        shutil.copytree(self.root / "tiny" / "tokenizer", self.root / "swap" / "tokenizer")
        line = ("midtrain", run, 1, "init_from=swap/pretrain")
        process = self.start(*line)
        wait_for_checkpoint(self.root / run / "midtrain", process)
        self.stop(process, "all")
        shutil.rmtree(parent)
        shutil.copytree(self.root / "straight-pretrain-1-proc" / "pretrain" / "model", parent)
        return self.expect_refusal(tally, *line)

    def flipped_weights(self) -> Tally:
        """One bit of the weights in model/ is flipped: the stage that starts from them is refused."""
        tally = Tally("bit flipped in model/")
        shutil.copytree(self.root / "tiny" / "tokenizer", self.root / "flip" / "tokenizer")
        shutil.copytree(self.root / "tiny" / "pretrain", self.root / "flip" / "pretrain")
        path = self.root / "flip" / "pretrain" / "model" / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[random.Random(self.seed).randrange(len(content) // 2, len(content))] ^= 4
        path.write_bytes(content)
        return self.expect_refusal(tally, "midtrain", "flipped", 1, "init_from=flip/pretrain")

    def cut_libraries(self) -> Tally:
        """Every library in the compile cache ends too early, as after a compiler that was killed: compiled again."""
        tally, cache = Tally("libraries cut in the compile cache"), self.root / "compiled"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)  # of the trainings from here on
        self.finish("pretrain", "compiled-1", 1, "compile=true")
        for share in (0.001, 0.1, 0.5):
            for path in cache.rglob("*.so"):
                os.truncate(path, int(share * path.stat().st_size))
            tally.injected += 1
            status, out = self.status("pretrain", "compiled-2", 1, "compile=true", "overwrite=true")
            if status or "compile cache: deleted" not in out:
                tally.problems.append(f"cut to {share}: status {status}: {out[-300:]}")
                continue
            tally.recovered += 1
            self.compare("pretrain", "compiled-1", "compiled-2", tally)
        return tally

    def expect_refusal(self, tally: Tally, *line) -> Tally:
        """Count one fault, which a start must refuse in one line with status 2."""
        status, out = self.status(*line)
        tally.injected, tally.recovered = 1, int(status == 2 and out.count("error:") == 1)
        if not tally.recovered:
            tally.problems.append(f"status {status}: {out[-300:]}")
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


def write_files(root: Path) -> None:
    """Write the text and the conversations of the cases with files."""
    for folder in (root / "text", root / "files" / "chat"):
        folder.mkdir(parents=True)
    for name, count in (("a", 300), ("b", 300), ("val", 40)):
        words = (" ".join(f"word{(i * j) % 97}" for j in range(5 + i % 60)) for i in range(count))
        rows = (json.dumps({"text": f"Story {i} of {name}: {text}"}) for i, text in enumerate(words))
        (root / "text" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    for name, count in (("train", 200), ("val", 40)):
        pairs = ((f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(count))
        rows = (json.dumps([{"role": "user", "content": a}, {"role": "assistant", "content": b}]) for a, b in pairs)
        (root / "files" / "chat" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def wait_for_checkpoint(stage_dir: Path, process: subprocess.Popen, before: Collection[str] = ()) -> None:
    """Return once there is a checkpoint whose name is not in `before`, or the training has ended well."""
    while not {path.name for path in stage_dir.glob("checkpoints/*.ckpt")} - set(before):
        if process.poll() == 0:
            return
        if process.poll() is not None:
            raise RuntimeError(f"ended before its first checkpoint: {process.stdout.read()[-800:]}")
        time.sleep(0.02)


def kill(process: subprocess.Popen, what: str) -> None:
    """SIGKILL to all processes of a training, its launcher, or one of its processes; returns when none is left."""
    children = processes.offspring_of(process.pid)
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
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--only", default="", help="cases and other faults whose name holds this")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    processes.mark_all()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    begin, chaos = time.monotonic(), Chaos(args.folder.resolve(), seed)
    chaos.parents()
    cases = [case for case in CASES if args.only in case.name]
    counts = [3 if case.chain else max(1, args.kills // len(CASES)) for case in cases]
    tallies, damaged = [], Tally("damaged checkpoints and manifests")
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(chaos.stops, cases, counts):
            tallies.append(done[0])
            damaged.injected, damaged.recovered = (damaged.injected + done[1], damaged.recovered + done[1])
            print(f"{done[0].fault}: {done[0].recovered} of {done[0].injected}", flush=True)
    tallies += [damaged, *(getattr(chaos, other)() for other in OTHERS if args.only in other)]
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
    print(f"\nways of stopping: {chaos.stopped}; {(time.monotonic() - begin) / 60:.0f} minutes, seed {seed}")
    sys.exit(any(t.failed for t in tallies))


if __name__ == "__main__":
    main()
