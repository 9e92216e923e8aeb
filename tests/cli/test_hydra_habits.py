"""Habits of Hydra's users: every row of the table in docs/configuration.md, and experiments that extend experiments."""

import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import REPO, run_cli
from processes import run, run_python

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
    "experiment/flat": "# @package _global_\nstage: {tokens_per_param: 9}\n",
    "callbacks/mine": "mine: {_target_: my_code.Callback}\n",
    "search/lr": "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: 'choice(1,2)'}}}\n",
    "data/mytext": "defaults: [_local, _self_]\npath: texts\n",
    "noisy/off": "# @package _global_\nlogger: null\n",
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
    monkeypatch.syspath_prepend(str(tmp_path))  # where my_conf is a package too
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
# Odd but legitimate lines, of Hydra's documentation and of the template for Lightning and Hydra

REFUSED = {
    "trainer=ddp trainer.devices=4": "trainer=ddp does not exist; did you mean strategy=ddp?",
    "logger=none": "logger=none does not exist; did you mean logger=null?",
    "debug=debug": "there is no group debug; write experiment=debug",
    "--config-dir my_conf -m search=lr": "search is a folder of yours, no group yet: +search=lr",
    "ckpt_path=last.ckpt": "ckpt_path is written otherwise here: init_from=<run>/<stage>",
    "task_name=mine": "task_name is written otherwise here: run=<name>",
    "train=False test=True": "train is written otherwise here: stage=<name>",
    "extras.print_config=true": "extras is written otherwise here: --cfg job shows the configuration",
    "trainer.max_epochs=20": "stage.epochs or max_steps",
    "+trainer.precision=16": "precision.compute",
    "model.optimizer.lr=1e-4": "unknown key 'model.optimizer.lr'",
    "optim._target_=torch.optim.Adam": "optim=<name>, which a plugin registers",
    "experiment=[tiny,debug]": "give one name; an experiment takes others over in its file",
    "stage=[pretrain]": "several in a row are a sweep: -m stage=tokenizer,pretrain",
    "/model=d4": "a key begins with a letter: model=d4",
    "'model={\"depth\": 3}'": "keys in braces have no quotes",
    "-m 'model=glob(d[12])'": "in quotes of their own: \"model=glob('d[12]')\"",
    "run=a=b": "in quotes of their own: \"run='a=b'\"",
    "--cfg jobs": "--cfg/-c: invalid choice: 'jobs'",
    "'-m seed=1,2'": "(Hydra's own arguments: --hydra-help)",
    "-m hydra.sweeper.params.seed=3": "write it in braces: 'hydra.sweeper.params={seed: \"3\"}'",
    "hydra.mode=multirun": "expected one of [RUN, MULTIRUN]",
    "--config-dir my_conf +noisy=off": "off.yaml: logger=null: must have a value; a group is left out by `- override",
    "--config-dir my_conf experiment=flat stage=tokenizer": "flat.yaml: stage.tokens_per_param: only stage=pretrain",
    "hydra/launcher=ray": "pip install hydra-ray-launcher",
    "-m 'optim.matrix_lr=0.01,null'": "optim.matrix_lr=null: expected a number",
    "--config-dir nowhere": "--config-dir: there is no folder",
    "hydra.searchpath=[pkg://nowhere.conf]": "there is no package pkg://nowhere.conf; put its folder on PYTHONPATH",
    "~model.depth": "model has a fixed set of keys",
}
TAKEN = (
    *("seed=1,2 -m", "--multirun seed=1,2", "-m 'run=a,b'", "\"run='a,b'\"", "'model={depth: 3, seq_len: 64}'"),
    *("~callbacks=default", "model.depth=int(3.0)", "-m 'seed=shuffle(range(1,4))'", "'run=${now:%Y}'"),
    *("-m 'optim.matrix_lr=range(0.01,0.03,0.01)'", "-m 'data.eval=[choice],[choice,arithmetic]'", "logger={}"),
    *("'hydra.run.dir=outputs/${now:%Y-%m-%d}'", "-m 'hydra.sweep.subdir=${hydra.job.num}' seed=1,2", "'logger=[csv]'"),
    *("-m hydra.sweeper.max_batch_size=2 seed=1,2", "hydra.job.chdir=True", "hydra.output_subdir=.hydra", "--info"),
    *(
        "-m hydra/sweeper=basic hydra/launcher=basic seed=1,2",
        "--cfg job --package model",
        "trainer.deterministic=true",
    ),
)


@pytest.mark.parametrize("line", REFUSED)
def test_an_odd_line_is_refused_with_what_to_do(my_conf, line):
    with pytest.raises(UserError) as caught:
        check_overrides("train", shlex.split(line))
    assert REFUSED[line] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("line", TAKEN)
def test_an_odd_line_is_taken(my_conf, line):
    check_overrides("train", sorted(shlex.split(line), key=lambda arg: arg != "-m"))


def test_a_search_has_one_direction():
    needs_optuna()
    argv = ["-m", *SEARCH, "hydra.sweeper.direction=[minimize,maximize]"]
    with pytest.raises(UserError, match="a search has one objective: give minimize or maximize"):
        check_overrides("train", argv)


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
    search = [f"hydra.searchpath=[{kind}://my_conf]" for kind in ("file", "pkg")]
    for argv in (["--config-dir", "my_conf"], ["--config-path", "my_conf"], *([one] for one in search)):
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
# One real process per kind: what is composed and checked above is also what Hydra does. A dry run trains nothing.

DRY = ("stage=pretrain", "dry_run=true", "model.vocab_size=300", "+hydra.callbacks.told._target_=told.Told")
CALLBACK = """from hydra.experimental.callback import Callback

class Told(Callback):
    def on_job_start(self, config, **kwargs):
        print(f"told: seed={config.seed} depth={config.model.depth} steps={config.max_steps}", flush=True)
"""
TINY = "experiment=tiny"
SEEDS = ["seed=1 depth=2 steps=4", "seed=2 depth=2 steps=4"]
# Kind: arguments, and what a callback of Hydra is told of each job.
KINDS = {
    "list": (["-m", TINY, "seed=1,2"], SEEDS),
    "glob": (["-m", TINY, "model=glob([d1,d2])"], ["seed=42 depth=1 steps=4", "seed=42 depth=2 steps=4"]),
    "tagged": (["-m", TINY, "seed=tag(luck,choice(1,2))"], SEEDS),
    "params": (["-m", TINY, "hydra.sweeper.params={seed: '1,2'}"], SEEDS),
    "mode": ([TINY, "hydra.mode=MULTIRUN", "seed=1,2"], SEEDS),
    "folder": (["--config-dir", "my_conf", TINY, "model=wide"], ["seed=42 depth=3 steps=4"]),
    "main folder": (["--config-path", "my_conf", TINY, "model=wide"], ["seed=42 depth=3 steps=4"]),
    "main file": (["--config-dir", "my_conf", "--config-name", "mytrain", TINY], ["seed=7 depth=2 steps=4"]),
    "search path": (["hydra.searchpath=[file://my_conf]", TINY, "model=wide"], ["seed=42 depth=3 steps=4"]),
    "experiment": (["--config-dir", "my_conf", "experiment=mine"], ["seed=42 depth=2 steps=6"]),
    "joblib": (["-m", TINY, "hydra/launcher=joblib", "seed=1,2"], SEEDS),
}


def dry(argv, folder: Path, fresh: bool = False):
    """Run a command line with the callback, and with a class for the user's experiment."""
    (folder / "told.py").write_text(CALLBACK)
    (folder / "my_code.py").write_text("from lightning.pytorch.callbacks import Callback\n")
    return run_cli("train.py", *argv, *DRY, cwd=folder, fresh=fresh)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_process_of_a_kind(my_conf, kind):
    argv, jobs = KINDS[kind]
    if kind == "joblib" and missing_plugin("hydra/launcher", "joblib"):
        pytest.skip("needs pip install -e '.[search]'")
    done = dry(argv, my_conf.parent)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"told: (.+)", done.stdout)) == jobs


def test_a_real_process_does_several_at_once(my_conf):
    """A main file of the user's, its folder, a sweep by a key with a tag, and a callback of Hydra."""
    argv = ["--config-path", "my_conf", "--config-name", "mytrain", "hydra.mode=MULTIRUN", TINY, "model=wide"]
    done = dry([*argv, "max_steps=tag(short,choice(2,3))"], my_conf.parent)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"told: (.+)", done.stdout) == ["seed=7 depth=3 steps=2", "seed=7 depth=3 steps=3"]


@pytest.mark.slow
def test_a_real_process_refuses_an_interval_in_one_line(my_conf):
    done = dry(["-m", TINY, "optim.matrix_lr=interval(0.01,0.1)"], my_conf.parent)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch("error: optim.matrix_lr=interval.*: an interval needs a search: .*\n", done.stderr)


@pytest.mark.slow
def test_text_of_a_user_without_tasks_is_enough_to_train(my_conf):
    folder = my_conf.parent
    (folder / "texts").mkdir()
    lines = [json.dumps({"text": f"The fox number {i} has {i * i} apples."}) for i in range(400)]
    (folder / "texts/fox.jsonl").write_text("\n".join(lines))
    argv = ["-m", "--config-dir", "my_conf", TINY, "data=mytext", "trainer=cpu", "stage=tokenizer,pretrain"]
    done = run_cli("train.py", *argv, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/tiny/pretrain/model/model.safetensors").is_file()


@pytest.mark.slow
def test_jobs_that_submitit_starts_print_into_a_folder_beside_the_runs(my_conf):
    pytest.importorskip("submitit")
    done = dry(["-m", TINY, "hydra/launcher=submitit_local", "seed=1,2"], my_conf.parent, fresh=True)
    assert done.returncode == 0, done.stderr
    logs = [path.read_text() for path in (my_conf.parent / "runs/.submitit").rglob("*.out")]
    assert sorted(re.findall(r"told: (.+)", "".join(logs))) == SEEDS


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


COMPOSITIONS = """
import sys
from hydra._internal.hydra import Hydra
from llm.cli.app import run_command
calls, compose, find = [], Hydra.compose_config, Hydra.get_mode
Hydra.compose_config = lambda *args, **named: calls.append(1) or compose(*args, **named)
run_command("train", lambda cfg: print(cfg.seed, len(calls)), sys.argv[1:])
print(Hydra.get_mode is find)
"""


@pytest.mark.parametrize(
    ("argv", "jobs"),
    [(["seed=1"], ["1 2"]), (["-m", "seed=1,2"], ["1 3", "2 3"]), (["hydra.mode=MULTIRUN", "seed=1"], ["1 3"])],
)
def test_one_job_is_composed_twice_for_the_check_and_for_itself(argv, jobs):
    """Hydra would compose it once more to find out whether it is a sweep, which the check knows."""
    lines = run_python(COMPOSITIONS, *argv).stdout.splitlines()
    assert [line for line in lines if re.fullmatch(r"\d+ \d+", line)] == jobs
    assert lines[-1] == "True"
