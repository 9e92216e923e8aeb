"""Loss scaling for training in fp16."""

import torch

from llm.parallel import collectives


class LossScaler:
    """Dynamic loss scaling for fp16: gradients too small for it are scaled up, steps that overflow are left out.

    The scale doubles after `interval` steps without overflow and halves at every overflow (Micikevicius et al. 2018).
    """

    def __init__(self, scale: float = 2.0**15, interval: int = 1000):
        self.scale, self.interval, self.good_steps = scale, interval, 0

    def unscale(self, params) -> bool:
        """Divide the gradients by the scale, or drop them all and return False where one overflowed."""
        grads = [grad for p in params if p.grad is not None and (grad := collectives.to_local(p.grad)).numel()]
        norms = torch._foreach_norm(grads, ord=float("inf"))
        overflowed = bool(grads) and not torch.isfinite(torch.stack(norms)).all()
        if collectives.all_reduce_sum([float(overflowed)])[0]:
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
