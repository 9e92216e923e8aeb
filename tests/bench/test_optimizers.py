"""bench/optimizers.py: settings of every method, the crossing of a target, the search for rates, and a tiny table."""

import json
import sys

import matplotlib.image
import pytest
from conftest import REPO
from processes import run

from llm.cli.overrides import compose
from llm.errors import UserError
from llm.experiments.queue_store import Queue

sys.path.append(str(REPO / "bench"))
import optimizers  # noqa: E402


@pytest.mark.parametrize(
    ("target", "steps"), [(5.0, 0.0), (4.0, 0.0), (3.0, 10.0), (2.5, 15.0), (2.2, 18.0), (1.9, 37.0), (1.0, None)]
)
def test_steps_to_a_target_lie_between_evaluations(target, steps):
    """Where the curve rises again for a while the first crossing counts."""
    points = [(0, 4.0), (10, 3.0), (20, 2.0), (30, 2.6), (40, 1.6)]
    assert optimizers.steps_to(target, points) == (None if steps is None else pytest.approx(steps))


@pytest.mark.parametrize("name", optimizers.METHODS)
def test_every_method_composes_and_its_rates_exist(name):
    method = optimizers.METHODS[name]
    optim = compose("train", ["stage=pretrain", *method.settings]).optim
    assert all(optim[key] > 0 for keys in method.rates for key in keys)


def bench_of(tmp_path, bpb, monkeypatch):
    """A bench whose trainings end with bpb(factors, seed)."""
    monkeypatch.setattr(optimizers.Bench, "train", lambda self, wanted: None)
    monkeypatch.setattr(sys, "argv", ["optimizers.py", "--out", str(tmp_path), "--factors", "0.5", "1", "2"])
    bench = optimizers.Bench(optimizers.arguments())
    tried = []

    def curves(runs):
        tried.extend(runs.values())
        return {key: [(0, 9.0), (600, bpb(*run[1:]))] for key, run in runs.items()}

    monkeypatch.setattr(bench, "curves", curves)
    return bench, tried


def test_rates_are_searched_one_after_the_other(tmp_path, monkeypatch):
    best = (2, 0.5, 0.1)

    def bpb(factors, seed):
        return sum((factor - good) ** 2 for factor, good in zip(factors, best, strict=False))

    bench, tried = bench_of(tmp_path, bpb, monkeypatch)
    assert bench.tuned("soap") == best
    assert [run[1] for run in tried[:3]] == [(0.5, 1, 1), (1, 1, 1), (2, 1, 1)]
    assert [run[1] for run in tried[3:6]] == [(2, 0.5, 1), (2, 1, 1), (2, 2, 1)]
    assert [run[1:] for run in tried[6:]] == [((2, 0.5, 0.1), 0), ((2, 0.5, 1), 0)]
    settings = bench.settings("soap", best, 1)
    wanted = {"optim.matrix_lr=0.04", "optim.embedding_lr=0.15", "optim.x0_lr=0.05", "optim.soap_beta=0.9", "seed=1"}
    assert wanted <= set(settings)
    assert len(bench.tuned("adamw")) == 1  # it has no other rates
    assert bench.tuned("default") == ()
    assert not any(word.startswith("optim.") for word in bench.settings("default", (), 1))


def test_rates_of_tables_and_scalars_may_be_those_of_another_method(tmp_path, monkeypatch):
    def bpb(factors, seed):
        return sum((factor - good) ** 2 for factor, good in zip(factors, (2, 0.5, 0.1), strict=False))

    bench, tried = bench_of(tmp_path, bpb, monkeypatch)
    bench.args.share = "muon_adamw"
    assert bench.tuned("soap") == (2, 0.5, 0.1)
    assert [run[1] for run in tried if run[0] == "soap"] == [(0.5, 0.5, 0.1), (1, 0.5, 0.1), (2, 0.5, 0.1)]
    assert len([run for run in tried if run[0] == "muon_adamw"]) == 8
    tried.clear()
    assert bench.tuned("adamw") == (2,) and {run[0] for run in tried} == {"adamw"}


def test_means_are_of_all_seeds_or_none(monkeypatch, capsys):
    curves = {("default", 1): [(0, 3.0), (10, 1.9)], ("default", 2): [(0, 3.0), (10, 2.1)]}
    curves |= {("soap", 1): [(0, 3.0), (10, 1.0)], ("soap", 2): [(0, 3.0), (10, 2.5)]}
    monkeypatch.setattr(sys, "argv", ["optimizers.py", "--seeds", "1", "2", "--steps", "10"])
    optimizers.show(optimizers.arguments(), {"default": (), "soap": (1, 2, 1)}, curves)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    by_name = {row["method"]: row for row in told["methods"]}
    assert told["target"] == 2.0 and by_name["default"]["mean_steps"] == 10.0
    assert by_name["default"]["reached"] == 1  # it ends at the target on the mean
    assert by_name["soap"]["steps"] == [5.0, None] and by_name["soap"]["mean_steps"] is None
    assert by_name["default"]["share"] == 1.0 and by_name["soap"]["share"] is None


def test_curves_of_all_methods_are_drawn(tmp_path):
    """Also with a single seed, and where a method falls below another later."""
    steps = range(0, 101, 10)
    curves = {"default": [[(s, 3.0 - s / 100) for s in steps]], "soap": [[(s, 3.2 - s / 70) for s in steps]]}
    optimizers.draw(tmp_path / "curves.png", curves)
    width, height = matplotlib.image.imread(tmp_path / "curves.png").shape[1::-1]
    assert width > height > 500


def test_a_tuning_seed_of_the_table_is_refused(tmp_path):
    done = run(sys.executable, str(REPO / "bench/optimizers.py"), "--tuning-seed", "1", "--out", str(tmp_path / "new"))
    assert done.returncode == 2 and "rates would be chosen by what they win" in done.stderr
    assert not (tmp_path / "new").exists()


def test_runs_of_other_settings_are_no_results_of_these(tmp_path, monkeypatch):
    def work(queue, say):
        while job := queue.claim("worker"):
            queue.end(job.id, "done")

    def train(*more):
        line = ["optimizers.py", "--out", str(tmp_path), "--steps", "600", "--vocab", "300", *more]
        monkeypatch.setattr(sys, "argv", line)
        bench = optimizers.Bench(optimizers.arguments())
        bench.train({"default-1": bench.settings("default", (), 1)})

    monkeypatch.setattr(optimizers, "work", work)
    train()
    train("--seeds", "1", "2")
    for more in (["--steps", "300"], ["--evaluations", "10"], ["--vocab", "400"], ["--set", "stage.lr_frac=0.5"]):
        with pytest.raises(UserError, match=f"--out {tmp_path}: .* was begun with other settings"):
            train(*more)
    assert len(Queue(tmp_path / "queue.sqlite").jobs()) == 2


@pytest.mark.slow
def test_a_tiny_table_goes_on_where_it_was_stopped(tmp_path):
    tiny = ["experiment=tiny", "trainer=cpu", "compile=false", "model.seq_len=64", "batch.tokens_per_step=256"]
    line = [sys.executable, str(REPO / "bench/optimizers.py"), "--set", *tiny, "--vocab", "300", "--steps", "2"]
    line += ["--factors", "1", "--scalar-factors", "1", "--seeds", "1", "--out", str(tmp_path), "--methods", "default"]
    first = json.loads(run(*line).stdout.splitlines()[-1])
    both = json.loads(run(*line, "average").stdout.splitlines()[-1])
    assert [row["method"] for row in first["methods"]] == ["default"]
    assert first["methods"][0] in both["methods"] and len(both["methods"]) == 2
    assert [job.state for job in Queue(tmp_path / "queue.sqlite").jobs()] == ["done"] * 3
