"""Switches of the loss of pretraining: schedules, validation as without, an exact resume."""

from dataclasses import replace

import pytest
import torch
from conftest import compose
from small_training import CONFIG, OPTIM, StopAt, net, pretrain, rows, step_batch, weights

from llm.checkpoint.resume import newest_checkpoint
from llm.model.sampled_softmax import sample_vocabulary
from llm.stages.step_module import StageContext, StepModule
from llm.stages.text_loss import TextLoss, later_shares, prefix_share, prefix_table, sample_share
from llm.tokenizer.bpe import Tokenizer

KEYS = {"sampled_softmax": 0.3, "multi_token": 0.5, "prefix_token": 0.2}
TOKENS = [b"ab", b"abc", b"bc", b"abcd", *(bytes([b, 0]) for b in range(31)), *(bytes([b]) for b in range(256))]
TOKENIZER = Tokenizer(TOKENS)
WIDE = replace(CONFIG, vocab_size=300)


def test_without_a_switch_there_is_no_other_loss():
    assert TextLoss.of(compose("train", "stage=pretrain").stage, None) is None
    assert TextLoss.of(compose("train", "stage=sft").stage, None) is None
    asked = compose("train", "stage=pretrain", "stage.sampled_softmax=0.2").stage
    assert TextLoss.of(asked, None) == TextLoss(sampled_softmax=0.2)


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


def test_the_weights_of_further_goals_fall():
    assert later_shares(None, 0.0) == (0.0, 0.0) and later_shares(0.5, 0.0) == (0.5, 0.25)
    assert later_shares(0.5, 1 / 6) == pytest.approx((0.5, 0.125)) and later_shares(0.5, 0.5) == pytest.approx(
        (0.25, 0)
    )
    assert later_shares(0.5, 0.7) == later_shares(0.5, 1.0) == (0.0, 0.0)
    assert prefix_share(0.2, 0.0) == 0.2 and prefix_share(0.2, 1 / 3) == pytest.approx(0.1)
    assert prefix_share(0.2, 0.7) == prefix_share(None, 0.0) == 0.0


def test_the_prefix_of_a_token_is_the_longest_other_one_that_it_begins_with():
    table = prefix_table(TOKENIZER)
    assert len(table) == TOKENIZER.vocab_size + 1 and table[-1] == -1
    assert table[:4].tolist() == [TOKENS.index(b"a"), 0, TOKENS.index(b"b"), 1]
    assert table[4:35].tolist() == list(range(35, 66)) and (table[35:] == -1).all()


@pytest.mark.parametrize("sampled", [None, 0.3])
@pytest.mark.parametrize("done", [0.0, 0.2, 0.5, 0.9])
def test_further_goals_equal_a_loop_over_tokens(done, sampled):
    """In float64, over the whole vocabulary and over a sample of it."""
    model, micro = net(config=WIDE), step_batch(1)["micro"][0]
    targets, prefixes = micro["targets"], torch.arange(-1, 300).remainder(7) - 1
    loss = TextLoss(sampled, 0.5, 0.2, prefixes)
    found = loss(model, micro, done, 3)
    logits, exact = model(micro["inputs"]).double(), 0.0
    second, third = (max(0, 0.5 * min(1, 2 - 3 * done)), max(0, 0.25 * (1 - 3 * done)))
    every = torch.stack([targets, *(goals for goals, _ in loss.further(targets, done))])
    ids = sample_vocabulary(every, 300, sample_share(sampled, done), 3)
    seen = torch.arange(300) if ids is None else ids
    for b, t in (targets >= 0).nonzero().tolist():
        goals = [(targets[b, t], 1.0), (prefixes[targets[b, t]], 0.2 * max(0, 1 - 1.5 * done))]
        goals += [(targets[b, t + k], w) for k, w in ((1, second), (2, third)) if t + k < targets.size(1)]
        log_z = logits[b, t, seen].logsumexp(0)
        exact = exact + sum(weight * (log_z - logits[b, t, goal]) for goal, weight in goals if goal >= 0)
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (found, exact)), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "key", [pytest.param(k, marks=() if k == "sampled_softmax" else pytest.mark.slow) for k in KEYS]
)
def test_a_switch_changes_training_and_resumes_to_the_bit(tmp_path, key):
    options = {"config": WIDE, "tokenizer": TOKENIZER, key: KEYS[key]}
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
        module = StepModule(net(config=WIDE), OPTIM, stage, StageContext("pretrain", TOKENIZER, torch.ones(300), 6, 8))
        module.on_validation_epoch_start()
        with torch.no_grad():
            module.validation_step(step_batch(1)["micro"][0], 0)
        measured.append(module.bpb.compute().item())
    assert measured[0] == measured[1] > 0


def test_the_loss_follows_the_clock_where_a_training_has_minutes():
    """Ends with the loss that is validated: with 96 % of the time over the softmax is whole, at any step."""
    stage = compose("train", "stage=pretrain", "stage.sampled_softmax=0.3").stage
    context = StageContext("pretrain", TOKENIZER, torch.ones(300), 6, 8, max_minutes=1.0)
    module, micro = StepModule(net(config=WIDE), OPTIM, stage, context), step_batch(1)["micro"][0]
    plain = module.net(micro["inputs"], micro["targets"], reduction="sum").item()
    assert module.micro_loss(micro).item() < plain
    module.budget.used = 0.96
    assert module.micro_loss(micro).item() == plain
