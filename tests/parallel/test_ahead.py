"""Two devices: what arithmetic tells of a run is one error line before any process starts."""

import re

import pytest
from conftest import compose
from omegaconf import OmegaConf
from processes import run_python

from llm.checkpoint.model_folder import save_model_folder
from llm.config.stages import all_stages, stage_row
from llm.errors import UserError
from llm.model.gpt import build_network
from llm.parallel.env import LAUNCHER
from llm.parallel.launch import child_env
from llm.run.stage_folder import RunDir
from llm.scaling.rules import model_config
from llm.stages import run_stage
from llm.utils.registry import resolved


class Started(Exception):
    pass


@pytest.fixture(scope="module")
def parents(tmp_path_factory, tiny_tokenizer):
    """Folders of a tokenizer and of a model of experiment=tiny, to start from."""
    root, cfg = tmp_path_factory.mktemp("parents"), compose("train", "experiment=tiny")
    config = model_config(cfg.model, cfg.arch, tiny_tokenizer.vocab_size)
    tiny_tokenizer.save(root / "tokenizer")
    save_model_folder(root / "model", build_network(config).init_weights(0), tiny_tokenizer)
    return root


@pytest.fixture
def launched(parents, tmp_path, monkeypatch):
    """`launched("sft", "model", "batch.tokens_per_step=3")`: what a run on two CPUs says before it starts processes."""

    def start(*args):
        raise Started

    monkeypatch.setattr(run_stage, "start_processes", start)

    def line(stage: str, parent: str, *settings: str, **later) -> str:
        base = ["experiment=tiny", f"stage={stage}", "trainer=cpu", "run=two", f"paths.runs={tmp_path}", *settings]
        cfg = compose("train", *base)
        cfg.init_from = str(parents / parent)
        for key, value in ({"trainer.devices": 2} | later).items():
            OmegaConf.update(cfg, key, value)
        with pytest.raises((UserError, Started)) as caught:
            run_stage.run_stage(cfg)
        return str(caught.value) if caught.type is UserError else "started"

    return line


GOOD = {"batch.tokens_per_step": 1024}
TEXT = [
    ({"batch.tokens_per_step": 1000}, "not a multiple of .* = 4 x 128 x 2 = 1024; set batch.tokens_per_step=1024"),
    ({"batch.tokens_per_step": 512, "batch.micro_batch_size": 4}, r"= 4 x 128 x 2 = 1024"),
    ({"batch.tokens_per_step": 200, "batch.micro_batch_size": "auto"}, "holds no whole row"),
    ({"batch.tokens_per_step": 1000, "batch.micro_batch_size": "auto"}, "not a multiple of .* = 1 x 128 x 2"),
    (GOOD | {"trainer.devices": 3}, "x devices = 4 x 128 x 3 = 1536"),
    (GOOD | {"trainer.num_nodes": 4}, "x devices = 4 x 128 x 8 = 4096"),
    (GOOD | {"trainer.accelerator": "gpu"}, "trainer.accelerator=gpu: no GPU that torch can use"),
    (GOOD | {"strategy.name": "single"}, "strategy=single: there are 2 processes"),
    (GOOD | {"strategy.name": "fsdp", "precision.fp8": True, "precision.compute": "bf16"}, "not tested with strategy"),
    (GOOD | {"strategy.early_sums": True, "precision.compute": "fp16"}, "with fp16 gradients are sums of scaled"),
    (GOOD | {"precision.fp8": True, "precision.compute": "fp32"}, "precision.fp8=true: works beside bf16 only"),
    (GOOD | {"model.vocab_size": 5000}, "model.vocab_size=5000: the tokenizer has 300 tokens"),
]
FRESH = [
    (GOOD | {"max_steps": 3, "stage.target_flops": 1e12}, "are two horizons"),
    (GOOD | {"model.depth": 60, "model.aspect_ratio": 512}, "parameters in each of 2 processes are .* GiB, more than"),
    (GOOD | {"model.n_kv_head": 3}, "model.n_kv_head=3 must divide the number of heads"),
    (GOOD | {"stage.keep_best": "bpb", "stage.eval_every": 0}, "stage.keep_best=bpb: the run measures no bpb"),
    (GOOD | {"stage.warm_start": True}, "stage.warm_start=true: .* holds no weights"),
    (GOOD | {"model.lora.rank": 4}, "model.lora.rank=4: a fresh network has no weights"),
    (GOOD | {"arch.rope_scaling": "yarn"}, "arch.rope_scaling=yarn: a fresh network"),
    (GOOD | {"gpu.tuned_products": True, "compile": False}, "gpu.tuned_products=true: compile=false compiles no"),
]
TRAINED = [
    (GOOD | {"model.lora.alpha": 3.0}, "model.lora.alpha: there is no adapter without a rank"),
    (GOOD | {"model.lora.rank": 4, "precision.fp8": True, "precision.compute": "bf16"}, "not tested with fp8"),
    (GOOD | {"model.lora.rank": 4, "gpu.joint_qkv": True}, "gpu.joint_qkv=true: not made for adapters"),
]
FEW = {"stage.prompts_per_step": 1}


@pytest.mark.parametrize(
    "stage, parent, later, said",
    [
        *(("pretrain", "tokenizer", later, said) for later, said in TEXT + FRESH),
        *(("sft", "model", later, said) for later, said in TEXT + TRAINED),
        ("pretrain", "nothing", GOOD, "init_from=.*nothing is neither a run nor a folder"),
        ("grpo", "model", FEW, "stage.prompts_per_step=1: fewer than the 2 devices"),
        ("grpo", "model", {"stage.rehearsal": 1}, "stage.rehearsal=1: fewer than the 2 devices"),
        ("grpo", "model", {"stage.overlong": 5000}, "stage.overlong=5000: must be smaller"),
        ("grpo", "model", {"stage.loss": "reinforce", "stage.updates_per_rollout": 2}, "stage.updates_per_rollout=2"),
        ("ppo", "model", FEW, "stage.prompts_per_step=1: fewer than the 2 devices"),
        ("ppo", "model", {"stage.overlong": 5000}, "stage.overlong=5000: must be smaller"),
        ("best_of_n", "model", FEW, "stage.prompts_per_step=1: fewer than the 2 devices"),
        ("distill", "model", FEW, "stage.teacher=null: name the model"),
        ("distill", "model", {"stage.teacher": "tiny/none"}, "stage.teacher=tiny/none"),
        ("dpo", "model", {"stage.pairs_per_step": 1}, "stage.pairs_per_step=1: fewer than the 2 devices"),
        ("reward", "model", {"stage.pairs_per_step": 1}, "stage.pairs_per_step=1: fewer than the 2 devices"),
    ],
)
def test_a_bad_setting_starts_no_process(stage, parent, later, said, launched):
    line = launched(stage, parent, **later)
    assert re.search(said, line) and "\n" not in line, line


@pytest.mark.parametrize(
    "settings, said",
    [
        (("strategy=muon", "strategy.early_sums=true", "precision.compute=fp16"), "with fp16 gradients are sums"),
        (("strategy=fsdp", "arch.loops=2"), "strategy=fsdp gathers each block by itself"),
        (("strategy=single",), "there are 2 processes"),
    ],
)
def test_processes_that_torchrun_has_started_check_too(settings, said, parents, tmp_path, monkeypatch):
    """Sums of scaled losses would be taken for gradients, and blocks that share matrices end in a traceback."""
    for name, value in child_env(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(LAUNCHER, raising=False)
    cfg = compose("train", "experiment=tiny", "stage=pretrain", "trainer=cpu", "batch.tokens_per_step=1024", *settings)
    cfg.init_from = str(parents / "tokenizer")
    with pytest.raises(UserError, match=said):
        run_stage.work_as_writer(cfg, stage_row("pretrain"), RunDir(tmp_path, "two"))


def test_another_shape_than_the_parent_s_starts_no_process(launched):
    assert "model.depth: configured 6, found 2" in launched("sft", "model", "model.depth=6", **GOOD)
    assert "model.seq_len: configured 64, found 128" in launched("sft", "model", "model.seq_len=64", **GOOD)


@pytest.mark.parametrize("stage", [row.name for row in all_stages() if row.check])
def test_good_settings_start_them(stage, launched, parents):
    """Also from a trained parent, with a longer context than that one's, and a step that the data decide."""
    parent = "tokenizer" if stage == "pretrain" else "model"
    later = {"stage.teacher": str(parents / "model")} if stage == "distill" else {}
    assert launched(stage, parent, **GOOD, **later) == "started"
    if stage == "pretrain":
        assert launched(stage, "model", **GOOD) == "started"
    if stage == "sft":
        assert launched(stage, parent, "model.seq_len=256", **{"batch.tokens_per_step": None}) == "started"


def test_every_stage_that_trains_in_several_processes_is_checked_without_lightning():
    rows = [row for row in all_stages() if row.build]
    assert rows and all(row.check and row.parallel for row in rows)
    assert all(callable(resolved(row.check, row.name)) for row in rows)
    modules = sorted({row.check.rpartition(".")[0] for row in rows})
    done = run_python(f"import sys, {', '.join(modules)}; print('lightning' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
