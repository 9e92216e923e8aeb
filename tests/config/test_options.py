"""Options written once: depths from a loop, shared bases, a debug experiment, a user's own defaults in conf/local/."""

import csv
import json
import subprocess
from dataclasses import fields

import pytest
from conftest import REPO, compose, run_cli
from omegaconf import OmegaConf

from llm.cli import overrides
from llm.cli.options import Sources
from llm.cli.overrides import CONF, check_overrides, group_options
from llm.config.schema import VARIANTS
from llm.config.stages import stage_names, stage_row
from llm.errors import UserError
from llm.model.config import config_class

DEPTHS = [f"d{depth}" for depth in range(1, 65)]


# ---------------------------------------------------------------------------------------------------------------------
# Depths


def test_depths_come_from_a_loop():
    assert group_options("model") == DEPTHS
    assert not list((CONF / "model").glob("d*.yaml"))
    base = OmegaConf.to_container(OmegaConf.load(CONF / "model/_base.yaml"))
    for name in ("d1", "d7", "d64"):
        cfg = overrides.compose("train", [f"model={name}"])
        assert OmegaConf.to_container(cfg.model) == base | {"depth": int(name[1:])}
    with pytest.raises(UserError, match=r"model=d65 does not exist; did you mean model=d64\? .*d1, d2 \.\.\. d64"):
        check_overrides("train", ["model=d65"])
    check_overrides("train", ["-m", "model=d2,d64"])
    with pytest.raises(UserError, match="model=d65 does not exist"):
        check_overrides("train", ["-m", "model=d2,d65"])


def test_a_file_adds_a_model_or_takes_the_place_of_a_depth(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/wide.yaml").write_text("defaults: [_base, _self_]\ndepth: 3\naspect_ratio: 256\n")
    (tmp_path / "model/d4.yaml").write_text("defaults: [_base, _self_]\ndepth: 4\nseq_len: 4096\n")
    check_overrides("train", ["--config-dir", str(tmp_path), "model=wide"])
    assert group_options("model", [CONF, tmp_path]) == [*DEPTHS, "wide"]
    wide, own, d5 = (
        overrides.compose("train", [f"model={m}"], Sources((CONF, tmp_path))).model for m in ("wide", "d4", "d5")
    )
    assert (wide.depth, wide.aspect_ratio, wide.head_dim) == (3, 256, 128)
    assert (own.depth, own.seq_len, d5.depth, d5.seq_len) == (4, 4096, 5, 2048)
    with pytest.raises(UserError, match="model=wdie does not exist; did you mean model=wide"):
        check_overrides("train", ["--config-dir", str(tmp_path), "model=wdie"])


# ---------------------------------------------------------------------------------------------------------------------
# Bases


@pytest.mark.parametrize(
    ("option", "values"),
    [("auto", ("auto", "auto")), ("cpu", ("cpu", 1)), ("gpu", ("gpu", 1))],
)
def test_trainers_share_a_base(option, values):
    trainer = compose("train", f"trainer={option}").trainer
    assert (trainer.accelerator, trainer.devices) == values
    assert (trainer.num_nodes, trainer.activation_checkpointing) == (1, False)


def test_every_option_of_an_architecture_is_one_of_the_model():
    """A key of conf/arch/ that the network does not know would be an error of GPTConfig, and only while it is built."""
    for name, schema in VARIANTS["arch"].items():
        options = set(schema.__dataclass_fields__) - {"name", "document_masks", "width"}  # width is n_embd there
        assert options <= {field.name for field in fields(config_class(name))}, name
        stated = compose("train", f"arch={name}").arch
        assert set(stated) == set(schema.__dataclass_fields__) and not OmegaConf.missing_keys(stated)


# ---------------------------------------------------------------------------------------------------------------------
# experiment=debug


@pytest.mark.parametrize("stage", stage_names())
def test_debug_is_tiny_plain_and_looks_often(stage):
    cfg = compose("train", "experiment=debug", f"stage={stage}")
    assert (cfg.precision.compute, cfg.compile, cfg.trainer.devices, cfg.strategy.name) == ("fp32", False, 1, "single")
    assert (cfg.log_every, cfg.save_async, cfg.model.depth, cfg.overwrite) == (1, False, 2, False)
    if stage == "tokenizer":
        return
    assert cfg.max_steps <= 20 and cfg.save_every <= 5
    assert 0 < cfg.stage.eval_every <= 5
    assert stage_row(stage).kind not in ("text", "chat") or 0 < cfg.stage.sample_every <= cfg.max_steps
    assert "chat_every" not in cfg.stage or 0 < cfg.stage.chat_every <= cfg.max_steps


def test_debug_pretrains_and_logs_every_step(tmp_path):
    done = run_cli(
        "train.py", "-m", "experiment=debug", "stage=tokenizer,pretrain", "max_steps=6", f"paths.runs={tmp_path}"
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "; float32, attention" in done.stdout and "eager (compile=false)" in done.stdout
    stage = tmp_path / "debug/pretrain"
    record = json.loads((stage / "run.json").read_text())
    assert record["derived"]["micro_batches"] == 2
    with open(stage / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(7)]
    assert [row["step"] for row in rows if row["bpb"]] == ["0", "5", "6"]


# ---------------------------------------------------------------------------------------------------------------------
# conf/local/


@pytest.fixture
def local(tmp_path):
    """Writes conf/local/<name>.yaml of a user; returns a function that composes with it."""

    def write(name: str, text: str):
        (tmp_path / "local").mkdir(exist_ok=True)
        (tmp_path / f"local/{name}.yaml").write_text(text)
        return lambda config_name, *lines: overrides.compose(config_name, lines, Sources((CONF, tmp_path)))

    return write


def test_local_is_ignored_by_git():
    done = subprocess.run(["git", "check-ignore", "conf/local/default.yaml"], cwd=REPO, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.stdout.strip() == "conf/local/default.yaml"


def test_own_defaults_hold_for_all_entry_points(local):
    composed = local("default", "paths: {runs: /large/runs}\n")
    for config_name in ("train", "evaluate", "serve", "export"):
        assert composed(config_name).paths.runs == "/large/runs"
    assert composed("train", "paths.runs=here").paths.runs == "here"


def test_own_defaults_of_one_entry_point_choose_options_too(local):
    local("default", "paths: {runs: /large/runs}\n")
    composed = local("train", "defaults:\n  - override /logger: tensorboard\n  - override /model: d6\nseed: 7\n")
    cfg = composed("train")
    assert (cfg.paths.runs, cfg.seed, cfg.model.depth, list(cfg.logger)) == ("/large/runs", 7, 6, ["tensorboard"])
    assert composed("evaluate").paths.runs == "/large/runs"


def test_an_experiment_and_the_command_line_beat_own_defaults_which_beat_groups(local):
    text = "defaults: [override /model: d6]\nlog_every: 3\nseed: 7\nbatch: {micro_batch_size: 2}\n"
    composed = local("train", text)

    def values(*lines):
        cfg = composed("train", *lines)
        return cfg.model.depth, cfg.log_every, cfg.seed, cfg.batch.micro_batch_size

    assert values("stage=sft") == (6, 3, 7, 2)  # sft's own micro-batch is 4
    assert values("stage=sft", "experiment=tiny") == (2, 1, 7, 4)
    assert values("stage=sft", "experiment=tiny", "model=d8", "log_every=5", "seed=9") == (8, 5, 9, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3\n", "unknown key 'max_step'; did you mean 'max_steps'?"),
        ("seed: many\n", "seed: Value 'many'"),
        ("batch: {total: 4096}\n", "batch.total is now called batch.tokens_per_step"),
        ("defaults: [override /logger: tensorbord]\n", "logger=tensorbord does not exist; did you mean logger=tens"),
        ("defaults: [override /loger: csv]\n", "Could not override 'loger'"),
        ("defaults: 3\n", "Invalid defaults list"),
        ("seed: 1\nbatch: {\n", "line 3 is not valid YAML"),
    ],
    ids=lambda value: value.strip().partition("\n")[0],
)
def test_a_mistake_in_own_defaults_names_the_file(local, tmp_path, text, message):
    composed = local("train", text)
    with pytest.raises(UserError) as caught:
        composed("train")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/local/train.yaml: {message}") and "\n" not in said
