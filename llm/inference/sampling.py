"""Choice of the next token: the settings of a caller, and one vectorised draw for all rows of a batch."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from llm.errors import UserError

GREEDY_BELOW = 1e-6  # lower temperatures are greedy: logits divided by them soon exceed every number
BROKEN = -1  # in place of a token id: the logits were no numbers


@dataclass(frozen=True)
class SamplingParams:
    """Settings of sampling. temperature 0 (or below `GREEDY_BELOW`) = greedy; top_k 0 and top_p 1 = no truncation.

    max_new_tokens counts sampled and forced (calculator) tokens; stop: texts behind which a completion ends. Raises
    UserError for values outside their range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    use_tools: bool = True
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature={self.temperature} must be a number from 0 (greedy) upwards")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise UserError(f"top_k={self.top_k} must be a whole number from 0 (all tokens) upwards")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1 (all tokens)")
        if self.max_new_tokens < 1 or self.max_new_tokens != int(self.max_new_tokens):
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be a whole number from 1 upwards")

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is always taken, so that nothing is drawn."""
        return self.temperature < GREEDY_BELOW


def uniform_draws(seed: int, n_steps: int, n_rows: int) -> np.ndarray:
    """Return (n_steps, n_rows) float64 numbers in [0, 1), each a hash of (seed, row, step) and of nothing else.

    A row therefore draws equal numbers whatever else is in its batch. The hash is the finaliser of SplitMix64
    (Steele et al., 2014), once per part of the key.
    """
    key = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    key = _mix(key ^ _mix(np.arange(n_rows, dtype=np.uint64)))  # (n_rows,)
    bits = _mix(key ^ _mix(np.arange(n_steps, dtype=np.uint64)[:, None] + np.uint64(1 << 32)))
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 numbers by the finaliser of SplitMix64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample(logits: torch.Tensor, params: SamplingParams, draws: torch.Tensor | None) -> torch.Tensor:
    """Return one token id (B,) per row of `logits` (B, V), by inversion of its distribution at `draws` (B,) in [0, 1).

    The order is the usual one: temperature, then top_k, then top_p (the fewest tokens that hold this share of what
    top_k left). A row whose logits hold NaN or no largest number gets `BROKEN`.
    """
    if params.is_greedy:
        best = logits.argmax(dim=-1)  # of NaN, if there is one
        return best.masked_fill(~logits.gather(1, best.unsqueeze(1)).squeeze(1).isfinite(), BROKEN)
    logits = logits.float() / params.temperature
    order = None
    if 0 < params.top_k < logits.size(-1):
        logits, order = logits.topk(params.top_k)
    elif params.top_p < 1:
        logits, order = logits.sort(descending=True)
    # Summing tens of thousands of probabilities in fp32 loses the small ones.
    probs = torch.softmax(logits, dim=-1, dtype=draws.dtype)
    cdf = probs.cumsum(dim=-1)
    if params.top_p < 1:
        cdf = probs.masked_fill(cdf - probs >= params.top_p, 0.0).cumsum(dim=-1)
    pick = torch.searchsorted(cdf, (draws * cdf[:, -1]).unsqueeze(1), right=True)
    pick = pick.clamp_(max=cdf.size(-1) - 1)
    ids = (pick if order is None else order.gather(1, pick)).squeeze(1)
    return ids.masked_fill(cdf[:, -1].isnan(), BROKEN)
