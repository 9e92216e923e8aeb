"""Habits of Hydra's users: every row of the table in docs/configuration.md, and experiments that extend experiments."""

import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import REPO
from processes import run

from llm.cli import overrides
from llm.cli.compose import find_sources
from llm.cli.hydra_plugins import missing_plugin
from llm.cli.overrides import check_overrides
from llm.cli.sweep import best_of_search, values_of
from llm.errors import UserError
from llm.run.objective import NoObjective, objective_of

pytestmark = pytest.mark.usefixtures("composed_once")

TABLE = re.findall(r"^\| ([^|`]+) \| `([^|]+)` \| ([^|]+) \|$", (REPO / "docs/configuration.md").read_text(), re.M)
HABITS = [row for row in TABLE if re.match("works|refused|needs", row[2])]
FILES = {
    "mytrain": "defaults: [train, _self_]\nseed: 7\n",
    "experiment/inner": "# @package _global_\ndefaults: [/experiment/tiny]\nlog_every: 3\n",
    "experiment/inner/pretrain": "max_steps: 5\nstage: {eval_every: 3}\n",
    "experiment/mine": "# @package _global_\ndefaults: [inner, {override /callbacks: mine}]\nrun: mine\nmax_steps: 6\n",
    "experiment/mine/pretrain": "keep_last: 9\n",
    "callbacks/mine": "mine: {_target_: my_code.Callback}\n",
    "search/lr": "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: 'choice(1,2)'}}}\n",
    "data/mytext": "defaults: [_local, _self_]\npath: texts\n",
    "model/wide": "defaults: [_base, _self_]\ndepth: 3\n",
}


@pytest.fixture
def my_conf(tmp_path, monkeypatch) -> Path:
    """Writes the options of a user into my_conf/ of an empty current folder."""
    for name, text in FILES.items():
        path = tmp_path / f"my_conf/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "my_conf"


def composed(*argv: str):
    sources, rest = find_sources("train", argv)
    return overrides.compose("train", rest, sources)


def test_the_table_has_the_habits():
    assert len(HABITS) >= 25


@pytest.mark.parametrize(("habit", "command", "result"), HABITS, ids=[command for _, command, _ in HABITS])
def test_a_habit_does_what_the_table_says(my_conf, habit, command, result):
    argv = shlex.split(command)
    kind, _, rest = result.partition(": ")
    plugin = re.search(r"hydra/(launcher|sweeper)=(\w+)", command)
    problem = missing_plugin(f"hydra/{plugin[1]}", plugin[2]) if plugin else None
    if kind == "refused" or problem:
        with pytest.raises(UserError) as caught:
            check_overrides("train", argv)
        assert "\n" not in str(caught.value) and (problem or rest.strip("`")) in str(caught.value)
        return
    swept = check_overrides("train", argv).swept
    if jobs := re.search(r"(\d+) jobs", result):
        assert math.prod(len(values_of(override)) for override in swept) == int(jobs[1])


# ---------------------------------------------------------------------------------------------------------------------
# Folders and experiments of a user


def test_an_experiment_wins_over_those_that_it_extends_for_every_stage(my_conf):
    cfg = composed("--config-dir", "my_conf", "experiment=mine", "stage=pretrain")
    assert (cfg.run, cfg.model.depth, cfg.log_every) == ("mine", 2, 3)
    assert (cfg.stage.eval_every, cfg.stage.sample_every, cfg.stage.eval_tokens) == (3, 4, 2048)  # inner, tiny, tiny
    assert (cfg.max_steps, cfg.keep_last, list(cfg.callbacks)) == (6, 9, ["mine"])
    inner = composed("--config-dir", "my_conf", "experiment=inner", "stage=pretrain")
    assert (inner.max_steps, inner.keep_last, inner.run) == (5, 2, "tiny")
    sft = composed("--config-dir", "my_conf", "experiment=inner", "stage=sft")
    assert (sft.max_steps, sft.stage.chat_every) == (4, 4)
    assert composed("--config-dir", "my_conf", "experiment=mine", "stage=pretrain", "max_steps=8").max_steps == 8


def test_folders_of_a_user_are_found_in_every_way(my_conf):
    for argv in (["--config-dir", "my_conf"], ["hydra.searchpath=[file://my_conf]"], ["--config-path", "my_conf"]):
        assert composed(*argv, "model=wide").model.depth == 3
    assert composed("--config-dir=my_conf", "--config-name=mytrain").seed == 7
    shutil.copytree(my_conf, "conf/local")
    Path("conf/local/default.yaml").write_text("keep_last: 6\n")
    assert composed("model=wide").keep_last == 6
    assert composed("model=wide", "experiment=mine").model.depth == 3
    with pytest.raises(UserError, match="experiment=mien does not exist; did you mean experiment=mine"):
        check_overrides("train", ["experiment=mien"])


def test_a_main_file_names_folders_too(my_conf, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more/mytrain.yaml").write_text(
        f"defaults: [train, _self_]\nhydra: {{searchpath: ['file://{my_conf}']}}\n"
    )
    assert composed("--config-dir", "more", "--config-name", "mytrain", "model=wide").model.depth == 3


# ---------------------------------------------------------------------------------------------------------------------
# Searches


def test_the_objective_is_the_last_the_least_or_the_largest_value(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,bpb\n1,3.0,2.0\n2,2.0,\n3,2.5,2.5\n")
    assert [objective_of(tmp_path, "bpb", mode) for mode in ("last", "min", "max")] == [2.5, 2.0, 2.5]
    assert objective_of(tmp_path, "loss", "last") == 2.5
    with pytest.raises(NoObjective, match=r"objective=acc: metrics.csv has no numbers .* \(it has bpb, loss\)"):
        objective_of(tmp_path, "acc", "last")


def test_the_best_trial_is_told(tmp_path):
    text = "name: optuna\nbest_value: 1.25\nbest_params: {optim.matrix_lr: 0.02}\n"
    (tmp_path / "optimization_results.yaml").write_text(text)
    assert best_of_search(str(tmp_path)) == "\nbest of the search: 1.25 with optim.matrix_lr=0.02"


SEARCH = ["hydra/sweeper=optuna", "objective=bpb", "optim.matrix_lr=tag(log,interval(0.005,0.1))"]
STUB = """
from llm.cli.app import run_app

def go(cfg):
    if cfg.seed == 13:
        raise ValueError("an unlucky number")
    return abs(cfg.optim.matrix_lr - 0.03)

run_app("train", go)
"""


def needs_optuna():
    if missing_plugin("hydra/sweeper", "optuna"):
        pytest.skip("needs pip install -e '.[search]'")


@pytest.mark.slow
def test_a_failed_trial_is_nan_and_the_search_goes_on(tmp_path):
    needs_optuna()
    (tmp_path / "app.py").write_text(STUB)
    argv = ["-m", "experiment=tiny", *SEARCH, "seed=1,13", "hydra.sweeper.n_trials=8"]
    done = run(sys.executable, "app.py", *argv, cwd=tmp_path, env={"PYTHONPATH": str(REPO)})
    assert done.returncode == 0, done.stderr
    assert "seed=13: failed, its objective is NaN" in done.stdout and "an unlucky number" in done.stderr
    assert re.search(r"best of the search: [\d.e-]+ with .*seed=1$", done.stdout, re.M)


@pytest.mark.slow
def test_a_search_over_learning_rates_finds_the_best_of_twenty(tmp_path, monkeypatch):
    needs_optuna()
    monkeypatch.setattr("processes.HANG", 1800)
    common = ["experiment=tiny", "trainer=cpu", f"paths.runs={tmp_path}", "compile=false"]
    done = run(sys.executable, "train.py", *common, "stage=tokenizer", env={"OMP_NUM_THREADS": "1"}, cwd=REPO)
    assert done.returncode == 0, done.stderr
    argv = ["-m", *common, *SEARCH, "stage=pretrain", "stage.sample_every=0"]
    done = run(sys.executable, "train.py", *argv, env={"OMP_NUM_THREADS": "1"}, cwd=REPO)
    assert done.returncode == 0, done.stderr
    reached = [float(value) for value in re.findall(r"^job \d+: optim.matrix_lr=\S+: bpb=([\d.]+)$", done.stdout, re.M)]
    best = float(re.search(r"best of the search: ([\d.]+) with optim.matrix_lr=", done.stdout)[1])
    assert len(reached) == 20 and best == min(reached) < max(reached)
    assert len(list(tmp_path.glob("tiny-matrix_lr=*/pretrain/run.json"))) == 20
