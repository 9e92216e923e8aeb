"""Speed of this machine and how long a training will take on it."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from llm.scaling import machine
from llm.scaling.duration import MOST_LIKE, Estimate, Work, estimate, expected
from llm.scaling.machine import Parts, Run, earlier_runs, file, matmul_rate, remember

CPU, FP32 = torch.device("cpu"), torch.float32
WORK = Work("pretrain", 11, 1e9, 0.0, 2, 128, 1000, 3e9, 0.0, False)


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """The file of the machine, in a folder of its own."""
    path = tmp_path / "cache" / "machine.json"
    monkeypatch.setenv("FATHOM_MACHINE", str(path))
    return path


@pytest.fixture
def measured(monkeypatch) -> list:
    """List of the measurements that are made; each gives 1e9."""
    calls = []
    monkeypatch.setattr(machine, "measured_matmul_rate", lambda *args: calls.append(args) or 1e9)
    return calls


def run(seconds: float, stage="pretrain", on="here", flops=1e9) -> Run:
    """A training whose steps took `seconds`, as often as that is of what was expected of the whole."""
    wanted = expected(WORK, 1e9)
    factor = seconds / wanted.step
    took = Parts(seconds, wanted.first * factor, wanted.pauses * factor, wanted.rest * factor)
    return Run(on, stage, flops, wanted, took)


def test_the_rate_is_measured_once_and_kept(kept, measured):
    assert [matmul_rate(CPU, FP32) for _ in range(3)] == [1e9] * 3
    assert len(measured) == 1
    (name,) = json.loads(kept.read_text())["rates"]
    assert f"{torch.get_num_threads()} threads, float32, torch {torch.__version__}" in name
    matmul_rate(CPU, torch.bfloat16)
    assert len(measured) == 2 and len(json.loads(kept.read_text())["rates"]) == 2


def test_a_measured_rate_is_that_of_a_product():
    rate = machine.measured_matmul_rate(CPU, FP32, n=128, seconds=0.01)
    assert 1e7 < rate < 1e14


@pytest.mark.parametrize("content", ["", "[1]", '{"rates": {"a": "fast"}}', '{"runs": [{"on": 1}]}', None])
def test_a_file_that_cannot_be_used_is_not_in_the_way(kept, measured, content):
    if content is None:
        kept.parent.parent.joinpath("cache").write_text("a file in the place of the folder")
    else:
        kept.parent.mkdir()
        kept.write_text(content)
    assert matmul_rate(CPU, FP32) == 1e9 and earlier_runs() == []
    remember(run(1.0))
    assert earlier_runs() == ([] if content is None else [run(1.0)])


def test_the_file_lies_in_the_users_cache(monkeypatch):
    monkeypatch.delenv("FATHOM_MACHINE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert file() == Path("/cache/fathom/machine.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert file() == Path(os.path.expanduser("~/.cache/fathom/machine.json"))


def test_only_the_last_runs_are_remembered(kept, monkeypatch):
    monkeypatch.setattr(machine, "MOST_RUNS", 3)
    for number in range(5):
        remember(run(number + 1.0))
    assert [one.took.step for one in earlier_runs()] == [3.0, 4.0, 5.0]


def test_expected_by_the_rate_alone():
    parts = expected(Work("pretrain", 5, 4.5e9, 0.0, 0, 0, 0, 1e9, 0.0, False), 1e10)
    assert parts == Parts(step=pytest.approx(1.0), first=pytest.approx(1.0), pauses=pytest.approx(0.2), rest=2.0)
    answers = expected(Work("grpo", 5, 4.5e9, 1e9, 0, 0, 0, 0.0, 1e9, False), 1e10)
    assert answers.step == pytest.approx(2.0) and answers.pauses == pytest.approx(1.0)  # drawing is slow
    compiled = expected(Work("pretrain", 5, 4.5e9, 0.0, 0, 0, 0, 0.0, 0.0, True), 1e10)
    assert compiled.step < 1.0 and compiled.first > 30


def test_an_estimate_adds_up_the_parts():
    assert Estimate(Parts(2.0, 5.0, 3.0, 1.0), steps=11, runs=0).seconds == 5 + 2 * 10 + 3 + 1
    found = estimate(WORK, 1e9, 1.0, "here", [])
    assert found.runs == 0 and found.parts == expected(WORK, 1e9)
    busy = estimate(WORK, 1e9, 0.25, "here", [])
    assert busy.seconds == pytest.approx(4 * found.seconds)


def test_earlier_runs_correct_it():
    """The median of what the runs took counts, and only that of runs like this one."""
    step = expected(WORK, 1e9).step
    runs = [run(step * times) for times in (2.0, 3.0, 10.0)]
    found = estimate(WORK, 1e9, 1.0, "here", runs)
    assert found.runs == 3 and found.parts.step == pytest.approx(3 * step)
    others = [run(step * 9, stage="sft"), run(step * 9, on="there"), run(step * 9, flops=9e9), run(step * 9, flops=0)]
    assert estimate(WORK, 1e9, 1.0, "here", others).runs == 0


def test_the_nearest_and_newest_runs_are_asked():
    step = expected(WORK, 1e9).step
    old, new, far = ([run(step * times, flops=flops)] * 9 for times, flops in ((2, 1e9), (5, 1e9), (7, 6e9)))
    found = estimate(WORK, 1e9, 1.0, "here", [*old, *new, *far])
    assert found.runs == MOST_LIKE and found.parts.step == pytest.approx(5 * step)
    assert math.isfinite(estimate(WORK, 1e9, 1.0, "here", far).seconds)


def test_the_share_of_time_is_between_zero_and_one():
    assert 0 < machine.free_share(CPU, seconds=0.01) <= 1
    assert machine.free_share(torch.device("meta")) == 1.0
    assert [machine.cpu_share(*pair) for pair in ((1.0, 2.0, 1), (9.0, 2.0, 2), (0.0, 1.0, 1))] == [0.5, 1.0, 0.01]
