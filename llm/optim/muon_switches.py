"""Switches of Muon, all off by default: what is made of an update before and after it is orthogonal, and of weights.

Each is a function on stacks (n, r, c) of matrices of one shape; state is changed in place. `SWITCHES` holds the names
and the off values of the hyperparameters. Formulas: w weight, g gradient, m momentum, u orthogonal update.
"""

import torch

EPS = 1e-8
SWITCHES = {
    "soap_beta": None,  # averaging factor of SOAP-Muon
    "soap_every": None,  # steps between turns of its eigenbases; None = SOAP_EVERY
    "soap_side": None,  # a longer side of a matrix is not turned into its eigenbasis; None = SOAP_SIDE
    "muon2_beta": None,  # averaging factor of Muon^2's squares
    "slow_momentum": None,  # averaging factor of a second, slower average of the gradients
    "slow_share": None,  # its share; None = SLOW_SHARE
    "normuon_rows": False,  # NorMuon along rows, also of wide matrices
    "cautious_update": False,  # keep only what does not oppose the gradient
    "row_floor": None,  # smallest length of a row's update, in lengths of its weights and lr
    "hyperball": False,  # keep the norm of every matrix
    "head_rows": None,  # rows of a head: each is orthogonalised by itself
}
# What makes sense beside a switch only, with a usual value of that.
DETAILS = [("soap_every", "soap_beta", 0.9), ("soap_side", "soap_beta", 0.9), ("slow_share", "slow_momentum", 0.98)]
DETAILS += [("normuon_rows", "normuon_beta2", 0.9)]
SOAP_EVERY, SOAP_SIDE, SLOW_SHARE = 10, 1024, 0.5
RIDGE = 1e-3  # on the diagonals of SOAP's covariances, in means of them
FROM_ZERO = 0.5  # norm to which a matrix of zeros grows on the hyperball, relative to a semi-orthogonal one


def switch_state(group: dict, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state that the switches of a group need of a matrix (r, c), before its first step."""
    state = {}
    if group["soap_beta"] is not None:
        state = {"soap_second": torch.zeros_like(matrix), "step": torch.zeros(1)}  # read by the host in every step
        for side, size in zip(("left", "right"), matrix.shape, strict=True):
            if size <= (group["soap_side"] or SOAP_SIDE):
                state[f"soap_{side}"] = matrix.new_zeros(size, size)
                state[f"soap_{side}_basis"] = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    if group["muon2_beta"] is not None:
        state["muon2_second"] = torch.zeros_like(matrix)
    if group["slow_momentum"] is not None:
        state["slow_buffer"] = torch.zeros_like(matrix)
    return state


def two_averages(group: dict, grads: list[torch.Tensor], buffers: list, states: list[dict]) -> list[torch.Tensor]:
    """Return (1 - s) m + s n for the momentum m and a slower one, n = EMA(g) with `slow_momentum`; s is `slow_share`.

    Muon's Nesterov step looks ahead along the mixture. Source: modded-nanogpt, track 3, 2026-07-13 (0.98, share 0.56
    from a quarter of the steps on); two averages in track 1, 2026-08-08. Here n begins at zero and fills up.
    """
    slow, share = [state["slow_buffer"] for state in states], group["slow_share"]
    torch._foreach_lerp_(slow, grads, 1 - group["slow_momentum"])
    return list(torch._foreach_lerp(buffers, slow, SLOW_SHARE if share is None else share))


def soap(group: dict, update: torch.Tensor, grads: torch.Tensor, states: list[dict]) -> torch.Tensor:
    """Return momenta (n, r, c) that are divided, in the eigenbases of the gradients, by their root mean squares.

    L = EMA(g g'), R = EMA(g' g), with bases P and Q of their eigenvectors; v = EMA((P' g Q)^2); the result is
    P ((P' m Q) / (sqrt v + eps)) Q'. Every `soap_every` steps the bases make one orthogonal step, P = qr((L + r) P).
    r, a thousandth of the mean of L's diagonal, changes no eigenvector; without it rounding alone would turn P where L
    has less than full rank. All EMAs have `soap_beta`. SOAP: arXiv 2409.11321. In front of Muon's orthogonalisation:
    modded-nanogpt, track 3, 2026-06-09 (all matrices, beta 0.9, each step). A side longer than `soap_side` keeps its
    own basis.
    """
    beta, every = group["soap_beta"], group["soap_every"] or SOAP_EVERY
    is_due = int(states[0]["step"]) % every == 0
    bases = {}
    for side, product in (("left", lambda: grads @ grads.mT), ("right", lambda: grads.mT @ grads)):
        if f"soap_{side}" not in states[0]:
            continue
        covariances, bases[side] = (stacked(states, f"soap_{side}{end}") for end in ("", "_basis"))
        covariances.lerp_(product(), 1 - beta)
        write(states, f"soap_{side}", covariances)
        if is_due:
            mean = covariances.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            bases[side] = torch.linalg.qr(covariances @ bases[side] + RIDGE * mean * bases[side]).Q
            write(states, f"soap_{side}_basis", bases[side])
    second = stacked(states, "soap_second").lerp_(rotated(grads, bases).square_(), 1 - beta)
    write(states, "soap_second", second)
    for state in states:
        state["step"] += 1
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


def agreeing(step: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """Return steps (n, r, c) without the numbers that go up the gradient; the rest grows by the share of what is kept.

    step 1[-step g > 0] / mean of the mask. Cautious optimizers: arXiv 2411.16085.
    """
    kept = (step * grads < 0).to(step.dtype)
    return step * kept / kept.mean(dim=(-2, -1), keepdim=True).clamp_min_(1e-3)


def floored(group: dict, params: list[torch.Tensor], step: torch.Tensor) -> torch.Tensor:
    """Return steps (n, r, c) whose rows have at least the length lr `row_floor` |row of weights|.

    Rows of zeros stay. Source: modded-nanogpt, track 3, 2026-06-19 (0.3825, with the norm of matrices held).
    """
    least = torch.stack(params).norm(dim=-1, keepdim=True) * (group["lr"] * group["row_floor"])
    lengths = step.norm(dim=-1, keepdim=True)
    return step * torch.where(lengths > 0, least / lengths.clamp_min(1e-30), 1.0).clamp_min_(1.0)


def on_hyperball(group: dict, params: list[torch.Tensor], step: torch.Tensor) -> None:
    """Add steps (n, r, c) to whole matrices in place on the sphere of their norm R: W <- R norm(W - lr R norm(u)).

    Weight decay would be undone and is left out. A matrix of less than the norm 0.5 sqrt(min(r, c)), as one that begins
    at zero, takes steps as if it had that, and grows up to it. Source: the hyperball forms MuonH and AdamH of
    modded-nanogpt, track 3 (#31, 2026-05 and later), which begin without zeros.
    """
    weights = torch.stack(params)
    dims, size = (-2, -1), FROM_ZERO * min(weights.shape[-2:]) ** 0.5
    held = weights.norm(dim=dims, keepdim=True)
    radius = held.clamp_min(size)
    lengths = step.norm(dim=dims, keepdim=True).clamp_min(1e-30)
    step = step * (group["lr"] * radius / lengths)
    moved = weights + (step if group.get("row_floor") is None else floored(group, params, step))
    norm = moved.norm(dim=dims, keepdim=True)
    factor = radius / norm.clamp_min(1e-30)
    moved *= torch.where(held < size, factor.clamp_max(1.0), factor)
    torch._foreach_copy_(params, list(moved.unbind(0)))
