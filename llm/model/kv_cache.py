"""Key/value cache for generation, and the attention of new tokens over it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from llm.model.attention import causal_attention


class AttentionOptions(NamedTuple):
    """The arguments of `causal_attention` behind q, k and v."""

    scale: float
    window: int | None
    mask: torch.Tensor | None
    backend: str | None


def cached_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """Return the attention of new queries over a cache in which key j of a row stands at position j.

    q: (B, T, H, D) at `positions` (B, T); k, v: (B, S, Hkv, D). Returns (B, T, H, D). A query sees the keys at or
    before its own position (and within the window), which hides everything behind a row's end: padding and stale
    entries.
    """
    at = torch.arange(k.size(1), device=q.device)
    mask = at <= positions.unsqueeze(-1)  # (B, T, S)
    if window is not None and window < k.size(1) - 1:
        mask &= at >= positions.unsqueeze(-1) - window
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask.unsqueeze(1), scale=scale, enable_gqa=q.size(1) != k.size(1)
    )
    return y.transpose(1, 2)


class KVCache:
    """Keys and values of B rows, each with its own length, in one buffer per kind: (L, B, S, Hkv, D).

    Rows of different lengths share a batch: a row's next token is written at its own `lengths[b]`. The first pass over
    right-padded prompts leaves the padding's keys behind the row's end, where they are never attended to and soon
    overwritten. `used` bounds the lengths from above on the host, so no step has to wait for the device.
    """

    def __init__(self, config, batch: int, max_len: int, device="cpu", dtype: torch.dtype = torch.float32):
        shape = (config.n_layer, batch, max_len, config.n_kv_head, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # true tokens per row
        self.used = 0
        self.fed: torch.Tensor | None = None  # embeddings (B, T, C) of the tokens just fed, if the model smears
        self.last_embed: torch.Tensor | None = None  # embedding (B, 1, C) of every row's last token

    @property
    def max_len(self) -> int:
        """Positions that the cache has room for."""
        return self.k.size(2)

    def positions(self, n_new: int) -> torch.Tensor:
        """Return the positions (B, n_new) of the next tokens of every row. Raises ValueError if the cache is full."""
        if self.used + n_new > self.max_len:
            raise ValueError(f"KV cache of {self.max_len} positions is full: {self.used} used, {n_new} more asked for")
        return self.lengths.unsqueeze(1) + torch.arange(n_new, device=self.lengths.device)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor):
        """Store new keys and values (B, T, Hkv, D) of a layer at `positions`; return all keys and values in use."""
        end = self.used + k.size(1)
        if self.used == 0:
            self.k[layer, :, :end], self.v[layer, :, :end] = k.to(self.k.dtype), v.to(self.v.dtype)
        else:
            rows = torch.arange(k.size(0), device=k.device).unsqueeze(1)
            self.k[layer][rows, positions], self.v[layer][rows, positions] = k.to(self.k.dtype), v.to(self.v.dtype)
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def attend(self, layer: int, q, k, v, positions, options: AttentionOptions) -> torch.Tensor:
        """Store keys and values of new tokens; return the attention (B, T, H, D) of their queries over the cache."""
        first = self.used == 0
        keys, values = self.update(layer, k, v, positions)
        if first:
            return causal_attention(q, k, v, *options)
        return cached_attention(q, keys, values, positions, options.scale, options.window)

    def advance(self, n_new: int, lengths: torch.Tensor | None = None) -> None:
        """Count `n_new` written positions, of which the first `lengths[b]` are true tokens (None: all)."""
        if self.fed is not None:
            rows = torch.arange(len(self.fed), device=self.fed.device)
            last = torch.full_like(rows, n_new - 1) if lengths is None else lengths - 1
            self.last_embed, self.fed = self.fed[rows, last].unsqueeze(1), None
        self.lengths = self.lengths + (n_new if lengths is None else lengths)
        self.used += n_new

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows, each at most once. They are moved within the buffers, which is cheaper than new buffers."""
        n = len(rows)
        for layer in (*self.k, *self.v):
            layer[:n, : self.used] = layer[rows, : self.used]
        self.k, self.v, self.lengths = self.k[:, :n], self.v[:, :n], self.lengths[rows]
        if self.last_embed is not None:
            self.last_embed = self.last_embed[rows]

    def repeat(self, n: int) -> None:
        """Repeat every row n times, copies side by side."""
        self.k, self.v = self.k.repeat_interleave(n, dim=1), self.v.repeat_interleave(n, dim=1)
        self.lengths = self.lengths.repeat_interleave(n)
        if self.last_embed is not None:
            self.last_embed = self.last_embed.repeat_interleave(n, dim=0)


class SharedPrefixCache:
    """Cache for `n` continuations of every row of a KVCache, computed in one pass over ids (B * n, T) and not stored.

    Continuation b * n + i sees the tokens of row b and its own. The prefix is read in place, not copied n times: all
    continuations of a row are queries of one attention, and a mask keeps them apart. It replaces a KVCache in one
    forward pass of the network.
    """

    def __init__(self, cache: KVCache, n: int, seq_len: int):
        self.cache, self.n, self.seq_len, self.used = cache, n, seq_len, cache.used
        self.last_embed = None if cache.last_embed is None else cache.last_embed.repeat_interleave(n, dim=0)
        self._masks: dict[int | None, torch.Tensor] = {}

    def positions(self, n_new: int) -> torch.Tensor:
        """Return the positions (B * n, n_new) of the continuations' tokens.

        Padding behind short continuations may lie beyond the context; it gets the last position.
        """
        first = self.cache.lengths.repeat_interleave(self.n).unsqueeze(1)
        return (first + torch.arange(n_new, device=first.device)).clamp(max=self.seq_len - 1)

    def attend(self, layer: int, q, k, v, positions, options: AttentionOptions) -> torch.Tensor:
        """Return the attention (B n, T, H, D) of the continuations over the prefix and over themselves."""
        n_new, rows = q.size(1), len(self.cache.lengths)
        q, k, v = (t.reshape(rows, self.n * n_new, *t.shape[2:]).transpose(1, 2) for t in (q, k, v))  # (B, H, n T, D)
        keys, values = (
            torch.cat((old[layer, :, : self.used].transpose(1, 2), new), dim=2)
            for old, new in ((self.cache.k, k), (self.cache.v, v))
        )
        mask, is_grouped = self._mask(n_new, options.window), q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=options.scale, enable_gqa=is_grouped)
        return y.transpose(1, 2).reshape(rows * self.n, n_new, *y.shape[1::2])

    def _mask(self, n_new: int, window: int | None) -> torch.Tensor:
        """Return a mask (B, 1, n T, used + n T), true where a query sees a key: the prefix's keys, then new ones."""
        if window not in self._masks:
            lengths = self.cache.lengths.view(-1, 1, 1, 1)
            at = torch.arange(self.used, device=lengths.device)
            new = torch.arange(self.n * n_new, device=lengths.device)
            continuation, offset = new // n_new, (new % n_new).unsqueeze(1)
            reach = self.seq_len if window is None else window
            old = (at < lengths) & (lengths + offset - at <= reach)  # (B, 1, n T, used)
            own = (continuation.unsqueeze(1) == continuation) & (offset >= offset.T) & (offset - offset.T <= reach)
            self._masks[window] = torch.cat((old, own.expand(len(old), 1, -1, -1)), dim=-1)
        return self._masks[window]
