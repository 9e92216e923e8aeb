"""Mutated run folders handed to real commands: one line or right behaviour, in time, without network or execution.

COMMANDS of them, drawn by FATHOM_SEED (else by chance, and printed), each in a process of its own. Each process
notes connections to other machines, look-ups of names and imports of what the folders name. The time limit is
that of the same command on a sound folder, measured on this machine, and 10 s more.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPO
from hostile import CODE, mutate
from processes import finish, start_warm

ENTRY = REPO / "tests" / "hostile_entry.py"
COMMANDS = int(os.environ.get("FATHOM_COMMANDS", 60))
SEED = int(os.environ.get("FATHOM_SEED", random.SystemRandom().randrange(10**6)))
HANG = 10  # seconds beyond a sound folder's
BUSY = 3  # times as long as then the machine may take now
TINY = ("experiment=tiny", "paths.runs=runs", "trainer=cpu")
STAGES = ("tokenizer", "pretrain", "midtrain", "sft")
KINDS = {
    "evaluate": ("evaluate.py", "run=demo", "paths.runs=runs", "eval=[bpb,chat,samples]", "eval.max_per_task=2"),
    "serve": ("serve.py", "run=demo", "paths.runs=runs", "ui=cli", "max_new_tokens=4"),
    "resume": ("train.py", *TINY, "run=demo", "stage=sft"),
    "init_from": ("train.py", *TINY, "run=other", "stage=midtrain", "init_from=demo/pretrain", "max_steps=1"),
    "inspect": ("-m", "llm.checkpoint", "runs/demo"),
    "report": ("-m", "llm.report", "runs/demo"),
    "table": ("-m", "llm.experiments.table", "--runs", "runs", "--diff"),
}
PAYLOAD = """
import os
with open(os.environ["HOSTILE_NOTES"], "a") as file:
    file.write("imported\\n")
def run(*args, **options): pass
"""


def command(kind: str, folder: Path, limit: float) -> tuple[int | None, str, float]:
    """Run a command in a folder with `runs`; return (status, None where it hung; what it printed; seconds)."""
    (folder / "stdin").write_text("Who are you?\n/quit\n")
    env = {"PYTHONPATH": f"{folder / 'code'}:{REPO}", "HF_HOME": str(folder / "home")}
    env |= {"HOSTILE_NOTES": str(folder / "notes"), "HOSTILE_STDIN": str(folder / "stdin")}
    first, *rest = KINDS[kind]
    line = [*([first] if first == "-m" else [str(REPO / first)]), *rest]
    start = time.monotonic()
    program = start_warm(ENTRY, *line, cwd=folder, env=env, stderr=subprocess.STDOUT)
    status: int | None = None
    try:
        text, _ = program.communicate(limit)
        status = program.returncode
    except subprocess.TimeoutExpired:
        program.kill()
        text, _ = program.communicate()
    return status, text or "", time.monotonic() - start


def prepare(base: Path, folder: Path, kind: str) -> None:
    """Copy the sound run; to be resumed, its last stage is unfinished and has two checkpoints."""
    shutil.copytree(base / "code", folder / "code")
    shutil.copytree(base / "runs", folder / "runs")
    if kind == "resume":
        stage = folder / "runs/demo/sft"
        shutil.rmtree(stage / "model")
        record = json.loads((stage / "run.json").read_text())
        (stage / "run.json").write_text(json.dumps(record | {"status": "running"}))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a sound run, and the seconds that each kind of command takes with it."""
    folder, seconds = tmp_path_factory.mktemp("base"), {}
    (folder / "code").mkdir()
    (folder / "code" / f"{CODE}.py").write_text(PAYLOAD)
    for stage in STAGES:
        [done] = finish(start_warm(REPO / "train.py", *TINY, "run=demo", f"stage={stage}", cwd=folder))
        assert done[0] == 0, done[2]
    for kind in KINDS:
        prepare(folder, work := folder.parent / f"sound-{kind}", kind)
        status, text, seconds[kind] = command(kind, work, 900)
        assert status == 0 and not (work / "notes").exists(), (kind, text)
        shutil.rmtree(work)
    return folder, seconds


def judged(kind: str, status: int | None, text: str, notes: str) -> str:
    """Return in words how a command behaved."""
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    if notes:
        return f"WRONG: {' '.join(sorted(set(notes.split())))}"
    if status is None:
        return "WRONG: hang"
    if "Traceback (most recent call last)" in text:
        return "WRONG: traceback"
    if status == 0:
        return "right behaviour"
    if status == 1 and kind == "inspect":
        return "damage reported"
    return "one line, status 2" if status == 2 and len(lines) == 1 else f"WRONG: status {status}, {len(lines)} lines"


@pytest.mark.slow
def test_mutated_folders_as_real_commands(base, tmp_path, capsys):
    sound, seconds = base
    draw, outcomes, wrong = random.Random(SEED), Counter(), []
    say = lambda *words: print(*words, file=sys.stderr, flush=True)  # noqa: E731
    with capsys.disabled():
        say(f"\nseed {SEED}; seconds of sound commands: { {kind: round(s) for kind, s in seconds.items()} }")
        for number in range(COMMANDS):
            kind = list(KINDS)[number % len(KINDS)]
            prepare(sound, folder := tmp_path / str(number), kind)
            stage = folder / "runs/demo" / ("pretrain" if kind == "init_from" else "sft")
            done = [mutate(stage, draw) for _ in range(draw.choice((1, 1, 2)))]
            status, text, took = command(kind, folder, HANG + BUSY * seconds[kind])
            notes = (folder / "notes").read_text() if (folder / "notes").exists() else ""
            how = judged(kind, status, text, notes)
            outcomes[kind, how] += 1
            error = next((line for line in text.splitlines() if line.startswith("error:")), "")
            say(f"{number} {kind} {took:.0f} s {done}: {how} {error[:200]}")
            if how.startswith("WRONG"):
                wrong.append(f"{number} {kind} {done}: {how}\n{text[-3000:]}")
            shutil.rmtree(folder)
        for (kind, how), count in sorted(outcomes.items()):
            say(f"| {kind} | {how} | {count} |")
    assert not wrong, "\n\n".join(wrong)
