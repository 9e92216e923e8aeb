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
    """Text of the store. logits: (V,) fp32 behind its last token, if they were computed; uses: rows that need it.

    adapter: name of the one by which it was read, None for the base: keys and values depend on it.
    """

    tokens: np.ndarray
    prefix: Prefix
    logits: torch.Tensor | None = None
    uses: int = 0
    adapter: str | None = None


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
    def cost(self) -> int:
        """Memory of all texts, in tokens that all layers keep."""
        return sum(entry.prefix.cost for entry in self._entries)

    @property
    def needed(self) -> int:
        """Memory of the texts that rows stand behind, in tokens that all layers keep."""
        return sum(entry.prefix.cost for entry in self._entries if entry.uses)

    def find(self, tokens: Sequence[int], adapter: str | None = None) -> tuple[Entry | None, int]:
        """Return the text that shares the most first tokens with `tokens`, and their number; (None, 0) below a minimum.

        Only texts that the same adapter has read count.
        The whole of `tokens` counts only where the logits behind them are known: one must be left to be read. Of a long
        text few last tokens can be left out where layers with a window keep no more.
        """
        wanted, best, most = np.asarray(tokens), None, LEAST_SHARED - 1
        for entry in self._read_by(adapter):
            n = common(entry.tokens, wanted)
            if n == len(wanted) and (len(entry.tokens) > n or entry.logits is None):
                n -= 1
            if n < entry.prefix.least:
                continue
            if n > most or (n == most and best is not None and len(entry.tokens) == n):
                best, most = entry, n
        return (None, 0) if best is None else (best, most)

    def longest_beginning(self, tokens: Sequence[int], adapter: str | None = None) -> int:
        """Return how many first tokens some text shares with `tokens`, whether or not it can be used from there on."""
        wanted = np.asarray(tokens)
        return max((common(entry.tokens, wanted) for entry in self._read_by(adapter)), default=0)

    def _read_by(self, adapter: str | None) -> list[Entry]:
        return [entry for entry in self._entries if entry.adapter == adapter]

    def use(self, entry: Entry) -> None:
        """Note that an entry was used now."""
        self._entries.remove(entry)
        self._entries.append(entry)

    def add(
        self,
        tokens: Sequence[int],
        prefix: Prefix,
        logits: torch.Tensor | None = None,
        adapter: str | None = None,
    ) -> Entry:
        """Put in a text that an adapter (None: the base) has read; those that it can stand in for are dropped.

        These are shorter ones, read by the same adapter, that it begins with and no row needs.
        """
        entry = Entry(np.array(tokens), prefix, logits, adapter=adapter)
        for old in self._read_by(adapter):
            if not old.uses and prefix.least <= len(old.tokens) == common(old.tokens, entry.tokens):
                self._entries.remove(old)
        self._entries.append(entry)
        return entry

    def shrink(self, cost: int) -> None:
        """Drop texts that no row needs, those used longest ago first, until all cost at most `cost` together."""
        spare, excess = [entry for entry in self._entries if not entry.uses], self.cost - cost
        while spare and (excess > 0 or len(self._entries) > MOST_ENTRIES):
            excess -= spare[0].prefix.cost
            self._entries.remove(spare.pop(0))


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Return the number of first tokens that are equal."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
