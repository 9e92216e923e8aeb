"""A reward model: the parent's network with a head of one number, trained so that better answers get higher numbers.

The reward of a conversation is the number at the last token of its last answer. The loss of a pair is
-log sigmoid(r_chosen - r_rejected), plus stage.centre (r_chosen + r_rejected)^2 (`llm.objectives.reward_loss`).
"""

from pathlib import Path

import torch

from llm.eval.preferences import scalar_rewards
from llm.objectives import reward_loss
from llm.stages.common import BuiltStage, load_parent
from llm.stages.preferences import build_stage, read_sources, usable_rows


class RewardObjective:
    """Loss of a micro-batch of pairs, and sums for metrics.csv: accuracy, margin, and the mean reward."""

    def __init__(self, centre: float):
        self.centre = centre

    def __call__(self, net, micro: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if "last" not in micro:  # nothing but padding, see pad_micro_batches
            return 0.0 * net.scalars(micro["inputs"]).sum(), {}
        rewards = scalar_rewards(net, micro)
        chosen, rejected = rewards[0::2], rewards[1::2]
        gaps = (chosen - rejected).detach()
        sums = {
            "accuracy": (gaps > 0).sum() + 0.5 * (gaps == 0).sum(),
            "margin": gaps.sum(),
            "reward": rewards.detach().sum() / 2,
        }
        return reward_loss(chosen, rejected, self.centre).sum(), sums


def build(cfg, parent: Path) -> BuiltStage:
    """Build the parent's network with a scalar head, which is zero unless the parent is a reward model."""
    sources = read_sources(cfg)  # all rows are checked before weights are loaded
    net, tokenizer = load_parent(parent, cfg, scalar_head=True)
    rows = usable_rows(cfg, tokenizer, sources)
    return build_stage(cfg, net, tokenizer, rows, RewardObjective(cfg.stage.centre), scalar_rewards)
