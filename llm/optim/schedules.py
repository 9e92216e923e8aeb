"""Schedules: pure functions of the step, so there is nothing to checkpoint and nothing to restore.

step counts from 0 and names the update about to be made.
"""

import math


def lr_multiplier(
    step: int,
    total_steps: int,
    warmup_steps: int,
    warmdown_ratio: float,
    final_frac: float,
    power: float | None = None,
) -> float:
    """Return the factor on the learning rate: linear warm-up, flat, linear decay to `final_frac`.

    The decay takes the last `warmdown_ratio` of the steps. The warm-up takes at most a quarter of them; its first value
    is 1 / warmup and not 0. With a power p what is left of the decay counts as left^p (PowerCool of modded-nanogpt's
    track 3: 1.2).
    """
    warmup = min(warmup_steps, total_steps // 4)
    if step < warmup:
        return (step + 1) / warmup
    left = 1 - warmdown_progress(step, total_steps, warmdown_ratio)
    left = left if power is None else left**power
    return left + (1 - left) * final_frac


def warmdown_progress(step: int, total_steps: int, warmdown_ratio: float) -> float:
    """Return how much of the warm-down is done: 0 until it begins, then linear to 1 at the end."""
    warmdown = round(warmdown_ratio * total_steps)
    return min(max(step - (total_steps - warmdown), 0) / warmdown, 1.0) if warmdown else float(step > total_steps)


def ramp_share(step: float, total_steps: int, ramp: float | None) -> float:
    """Return the share of a window or row that a ramp over the first `ramp` of the steps allows; None: always 1.

    It is 1/4 in the ramp's first half, 1/2 in the second, and 1 behind: few sizes, since a compiler wants each once.
    """
    done = 1.0 if ramp is None else step / (ramp * total_steps)
    return 0.25 if done < 0.5 else 0.5 if done < 1 else 1.0


def muon_momentum(
    step: int, warmup_steps: int, start: float, end: float, final: float, warmdown: float, overlap: bool = False
) -> float:
    """Return Muon's momentum: linear from `start` to `end` over `warmup_steps`, then with `warmdown` to `final`.

    warmdown: share of the warm-down that is done, 0 to 1. overlap: whether it lowers the momentum during the warm-up
    already.
    """
    frac = min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    risen = (1 - frac) * start + frac * end
    if frac < 1.0 and not overlap:
        return risen
    return risen + warmdown * (final - risen)


def decay_multiplier(schedule: str, step: int, total_steps: int) -> float:
    """Return the factor on the weight decay: constant, or from 1 to 0 in a line (linear) or half a wave (cosine)."""
    done = min(step / total_steps, 1.0)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
