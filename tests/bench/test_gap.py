"""bench/gap.py: the trainings that it starts."""

import sys
from types import SimpleNamespace

from conftest import REPO

sys.path.append(str(REPO / "bench"))
import gap  # noqa: E402


def started(tmp_path, monkeypatch, *words):
    """Return the command lines of the trainings, without running them."""
    lines = []
    monkeypatch.setattr(sys, "argv", ["gap.py", "--runs", str(tmp_path), "--out", str(tmp_path / "gap"), *words])
    monkeypatch.setattr(
        gap, "subprocess", SimpleNamespace(run=lambda line, **_: lines.append(line) or SimpleNamespace(returncode=0))
    )
    row = {"step": 1.0, "logprob_gap": 1e-3, "ess": 0.9, "reward": 0.5, "pass@1": 0.2}
    monkeypatch.setattr(gap, "rows_of", lambda path: [row])
    monkeypatch.setattr(gap, "show", lambda *_: None)
    gap.main()
    return lines


def test_other_weights_are_another_run(tmp_path, monkeypatch):
    runs = [
        [word for line in started(tmp_path, monkeypatch, "--every", every) for word in line if word.startswith("run=")]
        for every in ("5", "10")
    ]
    assert runs == [["run=gap-0-1", "run=gap-1-1", f"run=gap-2-{every}"] for every in (5, 10)]


def test_the_shortest_training_is_evaluated_too(tmp_path, monkeypatch):
    for line in started(tmp_path, monkeypatch, "--steps", "1"):
        assert "max_steps=1" in line and "stage.eval_every=1" in line
