"""Switches of the loss of pretraining: schedules, validation as without, an exact resume."""

from dataclasses import replace

import pytest
import torch
from conftest import compose
from small_training import CONFIG, OPTIM, StopAt, net, pretrain, rows, step_batch, weights

from llm.checkpoint.resume import newest_checkpoint
from llm.stages.step_module import StageContext, StepModule
from llm.stages.text_loss import TextLoss, sample_share

KEYS = {"sampled_softmax": 0.3}
WIDE = replace(CONFIG, vocab_size=300)


def test_without_a_switch_there_is_no_other_loss():
    assert TextLoss.of(compose("train", "stage=pretrain").stage) is None
    assert TextLoss.of(compose("train", "stage=sft").stage) is None
    assert TextLoss.of(compose("train", "stage=pretrain", "stage.sampled_softmax=0.2").stage) == TextLoss(0.2)


def test_the_sample_grows_and_is_whole_at_the_end():
    shares = [round(sample_share(0.2, done), 3) for done in (0.0, 0.56, 0.58, 0.8, 0.82, 0.92, 0.94, 1.0)]
    assert shares == [0.2, 0.2, 0.28, 0.28, 0.49, 0.49, 1.0, 1.0]
    assert sample_share(None, 0.0) == sample_share(0.9, 0.6) == 1.0


def test_a_sampled_loss_is_lower_at_first_and_the_plain_one_at_the_end():
    model, micro = net(config=WIDE), step_batch(1)["micro"][0]
    loss = TextLoss(sampled_softmax=0.3)
    plain = model(micro["inputs"], micro["targets"], reduction="sum").item()
    assert loss(model, micro, 0.0, 0).item() < plain
    assert loss(model, micro, 0.0, 0).item() != loss(model, micro, 0.0, 1).item()
    assert loss(model, micro, 0.95, 5).item() == plain


@pytest.mark.parametrize("key", KEYS)
def test_a_switch_changes_training_and_resumes_to_the_bit(tmp_path, key):
    options = {"config": WIDE, key: KEYS[key]}
    plain, whole = pretrain(tmp_path / "plain", config=WIDE), pretrain(tmp_path / "a", **options)
    losses = [[float(row["loss"]) for row in rows(tmp_path / name)] for name in ("plain", "a")]
    assert losses[0][0] != losses[1][0] and not torch.equal(weights(plain)[0], weights(whole)[0])
    pretrain(tmp_path / "b", extra=[StopAt(3)], **options)
    resumed = pretrain(tmp_path / "b", ckpt=newest_checkpoint(tmp_path / "b" / "checkpoints")[1], **options)
    assert all(map(torch.equal, weights(resumed), weights(whole)))


@pytest.mark.parametrize("key", KEYS)
def test_validation_is_as_without(key):
    measured = []
    for keys in ({}, {key: KEYS[key]}):
        stage = compose("train", "stage=pretrain").stage
        for name, value in keys.items():
            stage[name] = value
        module = StepModule(net(config=WIDE), OPTIM, stage, StageContext("pretrain", None, torch.ones(300), 6, 8))
        module.on_validation_epoch_start()
        with torch.no_grad():
            module.validation_step(step_batch(1)["micro"][0], 0)
        measured.append(module.bpb.compute().item())
    assert measured[0] == measured[1] > 0
