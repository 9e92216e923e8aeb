"""Store of texts that the cache has read: prompts that begin with one of them are read from there on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llm.model.kv_cache import Prefix

LEAST_SHARED = 16  # tokens: less is not worth a prefix of its own
MOST_ENTRIES = 256


@dataclass(eq=False)
class Entry:
    """Text of the store. logits: (V,) fp32 behind its last token, if they were computed; uses: rows that need it."""

    tokens: np.ndarray
    prefix: Prefix
    logits: torch.Tensor | None = None
    uses: int = 0


class PrefixStore:
    """Texts with their keys and values, of which those used longest ago make room for others."""

    def __init__(self):
        self._entries: list[Entry] = []  # the last used one at the end
        self.hits = 0  # prompts that began with a text of the store

    @property
    def n_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(entry.tokens) for entry in self._entries)

    @property
    def n_needed(self) -> int:
        """Tokens of the texts that rows stand behind."""
        return sum(len(entry.tokens) for entry in self._entries if entry.uses)

    def find(self, tokens: Sequence[int]) -> tuple[Entry | None, int]:
        """Return the text that shares the most first tokens with `tokens`, and their number; (None, 0) below a minimum.

        The whole of `tokens` counts only where the logits behind them are known: one must be left to be read.
        """
        wanted, best, most = np.asarray(tokens), None, LEAST_SHARED - 1
        for entry in self._entries:
            n = common(entry.tokens, wanted)
            if n == len(wanted) and (len(entry.tokens) > n or entry.logits is None):
                n -= 1
            if n > most or (n == most and best is not None and len(entry.tokens) == n):
                best, most = entry, n
        return (None, 0) if best is None else (best, most)

    def use(self, entry: Entry) -> None:
        """Note that an entry was used now."""
        self._entries.remove(entry)
        self._entries.append(entry)

    def add(self, tokens: Sequence[int], prefix: Prefix, logits: torch.Tensor | None = None) -> Entry:
        """Put in a text; shorter ones that it begins with and nobody needs are replaced."""
        entry = Entry(np.array(tokens), prefix, logits)
        for old in list(self._entries):
            if not old.uses and len(old.tokens) == common(old.tokens, entry.tokens):
                self._entries.remove(old)
        self._entries.append(entry)
        return entry

    def shrink(self, n_tokens: int) -> None:
        """Drop texts that no row needs, those used longest ago first, until all have at most `n_tokens` together."""
        spare, excess = [entry for entry in self._entries if not entry.uses], self.n_tokens - n_tokens
        while spare and (excess > 0 or len(self._entries) > MOST_ENTRIES):
            excess -= len(spare[0].tokens)
            self._entries.remove(spare.pop(0))


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Return the number of first tokens that are equal."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
