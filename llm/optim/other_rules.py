"""Further rules: Adam on the hyperball, Dion, which makes a low-rank part of the momentum orthogonal, and lazy AdamW.

The first two are for matrices; like Muon's they work on stacks (n, r, c) of matrices of one shape.
"""

import torch

from llm.optim import row_adamw_cpu
from llm.optim.muon_switches import on_hyperball, stacked, write
from llm.optim.update_rules import ElementwiseRule, MatrixRule, unwaited


def adam_state(group: dict, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return Adam's state of a matrix (r, c)."""
    return {"exp_avg": torch.zeros_like(matrix), "exp_avg_sq": torch.zeros_like(matrix), "step": torch.zeros(1)}


def adam_step(group: dict, grads: list[torch.Tensor], states: list[dict]) -> torch.Tensor:
    """Return Adam's steps (n, r, c): -lr m^ / (sqrt v^ + eps), with m^ and v^ corrected for their beginning at zero."""
    (beta1, beta2), g = group["betas"], torch.stack(grads)
    mean = stacked(states, "exp_avg").lerp_(g, 1 - beta1)
    square = stacked(states, "exp_avg_sq").lerp_(g.square(), 1 - beta2)
    write(states, "exp_avg", mean)
    write(states, "exp_avg_sq", square)
    for state in states:
        state["step"] += 1
    done = stacked(states, "step")[:, :, None].double()  # on the host
    first, second = (unwaited((1 - beta**done).to(g.dtype), g.device) for beta in (beta1, beta2))
    root = square.div_(second).sqrt_().add_(group["eps"])
    return mean.div_(first).div_(root).mul_(-group["lr"])


def dion_state(group: dict, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return Dion's state of a matrix (r, c): its momentum, and a basis (c, k) that begins at random, equal everywhere.

    k is `dion_rank` times the shorter side, at least 1.
    """
    rank = max(1, round(group["dion_rank"] * min(matrix.shape)))
    basis = torch.randn(matrix.size(1), rank, generator=torch.Generator().manual_seed(0))
    basis = (basis / basis.norm(dim=0)).to(matrix.device, matrix.dtype)
    return {"momentum_buffer": torch.zeros_like(matrix), "basis": basis}


def dion_step(group: dict, grads: list[torch.Tensor], states: list[dict]) -> torch.Tensor:
    """Return Dion's steps (n, r, c): -lr sqrt(r / c) P Q', of rank k.

    With B = m + g: P = qr(B Q), one power iteration from the last Q; S = B' P; m = B - (1 - momentum) P S', so what the
    low rank leaves out stays in the momentum; Q = columns of S at length 1. arXiv 2504.05295, algorithm 1.
    """
    whole = stacked(states, "momentum_buffer").add_(torch.stack(grads))
    left = torch.linalg.qr(whole @ stacked(states, "basis")).Q
    right = whole.mT @ left
    write(states, "momentum_buffer", torch.baddbmm(whole, left, right.mT, alpha=group["momentum"] - 1))
    basis = right / right.norm(dim=-2, keepdim=True).clamp_min(1e-30)
    write(states, "basis", basis)
    rows, cols = grads[0].shape
    return (left @ basis.mT).mul_(-group["lr"] * (rows / cols) ** 0.5)


def row_adamw_update(group: dict, params: list[torch.Tensor], grads: list[torch.Tensor], states: list[dict]) -> None:
    """Update by AdamW what has a gradient other than 0, in place; weights, averages and decay of the rest stand still.

    For tables of which a step uses few rows, as torch.optim.SparseAdam. A gradient that names them in `rows` (see
    `llm.model.ngrams`) costs time for these alone.
    """
    for param, grad, state in zip(params, grads, states, strict=True):
        state["step"] = state["step"].to(param.device) + 1
        whole = (param, state["exp_avg"], state["exp_avg_sq"])
        rows = torch.cat(grad.rows).unique() if hasattr(grad, "rows") else None
        if row_adamw_cpu.computes((grad, *whole)):
            row_adamw_cpu.update(group, (grad, *whole), rows, state["step"].item())
            continue
        if rows is None:
            lazy_adamw(group, grad, *whole, state["step"])
            continue
        parts = [tensor.index_select(0, rows) for tensor in whole]
        lazy_adamw(group, grad.index_select(0, rows), *parts, state["step"])
        for tensor, part in zip(whole, parts, strict=True):
            tensor.index_copy_(0, rows, part)


def lazy_adamw(group: dict, grad, weight, mean, square, step: torch.Tensor) -> None:
    """Write AdamW's weights and averages where `grad` is not 0; all of one shape. step (): steps with this one."""
    (beta1, beta2), seen = group["betas"], grad != 0
    new_mean, new_square = mean.lerp(grad, 1 - beta1), square.lerp(grad.square(), 1 - beta2)
    root = (new_square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    moved = weight * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * (new_mean / (1 - beta1**step) / root)
    for tensor, new in ((weight, moved), (mean, new_mean), (square, new_square)):
        tensor.copy_(torch.where(seen, new, tensor))


ROW_ADAMW = ElementwiseRule(
    row_adamw_update, state=("exp_avg", "exp_avg_sq"), scalars=("step",), needs=("betas", "eps")
)
ADAMH = MatrixRule(adam_step, adam_state, on_hyperball, needs=("betas", "eps"))
DION = MatrixRule(dion_step, dion_state, needs=("momentum", "dion_rank"))
