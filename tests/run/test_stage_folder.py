"""Run folders: manifests, parents, best stage, comparison of configurations."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
from omegaconf import OmegaConf

from llm.cli.overrides import CONF
from llm.config.stages import stage_names
from llm.errors import UserError
from llm.experiments.runs import settings
from llm.run.config_diff import ABSENT, covers, describe_differences, diff_configs, flatten, neutral_keys
from llm.run.stage_folder import (
    RunDir,
    best_stages,
    find_parent,
    find_stage,
    list_runs,
    read_manifest,
    read_metrics,
    stage_before,
    write_manifest,
)
from llm.utils.environment import environment, git_commit


def add_stage(root, run, stage, status="finished", **extra):
    """A stage folder as training leaves it: run.json and, once finished, model/."""
    folder = RunDir(root, run).stage_dir(stage)
    write_manifest(folder, {"stage": stage, "status": status, **extra})
    if status == "finished":
        (folder / "model").mkdir()
        (folder / "model" / "tokenizer.tiktoken").write_text("x")
        if stage != "tokenizer":
            (folder / "model" / "model.safetensors").write_text("x")
    return folder


# ----- run.json


def test_manifest_round_trip_keeps_numbers_and_makes_the_rest_plain(tmp_path):
    import numpy as np
    import torch

    manifest = {"loss": np.float32(0.5), "n": torch.tensor(3), "path": tmp_path, "nan": float("nan"), "t": (1, True)}
    write_manifest(tmp_path / "s", manifest)
    assert read_manifest(tmp_path / "s") == {"loss": 0.5, "n": 3, "path": str(tmp_path), "nan": None, "t": [1, True]}
    assert read_manifest(tmp_path / "s" / "run.json") == read_manifest(tmp_path / "s")
    assert read_manifest(tmp_path / "never_started") is None
    assert os.listdir(tmp_path / "s") == ["run.json"]


def test_failed_write_keeps_the_previous_manifest(tmp_path, monkeypatch):
    write_manifest(tmp_path, {"steps": 1})

    def disk_full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm.utils.files.os.fsync", disk_full)
    with pytest.raises(UserError, match=r"run\.json: no space left on /"):
        write_manifest(tmp_path, {"steps": 2})
    assert read_manifest(tmp_path) == {"steps": 1}
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("text", ["{", "", "[1]", '{"a": "\xff'])
def test_corrupt_manifest_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"run\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", " a", "a ", ".hidden"])
def test_run_name_cannot_leave_the_runs_folder(tmp_path, name):
    with pytest.raises(UserError, match="run="):
        RunDir(tmp_path, name)


def test_metrics_keep_the_last_row_of_a_step_and_drop_torn_lines(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,bpb\n0,3.0,2.5\n1,2.0,\n2,1.5,\n1,1.9,2.1\n2,nan,\n3,1.")
    rows = read_metrics(tmp_path)
    assert rows == [
        {"step": 0, "loss": 3.0, "bpb": 2.5},
        {"step": 1, "loss": 1.9, "bpb": 2.1},
        {"step": 2},
    ]
    assert read_metrics(tmp_path / "none") == []


# ----- parents


def test_default_parent_is_the_previous_stage(tmp_path):
    for stage in ("tokenizer", "pretrain", "midtrain", "sft"):
        add_stage(tmp_path, "demo", stage)
    for parent, stage in (("tokenizer", "pretrain"), ("pretrain", "midtrain"), ("midtrain", "sft"), ("sft", "grpo")):
        assert find_parent(tmp_path, "demo", stage) == tmp_path / "demo" / parent / "model"
    assert find_parent(tmp_path, "demo", "tokenizer") is None


def test_missing_parent_lists_what_exists_and_the_fix(tmp_path):
    add_stage(tmp_path, "demo", "tokenizer")
    add_stage(tmp_path, "demo", "pretrain")
    add_stage(tmp_path, "other", "midtrain", status="running")
    with pytest.raises(UserError) as error:
        find_parent(tmp_path, "demo", "sft")
    text = str(error.value)
    assert "demo/midtrain" in text and "demo/tokenizer, demo/pretrain" in text and "init_from=demo/pretrain" in text
    assert "the same command with stage=midtrain, without its stage.* keys" in text and "other/" not in text
    with pytest.raises(UserError, match=r"There are no finished stages.*stage=tokenizer"):
        find_parent(tmp_path / "empty", "new", "pretrain")


def test_sft_continues_pretrain_where_nothing_is_to_be_midtrained(tmp_path):
    pretrain = add_stage(tmp_path, "demo", "pretrain") / "model"
    for weights, before in (({"chat": 1.0, "sums": 0.0}, "midtrain"), ({"chat": 0.0}, "pretrain"), ({}, "pretrain")):
        cfg = OmegaConf.create({"stage": {"name": "sft"}, "data": {"mixture": {"midtrain": weights}}})
        assert stage_before(cfg) == before
        cfg.stage.name = "grpo"
        assert stage_before(cfg) == "sft"
    assert find_parent(tmp_path, "demo", "sft", before="pretrain") == pretrain
    assert find_parent(tmp_path, "new", "sft", "demo", "pretrain") == pretrain
    with pytest.raises(UserError, match="starts from new/pretrain, which is missing"):
        find_parent(tmp_path, "new", "sft", before="pretrain")


@pytest.mark.parametrize("status", ["running", "interrupted"])
def test_unfinished_parent_is_refused_with_its_status(tmp_path, status):
    add_stage(tmp_path, "demo", "pretrain", status=status)
    with pytest.raises(UserError, match=status):
        find_parent(tmp_path, "demo", "midtrain")
    with pytest.raises(UserError, match=status):
        find_parent(tmp_path, "new", "midtrain", init_from="demo")


def test_init_from_run_run_stage_and_folder(tmp_path):
    add_stage(tmp_path, "demo", "pretrain")
    add_stage(tmp_path, "demo", "midtrain")
    pretrain, midtrain = (tmp_path / "demo" / stage / "model" for stage in ("pretrain", "midtrain"))
    assert find_parent(tmp_path, "new", "sft", "demo") == midtrain
    assert find_parent(tmp_path, "new", "sft", "demo/pretrain") == pretrain
    assert find_parent(tmp_path, "new", "sft", str(pretrain)) == pretrain
    assert find_parent(tmp_path, "new", "sft", str(pretrain.parent)) == pretrain
    assert find_parent(tmp_path / "elsewhere", "new", "sft", str(pretrain.parent)) == pretrain


def test_init_from_errors_name_the_value(tmp_path):
    add_stage(tmp_path, "demo", "tokenizer")
    for value, pattern in (
        ("nowhere", "init_from=nowhere is neither a run nor a folder"),
        ("demo/sftt", "no stage 'sftt'"),
        ("demo/tokenizer", r"no model\.safetensors"),
        (str(tmp_path), r"holds no model\.safetensors"),
    ):
        with pytest.raises(UserError, match=pattern) as error:
            find_parent(tmp_path, "new", "sft", value)
        assert "demo/tokenizer" in str(error.value)
    assert find_parent(tmp_path, "new", "pretrain", "demo") == tmp_path / "demo" / "tokenizer" / "model"
    with pytest.raises(UserError, match="remove this key"):
        find_parent(tmp_path, "new", "tokenizer", "demo")
    with pytest.raises(UserError, match="stage=sfft does not exist"):
        find_parent(tmp_path, "demo", "sfft")


# ----- finding runs


def test_best_stage_follows_the_pipeline_and_skips_unfinished(tmp_path):
    add_stage(tmp_path, "demo", "tokenizer")
    assert best_stages(RunDir(tmp_path, "demo")) == []
    for stage in ("sft", "pretrain", "midtrain"):
        add_stage(tmp_path, "demo", stage)
    add_stage(tmp_path, "demo", "grpo", status="running")
    assert best_stages(RunDir(tmp_path, "demo")) == ["sft"]
    assert find_stage(tmp_path, "demo") == tmp_path / "demo" / "sft"
    assert find_stage(tmp_path, "demo", "pretrain") == tmp_path / "demo" / "pretrain"
    assert find_stage(tmp_path, None) == tmp_path / "demo" / "sft"


def test_find_stage_errors_list_what_exists(tmp_path):
    add_stage(tmp_path, "demo", "pretrain")
    add_stage(tmp_path, "second", "pretrain")
    for run, stage, pattern in (
        (None, None, "run= is missing"),
        ("third", None, "run=third has no finished model stage"),
        ("demo", "tokenizer", "holds no model"),
        ("demo", "sft", "missing"),
    ):
        with pytest.raises(UserError, match=pattern) as error:
            find_stage(tmp_path, run, stage)
        assert "demo/pretrain" in str(error.value) and "second/pretrain" in str(error.value)


def test_runs_are_listed_in_natural_order(tmp_path):
    for name in ("d10", "d4", "d2", "abc"):
        add_stage(tmp_path, name, "pretrain")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert [run.name for run in list_runs(tmp_path)] == ["abc", "d2", "d4", "d10"]
    assert list_runs(tmp_path / "none") == []


def test_a_run_or_stage_that_may_not_be_read_hides_no_other(tmp_path, monkeypatch):
    for name in ("mine", "theirs"):
        add_stage(tmp_path, name, "pretrain")
    add_stage(tmp_path, "mine", "sft")
    closed = (tmp_path / "theirs", tmp_path / "mine" / "sft" / "run.json")
    iterdir, stat = Path.iterdir, Path.stat

    def refuse(path):
        if path in closed:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", lambda self: refuse(self) or iterdir(self))
    monkeypatch.setattr(
        Path, "stat", lambda self, **more: (self.name == "run.json" and refuse(self)) or stat(self, **more)
    )
    assert [run.name for run in list_runs(tmp_path)] == ["mine"]
    assert RunDir(tmp_path, "mine").stages() == ["pretrain"] and RunDir(tmp_path, "theirs").stages() == []


# ----- configurations


def test_passes_are_not_compared_beside_a_number_of_steps():
    old, new = ({"max_steps": 100, "stage": {"epochs": epochs}} for epochs in (1.0, None))
    assert diff_configs(old, new) == []
    by_passes = [config | {"max_steps": None} for config in (old, new)]
    assert diff_configs(*by_passes) == [("stage.epochs", 1.0, None)]
    assert diff_configs(by_passes[0], new) != []


def test_diff_names_result_changing_keys_only():
    old = {
        "seed": 42,
        "resume": True,
        "paths": {"runs": "runs"},
        "batch": {"tokens_per_step": 8, "micro_batch_size": 4},
        "betas": (1, 2),
    }
    new = {
        "seed": 43,
        "resume": False,
        "paths": {"runs": "r"},
        "batch": {"tokens_per_step": 8, "micro_batch_size": 2},
        "betas": [1, 2],
    }
    new["stage"] = {"chat_every": 5, "tokens_per_param": 20}
    assert diff_configs(old, new) == [("seed", 42, 43), ("stage.tokens_per_param", ABSENT, 20)]
    assert diff_configs(old, new, ignore=("stage", "seed", "paths", "batch")) == [("resume", True, False)]
    assert describe_differences(diff_configs(old, new)) == "seed: 42 -> 43; stage.tokens_per_param: (absent) -> 20"
    assert diff_configs(old, old) == diff_configs({"a": 1}, {"a": 1, "b": {"c": None}}) == []


def test_keys_that_a_stage_does_not_read_are_neutral_for_it():
    old = {"optim": {"matrix_lr": 0.02}, "data": {"path": "a", "mixture": {"sft": {"x": 1}, "midtrain": {"x": 1}}}}
    new = {"optim": {"matrix_lr": 0.03}, "data": {"path": "b", "mixture": {"sft": {"x": 2}, "midtrain": {"x": 1}}}}
    keys = {stage: [row[0] for row in diff_configs(old, new, neutral_keys(stage))] for stage in stage_names()}
    assert keys == {
        "tokenizer": ["data.path"],
        "pretrain": ["data.path", "optim.matrix_lr"],
        "midtrain": ["optim.matrix_lr"],
        "sft": ["data.mixture.sft.x", "optim.matrix_lr"],
        "reward": ["optim.matrix_lr"],
        "dpo": ["optim.matrix_lr"],
        **dict.fromkeys(("ppo", "grpo", "distill", "best_of_n"), ["data.mixture.sft.x", "optim.matrix_lr"]),
    }


@pytest.mark.parametrize(
    "stage, key, differs",
    [
        ("grpo", "stage.keep_rollouts", False),
        ("dpo", "stage.max_new_tokens", False),
        ("grpo", "stage.max_new_tokens", True),
        ("tokenizer", "stage.compare", False),
        ("grpo", "gpu.bf16_tables", True),
        ("grpo", "gpu.fp8_head", True),
        ("grpo", "gpu.joint_qkv", False),
    ],
)
def test_what_changes_no_weights_may_be_changed(stage, key, differs):
    group, name = key.split(".")
    assert bool(diff_configs({group: {name: 1}}, {group: {name: 2}}, neutral_keys(stage))) == differs


@pytest.mark.parametrize("key, value", [("gradient_clip_val", 1.0), ("overfit_batches", 2), ("devices", 2)])
def test_of_the_trainer_what_changes_weights_is_not_neutral(key, value):
    """A finished run was said to be finished with another clipping, and experiments took such runs for seeds of one."""
    old = {"trainer": {"gradient_clip_val": None, "overfit_batches": 0, "devices": 1}}
    new = {"trainer": old["trainer"] | {key: value}}
    changes = key != "devices"
    for stage in ("pretrain", "sft", "grpo"):
        found = [name for name, *_ in diff_configs(old, new, neutral_keys(stage))]
        assert found == ([f"trainer.{key}"] if changes else [])
        assert (settings({"stage": stage, "config": old}) != settings({"stage": stage, "config": new})) == changes
    assert diff_configs(old, new, neutral_keys("tokenizer")) == []


@pytest.mark.parametrize(
    "stage, differs",
    [
        ({"rehearsal": 0}, False),
        ({"rehearsal": 16}, True),
        ({"rehearsal": 0, "source": "rollouts"}, False),
        ({"rehearsal": 0, "source": "data"}, True),
        ({}, True),
    ],
)
def test_the_mixture_is_neutral_where_no_conversations_are_trained_on(stage, differs):
    old, new = ({"stage": stage, "data": {"mixture": {"sft": {"x": repeats}}}} for repeats in (1, 2))
    assert diff_configs(old, new) == ([("data.mixture.sft.x", 1, 2)] if differs else [])
    assert diff_configs({"stage": {"rehearsal": 4}}, {"stage": {"rehearsal": 0}}) == [("stage.rehearsal", 4, 0)]


def test_neutral_keys_exist_in_the_configuration():
    """A renamed key must be renamed in the lists too."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from llm.config.schema import register

    register()
    known = set()
    for stage in stage_names():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", [f"stage={stage}", "data.sources={web: {streaming: true, bad_rows: skip}}"])
        known |= set(flatten(OmegaConf.to_container(config)))
    patterns = {pattern for stage in stage_names() for pattern in neutral_keys(stage)}
    unknown = [pattern for pattern in patterns if not any(covers(pattern, key) for key in known)]
    assert unknown == []


# ----- environment


def test_environment_and_commit():
    facts = environment()
    assert facts["cpu"] and facts["cpu_threads"] >= 1 and facts["python"].startswith(f"{sys.version_info.major}.")
    assert facts["torch"] and facts["lightning"] and isinstance(facts["gpus"], list)
    json.dumps(facts)


def run_patiently(*args, timeout, **kwargs):
    return subprocess.run(*args, **kwargs)


def test_the_commit_is_that_of_the_checkout_with_the_code(tmp_path):
    """Not of the folder one stands in, not shortened, and marked where a tracked file was changed; None outside.

    So too the branch and the number of changed files, which counts new ones, in run.json.
    """
    source = Path(git_commit.__code__.co_filename)
    copy = tmp_path / "checkout" / source.relative_to(CONF.parent)
    copy.parent.mkdir(parents=True)
    shutil.copy(source, copy)
    spec = importlib.util.spec_from_file_location("copied_environment", copy)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    copied.subprocess = SimpleNamespace(run=run_patiently, TimeoutExpired=TimeoutError)

    def state():
        facts = copied.code_facts()
        return facts["branch"], facts["changed"]

    assert copied.git_commit() is None and state() == (None, None)
    size = copied.code_facts()
    assert size["files"] == 1 and size["lines"] == source.read_text().count("\n")
    assert size["characters"] == len(source.read_text()) and size["dependencies"] > 5

    def git(*args):
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        done = processes.run("git", *identity, *args, cwd=tmp_path / "checkout")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    git("init", "-b", "try")
    git("add", ".")
    git("commit", "-m", "One")
    head = git("rev-parse", "HEAD")
    assert state() == ("try", 0)
    (tmp_path / "checkout" / "new.txt").write_text("of no interest: not tracked")
    assert len(head) == 40 and copied.git_commit() == head and state() == ("try", 1)
    copy.write_text(source.read_text() + "# changed")
    assert copied.git_commit() == f"{head}-dirty" and state() == ("try", 2)
    git("checkout", "--detach")
    assert state() == ("(detached)", 2)


def test_import_is_cheap():
    heavy = "{'torch', 'lightning', 'numpy'}"
    done = processes.run_python(
        f"import sys, llm.run.stage_folder, llm.utils.environment; print({heavy} & set(sys.modules))"
    )
    assert done.stdout.strip() == "set()", done.stderr
