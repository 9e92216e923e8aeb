"""`python -m llm.experiments.scaling`: what it runs, what it leaves out, and what it says of finished runs."""

import math
import sys
from functools import partial

import processes
import pytest
from conftest import REPO

import llm.experiments.scaling as scaling
from llm.experiments.laws import Surface, bootstrap
from llm.model.config import flops_per_token, scaling_params
from llm.run.stage_folder import RunDir, read_manifest, write_manifest
from llm.utils.files import read_json, write_json

LAW = Surface(E=0.9, A=30.0, a=0.34, B=200.0, b=0.36)
SETTINGS = ["experiment=tiny"]
VOCAB = 512


def run_module(*words: str):
    """Run the command in a process of its own; returns it, with its output."""
    return processes.run(sys.executable, "-m", "llm.experiments.scaling", *words, cwd=REPO)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Stand in for train.py: a run is finished at once and follows LAW; returns the command lines that were run."""
    lines = []

    def run(overrides, folder):
        given = dict(word.split("=", 1) for word in overrides)
        lines.append(given)
        facts = {"stage": given["stage"], "status": "finished", "derived": {"vocab_size": VOCAB}}
        if given["stage"] == "pretrain":
            shape = scaling._shape(tuple(SETTINGS), int(given["model"][1:]), VOCAB)
            flops, n = float(given["stage.target_flops"]), scaling_params(shape)
            tokens = flops / flops_per_token(shape)
            bpb = LAW.at(n, tokens) * (1 + 0.02 * math.log(float(given["stage.lr_frac"])) ** 2)
            facts["derived"] |= {"params_scaling": n, "planned_tokens": tokens, "text_passes": tokens / 1e7, "steps": 1}
            facts |= {"tokens": tokens, "flops": flops, "metrics": {"bpb": bpb}}
        write_manifest(folder, facts)

    monkeypatch.setattr(scaling, "_run", run)
    monkeypatch.setattr(scaling, "bootstrap", partial(bootstrap, draws=20))
    return lines


def series(tmp_path, *more: str) -> int:
    """Run a series of depths 1 to 3 at three budgets, depth 4 held out; returns the exit status."""
    flops = ["--flops", "1e11,2e11,4e11"]
    depths = ["--depths", "1,2,3", "--held-out", "4"]
    return scaling.main(["--name", "s", "--runs", str(tmp_path), *depths, *flops, *more, *SETTINGS])


def test_a_series_is_run_once_and_predicts_what_it_did_not_fit(tmp_path, trained, capsys):
    assert series(tmp_path, "--predict", "5:1e12", "--lr-fracs", "0.5,2") == 0
    assert [line["stage"] for line in trained] == ["tokenizer"] + ["pretrain"] * 20
    assert {line["init_from"] for line in trained[1:]} == {"s/tokenizer"}
    told = read_json(tmp_path / "s" / "scaling.json")
    assert len(told["points"]) == 9 and len(told["held_out"]) == 3
    for row in told["predictions"][:3]:
        assert row["loss"] == pytest.approx(row["measured"], rel=1e-3)
    assert told["predictions"][3]["depth"] == 5 and told["predictions"][3]["measured"] is None
    assert (
        told["rates"]["best"] == dict.fromkeys(("d1", "d2", "d3", "d4"), 1.0) and told["rates"]["grid_steps_apart"] == 0
    )
    assert (tmp_path / "s" / "law.png").stat().st_size > 10_000
    assert (tmp_path / "s" / "isoflop.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "stage.tokens_per_param=" in out
    trained.clear()
    assert series(tmp_path) == 0 and not trained, "what is finished was run again"


def test_a_form_of_the_law_can_be_asked_for(tmp_path, trained):
    for form, names in (("added", {"E", "A", "a", "B", "b"}), ("coupled", {"Nc", "a", "Dc", "b"})):
        assert series(tmp_path, "--form", form) == 0
        told = read_json(tmp_path / "s" / "scaling.json")
        assert set(told["law"]) == names and set(told["intervals"]) == names and len(told["forms"]) == 2


def test_more_seeds_are_runs_of_their_own_whose_mean_counts(tmp_path, trained, capsys):
    assert series(tmp_path, "--more-seeds", "1,2") == 0
    seeds = [line.get("seed") for line in trained[1:]]
    assert seeds == [None] * 12 + ["1"] * 12 + ["2"] * 12
    assert {line["run"] for line in trained if line.get("model") == "d3" and line.get("seed") == "2"} == {
        f"s-d3-{flops}-s2" for flops in ("1e11", "2e11", "4e11")
    }
    manifest = tmp_path / "s-d2-2e11-s1" / "pretrain"
    facts = read_manifest(manifest)
    before = facts["metrics"]["bpb"]
    write_manifest(manifest, facts | {"metrics": {"bpb": before + 0.3}})
    assert series(tmp_path, "--more-seeds", "1,2") == 0
    points = read_json(tmp_path / "s" / "scaling.json")["points"]
    assert {point["seeds"] for point in points} == {3} and len(points) == 9
    changed = next(point for point in points if point["depth"] == 2 and point["budget"] == 2e11)
    assert changed["loss"] == pytest.approx(before + 0.1)
    assert series(tmp_path, "--more-seeds", "1,1") == 2
    assert "seed 1 is there twice" in capsys.readouterr().err


def test_depths_held_out_have_budgets_of_their_own(tmp_path, trained):
    assert series(tmp_path, "--held-out-flops", "4e11", "--lr-fracs", "0.5") == 0
    told = read_json(tmp_path / "s" / "scaling.json")
    assert len(told["points"]) == 9 and [point["budget"] for point in told["held_out"]] == [4e11]
    changed = {(line["model"], line["stage.target_flops"]) for line in trained if line.get("stage.lr_frac") == "0.5"}
    assert changed == {("d1", "1e+11"), ("d2", "1e+11"), ("d3", "1e+11"), ("d4", "4e+11")}


def test_more_than_one_pass_over_the_text_is_skipped_and_said(tmp_path, trained, capsys):
    assert series(tmp_path, "--flops", "1e11,2e11,4e11,1e14") == 0
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert [line.split(":")[0] for line in skipped] == ["skipped s-d1-1e14", "skipped s-d2-1e14"]
    assert all("tokens are more than one pass over the text trains, 10.00M" in line for line in skipped)
    assert read_json(tmp_path / "s" / "scaling.json")["skipped"] == [line.removeprefix("skipped ") for line in skipped]


def test_other_settings_are_another_series(tmp_path, trained, capsys):
    assert series(tmp_path) == 0
    assert scaling.main(["--name", "s", "--runs", str(tmp_path), "--flops", "1e11", *SETTINGS, "seed=2"]) == 2
    assert "begun with experiment=tiny; give these, or another --name" in capsys.readouterr().err


def test_settings_of_pretraining_are_no_settings_of_the_tokenizer_and_factors_multiply_theirs(
    tmp_path, trained, capsys
):
    own = ["stage.eval_tokens=4096", "stage.lr_frac=0.5"]
    assert series(tmp_path, "--lr-fracs", "0.5,2", *own) == 0
    assert not any(key.startswith("stage.") for key in trained[0])
    assert {line["stage.eval_tokens"] for line in trained[1:]} == {"4096"}
    rates = {line["run"].partition("-lr")[2]: line["stage.lr_frac"] for line in trained[1:]}
    assert rates == {"": "0.5", "0.5": "0.25", "2": "1"}
    record = tmp_path / "s" / "series.json"  # as an earlier release left it, which trained with 1
    write_json(record, {"settings": read_json(record)["settings"]})
    assert series(tmp_path, *own) == 2
    assert "begun with stage.lr_frac=1, now it is 0.5; give another --name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--flops", ","], "--flops: names no number; give one or more, as --flops 1e13,2e13"),
        (["--flops", "1e11", "--depths", ","], "--depths: names no number; give one or more, as --depths 2,3,4"),
        (["--flops", "0"], "--flops 0: all must be positive numbers"),
        (["--flops", "1e11", "--held-out-flops", "2e11"], "--held-out-flops: no depth is held out"),
        (
            ["--flops", "1e11", "--held-out", "9", "--held-out-flops", "0"],
            "--held-out-flops 0: all must be positive numbers",
        ),
        (["--flops", "1e11", "--lr-fracs", "-1"], "--lr-fracs -1: all must be positive numbers"),
        (["--flops", "1e11", "--depths", "0"], "--depths 0: must be at least 1"),
        (["--flops", "1e11", "--held-out", "3"], "--held-out 3: is also one of --depths"),
        (["--flops", "1e11", "--predict", "eight"], "--predict eight: write depth and FLOPs, as 8:1e15"),
        (["--flops", "1e11", "max_steps=3"], "max_steps=3: the series sets this key itself"),
        (["--flops", "1e11", "paths.runs=/x"], "paths.runs=/x: the folder of all runs is given by --runs=/x"),
        (["--flops", "1e11", "sed=3"], "sed"),
        (["--flops", "1e11", "stage.vocab_size=300"], "vocab_size"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path, trained, capsys, words, line):
    assert scaling.main(["--name", "s", "--runs", str(tmp_path), *words, *SETTINGS]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and line in error and error.count("\n") == 1
    assert not trained and not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_series_goes_on_where_it_was_stopped(tmp_path):
    words = ["--name", "s", "--runs", str(tmp_path), "--depths", "1,2", "--flops", "5e9,1e10", *SETTINGS]
    first = run_module(*words)
    assert first.returncode == 0, first.stderr
    folder = RunDir(tmp_path, "s-d1-5e9").stage_dir("pretrain")
    begun = read_manifest(folder)["started"]
    assert "no law is fitted" in first.stdout
    again = run_module(*words)
    assert again.returncode == 0 and read_manifest(folder)["started"] == begun
