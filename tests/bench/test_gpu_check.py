"""bench/gpu_check.py without a GPU: the runner with parts of its own, and the small form of the real parts."""

import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO

sys.path.append(str(REPO / "bench"))
import gpu_check  # noqa: E402
from gpu_check import Findings, Part  # noqa: E402

from llm.optim import muon_gpu  # noqa: E402

PARTS = """
import subprocess, time, sys
def fine(found, small, more=0):
    found.note(small=small, more=more)
    found.check("close", 0.1, 0.2)
def wrong(found, small):
    found.check("close", float("nan"), 0.2)
def crash(found, small):
    found.note(before=1)
    raise ValueError("nothing here")
def slow(found, small):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    found.note(child=child.pid)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(Part...) -> results; the parts' functions are those above."""
    (tmp_path / "parts_of_the_test.py").write_text(PARTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "PATIENCE", 1)
    return lambda *parts, minutes=1.0: gpu_check.run_all(parts, minutes, True, tmp_path)


def part(name: str, budget: float = 30, **more) -> Part:
    return Part(name, f"parts_of_the_test:{name}", budget, **more)


def test_every_end_of_a_part_is_told_apart(run, capsys):
    parts = (part("fine", options={"more": 3}), part("wrong"), part("crash"), part("slow", 2.0, measures=False))
    results = run(*parts)
    assert {name: result["status"] for name, result in results.items()} == {
        "fine": "ok",
        "wrong": "failed",
        "crash": "crashed",
        "slow": "out of time",
    }
    assert results["fine"]["values"] == {"small": True, "more": 3}
    assert results["crash"]["values"] == {"before": 1}, "what was found before is kept"
    assert results["crash"]["error"] == "ValueError: nothing here"
    assert 2.0 <= results["slow"]["seconds"] < 30
    assert is_gone(results["slow"]["values"]["child"]), "what a part has started ends with it"
    gpu_check.show(results)
    table = capsys.readouterr().out
    assert "DIFFERS  close: error nan, limit 0.2" in table and "equal    close" in table and "out of time" in table


def is_gone(pid: int, seconds: float = 20) -> bool:
    """Return True once a process has ended, False if it has not after `seconds`; a zombie counts as ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_what_no_time_is_left_for_is_left_out(run):
    results = run(part("slow"), part("fine"), minutes=0.03)
    assert results["slow"]["status"] == "out of time" and results["fine"]["status"] == "left out"


def test_the_small_form_gets_more_time_but_no_more_than_is_left(tmp_path, monkeypatch):
    given = []
    result = {"status": gpu_check.OK, "seconds": 0.0}
    monkeypatch.setattr(gpu_check, "run_part", lambda part, seconds, *more: given.append(seconds) or result)
    for minutes, small in ((9.0, False), (9.0, True), (0.25, True)):
        gpu_check.run_all((part("fine", 10),), minutes, small, tmp_path)
    assert given == [10, 30, pytest.approx(15, abs=1)]


def test_the_exit_status_and_the_file(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: False)

    def status(*names):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out"), "--only", ",".join(names)])
        return gpu_check.main(tuple(part(name, 2.0) for name in ("fine", "wrong", "crash", "slow")))

    assert status("fine", "slow") == 0
    assert status("fine", "wrong") == status("crash") == 1
    assert json.loads((tmp_path / "out/gpu_check.json").read_text())["parts"]["crash"]["status"] == "crashed"
    assert "failed: crash" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: no part 'quick'; there are fine"):
        status("quick")


def test_all_parts_exist_and_fit_in_nine_minutes_on_paper():
    for one in gpu_check.PARTS:
        module, function = one.where.split(":")
        assert f"\ndef {function}(found, small: bool" in (REPO / f"bench/{module}.py").read_text()
    assert len({one.name for one in gpu_check.PARTS}) == len(gpu_check.PARTS)


def findings(tmp_path) -> Findings:
    return Findings(tmp_path / "found.json")


def test_attention_is_compared_with_its_definition(tmp_path):
    import _gpu_kernels

    found = findings(tmp_path)
    _gpu_kernels.attention(found, True)
    backends = {
        f"{case}_{name}" for case in ("full", "window", "documents", "window_documents") for name in ("cpu", "sdpa")
    }
    assert set(found.checks) == backends and all(check["ok"] for check in found.checks.values())
    assert found.values["full_flash3"] == "absent" and found.values["window_sdpa_ms"] > 0
    assert json.loads(found.path.read_text())["checks"] == found.checks


def test_a_wrong_attention_is_noticed(tmp_path, monkeypatch):
    import _gpu_kernels

    right = _gpu_kernels.causal_attention
    wrong = lambda q, k, v, scale, window, mask, backend: right(q, k, v, scale, None, mask, backend)  # noqa: E731
    monkeypatch.setattr(_gpu_kernels, "causal_attention", wrong)  # forgets the window
    found = findings(tmp_path)
    _gpu_kernels.attention(found, True)
    assert {name for name, check in found.checks.items() if not check["ok"]} >= {"window_cpu", "window_sdpa"}
    assert found.checks["full_cpu"]["ok"]


def test_optimizers_are_compared_and_told_apart():
    import _gpu_kernels

    cpu = torch.device("cpu")
    one, same, other = (_gpu_kernels.moves(name, torch.float32, cpu) for name in ("adamw", "adamw", "muon_2025"))
    assert _gpu_kernels.worst(same, one) == 0 and _gpu_kernels.worst(other, one) > 0.1


def event(name: str, start: int, end: int, cuda: bool = False, annotation: bool = False) -> SimpleNamespace:
    """An event of the profiler, times in milliseconds."""
    from torch.autograd import DeviceType

    return SimpleNamespace(
        name=lambda: name,
        start_ns=lambda: start * 10**6,
        duration_ns=lambda: (end - start) * 10**6,
        device_type=lambda: DeviceType.CUDA if cuda else DeviceType.CPU,
        is_user_annotation=lambda: annotation,
    )


def test_what_the_profiler_saw():
    from _gpu_profile import END, traced

    events = [
        event("cudaLaunchKernel", 0, 1),
        event("matmul", 1, 5, cuda=True),
        event("add", 4, 6, cuda=True),  # overlaps
        event("Optimizer.step", 0, 20, cuda=True, annotation=True),
        event("aten::_local_scalar_dense", 6, 8),
        event("cudaMemcpyAsync", 6, 7),
        event("cudaStreamSynchronize", 6, 8),
        event("matmul", 9, 10, cuda=True),
        event(END, 12, 19),
        event("cudaDeviceSynchronize", 12, 19),  # our own, not counted
    ]
    trace = traced()
    trace.seconds = 0.020
    trace.profile = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events)))
    got = trace.summary()
    assert (got["host_waits"], got["items_read"], got["copies"], got["launches"]) == (1, 1, 1, 1)
    assert got["host_waits_ms"] == pytest.approx(2) and got["busy"] == pytest.approx(6 / 20)
    assert got["kernel_1"] == "5.00 ms matmul" and got["kernel_2"] == "2.00 ms add"


def test_a_trace_of_a_cpu_counts_what_is_read():
    from _gpu_profile import traced

    with traced() as trace:
        torch.ones(3).sum().item()
    assert trace.summary() == {"items_read": 1}


def test_the_generated_bundle_is_one(tmp_path):
    import _gpu_running

    from llm.eval.core_bundle import load_bundle

    _gpu_running.write_bundle(tmp_path, 5)
    tasks = load_bundle(tmp_path)
    assert [(task.name, len(task.examples)) for task in tasks] == [("choice", 5), ("schema", 5), ("continue", 5)]


def test_bytes_of_a_decode_step():
    import _gpu_running

    from llm.model.config import GPTConfig

    config = GPTConfig(2, 2, 1, 16, 32, 1024, 64, arch="modern", window_pattern="SL", window_divisor=4)
    weights = _gpu_running.bytes_of_a_step(config, 0, 300)
    assert weights == 2 * (2 * (2 * 32 * 32 + 2 * 32 * 16 + 8 * 32 * 32) + 64 * 32)
    keys = config.window(0) + 300
    assert config.window(0) == 256 and _gpu_running.bytes_of_a_step(config, 3, 300) == weights + 2 * 3 * keys * 2 * 16


def test_memory_of_the_card_bounds_the_rows(monkeypatch):
    import _gpu_training

    monkeypatch.setattr(_gpu_training._bench, "DEVICE", torch.device("cuda"))

    def rows(gib, depth):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib * 2**30, gib * 2**30))
        return _gpu_training.arguments(False, depth).rows

    assert rows(141, 12) == rows(80, 12) == 32 and rows(141, 20) == 32
    assert rows(24, 12) == 16 and rows(24, 20) < 8


@pytest.mark.parametrize(
    ("key", "is_wrong"),
    [("joint_qkv", False), ("joint_qkv", True), ("bf16_tables", False), ("tuned_products", False)],
)
def test_switches_are_compared(tmp_path, monkeypatch, key, is_wrong):
    """A product whose keys and values change places is noticed by the gradients; it learns as well as the right one."""
    import _gpu_training

    from llm.model import gpt

    right = gpt.joint_product
    if is_wrong:
        monkeypatch.setattr(gpt, "joint_product", lambda x, layers: [right(x, layers)[i] for i in (0, 2, 1)])
    found = findings(tmp_path)
    _gpu_training.switches(found, True, key)
    assert found.checks.keys() == {"loss_after_10_steps", f"gradients_{key}_and_cpu"} and found.values["on_to_off"] > 0
    wrong = {name for name, check in found.checks.items() if not check["ok"]}
    assert wrong == ({"gradients_joint_qkv_and_cpu"} if is_wrong else set())


@pytest.mark.slow
def test_muon_kernels_and_early_checks_are_compared(tmp_path):
    import _gpu_kernels
    import _gpu_training

    found = findings(tmp_path)
    _gpu_kernels.muon_kernels(found, True)
    _gpu_training.early_check(found, True, 2)
    assert len(found.checks) == 5 and all(check["ok"] for check in found.checks.values())
    assert found.values["plain_ms"] > 0 and found.values["early_to_late"] > 0 and not muon_gpu._is_on


@pytest.mark.slow
def test_every_part_in_small(tmp_path):
    """Every part ends well in the form for machines without a GPU; takes some minutes."""
    command = [sys.executable, str(REPO / "bench/gpu_check.py"), "--small", "--minutes", "30", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert set(parts) == {one.name for one in gpu_check.PARTS}
    late = {name for name, result in parts.items() if result["status"] == gpu_check.LATE}  # a busy machine
    assert all(result["status"] == "ok" for name, result in parts.items() if name not in late) and len(late) < 4
    numbers = [value for result in parts.values() for value in result["values"].values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
