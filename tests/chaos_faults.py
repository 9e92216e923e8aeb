"""Faults of tests/chaos.py besides stops at random moments: each function does some to trainings and yields them."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import processes
from chaos_trainings import (
    FROM_SFT,
    SHOWN,
    STAGES,
    STEPS,
    Failed,
    Fault,
    Trainings,
    end_of,
    judged,
    kill,
    refused,
    table,
)
from holding import FOLDER, TESTS, held, hold_at, release

HELD = {"PYTHONPATH": os.pathsep.join((str(processes.REPO), TESTS))}  # where the callback of tests/holding.py is found


def twins(t: Trainings, rng: random.Random) -> Iterator[Fault]:
    """Start the command of a running stage once more and with overwrite=true: refused, and the first goes on."""
    for n in (1, 2):
        run, folder = f"twins-{n}", t.root / f"held-{n}"
        folder.mkdir()
        line = ("pretrain", run, n, *hold_at(20))
        first = t.start(*line, env=HELD | {FOLDER: str(folder)})
        kind, who = f"twins on one folder, {n} proc.", f"is being written by process {first.pid} on "
        try:
            processes.wait_until(lambda: all(held(folder, rank) for rank in range(n)), first)  # noqa: B023
            yield judged(kind, "the same command", lambda: refused(t, who, *line, env=HELD))  # noqa: B023
            again = (*line, "overwrite=true")
            yield judged(kind, "overwrite=true", lambda: refused(t, who, *again, env=HELD))  # noqa: B023
        finally:
            release(folder)
        yield judged(kind, "the first one goes on", ends_as_left_alone, t, first, "pretrain", run, n)


def twins_at_once(t: Trainings, rng: random.Random) -> Iterator[Fault]:
    """Start one command twice within a second: one trains, the other is refused."""
    for number, n in enumerate((1, 1, 2)):
        run, folder = f"at-once-{number}", t.root / f"held-at-once-{number}"
        folder.mkdir()
        pair = []
        for _ in range(2):
            pair.append(t.start("pretrain", run, n, *hold_at(20), env=HELD | {FOLDER: str(folder)}))
            time.sleep(rng.uniform(0, 1))
        yield judged(f"twins at one moment, {n} proc.", "the same command", one_of_two, t, pair, run, n, folder)


def one_of_two(t: Trainings, pair: list[subprocess.Popen], run: str, n: int, folder: Path) -> str:
    """Let the one that has the stage go on when the other has ended; compare its weights."""
    try:
        processes.wait_until(lambda: any(process.poll() is not None for process in pair))
    finally:
        release(folder)
    loser = next((process for process in pair if process.poll() is not None), pair[0])
    status, out = end_of(loser)
    if status != 2 or out.count("error:") != 1 or "is being written by" not in out:
        raise Failed("wrong end", f"the second one: status {status}: {out[-SHOWN:]}")
    return ends_as_left_alone(t, next(process for process in pair if process is not loser), "pretrain", run, n)


def ends_as_left_alone(t: Trainings, process: subprocess.Popen, stage: str, run: str, n: int, *settings) -> str:
    """Wait for a training; return "recovered" where it ended well, with the weights of one that was left alone."""
    status, out = end_of(process)
    if status:
        raise Failed("wrong end", f"status {status}: {out[-SHOWN:]}")
    t.compare(stage, t.left_alone(stage, n, *settings)[0], run)
    return "recovered"


def swapped_parents(t: Trainings, rng: random.Random) -> Iterator[Fault]:
    """Replace the parent of an unfinished stage by another of the same shape: refused; put back, the stage goes on."""
    t.finish("tokenizer", "other", 1, "data.seed=7", "stage.vocab_size=384", "stage.max_chars=200000")
    for stage in STAGES[1:]:
        run, parent = f"swapped-{stage}", STAGES[STAGES.index(stage) - 1]
        other = "other" if parent == "tokenizer" else t.left_alone(parent, 1)[0]
        shutil.copytree(t.root / "tiny", t.root / f"parents-{stage}")
        model = t.stage_dir(f"parents-{stage}", parent) / "model"
        line = (stage, run, 1, f"init_from=parents-{stage}/{parent}")
        process = t.start(*line)
        t.wait_for_checkpoint(run, stage, process)
        kill(process, "all")
        model.rename(model.with_name("kept"))
        shutil.copytree(t.stage_dir(other, parent) / "model", model)
        yield judged("parent swapped", f"{parent} under {stage}", refused, t, "", *line)
        shutil.rmtree(model)
        model.with_name("kept").rename(model)
        yield judged("parent put back", f"{parent} under {stage}", lambda: goes_on(t, *line))  # noqa: B023


def goes_on(t: Trainings, stage: str, run: str, n: int, *settings: str) -> str:
    """Start an unfinished stage again and compare its weights with those of one that was left alone."""
    if "resuming at step" not in t.finish(stage, run, n, *settings):
        raise Failed("unreadable", f"{run}: began anew")
    t.compare(stage, t.left_alone(stage, n)[0], run)
    return "recovered"


def copied_weights(t: Trainings, rng: random.Random) -> Iterator[Fault]:
    """Put the weights of one stage into the model/ of another, with and without their manifest: refused."""
    for names in (("model.safetensors",), ("model.safetensors", "manifest.json")):
        run = f"copied-{len(names)}"
        shutil.copytree(t.root / "tiny", t.root / run)
        for name in names:
            shutil.copy(t.stage_dir(run, "pretrain") / "model" / name, t.stage_dir(run, "sft") / "model" / name)
        line = ("grpo", f"of-{run}", 1, f"init_from={run}/sft")
        yield judged("weights of another stage in model/", " and ".join(names), refused, t, "", *line)


def flipped_bits(t: Trainings, rng: random.Random) -> Iterator[Fault]:
    """Flip one bit of a file in model/, most often of the weights: the stage that starts from it is refused."""
    shutil.copytree(t.root / "tiny", t.root / "flip")
    model = t.stage_dir("flip", "pretrain") / "model"
    others = sorted(path for path in model.iterdir() if path.name not in ("model.safetensors", "manifest.json"))
    for path in (*[model / "model.safetensors"] * 4, *rng.sample(others, 3)):
        whole = path.read_bytes()
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        line = ("midtrain", "flipped", 1, "init_from=flip/pretrain")
        yield judged("bit flipped in model/", path.name, refused, t, path.name, *line)
        path.write_bytes(whole)


def interrupted_compiler(t: Trainings, rng: random.Random) -> Iterator[Fault]:
    """Kill trainings while they are compiled, and cut the libraries in the compile cache: compiled again."""
    line = ("pretrain", "compiled", 1, "compile=true")
    t.finish(*line, env={"TORCHINDUCTOR_CACHE_DIR": str(t.root / "compiled-whole")})
    for number in range(3):
        run, cache = f"compiled-{number}", t.root / f"compile-cache-{number}"
        env = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
        process = t.start("pretrain", run, *line[2:], env=env)
        processes.wait_until(lambda: any(cache.rglob("*.cpp")), process)  # noqa: B023
        time.sleep(rng.uniform(0, 4))
        kill(process, "all")
        yield judged("compiler interrupted", "killed while it wrote", compiled_again, t, run, env, "")
        for path in cache.rglob("*.so"):
            os.truncate(path, int(rng.choice((0.001, 0.1, 0.5)) * path.stat().st_size))
        test = (compiled_again, t, run, env, "compile cache: deleted", "overwrite=true")
        yield judged("compiler interrupted", "libraries cut", *test)


def compiled_again(t: Trainings, run: str, env: dict[str, str], text: str, *more: str) -> str:
    """Start a compiled training again and compare its weights; its output must hold `text`."""
    if text not in t.finish("pretrain", run, 1, "compile=true", *more, env=env):
        raise Failed("silent", f"{run}: nothing said of the libraries")
    t.compare("pretrain", "compiled", run)
    return "recovered"


def restarted_by_itself(t: Trainings, rng: random.Random) -> Iterator[Fault]:
    """Kill one of two processes of a job that may restart: it goes on by itself, to the same weights."""
    for number, strategy in enumerate(("muon", "ddp", "fsdp")):
        run, settings = f"restarted-{number}", (f"strategy={strategy}", "trainer.max_restarts=3")
        process = t.start("pretrain", run, 2, *settings)
        t.wait_for_checkpoint(run, "pretrain", process)
        os.kill(processes.offspring_of(process.pid)[-1], 9)
        test = (ends_as_left_alone, t, process, "pretrain", run, 2, *settings)
        yield judged("max_restarts=3, 2 proc.", f"one process killed, {strategy}", *test)


def fewer_processes(t: Trainings, rng: random.Random) -> Iterator[Fault]:
    """Kill one of two processes; the training goes on with one, to the same number of steps."""
    for stage in (*STAGES[1:], *FROM_SFT[1:]):
        run = f"fewer-{stage}"
        process = t.start(stage, run, 2)
        t.wait_for_checkpoint(run, stage, process)
        kill(process, "one")
        yield judged("a process gone, then 2 -> 1", stage, all_steps, t, stage, run)


def all_steps(t: Trainings, stage: str, run: str) -> str:
    """Go on with one process; return "recovered" where all steps are in metrics.csv."""
    t.finish(stage, run, 1)
    steps = {int(dict(row)["step"]) for row in table(t.stage_dir(run, stage) / "metrics.csv")}
    if max(steps) != STEPS[stage]:
        raise Failed("differing", f"{run} ended at step {max(steps)}")
    return "recovered"


def full_disk(t: Trainings, rng: random.Random) -> Iterator[Fault]:
    """Train on a file system of a few megabytes; once that is larger the same command goes on."""
    disk = t.root / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(disk)], capture_output=True).returncode:
        print("full_disk: left out, a tmpfs cannot be mounted", flush=True)
        return
    try:
        for megabytes in (6, 9, 12):
            run = f"full-{megabytes}"
            subprocess.run(["mount", "-o", f"remount,size={megabytes}M", str(disk)], check=True)
            line = ("pretrain", run, 1, f"paths.runs={disk}", f"init_from={t.root}/tiny/tokenizer")
            yield judged("disk full", f"{megabytes} MB", refused, t, "cannot", *line)
            subprocess.run(["mount", "-o", "remount,size=100M", str(disk)], check=True)
            (t.root / run).symlink_to(disk / run)
            yield judged("disk full, then enlarged", f"{megabytes} MB", on_a_larger_disk, t, run, line)
            shutil.rmtree(disk / run)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def on_a_larger_disk(t: Trainings, run: str, line: tuple) -> str:
    t.finish(*line)
    t.compare("pretrain", t.left_alone("pretrain", 1)[0], run)
    return "recovered"


OTHERS = {
    function.__name__: (function, of_several)
    for function, of_several in (
        (twins, True),
        (twins_at_once, True),
        (swapped_parents, False),
        (copied_weights, False),
        (flipped_bits, False),
        (interrupted_compiler, False),
        (restarted_by_itself, True),
        (fewer_processes, True),
        (full_disk, False),
    )
}
