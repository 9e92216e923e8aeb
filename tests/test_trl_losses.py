"""Policy losses of TRL's GRPO trainer on the tensors that ours get; skipped where trl is not installed."""

from types import SimpleNamespace

import pytest
import torch
from test_objectives import case

from llm import objectives as o

pytestmark = pytest.mark.slow
LOSSES = ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"]  # TRL has no reinforce and no ipo_rl
LIMIT = 9


def trl_loss(name, new, old, ref, rho, advantages, mask, kl):
    """Return the loss of TRL's trainer for given log-probabilities, without its models and its logging."""
    module = pytest.importorskip("trl.trainer.grpo_trainer")
    own = o.POLICY_LOSSES[name]
    args = SimpleNamespace(
        delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, use_bias_correction_kl=False
    )

    class Metrics(dict):
        def __missing__(self, key):
            return self.setdefault(key, [])

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
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
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
