"""The panel's data layer: columns of metrics.csv, the index of runs, curves with fewer points."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from experiment_runs import add_run, add_sweep

from llm.errors import UserError
from llm.panel import columns as columns_module
from llm.panel import index as index_module
from llm.panel.chart import Line, draw, ticks
from llm.panel.columns import Columns
from llm.panel.curves import band, curve, fewer, smooth
from llm.panel.index import Index, process_of
from llm.run.lock import lock_path, one_writer
from llm.run.stage_folder import read_metrics


@pytest.fixture
def stage(tmp_path):
    folder = tmp_path / "runs/a/pretrain"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def cache(tmp_path):
    return Columns(tmp_path / "cache")


def write(stage, text, mode="w"):
    with (stage / "metrics.csv").open(mode) as file:
        file.write(text)


def agrees(cache, stage):
    """Say whether the cache has what the slow reader has."""
    rows = read_metrics(stage, finite=False)
    names = {name for row in rows for name in row} - {"step"}
    assert set(cache.names(stage)) == names
    for name in names:
        expected = [(row["step"], row[name]) for row in rows if name in row]
        np.testing.assert_array_equal(np.column_stack(cache.points(stage, name)), np.array(expected))
    return True


def test_new_rows_are_appended_and_old_ones_not_read_again(cache, stage, monkeypatch):
    write(stage, "step,bpb,loss\n0,3.5,\n10,,2.5\n")
    assert agrees(cache, stage)
    taken = []
    take = columns_module._take
    monkeypatch.setattr(columns_module, "_take", lambda piece, *more: (taken.append(piece), take(piece, *more)))
    write(stage, "20,nan,2.0\n30,1.5", "a")
    assert agrees(cache, stage)
    write(stage, ",1.75\n", "a")
    assert agrees(cache, stage)
    assert taken == [b"20,nan,2.0\n", b"30,1.5,1.75\n"]
    assert cache.last(stage) == {"step": 30.0, "bpb": 1.5, "loss": 1.75}
    assert cache.last(stage) == Columns(cache.folder).last(stage), "another process goes on from the files"
    assert len(taken) == 2


@pytest.mark.parametrize("few", [0, 1 << 30])
def test_both_parsers_read_the_same(cache, stage, monkeypatch, few):
    monkeypatch.setattr(columns_module, "FEW", few)
    lines = [f"{step},{step / 7!r},{'' if step % 3 else 'inf'},{'x' if step == 5 else 1}" for step in range(50)]
    write(stage, "step,a,b,c\n" + "\n".join(lines) + "\n")
    assert agrees(cache, stage)


def test_a_file_that_is_written_anew_is_read_anew(cache, stage):
    write(stage, "step,bpb\n0,3\n10,2\n20,1\n")
    assert agrees(cache, stage)
    os.rename(stage / "metrics.csv", stage / "old")
    write(stage, "step,bpb,kl\n0,3,\n10,2.5,0.125\n")
    assert agrees(cache, stage)
    write(stage, "step,bpb,kl\n0,4,\n10,2.5,0.125\n15,7,7\n")  # in place, longer than before
    assert agrees(cache, stage)


def test_a_later_row_for_a_step_wins_and_the_cache_may_be_deleted(cache, stage):
    write(stage, "step,bpb\n0,3\n10,2\n20,1\n10,2.5\n")
    assert cache.points(stage, "bpb")[1].tolist() == [3, 2.5, 1]
    for file in cache.folder.rglob("*"):
        if file.is_file():
            file.unlink()
    assert agrees(cache, stage)
    assert agrees(Columns(cache.folder), stage)
    (next(cache.folder.iterdir()) / "state.json").write_text("{")
    assert agrees(Columns(cache.folder), stage)


def test_no_file_and_no_column_are_empty(cache, stage):
    assert cache.names(stage) == [] and cache.last(stage) == {}
    write(stage, "step,bpb\n")
    assert [len(part) for part in cache.points(stage, "bpb")] == [0, 0]


def test_fewer_points_keep_every_peak_and_say_where_numbers_fail():
    y = np.sin(np.arange(100_000) / 900.0)
    y[40_001], y[77_777], y[12_345] = 50.0, -60.0, np.nan
    x = np.arange(100_000, dtype=float)
    fx, fy = fewer(x, y, 300)
    assert len(fx) <= 902 and fx[0] == 0 and fx[-1] == 99_999
    assert (np.diff(fx) > 0).all()
    assert 50.0 in fy and -60.0 in fy and np.isnan(fy).sum() == 1
    assert np.array_equal(fy, y[fx.astype(int)], equal_nan=True), "only points that were measured"
    few = fewer(x[:500], y[:500], 300)
    assert len(few[0]) == 500, "few points stay all"


def test_smoothing_is_an_average_without_pull_to_zero():
    flat = smooth(np.array([4.0, 4.0, np.nan, 4.0]), 0.9)
    np.testing.assert_allclose(flat, [4, 4, np.nan, 4])
    np.testing.assert_allclose(smooth(np.array([0.0, 1.0]), 0.5), [0, 0.5 / 0.75])
    assert smooth(np.array([1.0, 2.0]), 0).tolist() == [1, 2]


def test_a_band_holds_all_seeds_where_all_are():
    x, mean, low, high = band(
        [(np.array([0.0, 10.0]), np.array([0.0, 10.0])), (np.array([5.0, 20.0]), np.array([1, 1]))]
    )
    assert x.tolist() == [5, 10] and mean.tolist() == [3, 5.5]
    assert low.tolist() == [1, 1] and high.tolist() == [5, 10]
    assert [len(part) for part in band([(np.empty(0), np.empty(0))])] == [0] * 4


def test_axes_follow_the_recorded_amounts(cache, tmp_path):
    folder = add_run(tmp_path / "runs", "a", steps=100, every=20, seconds=50)
    x, y = curve(cache, folder, "bpb", "seconds")
    assert x.tolist() == [0, 10, 20, 30, 40, 50]
    assert [len(part) for part in curve(cache, folder, "bpb", "tokens")] == [0, 0]


def test_the_index_reads_a_stage_again_only_when_it_changed(tmp_path, cache, monkeypatch):
    root = tmp_path / "runs"
    add_sweep(root, "base", (1,))
    add_run(root, "base-seed=2", 2, start="base-seed=1/tokenizer")
    add_run(root, "other", lr=0.5)
    index = Index(root, tmp_path / "cache", cache)
    rows = index.rows()
    assert [row["run"] for row in rows] == ["base-seed=1", "base-seed=2", "other"]
    assert rows[0]["family"] == rows[1]["family"] != rows[2]["family"]
    assert rows[2]["scores"]["bpb"] == pytest.approx(2, abs=0.01)
    read = []
    monkeypatch.setattr("llm.panel.index.stage_row_of", lambda folder, _: read.append(folder.parent.name))
    assert index.rows() == rows == Index(root, tmp_path / "cache", cache).rows()
    assert read == []
    assert index.row("other/pretrain") == rows[2]
    for name in ("nothing/here", "other", "other/..", "../other", "base-seed=1/../other/pretrain"):
        with pytest.raises(UserError):
            index.row(name)


def test_a_damaged_stage_is_a_problem_and_the_others_stay(tmp_path, cache):
    root = tmp_path / "runs"
    add_run(root, "good")
    (add_run(root, "bad") / "run.json").write_text("{")
    index = Index(root, tmp_path / "cache", cache)
    assert [row["run"] for row in index.rows()] == ["good"]
    assert len(index.problems) == 1 and "bad" in index.problems[0]


def test_a_run_that_may_not_be_read_is_a_problem_and_the_others_stay(tmp_path, cache, monkeypatch):
    root = tmp_path / "runs"
    add_run(root, "good")
    add_run(root, "theirs")
    iterdir = Path.iterdir

    def refused(self):
        if self == root / "theirs":
            raise PermissionError(13, "Permission denied", str(self))
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refused)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != root / "theirs")
    index = Index(root, tmp_path / "cache", cache)
    assert [row["run"] for row in index.rows()] == ["good"]
    (said,) = index.problems
    assert str(root / "theirs") in said and "cannot be read" in said


def test_a_running_stage_shows_what_it_has_reached_and_a_dead_one_that_it_was_interrupted(tmp_path, cache):
    root = tmp_path / "runs"
    folder = add_run(root, "live", status="running", steps=100, until=40)
    index = Index(root, tmp_path / "cache", cache)
    assert index.rows()[0]["status"] == "interrupted" and process_of(folder) is None
    with one_writer(folder):
        assert process_of(folder) == os.getpid()
        row = index.rows()[0]
        assert (row["status"], row["steps"]) == ("running", 40)
        write(folder, "50,1.25,30,2.5\n", "a")
        row = index.rows()[0]
        assert (row["steps"], row["scores"]["bpb"]) == (50, 1.25)


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path, cache, monkeypatch):
    folder = add_run(tmp_path / "runs", "dead", status="running", until=40)
    program = "import fcntl; file = open('another', 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": tmp_path}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as other:
        other.stdout.readline()  # it holds a lock, of another file
        text = f"process {other.pid} on {socket.gethostname()} since 2026-01-01 00:00:00 UTC"
        lock_path(folder).write_text(text)
        assert process_of(folder) is None
        assert Index(tmp_path / "runs", tmp_path / "cache", cache).rows()[0]["status"] == "interrupted"
        monkeypatch.setattr(index_module, "LOCKS", tmp_path / "not told by this system")
        assert process_of(folder) == other.pid
        other.communicate(b"\n")
    assert process_of(folder) is None


def test_two_readers_at_once_leave_a_whole_cache(tmp_path, stage):
    import threading

    write(stage, "step,bpb\n" + "".join(f"{n},{n / 2}\n" for n in range(5000)))
    caches = [Columns(tmp_path / "cache") for _ in range(4)]
    threads = [threading.Thread(target=one.points, args=(stage, "bpb")) for one in caches]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(agrees(one, stage) for one in caches)
    state = json.loads(next((tmp_path / "cache").rglob("state.json")).read_text())
    assert state["read"] == (stage / "metrics.csv").stat().st_size


def test_a_chart_has_a_curve_for_each_line_and_breaks_where_a_number_fails():
    x = np.arange(5.0)
    lines = [Line("a<b", x, np.array([3, 2, np.nan, 1, 1.5])), Line("empty", np.empty(0), np.empty(0), 1)]
    text = draw("bpb", lines, "step")
    assert text.count("<polyline") == 2 and "a&lt;b<b> 1.5</b> <em>with gaps" in text
    assert "empty<b> not measured" in text and "\n" not in text
    assert 'text-anchor="middle">2</text>' in text and 'text-anchor="end">4</text>' in text  # nothing beyond the edge
    banded = draw("bpb", [Line("a", x, x, 0, x - 1, x + 1)], "step")
    assert banded.count("<polygon") == 1
    assert "nothing was measured" in draw("kl", lines[1:], "step")
    for once in (0.0, 100.0, 4e19):  # steps, FLOPs
        assert draw("core", [Line("a", np.array([once]), np.array([0.2]))], "FLOPs").count("<polyline") == 1
    for low, high in ((0, 1), (-3e-5, 2e-5), (1e9, 3.3e12), (2.0001, 2.0002)):
        marks = ticks(low, high)
        assert 2 <= len(marks) <= 7 and all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)
