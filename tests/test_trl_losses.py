"""Losses of TRL's trainers on the tensors that ours get; skipped where trl is not installed.

Policies (GRPO), preferences (DPO, IPO, KTO, ORPO, SimPO), reward models and distillation (GKD), values and gradients.
A trainer's method is called with a stand-in for the trainer, which has no model and logs nothing.
"""

from types import SimpleNamespace

import pytest
import torch
from test_objectives import case

from llm import objectives as o

pytestmark = pytest.mark.slow
LOSSES = ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"]  # TRL has no reinforce and no ipo_rl
LIMIT = 9
ALONE = SimpleNamespace(
    num_processes=1,
    device=torch.device("cpu"),
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


class Metrics(dict):
    """Lists by name, to which a trainer appends what it logs."""

    def __missing__(self, key):
        return self.setdefault(key, [])


def trl_loss(name, new, old, ref, rho, advantages, mask, kl):
    """Return the loss of TRL's trainer for given log-probabilities, without its models and its logging."""
    module = pytest.importorskip("trl.trainer.grpo_trainer")
    own = o.POLICY_LOSSES[name]
    args = SimpleNamespace(
        delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, use_bias_correction_kl=False
    )

    trainer = SimpleNamespace(
        args=args,
        model=SimpleNamespace(training=True),
        loss_type={"gspo": "grpo"}.get(name, name),
        importance_sampling_level="sequence" if name == "gspo" else "token",
        epsilon_low=own.clip_low,
        epsilon_high=5.0 if name == "cispo" else own.clip_high,  # TRL's is the largest ratio itself
        beta=kl,
        max_completion_length=LIMIT,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": Metrics()},
        accelerator=ALONE,
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
    )
    trainer.args.steps_per_generation = 1
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages[:, 0],
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "importance_sampling_ratio": rho,
        "num_items_in_batch": mask.sum(),
    }
    return module.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_losses_and_gradients_are_trls(name, kl):
    new, old, advantages, mask = case(3)
    mask = mask.clone()
    mask[3, 0] = True  # TRL's masks have no empty rows
    engine, ref = old - 0.1, old + 0.05
    rho = o.correction_weights("token_tis", old, engine, mask)
    wanted = trl_loss(name, new, old, ref, rho, advantages, mask, kl)
    (wanted_gradient,) = torch.autograd.grad(wanted, new)
    loss = o.POLICY_LOSSES[name]
    losses, _, _ = loss(new, old, advantages, mask)
    losses = losses * rho + kl * o.kl_k3(new, ref, mask)
    got = loss.total(losses, mask) / loss.units(int(mask.sum()), len(mask), LIMIT)
    (gradient,) = torch.autograd.grad(got, new)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)


# ---------------------------------------------------------------------------------------------------------------------
# Preferences, reward models, distillation

PAIRS = o.PreferenceSettings(beta=0.5, gamma=0.3, odds_weight=0.25, desirable_weight=1.5, undesirable_weight=0.5)


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probabilities (8, 5) of tokens and those of a reference, and a mask: four chosen, four rejected."""
    found = [case(seed) for seed in (5, 6)]
    new, old = (torch.cat([one[i].detach() for one in found]) for i in (0, 1))
    mask = torch.cat([one[3] for one in found])
    mask[3, :2] = mask[7, 0] = True
    return new.requires_grad_(), old, mask


def masked_model(logprobs, mask):
    """Return what TRL's models give to its trainers: log-probabilities of tokens, and numbers that are logged."""
    kept = logprobs.masked_fill(~mask, 0.0)
    zeros = torch.zeros_like(kept).detach()
    return lambda **inputs: SimpleNamespace(
        log_probs=kept, entropy=zeros, mean_logits=zeros, is_top1=mask, log_sum_sq_probs=zeros
    )


def trainer_of(new, old, mask, **more) -> SimpleNamespace:
    """Return a stand-in for TRL's trainers of preferences."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model=masked_model(old, mask),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        accelerator=ALONE,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        beta=PAIRS.beta,
        _metrics={"train": Metrics()},
        _total_train_tokens=0,
        _tp_size=1,
        **more,
    )


def inputs_of(mask) -> dict[str, torch.Tensor]:
    """Return ids and masks of sequences of a prompt of one token and an answer, as TRL's trainers take them."""
    whole = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], 1)
    return {"input_ids": torch.zeros_like(whole), "attention_mask": torch.ones_like(whole), "completion_mask": whole}


def assert_same(wanted, got, *leaves) -> None:
    """Compare two losses and their gradients."""
    near = {"atol": 1e-6, "rtol": 1e-6, "check_dtype": False}  # TRL's odds are of fp32
    torch.testing.assert_close(got, wanted, **near)
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (got, wanted)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **near)
        assert a.any()


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_losses_of_pairs_with_a_reference_are_trls(name):
    module = pytest.importorskip("trl.trainer.dpo_trainer")
    new, old, mask = tokens()
    more = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False}
    more |= {"loss_types": [{"dpo": "sigmoid"}.get(name, name)], "loss_weights": [1.0]}
    trainer = trainer_of(new, old, mask, **more)
    wanted = module.DPOTrainer._compute_loss(trainer, masked_model(new, mask), inputs_of(mask), False)
    answers = o.Answers.of(new, mask, old)
    assert_same(wanted, o.PREFERENCE_LOSSES[name].loss(answers[:4], answers[4:], PAIRS).mean(), new)


@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_the_loss_of_labelled_answers_is_trls(shift):
    """The baseline is 0 where the mean difference, moved by `shift`, is below 0."""
    module = pytest.importorskip("trl.trainer.kto_trainer")
    new, old, mask = tokens()
    means = iter([old.sum(1) + shift, old.sum(1)])
    more = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "calculate_KL": True, "loss_type": "kto"}
    trainer = trainer_of(new, old, mask, **more, _compute_kl_logps=lambda model, batch: next(means))
    labels = torch.tensor([True, False, True, True, False, False, True, False])
    batch = inputs_of(mask) | {"label": labels}
    wanted = module.KTOTrainer._compute_loss(trainer, masked_model(new, mask), batch, False)
    baseline = torch.tensor(max(shift, 0.0), dtype=torch.float64)
    assert_same(wanted, o.kto_loss(o.Answers.of(new, mask, old), labels, baseline, PAIRS).mean(), new)


def test_orpo_is_trls():
    """TRL adds the cross-entropy over the tokens of the whole batch; ours is one mean per answer, so it is left out."""
    module = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    new, _, mask = tokens()
    answers = o.Answers.of(new, mask)
    trainer = SimpleNamespace(beta=PAIRS.odds_weight, accelerator=ALONE)
    found = module.ORPOTrainer.odds_ratio_loss(trainer, answers.mean[:4], answers.mean[4:])[0]
    chosen, rejected = answers[:4], answers[4:]
    got = o.orpo_loss(chosen, rejected, PAIRS) + chosen.mean
    assert_same(-found.mean(), got.mean(), new)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_is_trls(smoothing):
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    new, _, mask = tokens()
    answers = o.Answers.of(new, mask)
    numbers = {"alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.3, "label_smoothing": smoothing}
    trainer = SimpleNamespace(loss_type="simpo", accelerator=ALONE, **numbers)
    wanted = module.CPOTrainer.cpo_loss(trainer, answers.mean[:4], answers.mean[4:])[0]
    settings = o.PreferenceSettings(beta=2.0, gamma=0.3, label_smoothing=smoothing)
    assert_same(wanted.mean(), o.simpo_loss(answers[:4], answers[4:], settings).mean(), new)


@pytest.mark.parametrize("centre", [None, 0.05])
def test_the_loss_of_a_reward_model_is_trls(centre):
    module = pytest.importorskip("trl.trainer.reward_trainer")
    rewards = torch.randn(8, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    args = SimpleNamespace(center_rewards_coefficient=centre)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=args,
        accelerator=ALONE,
        _metrics={"train": Metrics()},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(8, 3)}
    wanted = module.RewardTrainer.compute_loss(trainer, lambda **own: SimpleNamespace(logits=rewards), inputs)
    assert_same(wanted, o.reward_loss(rewards[:4, 0], rewards[4:, 0], centre or 0.0).mean(), rewards)


@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0)])
def test_divergences_from_a_teacher_are_trls(name, beta):
    """TRL's generalised Jensen-Shannon divergence is the forward one at beta 0 and the reverse one at beta 1."""
    module = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    g = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(3, 5, 11, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.where(torch.rand(3, 5, generator=g) < 0.4, -100, 1)
    student.requires_grad_()
    wanted = module.GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta)
    kept = labels >= 0
    assert_same(wanted, o.distillation_loss(student[kept], teacher[kept], name).mean(), student)
