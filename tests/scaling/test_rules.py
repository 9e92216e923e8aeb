"""Scaling rules and schedules against the published numbers."""

import os
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import compose

from llm.errors import UserError
from llm.model.config import flops_per_token, num_params, scaling_params
from llm.model.gpt import GPT
from llm.model.lora import LoRA, add_adapter
from llm.optim.build import build_optimizer
from llm.optim.schedules import decay_multiplier, lr_multiplier, muon_momentum, warmdown_progress
from llm.scaling.gpu_estimate import estimate, memory_bytes, peak_of
from llm.scaling.rules import (
    adam_lr_scale,
    auto_batch,
    decay_factor,
    finetuning_batch,
    finetuning_passes,
    lr_batch_factor,
    micro_batches,
    model_config,
    pretrain_steps,
    training_tokens,
)
from llm.stages.micro_batch import kept_bytes, largest_trial, resolve_rows
from llm.stages.plan import check_same_model, shape_from
from llm.stages.pretrain import derived_without_tokenizer, plan


def shape(depth, arch="classic", vocab=65_536, **more):
    cfg = compose("train", f"arch={arch}")
    return model_config(dict(cfg.model) | {"depth": depth} | more, cfg.arch, vocab)


def test_document_masks_begin_at_the_tokenizers_bos(tiny_tokenizer):
    cfg = compose("train", "arch=modern")
    arch = dict(cfg.arch) | {"document_masks": True}
    apart = model_config(cfg.model, arch, tiny_tokenizer.vocab_size)
    assert apart.bos_id == tiny_tokenizer.bos_id
    together = model_config(cfg.model, cfg.arch, tiny_tokenizer.vocab_size)
    assert together.bos_id is None
    with pytest.raises(UserError, match="arch.document_masks: configured False, found True"):
        check_same_model(together, apart, Path("runs/x"))


def test_depth_sets_width_and_heads():
    assert [(shape(d).n_embd, shape(d).n_head) for d in (2, 4, 5, 20, 26)] == [
        (128, 1),
        (256, 2),
        (384, 3),
        (1280, 10),
        (1664, 13),
    ]
    with pytest.raises(UserError, match="n_kv_head=4"):
        shape(20, n_kv_head=4)
    with pytest.raises(UserError, match="model.depth=0"):
        shape(0)


@pytest.mark.parametrize(("depth", "has"), [(1, False), (2, False), (3, True), (4, True)])
def test_backout_needs_a_block_behind_the_middle_one(depth, has):
    """With two blocks, d2 of the recipe jumped from a loss of 5.8 to 13.8 when the coefficient went beyond 1."""
    cfg = compose("train", f"model=d{depth}")
    assert model_config(cfg.model, cfg.arch, 70).backout is has


def test_a_model_of_two_blocks_from_before_keeps_its_backout(tmp_path):
    cfg = compose("train", "stage=sft", "model=d2")
    found = replace(model_config(cfg.model, cfg.arch, 70), backout=True)
    assert shape_from(cfg, tmp_path, found).backout


@pytest.mark.parametrize(
    ("depth", "steps"),
    [(4, 1400), (6, 2325), (8, 3520), (10, 5075), (12, 7080), (16, 12_800), (20, 21_400), (24, 33_600)]
    + [(26, 41_275), (30, 60_225), (32, 71_680), (34, 84_575)],
)
def test_horizon_of_2025_equals_the_published_steps(depth, steps):
    assert pretrain_steps(shape(depth), 524_288, 20.0, "all", None) == steps


# version, depth, parameters, scaling parameters, FLOPs per token (7 digits), batch, steps, weight decay, rate factor
PUBLISHED = [
    ("modern_2026_02", 4, 36_700_296, 11_534_464, 8.493542e7, 262_144, 462, 1.35, 0.7071),
    ("modern_2026_02", 8, 125_829_648, 41_943_552, 3.145759e8, 262_144, 1_680, 0.371, 0.7071),
    ("modern_2026_02", 12, 286_262_424, 110_101_632, 8.021676e8, 524_288, 2_205, 0.200, 1),
    ("modern_2026_02", 16, 536_872_992, 234_883_072, 1.660957e9, 524_288, 4_704, 0.0938, 1),
    ("modern_2026_02", 18, 701_893_188, 324_405_792, 2.272018e9, 1_048_576, 3_248, 0.0960, 1.4142),
    ("modern_2026_02", 20, 896_535_720, 435_162_240, 3.004189e9, 1_048_576, 4_357, 0.0716, 1.4142),
    ("modern_2026_02", 24, 1_384_124_976, 729_813_504, 4.945112e9, 1_048_576, 7_308, 0.0427, 1.4142),
    ("modern_2026_02", 26, 1_681_790_292, 918_426_912, 6.185320e9, 1_048_576, 9_196, 0.0339, 1.4142),
    ("modern_2026_02", 32, 2_818_580_544, 1_677_729_792, 1.107301e10, 2_097_152, 8_400, 0.0263, 2),
    ("modern", 12, 286_261_730, 110_100_912, 7.596960e8, 524_288, 2_520, 0.280, 1),
    ("modern", 20, 896_533_746, 435_160_240, 2.886213e9, 1_048_576, 4_980, 0.1002, 1.4142),
    ("modern", 24, 1_384_122_122, 729_810_624, 4.775226e9, 1_048_576, 8_352, None, 1.4142),
]


@pytest.mark.parametrize(
    ("arch", "depth", "params", "counted", "flops", "batch", "steps", "decay", "factor"), PUBLISHED
)
def test_rules_of_2026_equal_the_published_rows(arch, depth, params, counted, flops, batch, steps, decay, factor):
    tokens_per_param, base = (10.5, 0.2) if arch == "modern_2026_02" else (12.0, 0.28)
    config, reference = (shape(d, arch, 32_768) for d in (depth, 12))
    assert (num_params(config)["total"], scaling_params(config)) == (params, counted)
    assert f"{flops_per_token(config):.6e}" == f"{flops:.6e}"
    tokens, reference_tokens = (training_tokens(c, tokens_per_param, "matrices") for c in (config, reference))
    assert auto_batch(tokens, reference_tokens) == batch
    assert pretrain_steps(config, batch, tokens_per_param, "matrices", None) == steps
    assert lr_batch_factor(batch) == pytest.approx(factor, abs=1e-4)
    if decay is not None:
        assert base * decay_factor(batch, tokens, reference_tokens) == pytest.approx(decay, rel=5e-3)


@pytest.mark.parametrize(
    ("depth", "tokens_per_param", "batch", "steps", "flops"),
    [(24, 12, 524_288, 16_704, 4.330784131228946e19), (26, 8.5, 524_288, 14_889, None), (26, 8.25, 2**20, 7_226, None)],
)
def test_published_runs(depth, tokens_per_param, batch, steps, flops):
    config = shape(depth, "modern_2026_02", 32_768)
    assert pretrain_steps(config, batch, tokens_per_param, "matrices", None) == steps
    if flops is not None:
        assert float(steps * batch * flops_per_token(config)) == flops


def test_speedrun_of_2025_derives_what_its_author_printed():
    values = derived_without_tokenizer(compose("train", "experiment=speedrun_2025", "dry_run=true"))
    expected = {
        "depth": 20,
        "n_embd": 1280,
        "n_head": 10,
        "params_total": 560_988_160,
        "flops_per_token": 3_491_758_080,
        "steps": 21_400,
        "planned_tokens": 11_219_763_200,
        "tokens_per_param": 20.0,
    }
    assert {name: values[name] for name in expected} == expected
    assert f"{values['planned_flops']:.6e}" == "3.917670e+19"
    assert {"estimate_memory_gib", "estimate_hours", "estimate_dollars"} <= set(values)


def test_speedrun_derives_the_published_numbers():
    values = derived_without_tokenizer(compose("train", "experiment=speedrun", "dry_run=true"))
    assert (values["params_total"], values["tokens_per_step"], values["steps"]) == (1_384_122_122, 2**20, 5_568)
    assert f"{values['flops_per_token']:.6e}" == "4.775226e+09"
    at_ratio_12 = derived_without_tokenizer(compose("train", "experiment=speedrun", "stage.tokens_per_param=12"))
    assert at_ratio_12["steps"] == 8_352


def test_the_speedrun_of_august_has_its_size_ratio_and_vocabulary():
    values = derived_without_tokenizer(compose("train", "experiment=speedrun_2026_08", "dry_run=true"))
    assert (values["depth"], values["n_embd"], values["vocab_size"]) == (22, 22 * 64, 49_152)
    assert values["tokens_per_param"] == pytest.approx(9.4, abs=0.01)


def test_horizons():
    config = shape(20)
    assert pretrain_steps(config, 524_288, 20.0, "all", 1e18) == round(1e18 / (3_491_758_080 * 524_288))
    with pytest.raises(UserError, match="stage.tokens_per_param"):
        pretrain_steps(shape(4), 10**12, 20.0, "all", None)
    assert plan(compose("train", "max_steps=7"), 32_768).steps == 7
    with pytest.raises(UserError, match=r"max_steps=7 and stage.target_flops=1e\+18"):
        plan(compose("train", "max_steps=7", "stage.target_flops=1e18"), 32_768)


def test_scales_of_a_plan():
    cfg = compose("train", "model=d20", "stage.lr_frac=0.5")
    scales = plan(cfg, 32_768).scales
    assert scales["lr_scale"] == pytest.approx(0.5 * 2**0.5)
    assert scales["fixed_lr_scale"] == 0.5
    assert cfg.optim.weight_decay * scales["decay_scale"] == pytest.approx(0.1002, rel=1e-3)
    assert plan(compose("train", "optim=muon_2025"), 32_768).scales == dict.fromkeys(scales, 1.0)
    small = [
        plan(compose("train", f"batch.tokens_per_step={n}", "stage.tokens_per_param=1"), 32_768).scales
        for n in (2**18, 8192)
    ]
    assert [s["lr_scale"] for s in small] == pytest.approx([0.5**0.5] * 2)  # the rates stay, the decay goes on
    assert small[1]["decay_scale"] == pytest.approx(small[0]["decay_scale"] / 2**2.5)


@pytest.mark.parametrize(
    "keys,heads",
    [
        (("model.depth=8", "model.aspect_ratio=64", "model.head_dim=256", "arch.paired_heads=all"), 2),  # there 3
        (("model=d20", "arch.gate_channels=1000"), 10),  # there 768 channels
        (("model=d24", "model.aspect_ratio=1", "model.head_dim=8"), 3),  # there 16, and smear reads 24
    ],
)
def test_the_reference_of_a_plan_refuses_no_model(keys, heads):
    assert plan(compose("train", "stage=pretrain", *keys), 8192).config.n_head == heads


def test_adam_scale_at_d20():
    assert adam_lr_scale(1280) == pytest.approx(0.774597, abs=1e-6)


def test_micro_batches():
    assert micro_batches(524_288, 32, 2048) == 8 and micro_batches(524_288, 32, 2048, world=8) == 1
    with pytest.raises(UserError, match=r"batch.tokens_per_step=5000.*set batch.tokens_per_step=4096 or 8192"):
        micro_batches(5000, 16, 256)
    with pytest.raises(UserError, match=r"batch.tokens_per_step=100.*set batch.tokens_per_step=4096"):
        micro_batches(100, 16, 256)


def test_estimates():
    config = shape(20)
    values = estimate(config, flops=3.91767e19, rows=32, gpu="h100", devices=8, mfu=0.475, kept=0)
    assert values["estimate_hours"] == pytest.approx(2.9, abs=0.1)  # 21,400 steps of 487 ms
    assert values["estimate_dollars"] == pytest.approx(values["estimate_hours"] * 24)
    more = memory_bytes(config, 32, 10**9) - memory_bytes(config, 16, 10**9)
    assert more == 16 * 2048 * 20 * 20 * 1280 * 2  # rows x positions x layers x values x width x bytes
    with pytest.raises(UserError, match="estimate.gpu=tpu"):
        estimate(config, flops=1, rows=1, gpu="tpu", devices=1, mfu=0.5, kept=0)


KEPT = {
    "muon_adamw": (),
    "adamw": ("optim=adamw",),
    "soap": ("optim.soap_beta=0.9", "optim.slow_momentum=0.98"),
    "dion": ("optim.dion_rank=0.25",),
    "tables": ("arch.ngrams=[2]",),
    "adapter": (),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_device_keeps_is_what_a_step_leaves_behind(name):
    cfg = compose("train", "model=d2", "model.aspect_ratio=16", "model.head_dim=16", *KEPT[name])
    net = GPT(model_config(cfg.model, cfg.arch, 70)).init_weights(0)
    if name == "adapter":
        add_adapter(net, LoRA(2, targets=("attention",)), 0)
    predicted = kept_bytes(net, cfg)
    optimizer = build_optimizer(net, cfg.optim)
    ids = torch.zeros(1, 8, dtype=torch.long)
    net(ids, ids).backward()
    optimizer.step()
    tensors = [*net.parameters()] + [p.grad for p in net.parameters() if p.grad is not None]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    assert sum(tensor.nbytes for tensor in tensors) == predicted
    cfg.stage.average_steps = 10
    assert kept_bytes(net, cfg) - predicted == sum(p.nbytes for p in net.parameters())


def test_a_dry_run_counts_what_the_optimizer_and_an_average_keep():
    def memory(*lines: str) -> dict:
        return derived_without_tokenizer(
            compose("train", "model=d12", "model.vocab_size=32768", "dry_run=true", *lines)
        )

    plain, gib = memory(), 2**30
    more = {"optim=adamw": plain["params_blocks"], "stage.average_steps=100": plain["params_total"]}
    for line, count in more.items():
        found = (memory(line)["estimate_memory_gib"] - plain["estimate_memory_gib"]) * gib
        assert found == pytest.approx(4 * count, rel=0.01)  # bytes of a number for each


def test_peaks_are_found_by_the_drivers_names():
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA GeForce RTX 4090": 165e12}
    assert {name: peak_of(name) for name in names} == names
    assert peak_of("NVIDIA GeForce GTX 1080") is None


def test_auto_rows_divide_the_step_and_fit(capsys, monkeypatch):
    cfg = compose("train", "batch.micro_batch_size=auto", "model.seq_len=512", "trainer=cpu")
    config = shape(4, seq_len=512)
    kept = kept_bytes(GPT(config), cfg)
    monkeypatch.setattr(os, "sysconf", lambda name: 16 << 30 if "PHYS_PAGES" in name else 1)  # bytes that are free
    assert resolve_rows(cfg, config, 48) == 16  # 24 and 48 rows are more than 8,192 tokens
    assert "batch.micro_batch_size=auto: 16 rows of 512 tokens" in capsys.readouterr().out
    monkeypatch.setattr(os, "sysconf", lambda name: 2 * memory_bytes(config, 3, kept) if "PHYS_PAGES" in name else 1)
    assert resolve_rows(cfg, config, 48) == 3
    cfg.trainer.devices = 3
    assert resolve_rows(cfg, config, 48) == 1  # three processes share what is free
    with pytest.raises(UserError, match="holds no whole row"):
        resolve_rows(cfg, config, 0)
    for wrong in ("many", "0", "1.5", "true"):
        with pytest.raises(UserError, match=f"batch.micro_batch_size={wrong}: must be"):
            compose("train", f"batch.micro_batch_size={wrong}")


def test_trials_go_down_until_one_fits():
    tried = []

    def attempt(rows):
        tried.append(rows)
        if rows > 4:
            raise torch.OutOfMemoryError("full")

    assert largest_trial([16, 8, 4, 2, 1], attempt) == 4 and tried == [16, 8, 4]
    with pytest.raises(UserError, match="not even one row fits"):
        largest_trial([16, 8], attempt)


def test_what_a_failed_trial_made_is_gone_when_the_cache_is_emptied(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append([made() for made in held]))

    class Activations:
        pass

    held, emptied = [], []

    def attempt(rows):
        activations = Activations()
        held.append(weakref.ref(activations))
        if rows > 4:
            raise torch.OutOfMemoryError

    assert largest_trial([16, 8, 4], attempt) == 4
    assert emptied == [[None], [None] * 2, [None] * 3]  # behind the one that fits too


def test_auto_rows_of_a_dry_run_fit_the_named_gpu():
    small, large = (
        derived_without_tokenizer(
            compose("train", "experiment=speedrun", "batch.micro_batch_size=auto", f"estimate.gpu={gpu}")
        )
        for gpu in ("rtx4090", "b200")
    )
    with pytest.raises(UserError, match="batch.micro_batch_size=big"):
        derived_without_tokenizer(compose("train", "experiment=speedrun", "batch.micro_batch_size=big"))
    again = compose("train", "experiment=speedrun", "trainer.activation_checkpointing=true", "dry_run=true")
    plain = compose("train", "experiment=speedrun", "dry_run=true")
    memory = [derived_without_tokenizer(c)["estimate_memory_gib"] for c in (again, plain)]
    assert memory[0] < 0.6 * memory[1]
    assert small["micro_batches"] > large["micro_batches"] and large["micro_batches"] == 16


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize(
    ("step", "want"), [(0, 0.1), (9, 1.0), (10, 1.0), (80, 1.0), (90, 0.55), (99, 0.145), (100, 0.1), (120, 0.1)]
)
def test_lr_schedule(step, want):
    assert lr_multiplier(step, 100, 10, 0.2, 0.1) == pytest.approx(want)


def test_warm_up_takes_at_most_a_quarter():
    assert [lr_multiplier(s, 8, 40, 0.0, 0.0) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert lr_multiplier(0, 3, 40, 0.0, 0.0) == 1.0


def test_lr_schedule_of_finetuning_falls_from_the_start():
    values = [lr_multiplier(s, 10, 0, 1.0, 0.0) for s in range(11)]
    assert values == pytest.approx([1 - s / 10 for s in range(11)])


def test_momentum_schedule():
    def momentum(step, final=0.95):
        return muon_momentum(step, 300, 0.85, 0.95, final, warmdown_progress(step, 1000, 0.2))

    assert [momentum(s) for s in (0, 150, 300, 900)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert [momentum(s, 0.9) for s in (800, 900, 1000)] == pytest.approx([0.95, 0.925, 0.9])
    assert muon_momentum(0, 0, 0.85, 0.95, 0.95, 0.0) == 0.95


def test_decay_schedules():
    at = {name: [decay_multiplier(name, s, 100) for s in (0, 25, 50, 100)] for name in ("constant", "linear", "cosine")}
    assert at["constant"] == [1, 1, 1, 1] and at["linear"] == [1, 0.75, 0.5, 0]
    assert at["cosine"] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0])


@pytest.mark.parametrize(
    ("tokens", "seq_len", "devices", "batch", "passes"),
    [
        (3_000, 512, 1, 1_024, 40),  # a hundred short conversations
        (3_000, 512, 2, 1_024, 40),
        (3_000, 512, 8, 4_096, 40),  # a row on every device
        (120_000, 512, 1, 1_024, 2**20 / 120_000),
        (2**20, 2_048, 1, 8_192, 1),
        (7_000_000, 2_048, 1, 65_536, 1),  # the mixture of nanochat's finetuning in 2025
        (7_000_000, 2_048, 8, 65_536, 1),
        (7_000_000, 2_048, 3, 33 * 2_048, 1),
        (430_000_000, 2_048, 1, 2**19, 1),  # that of its midtraining
        (3_000_000, 768, 1, 24_576, 1),
    ],
)
def test_finetuning_follows_the_amount_of_data(tokens, seq_len, devices, batch, passes):
    assert finetuning_batch(tokens, seq_len, devices) == batch and batch % (seq_len * devices) == 0
    assert finetuning_passes(tokens) == passes
