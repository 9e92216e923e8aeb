"""Losses of preferences: hand-computed numbers, float64 forms of their own, and TRL's on the same tensors."""

import math

import pytest
import torch

from llm import objectives as o

SETTINGS = o.PreferenceSettings(beta=0.5, gamma=0.3, odds_weight=0.25, desirable_weight=1.5, undesirable_weight=0.5)


def answers(logps, tokens, ref=None) -> o.Answers:
    double = {"dtype": torch.float64}
    return o.Answers(
        torch.tensor(logps, **double), torch.tensor(tokens), None if ref is None else torch.tensor(ref, **double)
    )


CHOSEN, REJECTED = answers([-2.0, -9.0], [2, 3], [-3.0, -8.0]), answers([-4.0, -6.0], [4, 2], [-3.0, -6.5])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_answers_are_summed_over_their_own_tokens_only():
    logprobs, mask = torch.tensor([[-1.0, math.nan, -2.0]]), torch.tensor([[True, False, True]])
    found = o.Answers.of(logprobs, mask, logprobs * 2)
    assert (found.logps.item(), found.tokens.item(), found.ratio.item(), found.mean.item()) == (-3, 2, 3, -1.5)


def test_dpo_and_ipo_by_hand():
    """d_c = 1 and -1, d_r = -1 and 0.5; per token 0.5 and -1/3, -0.25 and 0.25."""
    wanted = [-math.log(sigmoid(0.5 * 2.0)), -math.log(sigmoid(0.5 * -1.5))]
    assert o.dpo_loss(CHOSEN, REJECTED, SETTINGS).tolist() == pytest.approx(wanted)
    smoothed = o.dpo_loss(CHOSEN, REJECTED, o.PreferenceSettings(beta=0.5, label_smoothing=0.1))
    assert smoothed[0].item() == pytest.approx(0.9 * wanted[0] - 0.1 * math.log(sigmoid(-1.0)))
    gaps = [0.75, -1 / 3 - 0.25]
    assert o.ipo_loss(CHOSEN, REJECTED, SETTINGS).tolist() == pytest.approx([(gap - 1.0) ** 2 for gap in gaps])


def test_orpo_and_simpo_by_hand():
    """Mean log-probabilities are -1 and -3 of the chosen, -1 and -3 of the rejected answers."""
    odds = [math.log(math.exp(x) / (1 - math.exp(x))) for x in (-1.0, -3.0)]
    torch.testing.assert_close(o.log_odds(CHOSEN.mean), torch.tensor(odds, dtype=torch.float64))
    better = answers([-1.0, -9.0], [2, 3])
    gap = math.log(math.exp(-0.5) / (1 - math.exp(-0.5))) - odds[0]
    wanted = [0.5 - 0.25 * math.log(sigmoid(gap)), 3.0 + 0.25 * math.log(2)]
    assert o.orpo_loss(better, REJECTED, SETTINGS).tolist() == pytest.approx(wanted)
    margins = [0.5 * 0.5 - 0.3, -0.3]
    wanted = [-math.log(sigmoid(margin)) for margin in margins]
    assert o.simpo_loss(better, REJECTED, SETTINGS).tolist() == pytest.approx(wanted)


def test_kto_by_hand():
    """d = 1 and -1 with z = 0.25."""
    labels, z = torch.tensor([True, False]), torch.tensor(0.25, dtype=torch.float64)
    wanted = [1.5 * (1 - sigmoid(0.5 * 0.75)), 0.5 * (1 - sigmoid(0.5 * 1.25))]
    assert o.kto_loss(CHOSEN, labels, z, SETTINGS).tolist() == pytest.approx(wanted)


def test_reward_loss_by_hand_and_its_centre():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 2.0])
    wanted = [-math.log(sigmoid(2.0)), -math.log(sigmoid(-2.0))]
    assert o.reward_loss(chosen, rejected).tolist() == pytest.approx(wanted)
    assert o.reward_loss(chosen, rejected, 0.1).tolist() == pytest.approx([wanted[0], wanted[1] + 0.1 * 4])


@pytest.mark.parametrize("name", [name for name, loss in o.PREFERENCE_LOSSES.items() if loss.is_paired])
def test_gradients_raise_the_chosen_answer_and_lower_the_rejected_one(name):
    own = [answers([-30.0], [10], [-30.0]), answers([-30.0], [10], [-30.0])]
    for one in own:
        one.logps.requires_grad_()
    o.PREFERENCE_LOSSES[name].loss(*own, SETTINGS).sum().backward()
    assert own[0].logps.grad < 0 < own[1].logps.grad


@pytest.mark.parametrize("name", o.PREFERENCE_LOSSES)
@pytest.mark.parametrize("logp", [0.0, -1e-9, -2000.0])
def test_losses_and_gradients_are_finite_for_certain_and_impossible_answers(name, logp):
    own, other = answers([logp], [4], [-1.0]), answers([-5.0], [4], [-3.0])
    own.logps.requires_grad_()
    loss = o.PREFERENCE_LOSSES[name]
    extra = (torch.tensor([True]), torch.tensor(0.0)) if not loss.is_paired else (other,)
    value = loss.loss(own, *extra, o.PreferenceSettings())
    value.sum().backward()
    assert value.isfinite().all() and own.logps.grad.isfinite().all()


def test_implied_rewards():
    rewards = {name: loss.rewards(CHOSEN, 0.5).tolist() for name, loss in o.PREFERENCE_LOSSES.items()}
    assert rewards["dpo"] == rewards["kto"] == [0.5, -0.5]
    assert rewards["ipo"] == pytest.approx([0.25, -1 / 6])
    assert rewards["orpo"] == rewards["simpo"] == [-0.5, -1.5]
