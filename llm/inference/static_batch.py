"""Batch whose rows begin together: for networks that have no cache with places for rows that come and go."""

from collections import deque

import torch

from llm.inference.request import Request
from llm.inference.weights import LENGTHS, ROWS, keeps_shapes, round_up

COMPACT_BELOW = 0.75  # finished rows stay until the live share is this small, because leaving copies the cache


class StaticBatch:
    """Rows decoded together, from a cache of `net.new_cache`. New requests wait until all rows have ended."""

    def __init__(self, net, max_rows: int):
        self.net, self.max_rows = net, max_rows
        self._slots: list[Request | None] = []  # by place in the batch; None = finished, waiting to leave
        self._cache = None
        self._keeps_shapes = keeps_shapes(net.device, net.compute_dtype)

    @property
    def rows(self) -> list[Request]:
        """Requests that are being decoded, in the order of the logits."""
        return [request for request in self._slots if request]

    def stats(self) -> dict[str, int]:
        """Return numbers for `Engine.stats`."""
        n = sum(len(request.tokens) for request in self.rows)
        return {"rows": len(self.rows), "cached_tokens": n, "cache_size": n, "prefix_hits": 0, "preemptions": 0}

    def read_prompts(self, waiting: deque[Request]) -> tuple[list[Request], torch.Tensor | None] | None:
        """Take requests from `waiting` if there is room; return those whose prompts are read, and logits (B, V).

        Returns None where there is no room, or nothing waits.
        """
        if self.rows or not waiting:
            return None
        taken = [waiting.popleft() for _ in range(min(len(waiting), self.max_rows))]
        self._slots = list(taken)
        prompts, n = _shared_prompts([request.tokens for request in taken])
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        if self._keeps_shapes:
            longest = min(round_up(longest, *LENGTHS), self.net.config.seq_len)
        ids = torch.zeros(len(lengths), longest, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.as_tensor(prompt)
        device = self.net.device
        self._cache = self.net.new_cache(len(prompts), max(longest, *(len(r.tokens) + r.room for r in taken)))
        true_lengths = torch.tensor(lengths, device=device)
        logits = self.net(ids.to(device), cache=self._cache, lengths=true_lengths, last_only=True)[:, 0]
        if n > 1:
            self._cache.repeat(n)
            logits = logits.repeat_interleave(n, dim=0)
        return taken, logits

    def decode(self, waiting: deque[Request]) -> tuple[list[Request], torch.Tensor | None]:
        """Feed every row its newest token; return the rows and the logits (B, V) behind them."""
        if not self._slots:
            return [], None
        self._compact()
        live = [slot for slot, request in enumerate(self._slots) if request]
        self._cache.used = max(len(self._slots[slot].tokens) - 1 for slot in live)
        ids = torch.tensor([[request.ids[-1] if request else 0] for request in self._slots], device=self.net.device)
        logits = self.net(ids, cache=self._cache, last_only=True)[:, 0]
        return self.rows, logits if len(live) == len(logits) else logits[live]

    def leave(self, request: Request, comes_back: bool = False) -> None:
        """End a row, or let it be read again later (comes_back).

        Its place stays in the batch until `decode` finds enough such places.
        """
        slot = self._slots.index(request)
        self._slots[slot] = None
        self._cache.lengths[slot] = 0  # until it leaves, the slot writes at the start of its own cache row
        if not self.rows:
            self._slots, self._cache = [], None

    def _compact(self) -> None:
        """Let finished rows leave the batch once they are a quarter of it; some stay to fill one of a few sizes."""
        keep = [slot for slot, row in enumerate(self._slots) if row]
        if len(keep) > COMPACT_BELOW * len(self._slots):
            return
        if self._keeps_shapes:
            finished = [slot for slot, row in enumerate(self._slots) if not row]
            keep = sorted(keep + finished[: round_up(len(keep), *ROWS) - len(keep)])
            if len(keep) == len(self._slots):
                return
        self._slots = [self._slots[slot] for slot in keep]
        self._cache.keep(torch.tensor(keep, device=self.net.device))


def _shared_prompts(prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """Return (prompts to read, n): each of them n times, side by side, gives the list; n = 1 where that cannot be."""
    different = [list(one) for one in dict.fromkeys(map(tuple, prompts))]
    n = len(prompts) // len(different)
    return (different, n) if [p for p in different for _ in range(n)] == prompts else (prompts, 1)
