"""Fused linear head, soft cap and cross-entropy, a chunk of tokens at a time: full logits never exist.

A summed loss computes its gradients in the forward pass and keeps nothing else (the idea of Liger Kernel, arXiv
2410.10989). Losses of single tokens keep one number per token and repeat the product in the backward pass. Both are
exact.
"""

import torch
import torch.nn.functional as F

from llm.model import loss_cpu
from llm.model.fp8 import MULTIPLE
from llm.model.logit_bound import Bound, bound_of

# Logits held at a time: those of a chunk in the compute dtype (a few large matrix products), and of a chunk those of a
# tile in fp32 (on a CPU as many as stay in its cache).
CHUNK_ELEMENTS = {"cpu": (1 << 24, 1 << 19), "cuda": (1 << 28, 1 << 27)}
OTHER_CHUNK_ELEMENTS = (1 << 25, 1 << 25)
MIN_TOKENS = 256  # in a chunk or tile


class Products:
    """The products of a head (V, C) with hidden states (n, C), and with gradients of their logits (n, V)."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states."""
        return F.linear(hidden, self.weight)

    def put_d_hidden(self, d_logits: torch.Tensor, out: torch.Tensor) -> None:
        """Write the gradient of hidden states into `out`."""
        torch.mm(d_logits, self.weight, out=out)

    def add_d_weight(self, d_logits: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor) -> None:
        """Add the gradient of the head to `total`, which is fp32."""
        if total.dtype == d_logits.dtype:
            total.addmm_(d_logits.T, hidden)
        else:
            total += d_logits.T @ hidden

    @staticmethod
    def takes(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
        """Return whether these products are made for matrices of such sizes."""
        return True


def softcapped(logits: torch.Tensor, cap: float | Bound | None) -> torch.Tensor:
    """Return cap * tanh(logits / cap), or what another bound makes of them, in fp32; cap None: only cast."""
    bound = bound_of(cap)
    return logits.float() if bound is None else bound.height * torch.tanh(_shifted(logits, bound) / bound.width)


def _shifted(logits: torch.Tensor, bound: Bound) -> torch.Tensor:
    return logits.float() + bound.shift if bound.shift else logits.float()


def chunk_loss(logits: torch.Tensor, goal: torch.Tensor, scale: torch.Tensor | None, cap: float | Bound | None):
    """Return the losses (n,) of raw logits (n, V) against goals (n, 1), in nats, by eager PyTorch.

    With `scale` (n, 1), `logits` is overwritten with the gradient of sum(losses * scale) with respect to it.
    """
    bound, z = bound_of(cap), logits.float()
    if bound is None:
        log_z = z.logsumexp(dim=1, keepdim=True)
        losses = (log_z - z.gather(1, goal)).squeeze(1)
        if scale is not None:
            logits.copy_((z - log_z).exp_().mul_(scale).scatter_add_(1, goal, -scale))
        return losses
    t = (z.add_(bound.shift) if bound.shift else z).div_(bound.width).tanh_()
    at_goal = t.gather(1, goal)
    e = torch.mul(t, bound.height).exp_()  # no maximum to subtract: the cap keeps e^z finite
    total = e.sum(dim=1, keepdim=True)
    losses = (total.log() - bound.height * at_goal).squeeze(1)
    if scale is not None:
        d_logits = e.mul_(scale / total).scatter_add_(1, goal, -scale)
        d_logits.addcmul_(d_logits, t.square_(), value=-1)  # d tanh = 1 - tanh^2
        logits.copy_(d_logits if bound.height == bound.width else d_logits.mul_(bound.height / bound.width))
    return losses


def many_goal_loss(logits: torch.Tensor, goals: torch.Tensor, scales: torch.Tensor, cap, run) -> torch.Tensor:
    """Return sum_k scales_k losses_k (n,) of goals (n, K), and overwrite `logits` (n, V) with its gradient.

    scales: (n, K), 0 for a goal that is none. run(logits, goal, scale, cap) computes one goal, as `chunk_loss` does.
    All goals share its softmax; only the gradients at the goals are put right behind it.
    """
    bound, x = bound_of(cap), logits.gather(1, goals).float()
    z = softcapped(x, bound)
    slope = 1.0 if bound is None else (1 - (z / bound.height).square()) * (bound.height / bound.width)
    total = scales.sum(dim=1, keepdim=True)
    log_z = run(logits, goals[:, :1].contiguous(), total, cap).unsqueeze(1) + z[:, :1]
    due = ((goals.unsqueeze(2) == goals.unsqueeze(1)) * scales.unsqueeze(1)).sum(dim=2)  # goals may be equal
    logits.scatter_(1, goals, (((z - log_z).exp() * total - due) * slope).to(logits.dtype))
    return ((log_z - z) * scales).sum(dim=1)


def fused_chunk_loss(logits: torch.Tensor, goal: torch.Tensor, scale: torch.Tensor | None, cap: float | Bound | None):
    """Compute `chunk_loss` in a form that torch.compile turns into two passes over the chunk.

    It writes tanh(x) as 1 - 2 / (e^2x + 1).
    """
    if scale is None or cap is None:
        return chunk_loss(logits, goal, scale, cap)
    height, width, _ = bound = bound_of(cap)
    t = 1 - 2 / ((_shifted(logits, bound) * (2 / width)).exp() + 1)
    e = (t * height).exp()
    total = e.sum(dim=1, keepdim=True)
    losses = (total.log() - height * t.gather(1, goal)).squeeze(1)
    is_goal = torch.arange(t.size(1), device=t.device).unsqueeze(0) == goal
    slope = (1 - t * t) if height == width else (1 - t * t) * (height / width)
    logits.copy_((e * (scale / total) - torch.where(is_goal, scale, 0.0)) * slope)
    return losses


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | Bound | None,
    token_weights: torch.Tensor | None = None,
    reduction: str = "sum",
    kernel=chunk_loss,
    products: type[Products] = Products,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy in nats of softcap * tanh(hidden @ weight^T / softcap) against `targets`.

    hidden: (..., C) in the compute dtype; weight: (V, C), the true vocabulary only; targets: (...) long, -1 = not
    trained, loss 0; softcap: None = no cap, or a `Bound` of another form; token_weights: (...) factors of the tokens'
    losses; reduction: sum | mean (over trained tokens) | none | both; kernel: `chunk_loss`, or `fused_chunk_loss`
    compiled, which serves where our own kernel for CPUs (`llm.model.loss_cpu`) is missing; products: the kind of
    summed losses, e.g. those of `llm.model.fp8`, where it takes the sizes. Returns an fp32 scalar, or losses with the
    shape of `targets`; for both the sum, and losses without factors and without gradient.

    Tokens with K goals have targets and token_weights (..., K), and reduction sum alone; the first goal says whether
    the token is trained.
    """
    several = targets.dim() == hidden.dim()
    flat, goals, factors = (
        hidden.flatten(0, -2),
        *(None if t is None else t.flatten(0, -2) if several else t.flatten() for t in (targets, token_weights)),
    )
    trained, main = None, goals[:, 0] if several else goals
    if goals.device.type == "cpu" and (main < 0).any():  # on a GPU, counting them would make the host wait
        trained = (main >= 0).nonzero().squeeze(1)
        flat, goals = flat[trained], goals[trained]
        factors = None if factors is None else factors[trained]
    weight = weight.to(flat.dtype)
    if reduction == "none":
        losses = _TokenLosses.apply(flat, weight, goals, softcap)
        return _put_back(losses if factors is None else losses * factors, trained, targets)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, losses = _SummedLoss.apply(flat, weight, goals, factors, softcap, with_grad, kernel, products)
    if reduction == "both":
        return total, _put_back(losses, trained, targets)
    return total / (goals >= 0).sum() if reduction == "mean" else total


def _put_back(losses: torch.Tensor, trained: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    """Return losses (n,) of the flat positions `trained` in the shape of `targets`, 0 elsewhere; None = of all."""
    if trained is not None:
        losses = torch.zeros(targets.numel()).index_put((trained,), losses)
    return losses.view_as(targets)


def _run(
    hidden,
    weight,
    goals,
    factors,
    softcap,
    with_grad: bool,
    kernel=chunk_loss,
    trains_head: bool = True,
    kind: type[Products] = Products,
):
    """Return the losses (N,) without factors and, if `with_grad`, the gradients of sum(losses * factors).

    hidden: (N, C); weight: (V, C); goals, factors: (N,), or (N, K), whose losses come with factors and summed. The
    gradients are those of hidden and, if `trains_head`, of weight, else None.
    """
    elements, tile_elements = CHUNK_ELEMENTS.get(hidden.device.type, OTHER_CHUNK_ELEMENTS)
    tile = max(MIN_TOKENS, tile_elements // len(weight) // MULTIPLE * MULTIPLE)
    chunk = max(MIN_TOKENS, elements // len(weight)) // tile * tile  # whole tiles, which a compiled kernel is made for
    if hidden.device.type != "cpu":  # no token was left out there, so the tile has one fixed size
        tile = min(tile, len(goals))
    trained = (goals >= 0).float()
    scales = trained if factors is None else trained * factors
    several, goals = goals.dim() > 1, goals.clamp(min=0)
    goals = goals if several else goals.unsqueeze(1)

    def one_goal(logits, goal, scale, cap):
        if loss_cpu.computes(logits):
            return loss_cpu.row_losses(logits, goal, scale, cap)
        return _in_tiles(logits, goal, scale, cap, kernel, tile)

    losses = hidden.new_empty(len(goals), dtype=torch.float32)
    d_hidden = torch.empty_like(hidden) if with_grad else None
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if with_grad and trains_head else None
    products = kind(weight) if kind.takes(hidden, weight) else Products(weight)
    for start in range(0, len(goals), chunk):
        rows = slice(start, start + chunk)
        logits = products.logits(hidden[rows])
        if several:
            losses[rows] = many_goal_loss(logits, goals[rows], scales[rows], softcap, one_goal)
        else:
            scale = scales[rows].unsqueeze(1) if with_grad else None
            losses[rows] = one_goal(logits, goals[rows], scale, softcap)
        if not with_grad:
            continue
        products.put_d_hidden(logits, d_hidden[rows])
        if d_weight is not None:
            products.add_d_weight(logits, hidden[rows], d_weight)
    return losses if several else losses.mul_(trained), d_hidden, d_weight


def _in_tiles(logits, goals, scale, softcap, kernel, tile: int) -> torch.Tensor:
    """Return the losses of a chunk by `kernel`, `tile` rows at a time. A compiled kernel is made for whole tiles."""
    losses = torch.empty(len(logits), device=logits.device)
    for first in range(0, len(logits), tile):
        rows = slice(first, first + tile)
        run = kernel if first + tile <= len(logits) else chunk_loss
        losses[rows] = run(logits[rows], goals[rows], None if scale is None else scale[rows], softcap)
    return losses


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, goals, factors, softcap, with_grad: bool, kernel, products):
        trains_head = with_grad and ctx.needs_input_grad[1]
        losses, *ctx.gradients = _run(hidden, weight, goals, factors, softcap, with_grad, kernel, trains_head, products)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum() if factors is None or goals.dim() > 1 else (losses * factors).sum(), losses

    @staticmethod
    def backward(ctx, grad, _):
        d_hidden, d_weight = ctx.gradients
        d_weight = None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden * grad.to(d_hidden.dtype), d_weight, *(None,) * 6


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, goals, softcap):
        ctx.save_for_backward(hidden, weight, goals)
        ctx.softcap = softcap
        return _run(hidden, weight, goals, None, softcap, with_grad=False)[0]

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, goals = ctx.saved_tensors
        trains_head = ctx.needs_input_grad[1]
        _, d_hidden, d_weight = _run(hidden, weight, goals, grad, ctx.softcap, True, trains_head=trains_head)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None
