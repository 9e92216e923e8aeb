"""Switches of Muon, all off by default: what is made of an update before and after it is orthogonal, and of weights.

Each is a function on stacks (n, r, c) of matrices of one shape; state is changed in place. `SWITCHES` holds the names
and the off values of the hyperparameters. Formulas: w weight, g gradient, m momentum, u orthogonal update.
"""

import torch

MOST_ROTATED = 1024  # a longer side of a matrix is not rotated into its eigenbasis
EPS = 1e-8
SWITCHES = {
    "soap_beta": None,  # averaging factor of SOAP-Muon
    "soap_every": None,  # steps between turns of its eigenbases; None = SOAP_EVERY
    "muon2_beta": None,  # averaging factor of Muon^2's squares
}
DETAILS = [("soap_every", "soap_beta", 0.9)]  # what makes sense beside a switch only, with a usual value of that
SOAP_EVERY = 10


def switch_state(group: dict, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state that the switches of a group need of a matrix (r, c), before its first step."""
    state = {}
    if group["soap_beta"] is not None:
        state = {"soap_second": torch.zeros_like(matrix), "soap_steps": matrix.new_zeros(1)}
        for side, size in zip(("left", "right"), matrix.shape, strict=True):
            if size <= MOST_ROTATED:
                state[f"soap_{side}"] = matrix.new_zeros(size, size)
                state[f"soap_{side}_basis"] = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    if group["muon2_beta"] is not None:
        state["muon2_second"] = torch.zeros_like(matrix)
    return state


def soap(group: dict, update: torch.Tensor, grads: torch.Tensor, states: list[dict]) -> torch.Tensor:
    """Return momenta (n, r, c) that are divided, in the eigenbases of the gradients, by their root mean squares.

    L = EMA(g g'), R = EMA(g' g), with bases P and Q of their eigenvectors; v = EMA((P' g Q)^2); the result is
    P ((P' m Q) / (sqrt v + eps)) Q'. Every `soap_every` steps the bases make one orthogonal iteration, P = qr(L P). All
    EMAs have `soap_beta`. SOAP: arXiv 2409.11321. In front of Muon's orthogonalisation: modded-nanogpt, track 3,
    2026-06-09 (all matrices, beta 0.9, each step). A side longer than MOST_ROTATED keeps its own basis.
    """
    beta, every = group["soap_beta"], group["soap_every"] or SOAP_EVERY
    is_due = int(states[0]["soap_steps"]) % every == 0
    bases = {}
    for side, product in (("left", lambda: grads @ grads.mT), ("right", lambda: grads.mT @ grads)):
        if f"soap_{side}" not in states[0]:
            continue
        covariances, bases[side] = (stacked(states, f"soap_{side}{end}") for end in ("", "_basis"))
        covariances.lerp_(product(), 1 - beta)
        write(states, f"soap_{side}", covariances)
        if is_due:
            bases[side] = torch.linalg.qr(covariances @ bases[side]).Q
            write(states, f"soap_{side}_basis", bases[side])
    second = stacked(states, "soap_second").lerp_(rotated(grads, bases).square_(), 1 - beta)
    write(states, "soap_second", second)
    for state in states:
        state["soap_steps"] += 1
    return rotated(rotated(update, bases).div_(second.sqrt_().add_(EPS)), bases, back=True)


def rotated(x: torch.Tensor, bases: dict[str, torch.Tensor], back: bool = False) -> torch.Tensor:
    """Return P' x Q of a stack, or P x Q' if `back`; a side without a basis stays. Always a new tensor."""
    x = x.clone() if not bases else x
    if "left" in bases:
        x = (bases["left"] if back else bases["left"].mT) @ x
    if "right" in bases:
        x = x @ (bases["right"].mT if back else bases["right"])
    return x


def muon2(group: dict, update: torch.Tensor, grads: torch.Tensor, states: list[dict]) -> torch.Tensor:
    """Return momenta (n, r, c) divided by the root mean squares of the gradients: m / (sqrt v + eps).

    v = EMA(g^2) with `muon2_beta`. Muon^2: arXiv 2604.09967.
    """
    second = stacked(states, "muon2_second").lerp_(grads.square(), 1 - group["muon2_beta"])
    write(states, "muon2_second", second)
    return update / second.sqrt_().add_(EPS)


def stacked(states: list[dict], name: str) -> torch.Tensor:
    """Return a copy of one tensor of all states, (n, ...)."""
    return torch.stack([state[name] for state in states])


def write(states: list[dict], name: str, values: torch.Tensor) -> None:
    """Write a stack (n, ...) back into the states."""
    torch._foreach_copy_([state[name] for state in states], list(values.unbind(0)))
