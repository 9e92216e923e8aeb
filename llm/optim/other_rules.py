"""Further rules for matrices: Adam on the hyperball, and Dion, which makes a low-rank part of the momentum orthogonal.

Like Muon's they work on stacks (n, r, c) of matrices of one shape.
"""

import torch

from llm.optim.muon_switches import on_hyperball, stacked, write
from llm.optim.update_rules import MatrixRule


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
    done = stacked(states, "step")[:, :, None].double()
    root = square.div_((1 - beta2**done).to(g)).sqrt_().add_(group["eps"])
    return mean.div_((1 - beta1**done).to(g)).div_(root).mul_(-group["lr"])


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


ADAMH = MatrixRule(adam_step, adam_state, on_hyperball, needs=("betas", "eps"))
DION = MatrixRule(dion_step, dion_state, needs=("momentum", "dion_rank"))
