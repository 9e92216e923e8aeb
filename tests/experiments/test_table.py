"""The reader of runs and the table over them, from synthetic run folders."""

import json
import sys

import processes
import pytest
from experiment_runs import add_run, add_sweep

from llm.errors import UserError
from llm.experiments import table
from llm.experiments.runs import score_names, settings, settings_of, stage_row_of, stage_rows
from llm.experiments.sides import changed, load_side
from llm.experiments.table import as_text, differing, filtered, grouped, ordered, read_rows
from llm.run.stage_folder import RunDir, write_manifest
from llm.utils.files import write_json


@pytest.fixture
def runs(tmp_path):
    add_sweep(tmp_path, "base", [1, 2, 10], sd=0.01)
    add_sweep(tmp_path, "slow", [1, 2], level=2.5, sd=0.01, lr=0.004)
    add_run(tmp_path, "d10", seed=42, level=1.5, status="running", lr=0.03)
    return tmp_path


def names(rows):
    return [row["run"] for row in rows]


def test_rows_hold_facts_scores_and_the_configuration(runs):
    write_json(runs / "d10/pretrain/eval.json", {"bpb": 1.25, "chat": {"choice": {"accuracy": 0.5, "stderr": 0.05}}})
    row = stage_row_of(runs / "d10/pretrain")
    assert (row["run"], row["stage"], row["status"], row["seed"], row["steps"]) == (
        "d10",
        "pretrain",
        "running",
        42,
        100,
    )
    assert (row["bpb"], row["choice"], row["choice_stderr"], row["params"]) == (1.25, 0.5, 0.05, 1_000_000)
    assert row["config"]["optim"]["matrix_lr"] == 0.03 and row["folder"] == str(runs / "d10/pretrain")
    assert score_names([row]) == ["bpb", "loss", "choice"]
    assert names(stage_rows(runs, lambda run, stage: run.startswith("base"))) == [
        "base-seed=1",
        "base-seed=2",
        "base-seed=10",
    ]


def test_runs_with_wrong_files_hide_no_others(runs):
    (runs / "slow-seed=1/pretrain/run.json").write_text("")
    (runs / "slow-seed=2/pretrain/eval.json").write_text("[]")
    problems = []
    assert len(list(stage_rows(runs, problem=problems.append))) == 5
    assert len(problems) == 2 and "slow-seed=1/pretrain/run.json" in problems[0]


def test_old_runs_without_a_configuration_or_with_old_keys_are_read(runs):
    write_manifest(RunDir(runs, "old").path / "pretrain", {"stage": "pretrain", "metrics": {"bpb": 3.0}})
    config = {"stage": {"name": "pretrain", "ratio": 20}, "optim": {"matrix_lr": 0.02}, "seed": 3}
    write_manifest(RunDir(runs, "older").path / "pretrain", {"stage": "pretrain", "config": config})
    rows = ordered(grouped(read_rows(runs)), "stage.tokens_per_param")
    assert names(rows)[0] == "older" and stage_row_of(runs / "old/pretrain")["config"] == {}
    header, lines = as_text(rows)
    old = next(line for line in lines if line[0] == "old")
    assert old[header.index("bpb")] == "3" and old[header.index("depth")] == "-"


def test_seeds_of_one_configuration_are_one_row(runs):
    add_run(runs, "base-again", seed=2)  # a second run of a seed is no further seed
    rows = grouped(read_rows(runs))
    found = [(row["run"], row.get("seeds")) for row in rows]
    assert found == [("base-again, base-seed=*", 3), ("base-seed=2", None), ("d10", None), ("slow-seed=*", 2)]
    slow = next(row for row in rows if row["run"] == "slow-seed=*")
    each = [row["bpb"] for row in read_rows(runs, ["slow"])]
    assert slow["bpb"] == pytest.approx(sum(each) / 2) and slow["seed"] is None and slow["tokens"] == 51200
    assert slow["bpb_stderr"] == pytest.approx(abs(each[0] - each[1]) / 2)
    header, lines = as_text([slow])
    assert lines[0][header.index("bpb")] == f"{slow['bpb']:.4f} ± {slow['bpb_stderr']:.4f}"


@pytest.mark.parametrize(
    "scores, stage, left_out",
    [
        ({}, {}, []),
        ({"chat": {"choice": {"accuracy": 0.6, "n": 200}}}, {}, ["choice"]),
        ({"bpb": 2.5}, {}, ["bpb"]),
        ({}, {"eval_tokens": 8192}, ["bpb"]),
    ],
)
def test_a_score_that_one_seed_lacks_or_measures_otherwise_has_no_mean(tmp_path, capsys, scores, stage, left_out):
    for seed in (1, 2, 3):
        folder = add_run(tmp_path, f"a-seed={seed}", seed)
    config = json.loads((folder / "run.json").read_text())
    config["config"]["stage"] |= stage
    write_json(folder / "run.json", config)
    write_json(folder / "eval.json", scores)
    (row,) = grouped(read_rows(tmp_path))
    assert row["seeds"] == 3 and [name for name in score_names([row]) if row[name] is None] == left_out
    header, ((*cells,),) = as_text([row], "run,bpb,loss" + (",choice" if "chat" in scores else ""))
    assert [name for name, cell in zip(header, cells, strict=True) if cell == "-"] == left_out
    note = f"note: {left_out[0]}: no mean where a seed lacks it or has measured it otherwise" if left_out else ""
    assert note in capsys.readouterr().err


def test_what_is_executed_or_read_otherwise_makes_no_other_configuration(runs):
    row = stage_row_of(runs / "d10/pretrain")
    same = json.loads(json.dumps(row))
    same["config"] |= {"run": "x", "log_every": 7, "seed": 1, "compile": False, "save_mirror": None}
    assert settings(same) == settings(row)
    first, second = json.loads(json.dumps(row)), json.loads(json.dumps(row))
    first["config"] |= {"init_from": "a-seed=1/pretrain"}
    second["config"] |= {"init_from": "a-seed=12/pretrain"}
    assert settings(first) == settings(second) != settings(row)
    same["config"]["optim"]["matrix_lr"] = 0.0
    assert settings(same) != settings(row) and differing([row, same]) == ["optim.matrix_lr"]


def test_a_second_seed_that_names_the_tokenizer_of_the_first_is_a_seed(tmp_path):
    first = add_run(tmp_path, "a", 1, parent=str(tmp_path / "a/tokenizer/model"))
    second = add_run(tmp_path, "b", 2, start="a/tokenizer")
    other = {"parents": {"init_from": {"tokenizer": "71" * 32, "weights": None}}}
    add_run(tmp_path, "c", 3, start="c/tokenizer", **other)
    rows = read_rows(tmp_path)
    assert [row["run"] for row in grouped(rows)] == ["a, b", "c"] and differing(rows) == ["init_from"]
    assert [kept["init_from"] for kept in settings_of(rows)] == ["a/tokenizer", "a/tokenizer", "c/tokenizer"]
    assert load_side(tmp_path, "a,b", "pretrain", "bpb").rows == [stage_row_of(first), stage_row_of(second)]
    with pytest.raises(UserError, match="a and c differ in init_from"):
        load_side(tmp_path, "a,c", "pretrain", "bpb")


def test_models_that_start_from_other_weights_are_told_apart_by_their_names(tmp_path):
    parents = [{"init_from": {"tokenizer": "70" * 32, "weights": digit * 64}} for digit in "12"]
    add_run(tmp_path, "a", 1, parents=parents[0])
    add_run(tmp_path, "b", 2, parents=parents[1])  # seeds of whole pipelines
    add_run(tmp_path, "c", 3, parents=parents[1], start="b/pretrain")
    assert [row["run"] for row in grouped(read_rows(tmp_path))] == ["a, b", "c"]


@pytest.mark.parametrize(
    "key, before, other",
    [("optim.momentum_overlap", True, False), ("arch.window_multiple", 128, None), ("optim.muon2_beta", None, 0.9)],
)
def test_a_run_older_than_a_key_is_equal_to_one_with_the_rule_of_then_only(runs, key, before, other):
    group, name = key.split(".")
    old, same, new = (json.loads(json.dumps(stage_row_of(runs / "d10/pretrain"))) for _ in range(3))
    same["config"].setdefault(group, {})[name] = before
    new["config"].setdefault(group, {})[name] = other
    assert settings(old) == settings(same) != settings(new)
    assert differing([old, same, new]) == [key] == list(changed(settings(old), settings(new)))


def test_rows_are_sorted_and_filtered_by_columns_and_keys(runs):
    rows = read_rows(runs)
    assert names(ordered(rows, "bpb"))[0] == "d10" and names(ordered(rows, "bpb", descending=True))[0].startswith(
        "slow"
    )
    assert names(ordered(rows, "optim.matrix_lr"))[:2] == ["slow-seed=1", "slow-seed=2"]
    assert names(filtered(rows, ["matrix_lr<0.01", "seed=2"])) == ["slow-seed=2"]
    assert names(filtered(rows, ["run=base-*", "seed >= 2"])) == ["base-seed=2", "base-seed=10"]
    assert names(filtered(rows, ["status!=finished"])) == ["d10"]
    assert names(filtered(rows, ["FLOPs<=1e12", "depth=4.0", "bpb<1.7"])) == ["d10"]


def test_names_with_other_letters_are_found_and_shown_as_they_are(tmp_path):
    add_run(tmp_path, "größe", start="straße/tokenizer")
    rows = filtered(read_rows(tmp_path), ["run=größe", "init_from=straß*"])
    assert as_text(rows, "run,init_from") == (["run", "init_from"], [["größe", "straße/tokenizer"]])


def test_names_of_runs_are_names_patterns_or_sweeps(runs):
    assert names(read_rows(runs, ["slow", "d10"])) == ["d10", "slow-seed=1", "slow-seed=2"]
    assert names(read_rows(runs, ["*=1"])) == ["base-seed=1", "slow-seed=1"]


def test_columns_and_differences_are_shown(runs, capsys):
    header, lines = as_text(ordered(grouped(read_rows(runs)), "bpb"), diff=True)
    assert header == "run seeds stage depth params tokens FLOPs seconds loss bpb optim.matrix_lr".split()
    assert [line[-1] for line in lines] == ["0.03", "0.02", "0.004"] and lines[0][2] == "pretrain (running)"
    assert table.main(["--each", "--columns", "run,seed,matrix_lr", "--json", "--runs", str(runs), "base"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0] == {"run": "base-seed=1", "seed": 1, "matrix_lr": 0.02} and len(found) == 3
    assert table.main(["--each", "--columns", "run,seeds", "--json", "--runs", str(runs), "base"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {"run": "base-seed=1", "seeds": None}


def test_shares_are_percentages(tmp_path):
    for seed in (1, 2):
        folder = add_run(tmp_path, f"a-seed={seed}", seed)
        write_json(folder / "eval.json", {"chat": {"choice": {"accuracy": 0.5 + 0.01 * seed, "stderr": 0.05}}})
    header, lines = as_text(grouped(read_rows(tmp_path)))
    assert lines[0][header.index("choice")] == "51.5 ± 0.5 %"
    header, lines = as_text(read_rows(tmp_path))
    assert [line[header.index("choice")] for line in lines] == ["51.0 %", "52.0 %"]


def test_a_mean_that_is_no_share_is_no_percentage(tmp_path):
    scores = {"preferences": {"margin": 0.7, "margin_stderr": 0.1, "win_rate": 0.6, "win_rate_stderr": 0.05}}
    scores["judges"] = {"mine": {"marks": 1.7, "marks_stderr": 0.1, "right": 0.25, "right_stderr": 0.02}}
    write_json(add_run(tmp_path, "a") / "eval.json", scores)
    rows = read_rows(tmp_path)
    columns = "preference/margin,preference/win_rate,judges/mine/marks,judges/mine/right"
    assert as_text(rows, columns)[1] == [["0.7000", "60.0 %", "1.7000", "25.0 %"]]


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--sort", "bpd"], "--sort bpd: no run has such a column or key; did you mean bpb"),
        (["--columns", "run,matrix_rl"], "did you mean matrix_lr"),
        (["--columns", "name"], "--columns name: several keys end so: stage.name, data.name; name one of them in full"),
        (["--filter", "bpb"], "--filter 'bpb': write <column><sign><value>"),
        (["--filter", "bpb<small"], "--filter 'bpb<small': < needs a number"),
        (["--filter", "bpb<0"], "--filter 'bpb<0': no row is left"),
        (["--stage", "sft"], "no run there has a matching stage yet"),
        (["nobody"], "nobody: no run in"),
    ],
)
def test_mistakes_are_one_line(runs, capsys, words, problem):
    assert table.main([*words, "--runs", str(runs)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert problem in printed.err


def test_a_folder_of_runs_that_is_not_there_is_said(tmp_path, capsys):
    assert table.main(["--runs", str(tmp_path / "nope")]) == 2
    assert capsys.readouterr().err == f"error: --runs {tmp_path / 'nope'}: there is no such folder\n"


def test_the_command_prints_every_column_into_a_pipe_and_needs_no_torch(runs):
    program = (
        "import sys; from llm.experiments.table import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules); sys.exit(status)"
    )
    done = processes.run(sys.executable, "-c", program, "--runs", str(runs), "--diff")
    assert "optim.matrix_lr" in done.stdout and "1.00M" in done.stdout and "…" not in done.stdout
    assert len([line for line in done.stdout.splitlines() if "pretrain" in line]) == 3
