"""Kills, starves and damages real trainings and compares what they end with to trainings that were left alone.

    python tests/chaos.py [--kills 100] [--seed N] [--only WORD] [--quick]        `make chaos`

For every case of the table `CASES`: a training that is left alone, and trainings that are stopped at random moments
(SIGKILL to all processes of the job, to the launcher or to one process; SIGTERM, SIGHUP) and started again with the
same command until they end. Weights must be equal bit for bit and metrics.csv row for row, without what the clock says.
Before some of the restarts the newest checkpoint or the manifest is damaged. A chain is stopped three times, each time
after a new checkpoint. Stages that follow sft are also struck in each of their parts, one after another, at a random
moment of it: while answers are drawn, in the passes, the update, an evaluation, a checkpoint, a row of metrics.csv.
Then the faults of tests/chaos_faults.py. The seed is drawn anew each time and printed. Every
fault is written to faults.jsonl when its outcome is known; `--table` prints the tables of such files. Exits with 1 if
a fault was neither recovered nor refused.
"""

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import processes
import striking
from chaos_faults import HELD, OTHERS
from chaos_trainings import (
    FROM_SFT,
    OUTCOMES,
    SHOWN,
    STAGES,
    Failed,
    Fault,
    Trainings,
    end_of,
    kill,
    name_of,
    names_of_checkpoints,
)

DAMAGES = {  # before a restart, if at all
    "flip": "damaged: bit flipped in the checkpoint",
    "truncate": "damaged: checkpoint cut",
    "manifest": "damaged: bit flipped in the manifest",
}
STOPS = {"all": "SIGKILL to all", "launcher": "SIGKILL to the launcher", "one": "SIGKILL to one process"}
SIGNALS = ("SIGTERM", "SIGHUP")  # to the launcher, which tells the others


@dataclass(frozen=True)
class Case:
    """A kind of training, with the settings of its command; `{files}` and `{run}` are filled in."""

    stage: str
    processes: int
    settings: tuple[str, ...] = ()
    words: str = ""  # that name the settings
    chain: bool = False  # stopped three times, each time after a new checkpoint
    struck: bool = False  # in each of its parts, see tests/striking.py

    @property
    def name(self) -> str:
        how = "chain of 3" if self.chain else "struck" if self.struck else ""
        parts = (self.stage, f"{self.processes} proc.", self.words, how)
        return ", ".join(filter(None, parts))


TIME = "half an hour on two free cores, with --quick a quarter of an hour; hours on a busy machine"
DDP, FSDP = ("strategy=ddp",), ("strategy=fsdp",)
STRATEGIES = {"muon": (), "ddp": DDP, "fsdp": FSDP}
THREE = ("batch.tokens_per_step=1536",)  # a multiple of what three processes take at once
TEXT = ("data=local", "data.path={files}/text", "data.packing=best_fit", "data.token_cache={files}/cache-{run}")
SHUFFLED = ("data=local", "data.path={files}/text", "data.packing=stream", "data.shuffle=5")
A, B = "a:{path:{files}/text/a.jsonl,weight:2}", "b:{path:{files}/text/b.jsonl,weight:1}"
MIXTURE = ("data=mixture", f"data.sources={{{A},{B}}}")
CHATS = ("data=local", "data.tasks_path={files}", "data.mixture.midtrain={chat:1}", "data.mixture.sft={chat:1}")
QUIZ = (
    *CHATS,
    "data.tasks.identity.source=local",
    "data.tasks.identity.train={files}/quiz/train.jsonl",
    "data.tasks.identity.test={files}/quiz/val.jsonl",
    "data.rl=identity",
    "data.eval=[identity]",
)
TWICE = ("stage.updates_per_rollout=2",)
CASES = (
    Case("pretrain", 1, TEXT, "local, best_fit, token cache"),
    Case("pretrain", 2, (*TEXT, *FSDP), "local, best_fit, token cache, fsdp"),
    Case("pretrain", 2, (*SHUFFLED, *DDP), "local, stream, shuffled, ddp"),
    Case("pretrain", 1, MIXTURE, "mixture"),
    Case("pretrain", 2, MIXTURE, "mixture"),
    *(Case("midtrain", n, CHATS, "local") for n in (1, 2)),
    Case("midtrain", 2, (*CHATS, *FSDP), "local, fsdp"),
    *(Case("grpo", n, QUIZ, "local") for n in (1, 2)),
    Case("grpo", 2, (*QUIZ, *FSDP), "local, fsdp"),
    Case("pretrain", 1, chain=True),
    *(Case("pretrain", 2, s, word, chain=True) for word, s in STRATEGIES.items()),
    *(Case("pretrain", 3, (*s, *THREE), word, chain=True) for word, s in STRATEGIES.items()),
    *(Case(stage, 2, FSDP, "fsdp") for stage in STAGES[1:]),
    *(Case(stage, n) for n in (1, 2) for stage in STAGES[1:]),
    *(Case(stage, 1, struck=True) for stage in FROM_SFT),
    Case("grpo", 1, (*TWICE, "stage.loss=dapo", "stage.kl=0.1"), "two updates, kl", struck=True),
    Case("dpo", 1, ("stage.loss=kto",), "kto", struck=True),
    Case("distill", 1, TWICE, "two updates", struck=True),
    Case("distill", 1, (*TWICE, "stage.source=data"), "data", struck=True),
    *(Case(stage, 2, struck=True) for stage in ("reward", "ppo")),
    *(Case(stage, 2, FSDP, "fsdp", struck=True) for stage in ("grpo", "dpo", "distill")),
)


def stops(t: Trainings, case: Case, count: int, rng: random.Random) -> Iterator[Fault]:
    """Stop one kind of training `count` times, and damage its files now and then."""
    straight, seconds = t.left_alone(case.stage, case.processes, *case.settings)
    number = 0
    while count > 0:
        number += 1
        run, ways = name_of("stopped", case.name, str(number)), []
        try:
            if case.struck:
                strike(t, case, run, rng, ways)
            else:
                stop_until_finished(t, case, run, count, seconds, rng, ways)
            t.compare(case.stage, straight, run)
            outcome, said = "recovered", ""
            shutil.rmtree(t.root / run)
        except Failed as failed:
            outcome, said = failed.outcome, f"{run}: {failed}"
            ways = ways or ["none"]
        for way in ways:
            yield Fault(case.name, way, outcome, said)
        count -= sum(not way.startswith("damaged") for way in ways)


def stop_until_finished(t: Trainings, case: Case, run: str, count: int, seconds: float, rng, ways: list[str]) -> None:
    """Start and stop one training until it comes to its end; what is done to it is added to `ways`.

    count: most stops; seconds: how long it takes when it is left alone. Raises Failed.
    """
    stopped, folder = 0, t.stage_dir(run, case.stage)
    while True:
        before = names_of_checkpoints(folder)
        process = t.start(case.stage, run, case.processes, *case.settings)
        if stopped < (3 if case.chain else count):
            moment = rng.uniform(0.0, 0.5 if case.chain else 1.2 * seconds)
            if case.chain:
                t.wait_for_checkpoint(run, case.stage, process, before)
            try:
                process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                stopped += 1
                how = rng.choice(("all", *SIGNALS) if case.processes == 1 else (*STOPS, *SIGNALS))
                ways.append(STOPS.get(how, how))
                stop(t, process, run, how)
                ways += damage(folder / "checkpoints", None if case.chain else rng.choice((*DAMAGES, None, None)), rng)
                continue
        status, out = end_of(process)
        if status != 0:
            raise Failed("wrong end", f"status {status}: {out[-SHOWN:]}")
        if before and "resuming at step" not in out and "is finished" not in out:
            raise Failed("unreadable", out[-SHOWN:])
        return


def strike(t: Trainings, case: Case, run: str, rng: random.Random, ways: list[str]) -> None:
    """Kill one training in each of its parts and start it again, until it comes to its end. Raises Failed."""
    calls = {"rollout": 4, "evaluation": 2, "checkpoint": 4}
    line = (case.stage, run, case.processes, *case.settings, striking.SETTING)
    for part in rng.sample(sorted(striking.PARTS), len(striking.PARTS)):
        where = f"{part}:{rng.randint(1, calls.get(part, 5))}:{rng.randint(0, 100)}"
        status, out = end_of(t.start_warm(*line, env=HELD | {striking.STRIKE: where}))
        if status not in (0, -signal.SIGKILL, 128 + signal.SIGKILL):
            raise Failed("wrong end", f"{where}: status {status}: {out[-SHOWN:]}")
        ways += [f"SIGKILL in the {part}"] if status else []
    status, out = end_of(t.start_warm(*line, env=HELD))
    if status:
        raise Failed("wrong end", f"status {status}: {out[-SHOWN:]}")


def stop(t: Trainings, process: subprocess.Popen, run: str, how: str) -> None:
    """Stop a training in one of the ways of `STOPS` or by a signal, and return when none of its processes is left."""
    if how not in SIGNALS:
        kill(process, how)
        return
    process.send_signal(number := getattr(signal, how))
    status, out = end_of(process)
    if saved := re.search(r"at step (\d+), checkpoint saved", out):
        manifests = t.root.glob(f"{run}/*/checkpoints/manifest.json")
        if not any(f"step_{int(saved[1]):06d}.ckpt" in path.read_text() for path in manifests):
            raise Failed("silent", f"said that step {saved[1]} is saved, but the manifest lacks it")
        if status != 128 + number:
            raise Failed("wrong end", f"status {status} after {how}: {out[-SHOWN:]}")


def damage(folder: Path, how: str | None, rng: random.Random) -> list[str]:
    """Damage the newest checkpoint, or the manifest, if an older checkpoint is there to be used; say what was done."""
    found = sorted(folder.glob("step_*.ckpt"))
    if how is None or len(found) < 2:
        return []
    path = folder / "manifest.json" if how == "manifest" else found[-1]
    content = bytearray(path.read_bytes())
    if how == "truncate":
        content = content[: rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return [DAMAGES[how]]


def tables(faults: list[Fault]) -> str:
    """Return two tables: outcomes by kind of training or fault, and by way of stopping and damaging trainings."""
    ways = [fault for fault in faults if fault.way.startswith(("SIG", "damaged"))]
    kinds = table("training or fault", [(fault.kind, fault.outcome) for fault in faults])
    return f"{kinds}\n\n{table('way', [(fault.way, fault.outcome) for fault in ways])}"


def table(word: str, pairs: list[tuple[str, str]]) -> str:
    """Return a table of (name, outcome) pairs, counted."""
    lines = [f"| {word} | faults | {' | '.join(OUTCOMES)} |", "|---|" + "---:|" * (1 + len(OUTCOMES))]
    for name in (*dict.fromkeys(name for name, _ in pairs), "**all**"):
        found = Counter(outcome for other, outcome in pairs if name in (other, "**all**"))
        lines.append(f"| {name} | {found.total()} | {' | '.join(str(found[outcome]) for outcome in OUTCOMES)} |")
    return "\n".join(lines)


class Record:
    """The faults so far, also in a file."""

    def __init__(self, path: Path):
        self.path, self.lock, self.faults = path, threading.Lock(), []

    def take(self, name: str, faults: Iterable[Fault]) -> None:
        """Do the faults of one kind, and keep each; an error of this program counts as a failure."""
        begin, found = time.monotonic(), []
        try:
            for fault in faults:
                found.append(fault)
                self.keep(fault)
        except Exception as error:
            found.append(Fault(name, "none", getattr(error, "outcome", "wrong end"), repr(error)))
            self.keep(found[-1])
        good = sum(not fault.is_failure for fault in found)
        print(f"{name}: {good} of {len(found)} in {time.monotonic() - begin:.0f} s", flush=True)

    def keep(self, fault: Fault) -> None:
        with self.lock, open(self.path, "a") as file:
            self.faults.append(fault)
            file.write(json.dumps(asdict(fault)) + "\n")


def conclude(faults: list[Fault]) -> None:
    """Print tables and failures, and exit with 1 if there are any."""
    print(f"\n{tables(faults)}")
    failures = [fault for fault in faults if fault.is_failure]
    for fault in failures:
        print(f"\n{fault.kind}, {fault.way}: {fault.outcome}: {fault.said}")
    sys.exit(bool(failures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=f"Expected time: {TIME}.")
    parser.add_argument("--kills", type=int, default=100, help="stops in all, beside chains and strikes (default: 100)")
    parser.add_argument("--seed", type=int, help="of all that is random; default: a new one, which is printed")
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"), help="is emptied (default: runs/chaos)")
    parser.add_argument("--only", nargs="+", default=[""], help="cases and faults whose name holds one of these words")
    parser.add_argument("--quick", action="store_true", help="leave out jobs of several processes")
    parser.add_argument("--at-once", type=int, default=2, help="cases at one time (default: 2)")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print the tables of faults.jsonl files")
    args = parser.parse_args()
    if args.table:
        conclude([Fault(**json.loads(line)) for path in args.table for line in open(path)])
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    processes.mark_all()
    begin, t = time.monotonic(), Trainings(args.folder.resolve())
    cases = [case for case in CASES if not (args.quick and case.processes > 1)]
    each = max(1, args.kills // sum(not (case.chain or case.struck) for case in cases))
    others = [(name, function) for name, (function, several) in OTHERS.items() if not (args.quick and several)]
    jobs = [(name, function(t, random.Random(f"{seed} {name}"))) for name, function in others]
    count = {c: len(striking.PARTS) if c.struck else 3 if c.chain else each for c in cases}
    jobs += [(c.name, stops(t, c, count[c], random.Random(f"{seed} {c.name}"))) for c in cases]
    record = Record(t.root / "faults.jsonl")
    with ThreadPoolExecutor(args.at_once) as pool:
        chosen = [job for job in jobs if any(word in job[0] for word in args.only)]
        list(pool.map(lambda job: record.take(*job), chosen))
    print(f"\n{(time.monotonic() - begin) / 60:.0f} minutes, seed {seed}")
    conclude(record.faults)


if __name__ == "__main__":
    main()
