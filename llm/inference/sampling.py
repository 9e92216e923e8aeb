"""Choice of the next token: the settings of a caller, random numbers, and vectorised draws for the rows of a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
import torch

from llm.errors import UserError
from llm.inference import sample_cpu

GREEDY_BELOW = 1e-6  # lower temperatures are greedy: logits divided by them soon exceed every number
BROKEN = -1  # in place of a token id: the logits were no numbers


@dataclass(frozen=True)
class SamplingParams:
    """Settings of sampling. temperature 0 (or below `GREEDY_BELOW`) = greedy; top_k 0 and top_p 1 = no truncation.

    max_new_tokens counts sampled and forced (tool) tokens; 0 is for scoring a prompt alone. stop: texts behind which a
    completion ends. keep_stop: whether such a text belongs to the completion's text (`llm.inference.text`).
    min_p: tokens below this share of the most likely one's probability are left out. repetition_penalty divides
    positive logits (and multiplies negative ones) of tokens in prompt or completion; presence_penalty and
    frequency_penalty are taken from the logits of tokens of the completion, once and per occurrence. logit_bias:
    (id, number added to its logit). logprobs: None, or how many likely tokens are told beside each token's own
    log-probability, by the network's own logits; prompt_logprobs: the number for the tokens of the prompt.
    ignore_eos: tokens that end a turn are ordinary ones. min_new_tokens: so many tokens come before one may end it.
    Raises UserError for values outside their range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    use_tools: bool = True
    stop: tuple[str, ...] = ()
    keep_stop: bool = True
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    min_new_tokens: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature={self.temperature} must be a number from 0 (greedy) upwards")
        if not _is_whole(self.top_k, 0):
            raise UserError(f"top_k={self.top_k} must be a whole number from 0 (all tokens) upwards")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1 (all tokens)")
        if not _is_whole(self.max_new_tokens, 1 if self.prompt_logprobs is None else 0):
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be a whole number from 1 upwards")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p={self.min_p} must be from 0 (all tokens) to below 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be a number above 0; 1 = none")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)} must be a number; 0 = none")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None and not _is_whole(getattr(self, name), 0):
                raise UserError(f"{name}={getattr(self, name)} must be a whole number from 0 upwards, or None")
        if not (_is_whole(self.min_new_tokens, 0) and self.min_new_tokens <= self.max_new_tokens):
            raise UserError(
                f"min_new_tokens={self.min_new_tokens} must be a whole number from 0 to max_new_tokens, "
                f"{self.max_new_tokens}"
            )
        for one, bias in self.logit_bias:
            if not _is_whole(one, 0) or math.isnan(bias) or bias == math.inf:
                raise UserError(f"logit_bias: ({one}, {bias}) must be a token id and a number; -inf forbids a token")

    @cached_property
    def changes_logits(self) -> bool:
        """True if logits are changed before a token is drawn from them."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias or self.min_new_tokens or any(penalties))

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is always taken, so that nothing is drawn."""
        return self.temperature < GREEDY_BELOW


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, Integral) and value >= low


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers


def draw_keys(seeds: Sequence[int], samples: Sequence[int]) -> np.ndarray:
    """Return the uint64 keys (rows,) of streams of random numbers: hashes of a seed and of the number of a sample.

    seeds: any whole numbers; samples: whole numbers from 0.
    """
    seeds = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    return _mix(_mix(seeds) ^ _mix(np.array(samples, dtype=np.uint64)))


def uniform_draws(keys: np.ndarray, steps) -> np.ndarray:
    """Return float64 numbers in [0, 1), each a hash of its key and step and of nothing else.

    keys: (rows,) from `draw_keys`; steps: numbers that broadcast with them, the tokens a completion has already. A row
    draws equal numbers whatever else is in its batch. The hash is the finaliser of SplitMix64 (Steele et al., 2014),
    once per part of the key.
    """
    bits = _mix(keys ^ _mix(np.array(steps, dtype=np.uint64, ndmin=1) + np.uint64(1 << 32)))
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 numbers by the finaliser of SplitMix64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------------------------------------------------------------
# Draws


class Sampler:
    """Draws for rows with settings of their own; made once for a batch and used until its rows change.

    Rows that need equal steps (greedy, one top_k, whether probabilities are cut) form a group. Numbers such as the
    temperature may differ within a group. A row's arithmetic is equal in every group, so its token depends on its own
    logits and draw alone.
    """

    def __init__(self, settings: Sequence[SamplingParams], device: torch.device):
        self.is_greedy = all(params.is_greedy for params in settings)  # then no draws are needed
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        if device.type == "cpu" and sample_cpu.is_available():
            self._groups = [_KernelGroup(settings)]
            return
        kinds: dict[tuple, list[int]] = {}
        for row, params in enumerate(settings):
            kind = (0, False, False) if params.is_greedy else (params.top_k, params.top_p < 1, params.min_p > 0)
            kinds.setdefault((params.is_greedy, *kind), []).append(row)
        self._groups = [
            _Group(None if len(kinds) == 1 else rows, [settings[row] for row in rows], device, self.dtype)
            for rows in kinds.values()
        ]

    def draw(self, logits: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """Return one token id (B,) per row of `logits` (B, V), drawn at `draws` (B,) in [0, 1) of `dtype`.

        draws may be None if all rows are greedy. A row whose logits hold NaN or no largest number gets `BROKEN`.
        """
        if len(self._groups) == 1:
            return self._groups[0].draw(logits, draws)
        ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        for group in self._groups:
            ids[group.rows] = group.draw(logits[group.rows], None if draws is None else draws[group.rows])
        return ids


class _KernelGroup:
    """All rows of a batch on a CPU, drawn by our own kernel whatever their settings."""

    def __init__(self, settings: Sequence[SamplingParams]):
        temperatures = [0.0 if one.is_greedy else one.temperature for one in settings]
        self._temperature = torch.tensor(temperatures, dtype=torch.float32)  # whole numbers too
        self._top_k = torch.tensor([one.top_k for one in settings])
        self._top_p = torch.tensor([one.top_p for one in settings], dtype=torch.float64)
        self._min_p = torch.tensor([one.min_p for one in settings], dtype=torch.float64)

    def draw(self, logits: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """Return token ids (B,); draws may be None if all rows are greedy."""
        draws = torch.zeros(len(logits), dtype=torch.float64) if draws is None else draws
        settings = self._temperature, self._top_k, self._top_p, self._min_p
        return sample_cpu.sample_rows(logits.float(), *settings, draws)


class _Group:
    """Rows of a batch that are drawn in equal steps. rows: their places, None for all."""

    def __init__(self, rows: list[int] | None, settings: Sequence[SamplingParams], device, dtype: torch.dtype):
        def column(name: str, kind: torch.dtype) -> torch.Tensor:
            return torch.tensor([getattr(params, name) for params in settings], dtype=kind, device=device).unsqueeze(1)

        first = settings[0]
        self.rows = None if rows is None else torch.tensor(rows, device=device)
        self.is_greedy, self.top_k = first.is_greedy, first.top_k
        self.temperature = None if self.is_greedy else column("temperature", torch.float32)
        self.top_p = column("top_p", dtype) if first.top_p < 1 else None
        self.min_p = column("min_p", dtype) if first.min_p > 0 else None

    def draw(self, logits: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """Return token ids (B,) by inversion of each row's distribution at its draw.

        The order is the usual one: temperature, top_k, top_p (the fewest tokens that hold this share of what top_k
        left), min_p.
        """
        if self.is_greedy:
            best = logits.argmax(dim=-1)  # of NaN, if there is one
            return best.masked_fill(~logits.gather(1, best.unsqueeze(1)).squeeze(1).isfinite(), BROKEN)
        logits, order = logits.float() / self.temperature, None
        if 0 < self.top_k < logits.size(-1):
            logits, order = logits.topk(self.top_k)
        elif self.top_p is not None:
            logits, order = logits.sort(dim=-1, descending=True, stable=True)
        # Summing tens of thousands of probabilities in fp32 loses the small ones.
        probs = torch.softmax(logits, dim=-1, dtype=draws.dtype)
        cdf = probs.cumsum(dim=-1)
        if self.top_p is not None or self.min_p is not None:
            cut = torch.zeros_like(probs, dtype=torch.bool)
            if self.top_p is not None:
                cut |= cdf - probs >= self.top_p
            if self.min_p is not None:
                cut |= probs < self.min_p * probs.amax(dim=-1, keepdim=True)
            cdf = probs.masked_fill(cut, 0.0).cumsum(dim=-1)
        pick = torch.searchsorted(cdf, (draws * cdf[:, -1]).unsqueeze(1), right=True)
        pick = pick.clamp_(max=cdf.size(-1) - 1)
        ids = (pick if order is None else order.gather(1, pick)).squeeze(1)
        return ids.masked_fill(cdf[:, -1].isnan(), BROKEN)


def sample(logits: torch.Tensor, params: SamplingParams, draws: torch.Tensor | None) -> torch.Tensor:
    """Return one token id (B,) per row of `logits` (B, V), all drawn with equal settings; see `Sampler.draw`."""
    return Sampler([params] * len(logits), logits.device).draw(logits, draws)
