"""Fused linear head and cross-entropy against a mixture of the true token and a distribution, a chunk at a time.

As in `llm.model.cross_entropy` full logits never exist, and a loss computes its gradients in the forward pass: those of
the logits are p - (1 - s) [the token] - s q, times the slope of the soft cap, with the head's distribution p, the other
one q and its share s.
"""

from collections.abc import Callable

import torch

from llm.model.cross_entropy import CHUNK_ELEMENTS, MIN_TOKENS, OTHER_CHUNK_ELEMENTS, Products, softcapped
from llm.model.fp8 import MULTIPLE
from llm.model.logit_bound import Bound, bound_of

Distribution = Callable[[slice], torch.Tensor]  # rows of the hidden states -> probabilities (n, V), fp32


def soft_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    goals: torch.Tensor,
    softcap: float | Bound | None,
    share: float,
    others: Distribution,
    products: type[Products] = Products,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (1 - share) nats + share divergence, nats and divergence, summed over tokens: fp32 scalars.

    nats: -log p of goals (N,), for hidden states (N, C) in the compute dtype, a head (V, C), and `softcap` as in
    `linear_cross_entropy`, as `products` is; divergence: sum q (log q - log p), with the q of `others`. The first has a
    gradient.
    """
    return _SoftTargets.apply(hidden, weight.to(hidden.dtype), goals, softcap, share, others, products)


class _SoftTargets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, goals, softcap, share: float, others: Distribution, kind: type[Products]):
        elements, tile_elements = CHUNK_ELEMENTS.get(hidden.device.type, OTHER_CHUNK_ELEMENTS)
        sizes = (size // len(weight) // MULTIPLE * MULTIPLE for size in (elements, tile_elements))
        chunk, tile = (max(MIN_TOKENS, size) for size in sizes)
        products = kind(weight) if kind.takes(hidden, weight) else Products(weight)
        goals, sums = goals.unsqueeze(1), hidden.new_zeros(2, dtype=torch.float32)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(goals), chunk):
            rows = slice(start, start + chunk)
            logits = products.logits(hidden[rows])
            for first in range(0, len(logits), tile):
                part = slice(start + first, min(start + first + tile, start + chunk))
                sums += _tile_loss(logits[first : first + tile], goals[part], softcap, share, others(part))
            products.put_d_hidden(logits, d_hidden[rows])
            products.add_d_weight(logits, hidden[rows], d_weight)
        ctx.gradients, ctx.weight_dtype = (d_hidden, d_weight), weight.dtype
        nats, divergence = sums.unbind()
        ctx.mark_non_differentiable(nats, divergence)
        return (1 - share) * nats + share * divergence, nats, divergence

    @staticmethod
    def backward(ctx, grad, *_):
        d_hidden, d_weight = ctx.gradients
        return d_hidden * grad.to(d_hidden.dtype), (d_weight * grad).to(ctx.weight_dtype), *(None,) * 5


def _tile_loss(logits: torch.Tensor, goals: torch.Tensor, softcap, share: float, q: torch.Tensor) -> torch.Tensor:
    """Return the summed nats and divergence (2,), and overwrite raw logits (n, V) with the gradient of the loss."""
    z, bound = softcapped(logits, softcap), bound_of(softcap)
    log_z = z.logsumexp(dim=1, keepdim=True)
    nats = log_z.sum() - z.gather(1, goals).sum()
    divergence = torch.special.xlogy(q, q).sum() - torch.dot(q.flatten(), z.flatten()) + log_z.sum()
    d_logits = (z - log_z).exp_().sub_(q, alpha=share)
    d_logits.scatter_add_(1, goals, torch.full_like(goals, share - 1, dtype=d_logits.dtype))
    if bound is not None:
        slope = z.div_(bound.height).square_().neg_().add_(1.0)
        d_logits.mul_(slope if bound.height == bound.width else slope.mul_(bound.height / bound.width))
    logits.copy_(d_logits)
    return torch.stack((nats, divergence))
