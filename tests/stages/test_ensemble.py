"""Pretraining with teachers: the loss against the whole distributions, what is refused, and an exact resume."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import compose
from omegaconf import OmegaConf
from safetensors.torch import load_file
from small_rollouts import kill
from small_training import CONFIG, net, step_batch

from llm.checkpoint.model_folder import save_model_folder
from llm.config.stages import stage_row
from llm.errors import UserError
from llm.model import soft_targets
from llm.model.gpt import GPT
from llm.run.further import further_names
from llm.run.stage_folder import write_manifest
from llm.scaling.rules import model_config
from llm.stages.ensemble import EnsembleObjective
from llm.stages.plan import check_teachers
from llm.stages.run_stage import run_stage
from llm.tokenizer.bpe import Tokenizer


def teachers() -> list[GPT]:
    """Two networks, one of another width."""
    return [net(seed=1), net(seed=2, config=replace(CONFIG, n_embd=24, n_layer=1))]


@pytest.mark.parametrize("bound", [{}, {"softcap": None}, {"asymmetric_cap": True}], ids=str)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_loss_and_the_gradient_are_those_of_the_whole_distributions(share, bound, monkeypatch):
    monkeypatch.setattr(soft_targets, "CHUNK_ELEMENTS", {"cpu": (350, 210)})  # five tokens at a time, then three
    monkeypatch.setattr(soft_targets, "MIN_TOKENS", 1)
    monkeypatch.setattr(soft_targets, "MULTIPLE", 1)
    student, others, micro = net(config=replace(CONFIG, **bound)), teachers(), step_batch(1)["micro"][0]
    loss, sums = EnsembleObjective(others, share)(student, micro)
    found = torch.autograd.grad(loss, list(student.parameters()))
    mask = micro["targets"] >= 0
    log_p = student(micro["inputs"])[mask].log_softmax(-1)
    q = sum(other(micro["inputs"])[mask].softmax(-1).detach() for other in others) / len(others)
    nats = -log_p.gather(1, micro["targets"][mask].unsqueeze(1)).sum()
    divergence = (q * (q.log() - log_p)).sum()
    wanted = (1 - share) * nats + share * divergence
    torch.testing.assert_close(loss, wanted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sums["cross_entropy"], nats.detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sums["divergence"], divergence.detach(), atol=1e-4, rtol=1e-5)
    for a, b in zip(found, torch.autograd.grad(wanted, list(student.parameters())), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert all(p.grad is None for other in others for p in other.parameters())


def test_a_micro_batch_without_targets_counts_nothing():
    inputs = torch.arange(6).view(1, 6)
    loss, sums = EnsembleObjective(teachers(), 0.5)(net(), {"inputs": inputs, "targets": torch.full_like(inputs, -1)})
    assert loss == 0 and sums == {}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("stage.teacher_share=0.3",), "stage.teacher_share=0.3: there is nobody to learn from"),
        (("stage.teachers=[a]", "stage.multi_token=0.5"), "stage.multi_token=0.5: not made for stage.teachers"),
        (("stage.teachers=[a]", "stage.sampled_softmax=0.2"), "stage.sampled_softmax=0.2: not made for"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(lines, words):
    with pytest.raises(UserError, match=words):
        check_teachers(compose("train", "stage=pretrain", *lines))


def test_each_teacher_has_a_key_of_its_own():
    cfg, row = compose("train", "stage=pretrain", "stage.teachers=[a,b/pretrain]"), stage_row("pretrain")
    assert further_names(cfg, row) == {"stage.teachers.0": "a", "stage.teachers.1": "b/pretrain"}
    assert further_names(compose("train", "stage=pretrain"), row) == {}
    for value in ("/", 3):
        cfg = OmegaConf.create({"stage": {"teachers": ["a", value]}})
        with pytest.raises(UserError, match=f"stage.teachers.1={value}: name a model"):
            further_names(cfg, row)


SMALL = ("model.depth=1", "precision.compute=fp32", "trainer=cpu", "callbacks=none", "optim=adamw")


def test_a_killed_stage_resumes_exactly_and_its_teachers_stay_as_they_are(tokenizer_runs, tmp_path):
    root = shutil.copytree(tokenizer_runs, tmp_path / "runs")
    tokenizer = Tokenizer.load(root / "tiny" / "tokenizer" / "model")
    for seed, run in enumerate(("first", "second")):
        cfg = compose("train", "experiment=tiny", *SMALL)
        other = GPT(model_config(cfg.model, cfg.arch, tokenizer.vocab_size)).init_weights(seed)
        with torch.no_grad():
            other.head_weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
        save_model_folder(root / run / "pretrain" / "model", other, tokenizer)
        write_manifest(root / run / "pretrain", {"status": "finished", "finished": "now", "stage": "pretrain"})
    lines = ("stage=pretrain", "init_from=tiny/tokenizer", f"paths.runs={root}", "save_every=1", "keep_last=4")
    lines += ("max_steps=4", "stage.teachers=[first,second/pretrain]", "stage.teacher_share=0.9", "stage.eval_every=0")

    def train(name):
        run_stage(compose("train", "experiment=tiny", *SMALL, *lines, f"run={name}"))

    train("straight")
    record = json.loads((root / "straight/pretrain/run.json").read_text())
    assert list(record["further"]) == ["stage.teachers.0", "stage.teachers.1"]
    kill(root, "pretrain", (2, 3, 4))
    train("killed")
    a, b = (load_file(root / name / "pretrain" / "model" / "model.safetensors") for name in ("straight", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    with open(root / "straight" / "pretrain" / "metrics.csv", newline="") as file:
        found = [
            {key: float(row[key]) for key in ("loss", "cross_entropy", "divergence")} for row in csv.DictReader(file)
        ]
    assert all(one["loss"] == pytest.approx(0.1 * one["cross_entropy"] + 0.9 * one["divergence"]) for one in found)
    assert found[0]["divergence"] > found[-1]["divergence"] > 0
    save_model_folder(root / "first" / "pretrain" / "model", other, tokenizer)
    with pytest.raises(UserError, match="was trained from an earlier version of .*first/pretrain/model"):
        train("straight")
