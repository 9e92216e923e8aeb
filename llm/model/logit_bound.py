"""The bound of logits: z = height tanh((x + shift) / width), or none."""

from typing import NamedTuple


class Bound(NamedTuple):
    """A bound of logits x, z = height tanh((x + shift) / width), within (-height, height)."""

    height: float
    width: float
    shift: float = 0.0


# 23 sigmoid((x + 5) / 7.5) less 11.5, a constant that no probability sees: logits far below the others are bounded
# sooner than those far above (asymmetric logit cap of modded-nanogpt, track 1, 2025).
ASYMMETRIC = Bound(11.5, 15.0, 5.0)


def bound_of(cap: float | Bound | None) -> Bound | None:
    """Return a cap c as the bound c tanh(x / c) (Gemma 2, arXiv 2408.00118); a bound and None as they are."""
    return Bound(cap, cap) if isinstance(cap, int | float) else cap
