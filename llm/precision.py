"""Explicit precision: fp32 master weights, one compute dtype, casts in our own `Linear`; no autocast."""

import torch
import torch.nn.functional as F
from torch import nn

from llm import distributed
from llm.errors import UserError
from llm.fp8 import fp8_linear, takes_fp8

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Linear(nn.Linear):
    """Linear layer that multiplies in the dtype of its input, whatever dtype its weight is stored in.

    Initialisation is left to the model's one init function, so building a layer draws no random numbers.
    """

    fp8 = False  # set by llm.fp8.enable_fp8

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fp8 and torch.is_grad_enabled() and takes_fp8(x):
            return fp8_linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def has_fast_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products run natively: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def resolve_compute_dtype(choice: str, device: torch.device | str) -> torch.dtype:
    """The dtype for `precision.compute` = auto | fp32 | bf16 | fp16; auto takes bf16 where the device has it."""
    device = torch.device(device)
    if choice == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    if choice not in DTYPES:
        raise UserError(f"precision.compute={choice}: choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[choice]


class LossScaler:
    """Dynamic loss scaling for fp16: gradients too small for it are scaled up, steps that overflow are left out.

    The scale doubles after `interval` steps without overflow and halves at every overflow (Micikevicius et al. 2018).
    """

    def __init__(self, scale: float = 2.0**15, interval: int = 1000):
        self.scale, self.interval, self.good_steps = scale, interval, 0

    def unscale(self, params) -> bool:
        """Divide the gradients by the scale, or drop them all and return False where one overflowed."""
        grads = [grad for p in params if p.grad is not None and (grad := distributed.local(p.grad)).numel()]
        norms = torch._foreach_norm(grads, ord=float("inf"))
        overflowed = bool(grads) and not torch.isfinite(torch.stack(norms)).all()
        if distributed.total([float(overflowed)])[0]:
            for p in params:
                p.grad = None
            self.scale, self.good_steps = max(self.scale / 2, 1.0), 0
            return False
        torch._foreach_mul_(grads, 1 / self.scale)
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.scale, self.good_steps = self.scale * 2, 0
        return True

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale, self.good_steps = state["scale"], int(state["good_steps"])
