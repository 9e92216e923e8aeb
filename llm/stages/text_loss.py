"""The loss of pretraining steps where a switch of the stage makes it another than the plain cross-entropy.

It is a pure function of weights, micro-batch and step, so a resumed run needs nothing saved. Validation never uses it,
and a trained model has nothing of it: further goals are judged by the same logits as the next token.

    multi_token w     + w CE(token after the next) + w/2 CE(the one behind); the last weight falls to 0 over the first
                      third of the steps, the other over the second third (modded-nanogpt, track 1, from
                      arXiv 2404.19737, there with heads of their own)
    prefix_token w    + w CE(the longest token that the next one begins with); w falls to 0 over two thirds of the
                      steps (prefix token prediction of modded-nanogpt, track 1, 2026-07)
    sampled_softmax   the softmax of all these is over a sample (`llm.model.sampled_softmax`)
"""

from dataclasses import dataclass

import torch

from llm.model.cross_entropy import linear_cross_entropy
from llm.model.gpt import GPT
from llm.model.sampled_softmax import sample_vocabulary, sampled_head

# Until which share of the steps the sample of the vocabulary is how many times its first size; behind, it is whole.
SAMPLE_GROWTH = ((0.57, 1.0), (0.81, 1.4), (0.93, 2.45))
SWITCHES = ("sampled_softmax", "multi_token", "prefix_token")


def sample_share(first: float | None, done: float) -> float:
    """Return the share of the vocabulary in the softmax where the share `done` of the steps is over."""
    return min(1.0, next((first * growth for end, growth in SAMPLE_GROWTH if done < end), 1.0)) if first else 1.0


def later_shares(first: float | None, done: float) -> tuple[float, float]:
    """Return the weights of the tokens two and three places ahead where the share `done` of the steps is over."""
    left = (max(0.0, min(1.0, 2 - 3 * done)), max(0.0, 1 - 3 * done))
    return (first or 0.0) * left[0], (first or 0.0) / 2 * left[1]


def prefix_share(first: float | None, done: float) -> float:
    """Return the weight of the prefix of the next token where the share `done` of the steps is over."""
    return (first or 0.0) * max(0.0, 1 - 1.5 * done)


def later(targets: torch.Tensor, places: int) -> torch.Tensor:
    """Return the targets (B, T) so many `places` ahead; -1 behind the end of a row."""
    moved = torch.full_like(targets, -1)
    moved[:, :-places] = targets[:, places:]
    return moved


def prefix_table(tokenizer) -> torch.Tensor:
    """Return by token id (V + 1,) the longest other token that it begins with; -1 for none, and for the last place."""
    ids = {token: i for i, token in enumerate(tokenizer.tokens)}
    table = torch.full((tokenizer.vocab_size + 1,), -1)
    for token, i in ids.items():
        table[i] = next((ids[token[:n]] for n in range(len(token) - 1, 0, -1) if token[:n] in ids), -1)
    return table


@dataclass
class TextLoss:
    """The summed loss of a micro-batch by the switches of stage=pretrain, each None where it is off."""

    sampled_softmax: float | None = None
    multi_token: float | None = None
    prefix_token: float | None = None
    prefixes: torch.Tensor | None = None  # of `prefix_table`, for prefix_token

    @classmethod
    def of(cls, stage, tokenizer) -> "TextLoss | None":
        """Return the loss that the keys of a stage ask for; None where all are off, or the stage has none."""
        keys = {name: getattr(stage, name, None) for name in SWITCHES}
        if not any(keys.values()):
            return None
        return cls(**keys, prefixes=prefix_table(tokenizer) if keys["prefix_token"] else None)

    def further(self, targets: torch.Tensor, done: float) -> list[tuple[torch.Tensor, float]]:
        """Return further goals (B, T) beside the targets (B, T), -1 = none, and the weight of each."""
        goals = [(later(targets, k), share) for k, share in enumerate(later_shares(self.multi_token, done), 1) if share]
        if share := prefix_share(self.prefix_token, done):
            self.prefixes = self.prefixes.to(targets.device)
            goals.append((self.prefixes[targets], share))
        return goals

    def __call__(self, net: GPT, micro: dict, done: float, step: int) -> torch.Tensor:
        """Return the summed loss in nats. done: share of the steps that is over; step: their number."""
        goals, factors, vocab_size = micro["targets"], micro.get("weights"), net.config.vocab_size
        if more := self.further(goals, done):
            factors = torch.ones(goals.shape, device=goals.device) if factors is None else factors
            factors = torch.stack([factors, *(factors * share for _, share in more)], dim=-1)  # nothing is sent
            goals = torch.stack([goals, *(goal for goal, _ in more)], dim=-1)  # (B, T, K)
        ids = sample_vocabulary(goals, vocab_size, sample_share(self.sampled_softmax, done), step)
        if ids is None and not more:
            return net(micro["inputs"], goals, reduction="sum", token_weights=factors)

        def head(hidden: torch.Tensor) -> torch.Tensor:
            whole = net.head_weight
            rows, places = (whole[:vocab_size], goals) if ids is None else sampled_head(whole, goals, ids)
            how = (factors, "sum", net.loss_kernel, net.head_products)
            return linear_cross_entropy(hidden, rows, places, net.config.bound, *how)

        return net(micro["inputs"], head=head)
