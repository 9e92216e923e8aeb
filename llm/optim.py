"""MuonAdamW: one optimizer, Muon for the matrices of the blocks and AdamW for everything else.

Muon (Keller Jordan et al., 2024): momentum, then the nearest semi-orthogonal matrix instead of the raw update. Matrices
of one shape are stacked and orthogonalised together. Hyperparameters are plain numbers in `param_groups`; schedules
write them before each step.
"""

import torch
from torch import nn

from llm.scaling import adam_lr_scale

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic tuned for slope at zero; singular values end in about [0.7, 1.2]


def orthogonalize(g: torch.Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Approximate polar factor U V^T of each matrix of a stack (..., m, n) by Newton-Schulz iterations.

    dtype: precision of the products; default bf16 on CUDA, else that of `g`.
    """
    a, b, c = NEWTON_SCHULZ
    x = g.to(dtype or (torch.bfloat16 if g.is_cuda else g.dtype))
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


def adamw_update(p, grad, state, lr: float, betas, eps: float, weight_decay: float) -> None:
    """One AdamW step (Loshchilov & Hutter 2019) in place, as `torch.optim.AdamW` defines it."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    state["step"] += 1
    beta1, beta2, step = *betas, state["step"].item()  # a host scalar: no device sync
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    denom = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(eps)
    p.addcdiv_(state["exp_avg"], denom, value=-lr / (1 - beta1**step))


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups carry `kind`: "muon" (2-D matrices) or "adamw".

    muon:  lr, momentum (Nesterov), ns_steps, weight_decay (decoupled)
    adamw: lr, betas, eps, weight_decay (decoupled)
    State is fp32 and kept per parameter, so a checkpoint does not depend on how matrices are grouped.
    """

    def __init__(self, groups: list[dict]):
        for group in groups:
            group.setdefault("weight_decay", 0.0)
            group["initial_lr"] = group["lr"]
            if group["kind"] not in ("muon", "adamw"):
                raise ValueError(f"kind={group['kind']!r}: muon or adamw")
            if group["kind"] == "muon" and any(p.ndim != 2 for p in group["params"]):
                raise ValueError("Muon takes 2-D matrices only")
        super().__init__(groups, {})

    def step(self, closure=None):
        loss = None
        if closure is not None:  # Lightning runs forward and backward in here
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                if group["kind"] == "muon":
                    self._muon(group)
                else:
                    self._adamw(group)
        return loss

    def _adamw(self, group: dict) -> None:
        hyper = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay")}
        for p in group["params"]:
            if p.grad is not None:
                adamw_update(p, p.grad, self.state[p], **hyper)

    def _muon(self, group: dict) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        for (rows, cols), params in by_shape.items():
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            grads, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov: look ahead
            updates = orthogonalize(torch.stack(updates), group["ns_steps"])
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(updates.unbind(0)), alpha=-group["lr"] * max(1.0, rows / cols) ** 0.5)


def build_optimizer(net: nn.Module, optim, lr_frac: float = 1.0) -> MuonAdamW:
    """Optimizer for a GPT by the config group `optim`; `lr_frac` scales all learning rates (finetuning).

    muon_adamw: embedding and head by AdamW with the width rule of `llm.scaling`, block matrices by Muon.
    adamw: one learning rate for all, weight decay on the block matrices only.
    """
    embedding, head = [net.transformer.wte.weight], [net.lm_head.weight]
    matrices = list(net.transformer.h.parameters())
    adam = {"kind": "adamw", "betas": tuple(optim.betas), "eps": optim.eps}
    if optim.name == "adamw":
        lr = optim.lr * lr_frac
        return MuonAdamW(
            [
                adam | {"params": matrices, "lr": lr, "weight_decay": optim.weight_decay},
                adam | {"params": embedding + head, "lr": lr, "weight_decay": 0.0},
            ]
        )
    scale = lr_frac * adam_lr_scale(net.config.n_embd)
    muon = {"kind": "muon", "momentum": optim.momentum, "ns_steps": optim.ns_steps, "weight_decay": optim.weight_decay}
    return MuonAdamW(
        [
            adam | {"params": head, "lr": optim.unembedding_lr * scale},
            adam | {"params": embedding, "lr": optim.embedding_lr * scale},
            muon | {"params": matrices, "lr": optim.matrix_lr * lr_frac},
        ]
    )
