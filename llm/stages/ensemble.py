"""Pretraining that also learns what several models say together: an ensemble in one model (`stage.teachers`).

Models that differ by their seed err in different places, so the mean of their distributions q is better than each. The
student's loss at a token x is

    (1 - a) (-log p(x)) + a sum q (log q - log p)

with p its own distribution and a = `stage.teacher_share` (Hinton et al., arXiv 1503.02531; chains of ensembles and
students: slowrun, 2026). Teachers stand still and run without gradient beside each pass of the student.
"""

import torch
import torch.nn.functional as F

from llm.model.cross_entropy import softcapped
from llm.model.gpt import GPT
from llm.model.soft_targets import soft_cross_entropy
from llm.stages.common import load_further

SHARE = 0.5


class EnsembleObjective:
    """Loss of a micro-batch of text: its cross-entropy and the divergence from the mean of `teachers`.

    share: of the divergence in the loss. Beside the loss, in nats summed over the trained tokens, the sums
    `cross_entropy` and `divergence` are returned.
    """

    def __init__(self, teachers: list[GPT], share: float):
        self.teachers, self.share = [teacher.requires_grad_(False).eval() for teacher in teachers], share

    def __call__(self, net: GPT, micro: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs, targets = micro["inputs"], micro["targets"]
        mask = targets >= 0
        if not mask.any():
            return net(inputs, targets, reduction="sum"), {}
        for teacher in self.teachers:
            teacher.to(net.device).compute_dtype = net.compute_dtype
        with torch.no_grad():
            theirs = [self.output(teacher, inputs, mask) for teacher in self.teachers]

        def mean(rows: slice) -> torch.Tensor:
            q = sum(softcapped(F.linear(x[rows], head), bound).softmax(-1) for x, head, bound in theirs)
            return q.div_(len(theirs))

        def head(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            whole, c = net.head_weight[: net.config.vocab_size], net.config
            how = (c.bound, self.share, mean, net.head_products)
            return soft_cross_entropy(hidden[mask], whole, targets[mask], *how)

        loss, nats, divergence = net(inputs, head=head)
        return loss, {"cross_entropy": nats, "divergence": divergence}

    @staticmethod
    def output(teacher: GPT, inputs: torch.Tensor, mask: torch.Tensor) -> tuple:
        """Return a teacher's hidden states (N, C) at the trained tokens, its head, and the bound of its logits."""
        hidden = teacher.hidden(inputs)[mask]
        return hidden, teacher.head_weight[: teacher.config.vocab_size].to(hidden.dtype), teacher.config.bound


def ensemble_objective(cfg, net: GPT, tokenizer) -> EnsembleObjective | None:
    """Return the objective of `stage.teachers`, None where there are none.

    Raises UserError for a teacher with another tokenizer or a shorter context.
    """
    if not cfg.stage.teachers:
        return None
    named = [(f"stage.teachers.{i}", name) for i, name in enumerate(cfg.stage.teachers)]
    teachers = [load_further(cfg, key, name, "teacher", net, tokenizer)[0] for key, name in named]
    return EnsembleObjective(teachers, SHARE if cfg.stage.teacher_share is None else cfg.stage.teacher_share)
