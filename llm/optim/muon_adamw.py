"""MuonAdamW: one optimizer, Muon for the matrices of the blocks and AdamW for everything else.

Muon (Keller Jordan et al., 2024): momentum, then the nearest semi-orthogonal matrix instead of the raw update. Matrices
of one shape are stacked and updated together. Around the orthogonalisation, each by its own switch: row equilibration,
a second-moment step (NorMuon, arXiv 2510.05491), renormalisation, cautious weight decay (arXiv 2510.12402).
Hyperparameters are plain numbers in `param_groups`; schedules write them before each step.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch.optim.adamw import adamw as adamw_update

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic tuned for slope at zero; singular values end in about [0.7, 1.2]
# One quintic per iteration, each the best for what the one before leaves (Polar Express, arXiv 2505.16932, 2 % margin).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
COEFFICIENTS = {"newton_schulz": lambda i: NEWTON_SCHULZ, "polar_express": lambda i: POLAR_EXPRESS[min(i, 4)]}
NORM_MARGIN = {"newton_schulz": 1.0, "polar_express": 1.01}  # rounding must not lift a singular value above 1


# Matrices stacked for one update: on a CPU as many as stay in a core's cache between the passes over them.
STACK_BYTES = {"cpu": 1 << 21}
OTHER_STACK_BYTES = 1 << 32


def orthogonalize(
    g: torch.Tensor, steps: int = 5, method: str = "newton_schulz", dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Approximate polar factor U V^T of each matrix of a stack (n, r, c); `dtype` of products and result.

    method: newton_schulz | polar_express. Default dtype: that of `g`.
    """
    norm = g.norm(dim=(-2, -1), keepdim=True) * NORM_MARGIN[method] + 1e-7
    return polar_iterations(torch.div(g, norm, out=torch.empty_like(g, dtype=dtype or g.dtype)), steps, method)


def polar_iterations(x: torch.Tensor, steps: int, method: str) -> torch.Tensor:
    """The same for a stack whose matrices have no singular value above 1."""
    tall = x.size(-2) > x.size(-1)  # the products with the smaller Gram matrix
    for i in range(steps):
        a, b, c = COEFFICIENTS[method](i)
        gram = x.mT @ x if tall else x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x


def row_mean_square(update: torch.Tensor) -> torch.Tensor:
    """Mean square of the rows (columns, if they are more) of a stack (n, r, c): (n, r, 1) or (n, 1, c), fp32."""
    dim = -1 if update.size(-2) >= update.size(-1) else -2
    return update.float().square().mean(dim=dim, keepdim=True)


def row_factors(mean_square: torch.Tensor, second_moment: torch.Tensor, beta2: float) -> torch.Tensor:
    """What NorMuon multiplies the rows (or columns) with: one over their running root mean square, times a number per
    matrix that keeps its norm. `second_moment`, of the shape of `mean_square`, is updated in place.
    """
    second_moment.lerp_(mean_square.to(second_moment.dtype), 1 - beta2)  # a loaded one has the weights' dtype
    scale = second_moment.clamp_min(1e-10).rsqrt()
    old = mean_square.sum(dim=(-2, -1), keepdim=True)
    new = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return scale * (old / new.clamp_min(1e-20)).sqrt()


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups carry `kind`: "muon" (2-D matrices) or "adamw".

    muon:  lr, momentum (Nesterov), ns_steps, orthogonalizer, in_bf16 (its products), row_normalize, normuon_beta2
           (None = off), renormalize, weight_decay (decoupled), cautious (decay only what the update shrinks too)
    adamw: lr, betas, eps, weight_decay (decoupled), as `torch.optim.AdamW` defines it
    State is fp32 and kept per parameter, so a checkpoint does not depend on how matrices are grouped.
    """

    MUON_DEFAULTS = {
        "momentum": 0.95,
        "ns_steps": 5,
        "orthogonalizer": "newton_schulz",
        "in_bf16": False,
        "row_normalize": False,
        "normuon_beta2": None,
        "renormalize": False,
        "cautious": False,
    }

    def __init__(self, groups: list[dict]):
        for group in groups:
            group.setdefault("weight_decay", 0.0)
            group.setdefault("decays", False)  # whether the weight decay follows its schedule
            group["initial_lr"], group["initial_decay"] = group["lr"], group["weight_decay"]
            if group["kind"] not in ("muon", "adamw"):
                raise ValueError(f"kind={group['kind']!r}: muon or adamw")
            if group["kind"] == "muon":
                if any(p.ndim != 2 for p in group["params"]):
                    raise ValueError("Muon takes 2-D matrices only")
                for name, value in self.MUON_DEFAULTS.items():
                    group.setdefault(name, value)
        super().__init__(groups, {})

    def step(self, closure=None):
        loss = None
        if closure is not None:  # Lightning runs forward and backward in here
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._update()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but the state becomes this optimizer's own: what is loaded may be a file mapped into memory."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({name: value.clone() for name, value in state.items()})

    def _update(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "muon":
                self._muon(group, params)
            else:
                self._adamw(group, [(p, p, p.grad) for p in params])

    def _adamw(self, group: dict, shares: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """Update shares of parameters: (parameter whose state it is, what to update of it, the gradient of that)."""
        if not shares:
            return
        states = [self.state[p] for p, _, _ in shares]
        params = [share for _, share, _ in shares]
        for share, state in zip(params, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(share), torch.zeros_like(share)
            state["step"] = state["step"].to(share.device)  # a loaded state's step lies on the CPU
        adamw_update(
            params,
            [grad for _, _, grad in shares],
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

    def _muon(self, group: dict, params: list[torch.Tensor]) -> None:
        for part in stacks(params):
            self._descend(group, part, self._muon_step(group, part, [p.grad for p in part]))

    def _muon_step(self, group: dict, params: list[torch.Tensor], grads: list[torch.Tensor]) -> torch.Tensor:
        """What Muon adds to matrices (r, c) of the same shape, without weight decay: (n, r, c), fp32 or wider."""
        (rows, cols), states = params[0].shape, [self.state[p] for p in params]
        beta2, method = group["normuon_beta2"], group["orthogonalizer"]
        for grad, state in zip(grads, states, strict=True):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(grad)
                if beta2 is not None:
                    shape = (rows, 1) if rows >= cols else (1, cols)
                    state["second_moment"] = grad.new_zeros(shape, dtype=torch.float32)
        buffers = [s["momentum_buffer"] for s in states]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        update = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))  # Nesterov: look ahead
        dtype = torch.bfloat16 if group["in_bf16"] else update.dtype
        if group["row_normalize"]:  # rows of length 1 make matrices of norm sqrt(rows)
            lengths = update.norm(dim=-1, keepdim=True).clamp_min_(1e-10) * (rows**0.5 * NORM_MARGIN[method])
            update = torch.div(update, lengths, out=torch.empty_like(update, dtype=dtype))
            update = polar_iterations(update, group["ns_steps"], method)
        else:
            update = orthogonalize(update, group["ns_steps"], method, dtype)
        factors = torch.ones((1, 1, 1), device=update.device)  # makes what it multiplies fp32
        mean_square = row_mean_square(update) if beta2 is not None or group["renormalize"] else None
        if beta2 is not None:
            moments = torch.stack([s["second_moment"] for s in states])
            factors = row_factors(mean_square, moments, beta2)
            torch._foreach_copy_([s["second_moment"] for s in states], list(moments.unbind(0)))
        if group["renormalize"]:  # to the norm of an exactly semi-orthogonal matrix; the factors kept the norm
            norm = (mean_square.sum(dim=(-2, -1), keepdim=True) * min(rows, cols)).sqrt_()
            factors = factors * (min(rows, cols) ** 0.5 / norm.clamp_min_(1e-10))
        return update * (factors * (-group["lr"] * max(1.0, rows / cols) ** 0.5))

    def _descend(self, group: dict, params: list[torch.Tensor], step: torch.Tensor) -> None:
        """Decay matrices, or the same rows of each, and add the steps (n, r, c)."""
        decay = group["lr"] * group["weight_decay"]
        if decay and group["cautious"]:
            weights = torch.stack([p.detach() for p in params])
            decayed = (step * weights).le_(0).mul_(weights)  # 0 or 1 in fp32: masks of booleans are slow on a CPU
            step.sub_(decayed, alpha=decay)
        elif decay:
            torch._foreach_mul_(params, 1 - decay)
        torch._foreach_add_(params, list(step.unbind(0)))


def stacks(params: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The matrices in parts of one shape that are updated together."""
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    for shape, params in by_shape.items():
        size = STACK_BYTES.get(params[0].device.type, OTHER_STACK_BYTES) // (4 * shape.numel())
        yield from batched(params, max(size, 1))


def batched(items: list, size: int):
    """Consecutive parts of at most `size` items (itertools has it from Python 3.12 on)."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
