"""Cross-entropy over a sample of the vocabulary, for training steps: the head multiplies by the rows in the sample.

The sample holds all targets of a micro-batch and negatives of a strided sweep: with a stride s that shares no divisor
with the vocabulary V, token (i s) mod V for i from `step` x (size of the sample) on, leaving out the targets. The loss
is -z_goal + ln sum e^z over the sample, uncorrected for its chances; the gradient of all other rows is zero. Source:
sampled softmax of modded-nanogpt, track 1 (2026-08), whose sample grows and is whole at the end.
"""

import math

import torch

MULTIPLE = 64  # tokens in a sample, for fast products


def sweep_stride(vocab_size: int) -> int:
    """Return the stride of the sweep: near 0.618 of the vocabulary, without a common divisor."""
    stride = max(1, round(0.618 * vocab_size))
    while math.gcd(stride, vocab_size) > 1:
        stride += 1
    return stride


def sample_vocabulary(targets: torch.Tensor, vocab_size: int, share: float, step: int) -> torch.Tensor | None:
    """Return the token ids (P,) of a sample: all `targets` (-1 = none) and negatives, or None for the vocabulary.

    P is `share` of the vocabulary in whole multiples of 64, twice that, and so on, until all targets fit.
    """
    size = math.ceil(share * vocab_size / MULTIPLE) * MULTIPLE
    if size >= vocab_size:
        return None
    wanted = torch.zeros(vocab_size + 1, dtype=torch.bool, device=targets.device)
    wanted[targets.flatten()] = True  # -1 is the place behind the vocabulary
    wanted = wanted[:vocab_size]
    if targets.numel() > size:  # else they fit; on a GPU, counting makes the host wait
        count = int(wanted.sum())
        while size < count:
            size *= 2
    if size >= vocab_size:
        return None
    order = (torch.arange(vocab_size, device=targets.device) + step * size) * sweep_stride(vocab_size) % vocab_size
    return order[torch.argsort((~wanted[order]).byte(), stable=True)[:size]]


def sampled_head(weight: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows (P, C) of a head (V, C) for the sample `ids` (P,), and targets as numbers of these rows.

    All targets must be in the sample; -1 stays. `linear_cross_entropy` of both is the loss over the sample.
    """
    place = targets.new_full((len(weight) + 1,), -1)
    place[ids] = torch.arange(len(ids), device=ids.device)
    return _Rows.apply(weight, ids), place[targets]


class _Rows(torch.autograd.Function):
    """`weight[ids]` for distinct ids, whose gradient is written row by row instead of being added."""

    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return weight[ids]

    @staticmethod
    def backward(ctx, grad):
        d_weight = grad.new_zeros(ctx.shape)
        d_weight[ctx.saved_tensors[0]] = grad
        return d_weight, None
