"""Changes of logits that a request asks for, and the log-probabilities of tokens."""

from collections.abc import Collection, Sequence
from functools import lru_cache

import torch

from llm.inference.request import Request

Likely = list[tuple[int, float]]  # token ids and log-probabilities, the most likely first


def adjusted(logits: torch.Tensor, requests: Sequence[Request], stop_ids: Collection[int]) -> torch.Tensor:
    """Return the logits (B, V) that each request draws from: penalties, then biases, then what is not allowed.

    The argument itself where no request changes anything.
    """
    rows = [
        row for row, request in enumerate(requests) if request.constraint is not None or request.params.changes_logits
    ]
    if not rows:
        return logits
    logits = logits.float().clone()
    for row in rows:
        request, own = requests[row], logits[row]
        _penalise(own, request)
        if request.params.logit_bias:
            own.index_add_(0, *_biases(request.params.logit_bias, own.device))
        if len(request.ids) < request.params.min_new_tokens and stop_ids:
            own[list(stop_ids)] = -torch.inf
        if request.constraint is not None:
            own.masked_fill_(~_allowed(request).to(own.device), -torch.inf)
    return logits


@lru_cache(maxsize=64)
def _biases(given: tuple[tuple[int, float], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (n,), int64, and what is added to their logits, fp32 (n,), on a device: one by one they take long."""
    ids, numbers = zip(*given, strict=True)
    return torch.tensor(ids, device=device), torch.tensor(numbers, dtype=torch.float32, device=device)


def _allowed(request: Request) -> torch.Tensor:
    """Return the tokens (V,) that the constraint of a request allows; none if it fails, which `request.error` tells."""
    try:
        return request.constraint.allowed()
    except Exception as error:  # of whoever wrote the constraint; other requests go on
        request.error = f"the constraint fails: {error}"
        return torch.zeros(1, dtype=torch.bool)


def _penalise(logits: torch.Tensor, request: Request) -> None:
    """Change the logits (V,) of one row in place by its penalties; see `SamplingParams`."""
    params = request.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(request.tokens, device=logits.device).unique()
        own = logits[seen]
        logits[seen] = torch.where(own > 0, own / params.repetition_penalty, own * params.repetition_penalty)
    if request.ids and (params.presence_penalty or params.frequency_penalty):
        said, times = torch.tensor(request.ids, device=logits.device).unique(return_counts=True)
        logits[said] -= params.presence_penalty + params.frequency_penalty * times


def log_probs(logits: torch.Tensor, ids: Sequence[int], n_likely: Sequence[int]) -> list[tuple[float, Likely]]:
    """Return per row of logits (B, V) the log-probability of its id, and its `n_likely` most likely tokens."""
    everything = logits.float().log_softmax(dim=-1)
    chosen = everything.gather(1, torch.tensor(ids, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    most = min(max(n_likely), logits.size(-1))
    if not most:
        return [(own, []) for own in chosen]
    values, order = (t.tolist() for t in everything.topk(most))
    likely = [list(zip(i[:n], v[:n], strict=True)) for i, v, n in zip(order, values, n_likely, strict=True)]
    return list(zip(chosen, likely, strict=True))
