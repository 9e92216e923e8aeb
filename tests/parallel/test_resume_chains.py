"""Real trainings that are stopped three times, with every strategy, end as trainings that were left alone."""

import json
import os
import re
import shutil
import signal

import pytest
from conftest import REPO, run_cli
from holding import FOLDER, TESTS, held, hold_at
from processes import finish, is_alive, offspring_of, start_warm, wait_until
from test_strategies import columns

from llm.checkpoint.resume import MANIFEST, checkpoint_path

LINE = ("experiment=tiny", "stage=pretrain", "init_from=tiny/tokenizer", "batch.tokens_per_step=3072", "max_steps=24")
LINE += ("trainer=cpu", "precision.compute=fp32", "stage.eval_every=8", "stage.sample_every=0", "save_every=3")
STRATEGIES = [("single", 1), *((strategy, n) for strategy in ("ddp", "muon", "fsdp") for n in (2, 3))]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tokenizer_runs, tmp_path_factory):
    """runs/ with a tokenizer of the run `tiny`."""
    return shutil.copytree(tokenizer_runs, tmp_path_factory.mktemp("chains") / "runs")


def line(runs, run: str, strategy: str, n: int, *more: str) -> list[str]:
    return [*LINE, f"run={run}", f"paths.runs={runs}", f"strategy={strategy}", f"trainer.devices={n}", *more]


def start_held(line: list[str], n: int, step: int, folder):
    """Start a training that stands still after a step; return its launcher and its processes once all stand."""
    folder.mkdir()
    env = {"PYTHONPATH": TESTS, FOLDER: str(folder)}
    launcher = start_warm(REPO / "train.py", *line, *hold_at(step), env=env)
    wait_until(lambda: all(held(folder, rank) for rank in range(n)), launcher)
    return launcher, offspring_of(launcher.pid)


def kill(launcher, victims: list[int], everybody: list[int]) -> None:
    """SIGKILL to the victims; return when nobody is left."""
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    finish(launcher)
    wait_until(lambda: not any(map(is_alive, everybody)))


@pytest.mark.parametrize(("strategy", "n"), STRATEGIES)
def test_three_stops_change_nothing(runs, tmp_path, strategy, n):
    """SIGTERM, SIGKILL to every process, SIGKILL to one of them: weights and metrics are those of no stop."""
    straight, stopped = (f"{name}-{strategy}-{n}" for name in ("straight", "stopped"))
    done = run_cli("train.py", *line(runs, straight, strategy, n), fresh=True)
    assert done.returncode == 0, done.stderr
    command = line(runs, stopped, strategy, n)
    launcher, _ = start_held(command, n, 5, tmp_path / "first")
    launcher.send_signal(signal.SIGTERM)
    ((status, *_),) = finish(launcher)
    assert status == 128 + signal.SIGTERM
    launcher, workers = start_held(command, n, 11, tmp_path / "second")
    kill(launcher, [launcher.pid, *workers], workers)
    launcher, workers = start_held(command, n, 17, tmp_path / "third")
    kill(launcher, workers[-1:] or [launcher.pid], workers)
    resumed = run_cli("train.py", *command)
    assert resumed.returncode == 0 and re.search("resuming at step 1[2-7] of 24", resumed.stdout), resumed.stderr
    assert columns(runs, stopped) == columns(runs, straight)
    a, b = ((runs / run / "pretrain" / "model" / "model.safetensors").read_bytes() for run in (straight, stopped))
    assert a == b


@pytest.mark.parametrize(("strategy", "n"), [pair for pair in STRATEGIES if pair[1] < 3])
def test_saved_is_said_when_the_manifest_holds_the_file(runs, tmp_path, strategy, n):
    """A training under fsdp that was stopped said "checkpoint saved" and ended while the file was being written."""
    run = f"slow-disk-{strategy}"
    slow = ["+callbacks.slow._target_=holding.SlowDisk", "+callbacks.slow.seconds=1"]
    launcher, _ = start_held(line(runs, run, strategy, n, *slow), n, 4, tmp_path / "held")
    launcher.send_signal(signal.SIGTERM)
    said = next((text for text in launcher.stdout if "saved" in text), "")
    folder = runs / run / "pretrain" / "checkpoints"
    step = int(re.search("stopped by SIGTERM at step ([0-9]+), checkpoint saved", said)[1])
    assert checkpoint_path(folder, step).name in json.loads((folder / MANIFEST).read_text())
    ((status, *_),) = finish(launcher)
    assert status == 128 + signal.SIGTERM
