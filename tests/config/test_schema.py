"""Configuration: everything in conf/ composes, values are the published defaults, the command line wins."""

import itertools
import os
import re
import tomllib
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import yaml
from conftest import REPO, compose
from omegaconf import OmegaConf
from processes import run

from llm.cli import overrides
from llm.cli.options import Sources
from llm.cli.overrides import CONF, config_groups, group_options
from llm.config import schema
from llm.config.key import key
from llm.config.schema import VARIANTS, DataConfig, known_keys, register_schema
from llm.config.stages import stage_names
from llm.errors import UserError
from llm.run.config_diff import flatten

STAGES = stage_names()
EXPERIMENTS = group_options("experiment")


def complete(cfg) -> dict:
    """The resolved configuration as stages save it; fails where a key has no value or refers to none."""
    assert not OmegaConf.missing_keys(cfg)
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


# ---------------------------------------------------------------------------------------------------------------------
# What conf/ holds


def pairs(*, is_slow: bool) -> list[tuple[str | None, str]]:
    """(experiment, stage): every one of both in `make test`, all others in the slow tests."""
    of_all = itertools.product([None, *EXPERIMENTS], STAGES)
    return [(e, s) for e, s in of_all if is_slow != (e is None or s in ("pretrain", "sft"))]


@pytest.mark.parametrize(
    ("experiment", "stage"),
    [*pairs(is_slow=False), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs(is_slow=True))],
)
def test_every_experiment_composes_for_every_stage(experiment, stage):
    lines = [f"stage={stage}"] + ([f"experiment={experiment}"] if experiment else [])
    cfg = compose("train", *lines)
    assert complete(cfg)["stage"]["name"] == stage
    assert OmegaConf.get_type(cfg.stage) is VARIANTS["stage"][stage]


def test_what_the_speedruns_read():
    for experiment, repo, shards in [
        ("speedrun", "karpathy/climbmix-400b-shuffle", 170),
        ("speedrun_2025", "karpathy/fineweb-edu-100b-shuffle", 240),
    ]:
        data = compose("train", "stage=download", f"experiment={experiment}").data
        assert (data.name, data.repo, data.shards) == ("hub", repo, shards)


def test_sources_of_a_mixture_from_the_command_line():
    cfg = compose("train", "data=mixture", "data.sources={web: {repo: a/b, weight: 3}, own: {path: texts}}")
    assert cfg.data.sources == {"web": {"repo": "a/b", "weight": 3}, "own": {"path": "texts"}}


@pytest.fixture
def site_schema():
    """A source of text `site` with a key `address`, as a plugin registers it; forgotten after the test."""
    register_schema("data", "site", make_dataclass("Site", [("address", str, key("address"))], bases=(DataConfig,)))
    yield
    VARIANTS["data"].pop("site")
    schema._known_keys.cache_clear()


def test_a_source_of_text_of_a_plugin_has_keys_of_its_own_and_those_of_every_mixture(tmp_path, site_schema):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/site.yaml").write_text(
        "defaults: [/schema/data/site@_here_, _text, _public_tasks, _self_]\nname: local\naddress: x\n"
    )
    for config_name in ("train", "evaluate"):
        cfg = overrides.compose(config_name, ["data=site", "data.mixture.sft={gsm8k: 2}"], Sources((CONF, tmp_path)))
        assert (cfg.data.address, cfg.data.mixture.sft.gsm8k) == ("x", 2)
    with pytest.raises(UserError, match="data.mixture.sftt"):
        overrides.compose("train", ["data=site", "data.mixture.sftt={gsm8k: 2}"], Sources((CONF, tmp_path)))


SIMPLE_GROUPS = sorted(config_groups("train").keys() - {"stage", "model", "experiment"})


@pytest.mark.parametrize("group,option", [(g, o) for g in SIMPLE_GROUPS for o in group_options(g)])
def test_every_option_composes(group, option):
    """With what its file says: a file that another one hides, or whose package is wrong, composes too."""
    cfg = overrides.compose("train", [f"{group}={option}"])
    complete(cfg)
    text = (CONF / group / f"{option}.yaml").read_text()
    header = re.search(r"# @package (\S+)", text)
    package = header[1].replace("_group_", group) if header else group
    part = cfg if package == "_global_" else OmegaConf.select(cfg, package)
    for name, value in flatten(yaml.safe_load(text) or {}).items():
        if not name.startswith("defaults") and "${" not in str(value):
            assert OmegaConf.select(part, name) == value, name


@pytest.mark.parametrize("config_name", ["evaluate", "serve"])
def test_the_other_entry_points_compose(config_name):
    cfg = compose(config_name)
    assert complete(cfg)["run"] is None
    assert cfg.stage is None


def test_defaults_are_the_published_ones():
    cfg = compose("train")
    assert (cfg.batch.tokens_per_step, cfg.batch.micro_batch_size, cfg.model.seq_len, cfg.seed) == (None, 32, 2048, 42)
    assert (cfg.model.aspect_ratio, cfg.model.head_dim, cfg.model.n_kv_head) == (64, 128, None)
    assert (cfg.arch.name, cfg.arch.window_pattern, cfg.arch.window_divisor) == ("modern", "SSSL", 4)
    assert (cfg.arch.rope_base, cfg.arch.softcap, cfg.arch.qk_scale) == (100_000, 15, 1.2)
    assert (cfg.optim.momentum_start, cfg.optim.momentum, cfg.optim.momentum_final) == (0.85, 0.97, 0.9)
    stage = cfg.stage
    assert (stage.tokens_per_param, stage.count_params, stage.warmup_steps) == (12, "matrices", 40)
    assert (stage.warmdown_ratio, stage.final_lr_frac) == (0.65, 0.05)
    assert (stage.eval_every, stage.eval_tokens, stage.sample_every) == (250, 20 * 524_288, 2000)

    cfg = compose("train", "experiment=speedrun_2025")
    assert (cfg.optim.matrix_lr, cfg.optim.embedding_lr, cfg.optim.unembedding_lr) == (0.02, 0.2, 0.004)
    assert (list(cfg.optim.betas), cfg.optim.eps, cfg.optim.weight_decay) == ([0.8, 0.95], 1e-10, 0.0)
    assert (cfg.optim.momentum_start, cfg.optim.momentum, cfg.optim.momentum_warmup) == (0.85, 0.95, 300)
    assert (cfg.optim.orthogonalizer, cfg.optim.ns_steps) == ("newton_schulz", 5)
    stage = cfg.stage
    assert (stage.tokens_per_param, stage.count_params, stage.warmup_steps) == (20, "all", 0)
    assert (stage.warmdown_ratio, stage.final_lr_frac, cfg.batch.tokens_per_step) == (0.2, 0.0, 524_288)

    tokenizer = compose("train", "stage=tokenizer").stage
    assert (tokenizer.vocab_size, tokenizer.max_chars, tokenizer.doc_cap) == (32_768, 2_000_000_000, 10_000)
    mid = compose("train", "stage=midtrain").stage
    assert (mid.lr_frac, mid.warmdown_ratio, mid.train_on, mid.epochs, mid.eval_every) == (1.0, 0.2, "all", None, 150)
    sft = compose("train", "stage=sft")
    assert (sft.stage.lr_frac, sft.stage.warmdown_ratio, sft.stage.train_on) == (0.02, 1.0, "assistant")
    assert (sft.stage.eval_every, sft.stage.chat_every, sft.stage.chat_max_per_task) == (100, 200, 1024)
    assert (sft.batch.tokens_per_step, sft.batch.micro_batch_size) == (None, 4)
    published = {"experiment=speedrun_2025": (32 * 2048, 2**19), "experiment=speedrun": (2**20, None)}
    for experiment, batches in published.items():
        sft, midtrain = (compose("train", experiment, f"stage={stage}") for stage in ("sft", "midtrain"))
        assert (sft.batch.tokens_per_step, midtrain.batch.tokens_per_step, sft.stage.epochs) == (*batches, 1)
        for cfg in (sft, midtrain):  # a row or more on each of eight devices
            assert (cfg.batch.tokens_per_step or 2**20) % (8 * cfg.batch.micro_batch_size * cfg.model.seq_len) == 0
    grpo = compose("train", "stage=grpo")
    assert (grpo.stage.prompts_per_step, grpo.stage.samples_per_prompt, grpo.batch.micro_batch_size) == (16, 16, 8)
    assert (grpo.stage.temperature, grpo.stage.top_k, grpo.stage.max_new_tokens) == (1.0, 50, 256)
    assert (grpo.stage.lr_frac, grpo.stage.eval_every, grpo.stage.eval_examples) == (0.05, 60, 400)
    assert grpo.stage.eval_samples == 8


def test_callbacks_and_loggers_can_be_built(tmp_path):
    from hydra.utils import instantiate
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger

    cfg = compose("train", "stage=sft", "logger=tensorboard")
    assert cfg.callbacks.chat_eval.max_per_task == cfg.stage.chat_max_per_task
    for name, part in cfg.callbacks.items():
        assert isinstance(instantiate(part), Callback), name
    logger = instantiate(cfg.logger.tensorboard, save_dir=str(tmp_path))
    assert isinstance(logger, Logger)
    assert Path(logger.log_dir) == tmp_path / "tensorboard"


@pytest.mark.slow
def test_wandb_works_offline_without_an_account(tmp_path, monkeypatch):
    from hydra.utils import instantiate

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = instantiate(compose("train", "logger=wandb").logger.wandb, save_dir=str(tmp_path))
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.experiment.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("config_name", ["train", "evaluate", "serve"])
def test_every_key_says_what_it_is(config_name):
    assert [name for name, spec in known_keys(config_name).items() if not spec.metadata["help"]] == []


# ---------------------------------------------------------------------------------------------------------------------
# Which value wins


def test_values_of_an_experiment_for_one_stage():
    steps = {stage: compose("train", "experiment=demo", f"stage={stage}").max_steps for stage in STAGES}
    files = {stage: yaml.safe_load((CONF / f"experiment/demo/{stage}.yaml").read_text()) for stage in STAGES}
    assert steps == {stage: files[stage].get("max_steps") for stage in STAGES}
    assert len({steps[stage] for stage in STAGES}) > 3


def test_the_command_line_beats_stage_values_beat_experiment_beat_groups(tmp_path):
    (tmp_path / "experiment/mine").mkdir(parents=True)
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: d6\nmax_steps: 10\nseed: 1\nstage: {eval_every: 7}\n"
    )
    (tmp_path / "experiment/mine/sft.yaml").write_text("max_steps: 20\nstage: {lr_frac: 0.5}\n")

    def values(*lines):
        cfg = overrides.compose("train", ["experiment=mine", *lines], Sources((CONF, tmp_path)))
        return cfg.model.depth, cfg.max_steps, cfg.seed, cfg.stage.lr_frac, cfg.stage.eval_every

    assert values("stage=midtrain") == (6, 10, 1, 1.0, 7)
    assert values("stage=sft") == (6, 20, 1, 0.5, 7)
    assert values("stage=sft", "model=d8", "max_steps=30", "stage.lr_frac=0.25") == (8, 30, 1, 0.25, 7)


def test_experiment_with_other_data():
    cfg = compose("train", "experiment=demo", "run=real", "data=local", "data.path=texts", "max_steps=200")
    assert (cfg.run, cfg.data.name, cfg.data.path, cfg.max_steps, cfg.model.depth) == ("real", "local", "texts", 200, 4)
    assert "choice" not in cfg.data.tasks


def test_stage_of_evaluate_and_parts_of_eval():
    lines = ["run=demo", "stage=sft", "eval=[bpb,samples]", "eval.max_per_task=5"]
    cfg = overrides.compose("evaluate", lines)
    assert cfg.stage.name == "sft"  # the entry point passes on the name alone
    assert (cfg.eval.bpb, cfg.eval.chat, cfg.eval.samples, cfg.eval.max_per_task) == (True, False, True, 5)
    assert compose("evaluate", "data=local", "data.path=x").data.path == "x"


# ---------------------------------------------------------------------------------------------------------------------
# Packaging


def test_make_help_lists_the_targets():
    result = run("make", "help")
    for target in ("setup", "demo", "test", "test-full", "check", "bench", "table", "report", "clean"):
        assert re.search(rf"^ +make {target} +\w", result.stdout, re.MULTILINE), target
    assert os.access(REPO / ".ci/run", os.X_OK)


def test_every_requirement_is_pinned():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    lines = project["project"]["dependencies"] + sum(project["project"]["optional-dependencies"].values(), [])
    needed = {re.match(r"[\w.-]+", line)[0].lower() for line in lines} - {"fathom"}
    pins = [line for line in (REPO / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert needed <= {pin.split("==")[0].lower() for pin in pins}
