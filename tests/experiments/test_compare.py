"""Comparison of two configurations, from synthetic run folders."""

import json
import math
import re
import sys

import processes
import pytest
from experiment_runs import add_run, add_sweep
from matplotlib.figure import Figure
from PIL import Image

from llm.errors import UserError
from llm.experiments import compare as module
from llm.experiments.compare import as_json, in_words
from llm.experiments.comparison import compare
from llm.experiments.curves import Curve, common_seconds, common_steps, interpolate, read_curve
from llm.experiments.plot import _sides
from llm.experiments.runs import stage_row_of
from llm.experiments.screen import screen
from llm.run.stage_folder import RunDir, write_manifest
from llm.utils.files import write_json


@pytest.fixture
def sweeps(tmp_path):
    """Runs of a baseline, of the same configuration with other seeds, and of a worse learning rate."""
    add_sweep(tmp_path, "base", [1, 2, 3, 4], sd=0.002)
    add_sweep(tmp_path, "again", [5, 6, 7, 8], sd=0.002)
    add_sweep(tmp_path, "slow", [1, 2, 3, 4], level=2.05, sd=0.002, lr=0.004)
    return tmp_path


def verdicts(result):
    return [(one.at, one.of, one.verdict.verdict) for one in result.measures]


def test_a_worse_configuration_is_worse_in_every_way(sweeps):
    result = compare(sweeps, "base", "slow")
    ways = [("steps", "last"), ("steps", "mean of 3"), ("seconds", "interpolated")]
    assert verdicts(result) == [(*way, "worse") for way in ways]
    assert result.differs == {"optim.matrix_lr": (0.02, 0.004)} and not result.notes
    assert [(a.seed, b.seed) for a, b in result.pairs] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert result.measures[0].found.test == "paired" and result.noise.source == "seeds of A"
    assert "B is worse than A: +0.05" in in_words(result)
    assert compare(sweeps, "slow", "base").measures[0].verdict.verdict == "better"
    assert compare(sweeps, "base", "slow", direction="max").measures[0].verdict.verdict == "better"


def test_two_sweeps_of_one_configuration_are_equal_within_the_margin(sweeps):
    result = compare(sweeps, "base", "again")
    assert {verdict for *_, verdict in verdicts(result)} == {"equal"} and result.differs == {}
    assert result.pairs is None and result.measures[0].found.test == "welch"
    assert result.margin == pytest.approx(0.005 * result.measures[0].found.a)
    assert "equal to A within the margin" in in_words(result)


def test_too_few_seeds_say_how_many_more_are_needed(tmp_path):
    add_sweep(tmp_path, "base", [1, 2, 3], sd=0.05)
    add_sweep(tmp_path, "more", [4, 5], sd=0.05, lr=0.03)
    result = compare(tmp_path, "base", "more", margin="0.02")
    one = result.measures[0]
    assert one.verdict.verdict == "undecided" and one.further[1] == one.further[0] + 1 and one.further[0] > 10
    assert f"{one.further[0]} further seeds of A and {one.further[1]} of B" in in_words(result)
    assert compare(tmp_path, "base", "more", margin="50%").measures[0].verdict.verdict == "equal"


def test_equal_seconds_can_decide_otherwise_than_equal_steps(tmp_path):
    add_sweep(tmp_path, "base", [1, 2, 3], level=2.0, sd=0.001, seconds=100)
    add_sweep(tmp_path, "quick", [1, 2, 3], level=2.03, sd=0.001, seconds=25, lr=0.03)
    last, _, seconds = compare(tmp_path, "base", "quick").measures
    assert last.verdict.verdict == "worse" and seconds.verdict.verdict == "better" and seconds.point == 25


def test_runs_with_equal_tokens_in_other_numbers_of_steps_are_judged_by_their_ends(tmp_path, capsys):
    """A ramp of the batch: at the last common step it has seen fewer tokens, and looks worse."""
    add_sweep(tmp_path, "base", [1, 2, 3], level=2.0, sd=0.001, steps=60, tokens=60_000, seconds=60)
    add_sweep(tmp_path, "ramp", [1, 2, 3], level=2.02, sd=0.001, steps=100, tokens=59_500, seconds=72, lr=0.03)
    result = compare(tmp_path, "base", "ramp")
    assert [(one.at, one.point) for one in result.measures[:2]] == [("tokens", 59_500), ("steps", 60)]
    one = result.measures[0]
    assert one.found.a == pytest.approx(2.0 + 6 * math.exp(-60 / 15), abs=0.003)
    assert one.found.b == pytest.approx(2.02 + 6 * math.exp(-100 / 15), abs=0.003)
    assert one.verdict.verdict == as_json(result)["verdict"] == "better" and "their ends, decides" in result.notes[0]
    assert result.measures[1].verdict.verdict == "worse"
    module.show(result)
    assert "59.50K tokens" in capsys.readouterr().out
    (row,) = screen(tmp_path, "base", ["ramp"])
    assert row["verdict"] == "better" and row["seconds"] == pytest.approx(72 / 60)
    add_sweep(tmp_path, "more", [1, 2, 3], level=1.98, sd=0.001, steps=100, tokens=100_000, lr=0.03)
    assert [one.at for one in compare(tmp_path, "base", "more").measures][0] == "steps"
    add_sweep(tmp_path, "alike", [1, 2, 3], level=1.98, sd=0.001, steps=60, tokens=60_000, lr=0.03)
    assert {one.at for one in compare(tmp_path, "base", "alike").measures} == {"steps", "seconds"}


def test_runs_that_failed_are_counted_and_named(sweeps):
    add_run(sweeps, "slow-seed=3", 3, lr=0.004, status="interrupted", until=40)
    add_run(sweeps, "slow-seed=4", 4, lr=0.004, spoil={60: "nan"})
    result = compare(sweeps, "base", "slow")
    reasons = "slow-seed=3: interrupted at step 40; slow-seed=4: bpb is no number at step 60"
    assert result.notes[0].startswith("without a partner of the same seed, and so left out: base-seed=3, base-seed=4")
    assert result.notes[1] == f"2 of 4 runs of B cannot be compared ({reasons})"
    assert "part of a configuration's result" in result.notes[2] and len(result.pairs) == 2
    assert [one["run"] for one in as_json(result)["b"]["left_out"]] == ["slow-seed=3", "slow-seed=4"]
    for seed in (1, 2):
        add_run(sweeps, f"slow-seed={seed}", seed, lr=0.004, status="running", until=20)
    with pytest.raises(UserError, match="slow: no run of pretrain can be compared .*slow-seed=1: running at step 20"):
        compare(sweeps, "base", "slow")


def test_single_runs_need_the_spread_of_others(sweeps):
    result = compare(sweeps, "base-seed=1", "slow-seed=2")
    assert {verdict for *_, verdict in verdicts(result)} == {"undecided"} and "give --noise" in result.notes[-1]
    assert result.measures[0].further is None and "nothing says how far" in in_words(result)
    pool = compare(sweeps, "base-seed=1", "slow-seed=2", noise="base-*")
    assert pool.measures[0].verdict.verdict == "worse" and "(4 runs of base-*); weak" in pool.notes[-1]
    assert compare(sweeps, "base-seed=1", "slow-seed=2", noise="0.5").measures[0].verdict.verdict == "undecided"
    assert "a side has one run" in compare(sweeps, "base", "again-seed=5").notes[-1]
    for given, problem in (("-1", "must be above 0"), ("base-seed=1", "takes two finished runs"), ("x", "x: no run")):
        with pytest.raises(UserError, match=problem):
            compare(sweeps, "base-seed=1", "slow-seed=2", noise=given)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"parents": {"init_from": {"tokenizer": "71" * 32}}}, r"the tokenizer differs \(70707070 and 71717171\)"),
        ({"data": {"held_out_text": "bb22"}}, "the held-out text differs"),
        ({"data": {}}, None),  # an older run: its data settings are compared instead, and are the same
    ],
)
def test_what_was_measured_on_other_things_is_refused(tmp_path, change, reason):
    add_sweep(tmp_path, "base", [1, 2], sd=0.01)
    add_sweep(tmp_path, "other", [1, 2], sd=0.01, **change)
    if reason is None:
        assert compare(tmp_path, "base", "other").measures
        return
    refusal = f"not measured on the same things: .*{reason}.*--force"
    with pytest.raises(UserError, match=refusal):
        compare(tmp_path, "base", "other")
    assert compare(tmp_path, "base", "other", force=True).measures
    singles = {"a": "base-seed=1", "b": "base-seed=2", "noise": "other"}
    with pytest.raises(UserError, match=f"--noise other: .*{reason}.*--force"):
        compare(tmp_path, **singles)
    assert compare(tmp_path, **singles, force=True).noise.df == 1


def test_other_numbers_of_validation_tokens_are_refused(sweeps):
    for seed in (1, 2):
        folder = add_run(sweeps, f"much-seed={seed}", seed)
        manifest = json.loads((folder / "run.json").read_text())
        manifest["config"]["stage"]["eval_tokens"] = 8192
        write_json(folder / "run.json", manifest)
    for one, other in (("base", "much"), ("base-seed=3,much-seed=1,much-seed=2", "slow"), ("slow", "base-seed=3,much")):
        with pytest.raises(UserError, match="stage.eval_tokens is (4096 and 8192|8192 and 4096)"):
            compare(sweeps, one, other)


@pytest.mark.parametrize(
    "metric, of_base, of_other, said",
    [
        ("core", {"core": 0.1}, {"core": 0.2}, None),
        ("bpb_text", 4096, 4096, None),
        ("bpb_text", 4096, None, None),  # an old eval.json does not say
        ("bpb_text", 4096, 8192, "by evaluate.py on 4096 tokens and by evaluate.py on 8192 tokens"),
        ("choice", 200, 1000, "by evaluate.py on 200 items and by evaluate.py on 1000 items"),
        ("choice", "training", 1000, "by the training and by evaluate.py on 1000 items"),
    ],
)
def test_scores_of_evaluations_are_of_equally_much(tmp_path, metric, of_base, of_other, said):
    for name, lr, of in (("base", 0.02, of_base), ("other", 0.03, of_other)):
        for seed in (1, 2):
            folder = add_run(tmp_path, f"{name}-seed={seed}", seed, lr=lr)
            scores = of if isinstance(of, dict) else {metric: 1.0, "scored": {metric: {"data": "x", "source": "y"}}}
            if metric == "choice":
                scores = {"chat": {"choice": {"accuracy": 0.5, "n": 9 if of == "training" else of}}}
            elif isinstance(of, int):
                scores["scored"][metric]["tokens"] = of
            write_json(folder / "eval.json", scores)
            if of == "training":
                (folder / "metrics.csv").write_text("step,chat/choice\n100,0.5\n")
    if said is None:
        assert compare(tmp_path, "base", "other", metric=metric, direction="min").measures
        return
    with pytest.raises(UserError, match=f"it was measured {said}"):
        compare(tmp_path, "base", "other", metric=metric, direction="min")


def test_older_runs_without_a_key_or_with_another_tokenizer_within_a_side(sweeps):
    for seed in (1, 2):
        folder = add_run(sweeps, f"old-seed={seed}", seed)
        manifest = json.loads((folder / "run.json").read_text())
        del manifest["config"]["stage"]["eval_tokens"]
        write_json(folder / "run.json", manifest)
    assert compare(sweeps, "base", "old").measures
    add_run(sweeps, "old-seed=3", 3, parents={"init_from": {"tokenizer": "72" * 32}})
    with pytest.raises(UserError, match="the tokenizer differs"):
        compare(sweeps, "base", "old")


def test_a_sweep_may_have_the_name_of_the_run_of_its_tokenizer(sweeps):
    write_manifest(RunDir(sweeps, "base").path / "tokenizer", {"stage": "tokenizer", "status": "finished"})
    assert len(compare(sweeps, "base", "slow").a.rows) == 4


def test_mistakes_are_one_line(sweeps, capsys):
    add_run(sweeps, "twin", 1)
    add_run(sweeps, "rare", 2, every=50, lr=0.5, steps=150)
    add_run(sweeps, "odd", 3, every=30, steps=90, lr=0.6)
    cases = {
        ("base", "nothing"): "nothing: no run in .* has this name or begins so",
        ("base", "base-seed=1"): "base-seed=1 is on both sides",
        ("base-*,slow-*", "again"): "base-seed=1 and slow-seed=1 differ in optim.matrix_lr; one side may differ",
        ("base,twin", "again"): "base-seed=1 and twin have the same seed 1; give each seed once",
        ("rare", "odd", "--metric", "loss", "--stage", "sft"): "rare: no run with stage sft in",
        ("base", "again", "--metric", "kind"): "--metric kind: say what is better",
        ("base", "again", "--metric", "reward"): "base: no run of pretrain can be compared .*no reward was measured",
        ("base", "again", "--margin", "none"): "--margin none: must be a number above 0",
        ("base", "again", "--last", "0"): "--last 0: must be 1 or more",
    }
    for words, problem in cases.items():
        assert module.main([*words, "--runs", str(sweeps)]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("error: ")
        assert re.search(problem, printed.err), printed.err


def test_runs_without_common_evaluations_are_refused(tmp_path):
    add_run(tmp_path, "a", every=30, steps=90)
    add_run(tmp_path, "b", every=20, steps=40)
    folder = tmp_path / "b/pretrain/metrics.csv"
    folder.write_text("\n".join(line for line in folder.read_text().split("\n") if not line.startswith("0,")))
    with pytest.raises(UserError, match="a and b have no evaluated step in common"):
        compare(tmp_path, "a", "b")


def test_a_task_of_eval_json_and_shares_are_compared(tmp_path):
    for name, level in (("base", 0.5), ("more", 0.7)):
        for seed in (1, 2, 3):
            folder = add_run(tmp_path, f"{name}-seed={seed}", seed, lr=0.02 if name == "base" else 0.03)
            task = {"accuracy": level + 0.001 * seed * seed, "n": 100, "stderr": 0.05}
            write_json(folder / "eval.json", {"chat": {"choice": task}})
    result = compare(tmp_path, "base", "more", metric="choice")
    assert verdicts(result) == [("steps", "last", "better")] and result.margin == 0.01 and not result.points["seconds"]
    assert result.measures[0].found.stderr == pytest.approx(0.0, abs=1e-12)


def test_a_margin_of_pairs_is_no_share(tmp_path):
    for name in ("base", "more"):
        for seed in (1, 2):
            folder = add_run(tmp_path, f"{name}-seed={seed}", seed, lr=0.02 if name == "base" else 0.03)
            write_json(folder / "eval.json", {"preferences": {"margin": 0.8, "margin_stderr": 0.1}})
    assert compare(tmp_path, "base", "more", metric="preference/margin").margin == pytest.approx(0.005 * 0.8)


def test_runs_of_a_longer_training_are_compared_where_both_have_been(sweeps):
    add_sweep(sweeps, "long", [1, 2], sd=0.002, steps=140, lr=0.01)
    result = compare(sweeps, "base", "long")
    assert result.measures[0].point == 100
    assert "trained beyond step 100, with another schedule there: long-seed=1, long-seed=2" in result.notes


def test_busy_and_different_machines_are_said(sweeps):
    fast = {"environment": {"cpu": "Other CPU", "cpu_threads": 8, "gpus": [{"name": "Some GPU", "memory_gb": 80}]}}
    add_sweep(sweeps, "fast", [1, 2, 3], sd=0.002, seconds=30, commit="decade" * 6, **fast)
    add_run(sweeps, "fast-seed=4", 4, seconds=20, commit="decade" * 6, **fast)
    result = compare(sweeps, "base", "fast")
    assert result.differs == {"commit": ("c0ffeec0ff", "decadedeca")}
    assert "seconds are of different machines: Other CPU 8 threads Some GPU; Test CPU 2 threads" in result.notes
    assert any(note.startswith("runs of B took 20 to 30 s for the same steps") for note in result.notes)
    add_run(sweeps, "quick-seed=1", 1, seconds=1.6)
    add_run(sweeps, "quick-seed=2", 2, seconds=2.4)
    result = compare(sweeps, "base", "quick-*")
    assert any(note.startswith("runs of B took 1.6 to 2.4 s for the same steps") for note in result.notes)


def test_json_holds_what_the_page_says(sweeps, capsys):
    assert module.main(["base", "slow", "--json", "--runs", str(sweeps)]) == 0
    found = json.loads(capsys.readouterr().out)
    fields = "format verdict metric better margin alpha power a b pairs noise differences measures points notes"
    assert list(found) == fields.split()
    assert (
        found["verdict"] == "worse"
        and found["format"] == 1
        and found["differences"]["optim.matrix_lr"] == [0.02, 0.004]
    )
    measure = "at point of a b stderr df test sd runs difference verdict p p_equal low high further_seeds"
    assert list(found["measures"][0]) == measure.split()
    point = "at a b difference low high a_min a_max b_min b_max"
    assert list(found["points"]["steps"][-1]) == point.split() and len(found["points"]["steps"]) == 5
    assert found["a"]["runs"][0] == {"run": "base-seed=1", "seed": 1} and found["noise"]["df"] == 3


def test_the_command_prints_a_table_and_draws_a_picture(sweeps):
    picture = sweeps / "new/compare.png"
    words = ("-m", "llm.experiments.compare", "base", "slow", "--runs", str(sweeps), "--plot", str(picture))
    done = processes.run(sys.executable, *words)
    assert "optim.matrix_lr: 0.02 -> 0.004" in done.stdout and "paired by seed: t-test over 4 pairs" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("B is worse than A")
    assert Image.open(picture).size[0] > 1000


def test_the_legend_counts_the_runs_that_are_drawn(tmp_path):
    add_sweep(tmp_path, "base", [1, 2, 3], sd=0.002)
    add_sweep(tmp_path, "slow", [1, 2], sd=0.002, lr=0.004)
    for unpaired, counts in ((False, (2, 2)), (True, (3, 2))):
        result, axes = compare(tmp_path, "base", "slow", unpaired=unpaired), Figure().subplots()
        _sides(axes, result.points["steps"], result)
        names = axes.get_legend_handles_labels()[1]
        assert names == [f"A: base (band: {counts[0]} runs)", f"B: slow (band: {counts[1]} runs)"]


# ----- curves


def test_curves_know_their_seconds_at_evaluations(tmp_path):
    folder = add_run(tmp_path, "a", steps=100, seconds=50)
    curve = read_curve(stage_row_of(folder), "bpb")
    assert curve.steps == (0, 20, 40, 60, 80, 100) and curve.seconds == pytest.approx((0, 10, 20, 30, 40, 50))
    assert curve.after(25.0) == pytest.approx((curve.at(40) + curve.at(60)) / 2)
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().split()]
    short = [",".join(line if int(line[0].replace("step", "0")) <= 90 else [*line[:2], "", ""]) for line in lines]
    (folder / "metrics.csv").write_text("\n".join(short) + "\n")
    assert read_curve(stage_row_of(folder), "bpb").seconds[-1] == pytest.approx(50)  # by the speed until step 90
    old = "\n".join(",".join(line[:2]) for line in lines) + "\n"
    (folder / "metrics.csv").write_text(old)
    assert read_curve(stage_row_of(folder), "bpb").seconds is None


class Counted(tuple):
    """A tuple that counts how often it is read."""

    reads = 0

    def __getitem__(self, key):
        self.reads += 1
        return super().__getitem__(key)

    def __iter__(self):
        return (self[i] for i in range(len(self)))


def test_a_value_between_points_is_found_in_a_few_reads():
    xs, ys = Counted(range(0, 20000, 2)), tuple(x * x for x in range(10000))
    assert [interpolate(x, xs, ys) for x in (-1, 0, 1, 2, 2.5, 9001, 19998, 30000)] == [
        *(0, 0, 0.5, 1, 1.75, (4500**2 + 4501**2) / 2, 9999**2, 9999**2)
    ]
    assert xs.reads < 100
    assert interpolate(1.0, (0.0, 1.0, 1.0, 2.0), (5.0, 6.0, 7.0, 8.0)) == 6.0


def test_common_steps_and_seconds():
    one = Curve("a", 1, (0, 10, 20), (5.0, 3.0, 2.0), (0.0, 1.0, 2.0))
    two = Curve("b", 1, (0, 20, 40), (5.0, 3.0, 2.0), (0.0, 3.0, 6.0))
    assert common_steps([one, two]) == [20] and common_steps([two, Curve("c", 1, (0,), (5.0,), None)]) == [0]
    assert common_seconds([one, one], points=3) == [1.0, 1.5, 2.0]
    assert common_seconds([one, two]) == []  # the slower one is evaluated first after the other has ended
    assert common_seconds([one, Curve("c", 1, (0, 20), (5.0, 3.0), None)]) == []
