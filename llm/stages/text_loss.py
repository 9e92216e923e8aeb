"""The loss of pretraining steps where a switch of the stage makes it another than the plain cross-entropy.

It is a pure function of weights, micro-batch and step, so a resumed run needs nothing saved. Validation never uses it.
"""

from dataclasses import dataclass, fields

import torch

from llm.model.gpt import GPT
from llm.model.sampled_softmax import sample_vocabulary, sampled_cross_entropy

# Until which share of the steps the sample of the vocabulary is how many times its first size; behind, it is whole.
SAMPLE_GROWTH = ((0.57, 1.0), (0.81, 1.4), (0.93, 2.45))


def sample_share(first: float | None, done: float) -> float:
    """Return the share of the vocabulary in the softmax where the share `done` of the steps is over."""
    return min(1.0, next((first * growth for end, growth in SAMPLE_GROWTH if done < end), 1.0)) if first else 1.0


@dataclass(frozen=True)
class TextLoss:
    """The summed loss of a micro-batch by the switches of stage=pretrain, each None where it is off."""

    sampled_softmax: float | None = None

    @classmethod
    def of(cls, stage) -> "TextLoss | None":
        """Return the loss that the keys of a stage ask for; None where all are off, or the stage has none."""
        keys = {field.name: getattr(stage, field.name, None) for field in fields(cls)}
        return cls(**keys) if any(value is not None for value in keys.values()) else None

    def __call__(self, net: GPT, micro: dict, done: float, step: int) -> torch.Tensor:
        """Return the summed loss in nats. done: share of the steps that is over; step: their number."""
        targets, weights = micro["targets"], micro.get("weights")
        vocab_size = net.config.vocab_size
        ids = sample_vocabulary(targets, vocab_size, sample_share(self.sampled_softmax, done), step)
        if ids is None:
            return net(micro["inputs"], targets, reduction="sum", token_weights=weights)

        def head(hidden: torch.Tensor) -> torch.Tensor:
            parts = (net.config.bound, ids, weights, net.loss_kernel)
            return sampled_cross_entropy(hidden, net.head_weight, targets, *parts)

        return net(micro["inputs"], head=head)
