"""A screening of many changes against a pool of runs, from synthetic run folders."""

import json
import math
from statistics import fmean, stdev

import pytest
from experiment_runs import add_run, add_sweep

from llm.errors import UserError
from llm.experiments.runs import stage_row_of
from llm.experiments.screen import main, screen


@pytest.fixture
def folder(tmp_path):
    """Runs of a baseline with five seeds, and one run each of three changes."""
    add_sweep(tmp_path, "base", [1, 2, 3, 4, 5], sd=0.002)
    add_run(tmp_path, "same", 1, level=2.0)
    add_run(tmp_path, "good", 1, level=1.95, lr=0.03, seconds=60.0)
    add_run(tmp_path, "bad", 1, level=2.05, lr=0.004)
    return tmp_path


def test_changes_stand_by_their_difference_with_the_error_of_a_single_run(folder):
    rows = screen(folder, "base", ["bad", "same", "good"])
    assert [row["name"] for row in rows] == ["good", "same", "bad"]
    assert [row["verdict"] for row in rows] == ["better", "equal", "worse"]
    pool = [stage_row_of(folder / f"base-seed={seed}" / "pretrain")["bpb"] for seed in range(1, 6)]
    assert rows[0]["difference"] == pytest.approx(rows[0]["value"] - fmean(pool))
    assert rows[0]["stderr"] == pytest.approx(stdev(pool) * math.sqrt(1 + 1 / 5))
    assert rows[0]["seconds"] == pytest.approx(60 / 50) and rows[1]["seconds"] == pytest.approx(1.0)
    assert rows[0]["settings"] == {"optim.matrix_lr": (0.02, 0.03)} and rows[1]["settings"] == {}


def test_a_score_that_grows_has_its_best_change_first(folder):
    names = [row["name"] for row in screen(folder, "base", ["good", "bad"], direction="max")]
    assert names == ["bad", "good"]


def test_the_command_prints_a_table_or_json(folder, capsys):
    assert main(["base", "good", "bad", "--runs", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "optim.matrix_lr 0.02 -> 0.03" in text and "better" in text and "of 2 changes that do nothing" in text
    assert main(["base", "good", "--runs", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "good"


def test_a_change_that_does_not_exist_is_one_line(folder, capsys):
    assert main(["base", "nothing", "--runs", str(folder)]) == 2
    assert capsys.readouterr().err.startswith("error: nothing")
    with pytest.raises(UserError, match="on both sides"):
        screen(folder, "base", ["base-seed=1"])
