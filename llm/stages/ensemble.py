"""Pretraining that also learns what several models say together: an ensemble in one model (`stage.teachers`).

Models that differ by their seed err in different places, so the mean of their distributions q is better than each. The
student's loss at a token x is

    (1 - a) (-log p(x)) + a sum q (log q - log p)

with p its own distribution and a = `stage.teacher_share` (Hinton et al., arXiv 1503.02531; chains of ensembles and
students: slowrun, 2026). Teachers stand still and run without gradient beside each pass of the student.
"""

import torch

from llm.model.gpt import GPT
from llm.objectives import CHUNK_ELEMENTS, chunked_distillation
from llm.stages.common import load_further

SHARE = 0.5


class EnsembleObjective:
    """Loss of a micro-batch of text: its cross-entropy and the divergence from the mean of `teachers`.

    share: of the divergence in the loss. Beside the loss, in nats summed over the trained tokens, the sums
    `cross_entropy` and `divergence` are returned.
    """

    def __init__(self, teachers: list[GPT], share: float):
        self.teachers, self.share = [teacher.requires_grad_(False).eval() for teacher in teachers], share
        self.widths = [teacher.config.n_embd for teacher in teachers]

    def __call__(self, net: GPT, micro: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs, targets = micro["inputs"], micro["targets"]
        mask = targets >= 0
        if not mask.any():
            return net(inputs, targets, reduction="sum"), {}
        for teacher in self.teachers:
            teacher.to(net.device).compute_dtype = net.compute_dtype
        with torch.no_grad():
            theirs = torch.cat([teacher.hidden(inputs)[mask] for teacher in self.teachers], dim=-1)
        chunk = max(1, CHUNK_ELEMENTS // net.config.vocab_size)

        def head(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows = (hidden[mask], theirs, targets[mask])
            return chunked_distillation(net.logits, self.mean_logits, *rows, "forward_kl", chunk)

        divergences, logprobs = net(inputs, head=head)
        divergence, nats = divergences.sum(), -logprobs.sum()
        sums = {"cross_entropy": nats.detach(), "divergence": divergence.detach()}
        return (1 - self.share) * nats + self.share * divergence, sums

    def mean_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the log (n, V) of the mean distribution for the teachers' outputs side by side (n, sum of widths)."""
        parts = zip(self.teachers, hidden.split(self.widths, dim=-1), strict=True)
        return torch.stack([teacher.logits(x).log_softmax(-1) for teacher, x in parts]).logsumexp(0)


def ensemble_objective(cfg, net: GPT, tokenizer) -> EnsembleObjective | None:
    """Return the objective of `stage.teachers`, None where there are none.

    Raises UserError for a teacher with another tokenizer or a shorter context.
    """
    if not cfg.stage.teachers:
        return None
    named = [(f"stage.teachers.{i}", name) for i, name in enumerate(cfg.stage.teachers)]
    teachers = [load_further(cfg, key, name, "teacher", net, tokenizer)[0] for key, name in named]
    return EnsembleObjective(teachers, SHARE if cfg.stage.teacher_share is None else cfg.stage.teacher_share)
