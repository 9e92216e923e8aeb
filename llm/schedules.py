"""Schedules: pure functions of the step, so there is nothing to checkpoint and nothing to restore."""


def lr_multiplier(step: int, total_steps: int, warmup_ratio: float, warmdown_ratio: float, final_frac: float) -> float:
    """Linear warm-up, flat, linear decay to `final_frac`; the ratios are shares of `total_steps`.

    step counts from 0 and names the update about to be made, so the first warm-up value is 1 / warmup and not 0.
    """
    warmup, warmdown = round(warmup_ratio * total_steps), round(warmdown_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if step <= total_steps - warmdown:
        return 1.0
    left = max(total_steps - step, 0) / warmdown
    return left + (1 - left) * final_frac


def muon_momentum(step: int, warmup_steps: int, start: float, end: float) -> float:
    """Momentum of Muon: linear from `start` to `end` over the first `warmup_steps` steps."""
    frac = min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    return (1 - frac) * start + frac * end
