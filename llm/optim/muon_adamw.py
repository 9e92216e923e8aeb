"""Update rules of Muon, for the matrices of the blocks, and of AdamW, for everything else.

Muon (Keller Jordan et al., 2024): momentum, then the nearest semi-orthogonal matrix instead of the raw update. Matrices
of one shape are stacked and updated together. Around the orthogonalisation, each by its own switch: row equilibration,
a second-moment step (NorMuon, arXiv 2510.05491), renormalisation, cautious weight decay (arXiv 2510.12402). Further
switches, off by default, are in `llm.optim.muon_switches`.
"""

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw as fused_adamw

from llm.optim import muon_cpu, muon_gpu
from llm.optim.muon_switches import (
    SWITCHES,
    agreeing,
    floored,
    muon2,
    on_hyperball,
    soap,
    switch_state,
    two_averages,
)
from llm.optim.update_rules import ElementwiseRule, MatrixRule, decay_and_add

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic tuned for slope at zero; singular values end in about [0.7, 1.2]
# One quintic per iteration, each the best for what the one before leaves (Polar Express, arXiv 2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
COEFFICIENTS = {"newton_schulz": lambda i: NEWTON_SCHULZ, "polar_express": lambda i: POLAR_EXPRESS[min(i, 4)]}
NORM_MARGIN = {"newton_schulz": 1.0, "polar_express": 1.01}  # rounding must not lift a singular value above 1


STACK_DTYPES = (torch.bfloat16, torch.float32)  # of updates, as the kernels of our own take them


def kernels_for(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype] = (torch.float32,)):
    """Return the module of our own kernels that takes tensors like these, of one device; None = torch does it."""
    return next((kernels for kernels in (muon_cpu, muon_gpu) if kernels.computes(tensors, dtypes)), None)


def orthogonalize(
    g: torch.Tensor,
    steps: int = 5,
    method: str = "newton_schulz",
    dtype: torch.dtype | None = None,
    margin: float | None = None,
) -> torch.Tensor:
    """Return the approximate polar factor U V^T of each matrix of a stack (n, r, c).

    method: newton_schulz | polar_express. dtype: of the products and the result; None = that of `g`. margin: factor on
    the norm by which `g` is divided first; None = that of NORM_MARGIN.
    """
    norm = g.norm(dim=(-2, -1), keepdim=True) * (margin or NORM_MARGIN[method]) + 1e-7
    return polar_iterations(torch.div(g, norm, out=torch.empty_like(g, dtype=dtype or g.dtype)), steps, method)


def polar_iterations(x: torch.Tensor, steps: int, method: str) -> torch.Tensor:
    """Run the iterations on a stack (n, r, c) whose matrices have a spectral norm of at most 1."""
    tall = x.size(-2) > x.size(-1)  # the products with the smaller Gram matrix
    for i in range(steps):
        a, b, c = COEFFICIENTS[method](i)
        gram = x.mT @ x if tall else x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x


def row_mean_square(update: torch.Tensor, always_rows: bool = False) -> torch.Tensor:
    """Return the mean square of the rows of a stack (n, r, c), or of its columns if they are more.

    fp32, of shape (n, r, 1) or (n, 1, c). always_rows: rows, also where columns are more.
    """
    of_rows = always_rows or update.size(-2) >= update.size(-1)
    if kernels := kernels_for([update], STACK_DTYPES):
        return kernels.row_mean_square(update, of_rows)
    return update.float().square().mean(dim=-1 if of_rows else -2, keepdim=True)


def row_factors(mean_square: torch.Tensor, second_moment: torch.Tensor, beta2: float) -> torch.Tensor:
    """Return NorMuon's factors on the rows (or columns) of a stack, and update `second_moment` in place.

    A factor is one over the running root mean square of its row, times a number per matrix that keeps the matrix's
    norm. All three have the shape of `mean_square`, (n, r, 1) or (n, 1, c).
    """
    second_moment.lerp_(mean_square.to(second_moment.dtype), 1 - beta2)  # a loaded one has the weights' dtype
    scale = second_moment.clamp_min(1e-10).rsqrt()
    old = mean_square.sum(dim=(-2, -1), keepdim=True)
    new = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return scale * (old / new.clamp_min(1e-20)).sqrt()


def muon_state(group: dict, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return Muon's state of a matrix (r, c): its momentum, and what its switches need.

    NorMuon's second moment is (r, 1) or (1, c), in fp32. With `head_rows` states of the heads lie end to end.
    """
    rows, cols = matrix.shape
    if group["head_rows"]:
        of_one = muon_state(group | {"head_rows": None}, matrix[: group["head_rows"]])
        return {name: torch.cat([value] * (rows // group["head_rows"])) for name, value in of_one.items()}
    state = {"momentum_buffer": torch.zeros_like(matrix)}
    if group["normuon_beta2"] is not None:
        shape = (rows, 1) if group["normuon_rows"] or rows >= cols else (1, cols)
        state["second_moment"] = matrix.new_zeros(shape, dtype=torch.float32)
    return state | switch_state(group, matrix)


def muon_step(group: dict, grads: list[torch.Tensor], states: list[dict]) -> torch.Tensor:
    """Return what Muon adds to matrices (r, c) of one shape, without weight decay: (n, r, c), fp32 or wider."""
    (rows, cols), beta2 = grads[0].shape, group["normuon_beta2"]
    if group["head_rows"]:
        return step_of_heads(group, grads, states)
    update = orthogonalize_ahead(group, grads, states)
    factors = torch.ones((1, 1, 1), device=update.device)  # makes what it multiplies fp32
    mean_square = row_mean_square(update, group["normuon_rows"]) if beta2 is not None or group["renormalize"] else None
    if group["renormalize"]:  # to the norm of an exactly semi-orthogonal matrix
        norm = (mean_square.sum(dim=(-2, -1), keepdim=True) * min(rows, cols)).sqrt_()
        factors = min(rows, cols) ** 0.5 / norm.clamp_min_(1e-10)
        mean_square = mean_square * factors.square()
    if beta2 is not None:  # of the renormalised update, whose norm the factors keep
        moments = torch.stack([s["second_moment"] for s in states])
        factors = factors * row_factors(mean_square, moments, beta2)
        torch._foreach_copy_([s["second_moment"] for s in states], list(moments.unbind(0)))
    factors = factors * (-group["lr"] * max(1.0, rows / cols) ** 0.5)
    kernels = kernels_for([update], STACK_DTYPES) if beta2 is not None else None  # factors of rows or columns
    step = kernels.scaled(update, factors) if kernels else update * factors
    return agreeing(step, torch.stack(grads)) if group["cautious_update"] else step


def orthogonalize_ahead(group: dict, grads: list[torch.Tensor], states: list[dict]) -> torch.Tensor:
    """Return the polar factors of Nesterov's updates of matrices (r, c): (n, r, c). The momentum changes in place."""
    momentum, method = group["momentum"], group["orthogonalizer"]
    dtype = torch.bfloat16 if group["in_bf16"] else grads[0].dtype
    # Rows of length 1 make matrices of norm sqrt(rows).
    length = grads[0].size(0) ** 0.5 * (group["norm_margin"] or NORM_MARGIN[method])
    buffers = [s["momentum_buffer"] for s in states]
    switched = any(group[name] is not None for name in ("slow_momentum", "soap_beta", "muon2_beta"))
    if group["row_normalize"] and not switched and (kernels := kernels_for([*grads, *buffers])):
        update = kernels.look_ahead(grads, buffers, momentum, length, dtype)
        return polar_iterations(update, group["ns_steps"], method)
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    if group["slow_momentum"] is not None:
        buffers = two_averages(group, grads, buffers, states)
    update = torch.stack(torch._foreach_lerp(grads, buffers, momentum))  # Nesterov: look ahead
    if group["soap_beta"] is not None:
        update = soap(group, update, torch.stack(grads), states)
    if group["muon2_beta"] is not None:
        update = muon2(group, update, torch.stack(grads), states)
    if not group["row_normalize"]:
        return orthogonalize(update, group["ns_steps"], method, dtype, group["norm_margin"])
    lengths = update.norm(dim=-1, keepdim=True).clamp_min_(1e-10) * length
    update = torch.div(update, lengths, out=torch.empty_like(update, dtype=dtype))
    return polar_iterations(update, group["ns_steps"], method)


def step_of_heads(group: dict, grads: list[torch.Tensor], states: list[dict]) -> torch.Tensor:
    """Return `muon_step` of matrices (r, c) whose heads, `head_rows` rows each, are taken for matrices of their own."""
    (rows, cols), heads = grads[0].shape, grads[0].size(0) // group["head_rows"]
    parts = [{name: value.chunk(heads) for name, value in state.items()} for state in states]  # views
    own = [{name: values[head] for name, values in part.items()} for part in parts for head in range(heads)]
    step = muon_step(group | {"head_rows": None}, [part for grad in grads for part in grad.chunk(heads)], own)
    return step.view(len(grads), rows, cols)


def muon_apply(group: dict, params: list[torch.Tensor], step: torch.Tensor) -> None:
    """Decay n matrices (r, c), or some of their rows, and add step (n, r, c), in place.

    With `coupled_decay` a tall matrix, or head, decays at the rate of its step, lr x sqrt(rows / columns). With
    `cautious` only those weights decay that the step shrinks too; `step` is then used as scratch. With `hyperball`
    nothing decays, and matrices must be whole.
    """
    if group["coupled_decay"]:
        rows, cols = group["head_rows"] or group["shape"][0], group["shape"][1]
        group = group | {"weight_decay": group["weight_decay"] * max(1.0, rows / cols) ** 0.5}
    if group["hyperball"]:
        on_hyperball(group, params, step)
        return
    if group["row_floor"] is not None:
        step = floored(group, params, step)
    decay = group["lr"] * group["weight_decay"]
    if not (decay and group["cautious"]):
        decay_and_add(group, params, step)
        return
    if kernels := kernels_for([*params, step]):
        kernels.apply(params, step, decay)
        return
    weights = torch.stack([p.detach() for p in params])
    decayed = (step * weights).le_(0).mul_(weights)  # 0 or 1 in fp32: masks of booleans are slow on a CPU
    step.sub_(decayed, alpha=decay)
    torch._foreach_add_(params, list(step.unbind(0)))


def adamw_update(group: dict, params: list[torch.Tensor], grads: list[torch.Tensor], states: list[dict]) -> None:
    """Update parameters or pieces of them, and their states, in place, as `torch.optim.AdamW` does; fused if it can."""
    for param, state in zip(params, states, strict=True):
        state["step"] = state["step"].to(param.device)  # a loaded state's step lies on the CPU
    fused_adamw(
        params,
        grads,
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        fused=params[0].device.type in ("cpu", "cuda") and params[0].dtype != torch.float64,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


# momentum (Nesterov), ns_steps, orthogonalizer, norm_margin (None = NORM_MARGIN), in_bf16 (its products),
# row_normalize, normuon_beta2 (None = off), renormalize, cautious (decay only what the update shrinks too),
# coupled_decay (tall matrices decay at the rate of their update)
MUON_NEEDS = ("momentum", "ns_steps", "orthogonalizer", "norm_margin", "in_bf16")
MUON_NEEDS += ("row_normalize", "normuon_beta2", "renormalize", "cautious", "coupled_decay")
MUON = MatrixRule(muon_step, muon_state, muon_apply, MUON_NEEDS, SWITCHES)
ADAMW = ElementwiseRule(adamw_update, state=("exp_avg", "exp_avg_sq"), scalars=("step",), needs=("betas", "eps"))
