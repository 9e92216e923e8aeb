"""Old names of keys: an error that names the new one where users write them, translated where a saved run is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import compose, run_cli
from safetensors.torch import load_file

from llm.checkpoint.resume import list_checkpoints
from llm.cli import overrides
from llm.cli.options import CONF, Sources
from llm.cli.overrides import check_overrides
from llm.config.renamed import (
    CONFIG_KEYS,
    CURSOR_KEYS,
    MUON_BEFORE,
    OPTIMIZER_GROUP_KEYS,
    renamed_checkpoint,
    renamed_config,
    renamed_key,
)
from llm.config.schema import known_keys
from llm.data.loader import positions_for
from llm.errors import UserError
from llm.optim import build_optimizer
from llm.run import read_manifest
from llm.run.config_diff import diff_configs
from llm.stages.step_module import StepModule

NEWER = ("coupled_decay", "momentum_overlap", "norm_margin")  # keys of optim that came after the renamed ones


def old_names(thing, table: dict[str, str]):
    """`thing` (nested dicts and lists) with the keys of `table` renamed backwards."""
    before = {new: old for old, new in table.items()}
    if isinstance(thing, dict):
        return {before.get(key, key): old_names(value, table) for key, value in thing.items()}
    return [old_names(item, table) for item in thing] if isinstance(thing, list) else thing


def old_config(config: dict) -> dict:
    """A resolved configuration under the names of before."""
    parts = {old.rpartition(".")[2]: new.rpartition(".")[2] for old, new in CONFIG_KEYS.items()}
    before = config | {group: old_names(config[group], parts) for group in ("batch", "stage", "optim")}
    return before | {"optim": {key: value for key, value in before["optim"].items() if key not in NEWER}}


def old_checkpoint(checkpoint: dict) -> dict:
    """A resume checkpoint under the names of before, without the hyperparameters that are newer."""
    states = [
        state | {"param_groups": old_names(state["param_groups"], OPTIMIZER_GROUP_KEYS)}
        for state in checkpoint["optimizer_states"]
    ]
    for group in (group for state in states for group in state["param_groups"] if group["kind"] == "muon"):
        assert all(group.pop(name) == value for name, value in MUON_BEFORE.items())
    return checkpoint | {"optimizer_states": states, "StepData": old_names(checkpoint["StepData"], CURSOR_KEYS)}


def test_every_entry_leads_to_a_key_that_exists_from_one_that_does_not():
    keys = known_keys("train")
    for old, new in CONFIG_KEYS.items():
        assert new in keys and old not in keys
        assert old.partition(".")[0] == new.partition(".")[0], "renamed_config stays within a group"


@pytest.mark.parametrize("old", CONFIG_KEYS)
@pytest.mark.parametrize("form", ["{}=4", "+{}=4", "~{}", "-m {}=1,2", "nested"])
def test_an_old_key_on_the_command_line_names_the_new_one(old, form):
    group, _, key = old.partition(".")
    argv = [f"{group}={{{key}: 4}}"] if form == "nested" else form.format(old).split()
    with pytest.raises(UserError) as caught:
        check_overrides("train", argv)
    assert str(caught.value) == f"{argv[-1]}: {old} is now called {CONFIG_KEYS[old]}"


def test_the_entry_point_says_it_in_one_line():
    done = run_cli("train.py", "experiment=tiny", "batch.device=4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: batch.device=4: batch.device is now called batch.micro_batch_size\n"


@pytest.mark.parametrize(
    ("file", "text", "line", "old"),
    [
        ("experiment/mine.yaml", "# @package _global_\nstage: {ratio: 8}\n", "experiment=mine", "stage.ratio"),
        ("experiment/mine.yaml", "# @package _global_\nbatch:\n  device: 8\n", "experiment=mine", "batch.device"),
        ("experiment/mine/sft.yaml", "batch: {total: 8}\n", "experiment=mine", "batch.total"),
        ("optim/mine.yaml", "defaults: [muon_adamw, _self_]\nequalize: true\n", "optim=mine", "optim.equalize"),
    ],
)
def test_an_old_key_in_a_file_names_the_file_and_the_new_one(tmp_path, file, text, line, old):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / "experiment").mkdir(exist_ok=True)
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nseed: 1\n")
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError) as caught:
        overrides.compose(
            "train", ["stage=sft" if "sft" in file else "stage=pretrain", line], Sources((CONF, tmp_path))
        )
    message = str(caught.value)
    assert "\n" not in message and file in message and message.endswith(f"{old} is now called {CONFIG_KEYS[old]}")


def test_an_old_key_in_a_reference_names_the_new_one():
    with pytest.raises(UserError, match=r"max_steps.*: batch.total is now called batch.tokens_per_step"):
        check_overrides("train", ["max_steps=${batch.total}"])
    with pytest.raises(UserError, match=r"max_steps.*: .*quux"):
        check_overrides("train", ["max_steps=${quux}"])


def test_a_saved_run_is_read_under_the_present_names(tmp_path):
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(compose("train", "experiment=tiny", "stage.tokens_per_param=3"), resolve=True)
    old = old_config(config)
    assert old["batch"]["device"] == 4 and old["stage"]["ratio"] == 3 and "equalize" in old["optim"]
    assert len(diff_configs(old, config)) >= 5  # or the test below would pass without a table
    (tmp_path / "run.json").write_text(json.dumps({"stage": "pretrain", "status": "finished", "config": old}))
    manifest = read_manifest(tmp_path)
    for name in NEWER:
        del config["optim"][name]
    assert manifest["config"] == config and manifest["status"] == "finished"
    assert renamed_config(config) == config
    assert renamed_key("batch.micro_batch_size") is None


def test_a_class_of_the_users_that_a_saved_type_names_is_a_target():
    saved = {"data": {"tasks": {"mine": {"type": "word_problems.WordProblems"}, "chat": {"type": "chat"}, "bad": 3}}}
    tasks = renamed_config(saved)["data"]["tasks"]
    assert tasks["mine"] == {"type": None, "_target_": "word_problems.WordProblems"}
    assert tasks["chat"] == {"type": "chat"} and tasks["bad"] == 3
    assert saved["data"]["tasks"]["mine"]["type"] == "word_problems.WordProblems"


def test_cursors_of_a_changed_number_of_processes():
    cursor = {"epoch": 0, "shard": 0, "row": 9, "index": 9}
    packer = {"tokens": torch.arange(4), "lengths": torch.tensor([4]), "row_len": 9, "placed": 5, "lost": 0}
    two = [
        {"kind": "text", "cursor": cursor | {"index": index}, "packer": dict(packer), "rank": rank, "world": 2}
        for rank, index in enumerate((9, 12))
    ]
    state = {"positions": positions_for(two, 1)}
    old = old_names(state, CURSOR_KEYS)
    assert old["positions"][0]["cursor"]["taken"] == [[9, 12]]
    read = renamed_checkpoint({"StepData": old})["StepData"]["positions"][0]
    assert read["cursor"] == state["positions"][0]["cursor"] and "consumed" in read["cursor"]
    source = {"sources": {"taken": cursor, "web": cursor | {"taken": [[1, 2]]}}}  # a source of the user's of that name
    read = renamed_checkpoint({"StepData": {"positions": [{"cursor": source}]}})["StepData"]["positions"][0]["cursor"]
    assert read == {"sources": {"taken": cursor, "web": cursor | {"consumed": [[1, 2]]}}}


def interrupted_before(stage: Path) -> None:
    """Make a finished stage one that was stopped at its first checkpoint, before keys were renamed."""
    shutil.rmtree(stage / "model")
    (_, first), (_, last) = list_checkpoints(stage / "checkpoints")
    saved = old_checkpoint(torch.load(first, weights_only=True))
    assert any("equalize" in group for group in saved["optimizer_states"][0]["param_groups"])
    saved["fathom"]["origin"]["config"] = old_config(saved["fathom"]["origin"]["config"])
    torch.save(saved, first)
    last.unlink()
    (stage / "checkpoints/manifest.json").unlink()
    record = json.loads((stage / "run.json").read_text())
    record |= {"status": "interrupted", "config": old_config(record["config"])}
    (stage / "run.json").write_text(json.dumps(record))


def test_a_checkpoint_of_before_resumes_to_the_same_weights(tmp_path):
    """Names have changed since, and keys have come whose defaults are not what was done before."""

    def train(run, *args):
        done = run_cli("train.py", *args, "experiment=tiny", f"run={run}", f"paths.runs={tmp_path}", "max_steps=4")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    train("straight", "-m", "stage=tokenizer,pretrain", "optim.coupled_decay=false", "optim.momentum_overlap=true")
    shutil.copytree(tmp_path / "straight", tmp_path / "old")
    interrupted_before(tmp_path / "old/pretrain")
    module = StepModule.load_from_checkpoint(list_checkpoints(tmp_path / "old/pretrain/checkpoints")[0][1])
    muon = build_optimizer(module.net, module.optim_config).param_groups[-1]
    assert {name: muon[name] for name in MUON_BEFORE} == MUON_BEFORE and module.optim_config.momentum_overlap
    assert "resuming at step 2 of 4" in train("old", "stage=pretrain")
    weights = [load_file(tmp_path / run / "pretrain/model/model.safetensors") for run in ("straight", "old")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
