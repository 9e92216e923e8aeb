"""The batch ramp of pretraining: horizons, derived numbers, refusals, rates, what is foretold, and a run of it."""

import csv
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import compose
from optim.test_recipe import AtStep
from small_training import net

from callbacks.progress import Progress
from llm.errors import UserError
from llm.model.lora import LoRA, add_adapter
from llm.optim.schedules import decay_multiplier, lr_multiplier
from llm.scaling.batch_ramp import BatchSchedule, batch_schedule
from llm.scaling.rules import model_config
from llm.stages import text_plan
from llm.stages.common import steps_layout
from llm.stages.expect import work_of
from llm.stages.plan import check_planned, plan
from llm.stages.pretrain import derived_without_tokenizer
from llm.stages.run_stage import run_stage
from llm.stages.start import step_words
from llm.stages.step_module import StageContext
from llm.stages.text_plan import TextPlan, plan_text

SMALL = ("stage=pretrain", "model=d4", "model.seq_len=512", "batch.tokens_per_step=8192", "batch.micro_batch_size=4")


def config(*keys):
    return compose("train", *SMALL, "stage.batch_ramp=0.4", *keys)


def check(cfg):
    check_planned(cfg, model_config(cfg.model, cfg.arch, 8192), cfg.batch.tokens_per_step)


# ---- horizons and derived numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["stage.tokens_per_param=0.6", "stage.target_flops=4e13"])
def test_a_horizon_in_tokens_or_flops_keeps_its_tokens(key):
    plain = plan(config(key, "stage.batch_ramp=null"), 8192)
    found = plan(config(key), 8192)
    assert plain.steps > 100 and found.steps == pytest.approx(plain.steps / 0.8, abs=1)
    assert 0 <= plain.steps * 8192 - found.batch.total(found.steps) < 8192
    assert found.scales == plain.scales


def test_max_steps_is_a_number_of_steps():
    assert plan(config("max_steps=375"), 8192).steps == 375
    values = derived_without_tokenizer(config("max_steps=375", "model.vocab_size=8192"))
    assert (values["steps"], values["planned_tokens"]) == (375, 300 * 8192)
    assert values["planned_flops"] == 300 * 8192 * values["flops_per_token"]
    assert values["tokens_per_param"] == 300 * 8192 / values["params_scaling"]
    assert (values["tokens_per_step"], values["micro_batches"]) == (8192, 4)


def test_passes_over_the_text_are_those_of_the_ramp(tmp_path, monkeypatch):
    """Also in a resumed run, whose text has grown since."""
    size = 6 * 8192
    monkeypatch.setattr(text_plan, "passes_over", lambda source, tokenizer, planned: (size, planned / size))
    cfg = config(f"paths.runs={tmp_path}", "run=own", "stage.max_passes=2", "data.packing=auto")
    batch = batch_schedule(cfg, 8192)
    assert plan_text(cfg, None, None, 250, batch) == TextPlan(15, "best_fit", size, 2.0)
    cfg = config(f"paths.runs={tmp_path}", "run=own", "max_steps=30")
    assert plan_text(cfg, None, None, 30, batch).passes == 4.0
    stage_dir = tmp_path / "own" / "pretrain"
    (stage_dir / "checkpoints").mkdir(parents=True)
    (stage_dir / "checkpoints" / "step.ckpt").touch()
    kept = {"steps": 15, "packing": "best_fit", "text_tokens": 500, "text_passes": 8.0}
    (stage_dir / "run.json").write_text(json.dumps({"config": {}, "derived": kept}))
    assert plan_text(cfg, None, None, 30, batch) == TextPlan(30, "best_fit", 500, 16.0)


def test_the_size_of_a_micro_batch_is_found_in_a_part(monkeypatch):
    told = os.sysconf  # 32 GiB are free, whatever else runs
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_AVPHYS_PAGES": 1 << 23}.get(name) or told(name))
    cfg = config("batch.micro_batch_size=auto", "model.vocab_size=8192", "trainer=cpu")
    layout = steps_layout(cfg, plan(cfg, 8192).config, 8192, 4)
    assert (layout.rows_per_micro, layout.micro_per_step) == (4, 4)
    dry = config("batch.micro_batch_size=auto", "model.vocab_size=8192")
    assert derived_without_tokenizer(dry)["micro_batches"] == 4 and dry.batch.micro_batch_size == 4
    two = config("batch.micro_batch_size=auto", "model.vocab_size=8192", "trainer=cpu", "trainer.devices=2")
    assert derived_without_tokenizer(two)["micro_batches"] == 4 and two.batch.micro_batch_size == 2


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("batch.micro_batch_size=8",), "stage.batch_ramp=0.4: the 2 micro-batches of 8 rows .* are not 4 equal parts"),
        (("stage.batch_parts=3",), "stage.batch_parts=3: the 4 micro-batches of 4 rows .*tokens_per_step=8192 are not"),
        (("stage.batch_parts=32",), "stage.batch_parts=32: .* are not 32 equal parts"),
        (("batch.micro_batch_size=16",), "the 1 micro-batches of 16 rows"),
        (("batch.micro_batch_size=auto", "stage.batch_parts=3"), "stage.batch_parts=3: the 16 rows that a device has"),
        (("trainer=cpu", "trainer.devices=2"), "the 2 micro-batches of 4 rows that a device has"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_what_would(keys, message):
    with pytest.raises(UserError, match=message) as refused:
        check(config(*keys))
    fixes = re.findall(r"(?:stage|batch)\.\w+=\d+", str(refused.value).rpartition("; set ")[2])
    assert fixes and fixes[-1].startswith("batch.tokens_per_step=")
    for fix in fixes:
        cfg = config(*keys, fix)
        check(cfg)
    with pytest.raises(UserError, match=message):  # before there is a tokenizer, too
        derived_without_tokenizer(config(*keys, "model.vocab_size=8192", "dry_run=true"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("stage.batch_ramp=0",), "stage.batch_ramp=0.0: must be more than 0"),
        (("stage.batch_ramp=1.5",), "stage.batch_ramp=1.5: must be at most 1"),
        (("stage.batch_ramp=[0.2,4]",), "stage.batch_ramp"),
        (("stage.batch_parts=1",), "stage.batch_parts=1: must be at least 2"),
        (("stage.batch_parts=2000",), "stage.batch_parts=2000: must be at most 1024"),
        (("stage.batch_parts=2.5",), "stage.batch_parts"),
    ],
)
def test_wrong_values_are_refused_by_the_schema(keys, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run_stage(config(*keys))


def test_keys_without_an_effect_are_refused():
    with pytest.raises(UserError, match="stage.batch_parts=4: .*set stage.batch_ramp=0.4, or leave it out"):
        check(config("stage.batch_ramp=null", "stage.batch_parts=4"))
    with pytest.raises(UserError, match="trainer.overfit_batches=2 repeats the first steps.*stage.batch_ramp=null"):
        check(config("trainer.overfit_batches=2"))
    check(config())


# ---- rates, and what is foretold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rates", "decays"), [(True, True), (True, False), (False, True), (False, False)])
def test_rates_and_decay_follow_the_batch_of_the_step_where_the_rules_do(rates, decays):
    """But for the rate that follows no batch."""
    cfg = compose("train", "stage=pretrain", f"optim.scale_lr={rates}", f"optim.scale_decay={decays}")
    ramp, model = BatchSchedule(2**20, 0.5, 4), net()
    model.smear_gate = torch.nn.Linear(2, 1)
    module = AtStep(model, cfg.optim, cfg.stage, StageContext("pretrain", None, torch.ones(70), 20, 8, batch=ramp))
    module._trainer = SimpleNamespace(strategy=None)
    module.context.fixed_lr_scale = 1.0
    groups = module.configure_optimizers().param_groups
    names = {group["name"]: group for group in groups}
    for step in range(20):
        module.global_step = step
        module.apply_schedules(groups)
        size, decay_size = (ramp.tokens_of(step, 20) / 2**20 if follows else 1.0 for follows in (rates, decays))
        shape = (cfg.stage.warmup_steps, cfg.stage.warmdown_ratio, cfg.stage.final_lr_frac)
        multiplier = lr_multiplier(step, 20, *shape)
        for name, group in names.items():
            wanted = multiplier * (1 if name == "smear" else size**0.5)
            assert group["lr"] == pytest.approx(group["initial_lr"] * wanted), (name, step)
        assert module.rate == pytest.approx(multiplier * size**0.5)
        decay = decay_multiplier(cfg.optim.decay_schedule, step, 20) * decay_size**0.5
        assert names["matrices"]["weight_decay"] == pytest.approx(names["matrices"]["initial_decay"] * decay)
    assert {"smear", "matrices", "head"} <= names.keys() and ramp.tokens_of(0, 20) == 2**18


def test_the_rate_of_an_adapter_follows_no_batch():
    cfg, model = compose("train", "stage=pretrain", "optim.scale_lr=true"), net()
    add_adapter(model, LoRA(2), seed=0)
    context = StageContext("pretrain", None, torch.ones(70), 20, 8, batch=BatchSchedule(2**20, 0.5, 4))
    module = AtStep(model, cfg.optim, cfg.stage, context)
    module._trainer = SimpleNamespace(strategy=None)
    (group,) = module.configure_optimizers().param_groups
    module.global_step = 6  # behind the warm-up
    module.apply_schedules([group])
    assert group["lr"] == group["initial_lr"] * module.lr_frac(6) and module.rate < module.lr_frac(6)


def test_the_work_and_the_time_that_is_left_are_counted_in_tokens(monkeypatch):
    cfg = config("max_steps=15", "callbacks=none")
    numbers = {
        "windows": "full full full full",
        "n_embd": 256,
        "params_blocks": 9,
        "flops_per_token": 10,
        "micro_batches": 4,
    }
    numbers |= {"tokens_per_step": 8192, "steps": 15}
    work = work_of(cfg, numbers, None, 0, compiled=False)
    assert (work.steps, work.flops * 15, work.layers) == (15, pytest.approx(12 * 8192 * 10), round(16 * 0.8))
    rest = work_of(cfg, numbers, None, 4, compiled=False)  # two steps of three quarters, and nine whole ones
    assert (rest.steps, rest.flops * 11) == (11, pytest.approx(10.5 * 8192 * 10))
    context = StageContext("pretrain", None, torch.ones(70), 15, 8, batch=batch_schedule(cfg, 8192))
    module = AtStep(net(), cfg.optim, cfg.stage, context)
    assert [module.whole_steps(0, n) for n in range(8)] == [0, 0.25, 0.5, 1, 1.5, 2.25, 3, 4]
    one, now = Progress(1), [100.0]
    monkeypatch.setattr("callbacks.progress.time.perf_counter", lambda: now[0])
    one.module, one.begun, one.first_step, one.first_done = module, 90.0, 0, 100.0
    module.global_step, now[0] = 3, 107.5  # three quarters of a whole step since the first
    assert one.seconds_left() == pytest.approx(10 * 11)


def test_the_line_of_the_steps_says_both_sizes():
    numbers = {"micro_batches": 4, "tokens_per_step": 8192, "steps": 375}
    assert step_words(numbers, config()) == "375 steps of 2,048 to 8,192 tokens (1 to 4 micro-batches of 4 rows)"


# ---- a run ----------------------------------------------------------------------------------------------------------


def tiny(root, *keys):
    ramp = (
        "stage.batch_ramp=0.6",
        "batch.micro_batch_size=1",
        "keep_last=9",
        "save_every=1",
        "init_from=tiny/tokenizer",
    )
    run_stage(compose("train", "experiment=tiny", "stage=pretrain", f"paths.runs={root}", "max_steps=6", *ramp, *keys))


def rows(folder: Path) -> list[dict]:
    """Rows of metrics.csv behind a step, without those of an evaluation alone."""
    with open(folder / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["tokens"]]


def test_a_run_counts_its_tokens_and_resumes_amid_the_ramp(tokenizer_runs, tmp_path, capsys):
    root = tmp_path / "runs"
    shutil.copytree(tokenizer_runs, root)
    tiny(root, "run=whole")
    assert "6 steps of 128 to 512 tokens (1 to 4 micro-batches of 1 rows)" in capsys.readouterr().out
    whole, sizes = root / "whole" / "pretrain", [128, 128, 256, 384, 512, 512]
    manifest = json.loads((whole / "run.json").read_text())
    derived = manifest["derived"]
    assert (manifest["steps"], manifest["tokens"], derived["planned_tokens"]) == (6, sum(sizes), sum(sizes))
    assert manifest["flops"] == derived["planned_flops"] == sum(sizes) * derived["flops_per_token"]
    assert [float(row["tokens"]) for row in rows(whole)] == [sum(sizes[:n]) for n in range(1, 7)]
    assert [float(row["flops"]) for row in rows(whole)] == [
        sum(sizes[:n]) * derived["flops_per_token"] for n in range(1, 7)
    ]
    for done in (1, 3, 5):
        again = root / f"again{done}" / "pretrain"
        shutil.copytree(whole, again)
        shutil.rmtree(again / "model")
        for path in sorted((again / "checkpoints").glob("*.ckpt"))[done:]:
            path.unlink()
        log = (again / "metrics.csv").read_text().splitlines(keepends=True)  # as if killed before the row of the step
        (again / "metrics.csv").write_text("".join(log[:1] + [row for row in log[1:] if int(row.split(",")[0]) < done]))
        (again / "run.json").write_text(json.dumps(manifest | {"status": "interrupted", "run": again.parent.name}))
        tiny(root, f"run={again.parent.name}")
        assert f"resuming at step {done} of 6" in capsys.readouterr().out
        weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, again)]
        assert weights[0] == weights[1]
        for column in ("loss", "lr"):
            assert [row[column] for row in rows(again)] == [row[column] for row in rows(whole)]
        assert json.loads((again / "run.json").read_text())["tokens"] == sum(sizes)
