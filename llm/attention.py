"""Causal attention and the key/value cache: everything that looks across positions."""

import torch
import torch.nn.functional as F


def rotary_tables(seq_len: int, head_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles, each (seq_len, head_dim / 2) fp32 (RoFormer, arXiv 2104.09864)."""
    inv_freq = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device="cpu"), inv_freq)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head by minus the position's angle.

    x: (B, T, H, D); cos, sin: (T, D/2) or (B, T, D/2), broadcast over heads.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v with a causal mask. q: (B, T, H, D); k, v: (B, T, Hkv, D); returns (B, T, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


def cached_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Attention of new queries over a cache in which key j of a row stands at position j.

    q: (B, T, H, D) at `positions` (B, T); k, v: (B, S, Hkv, D). A query sees the keys at or before its own position,
    which hides whatever lies behind a row's end (padding, stale entries).
    """
    mask = torch.arange(k.size(1), device=q.device) <= positions.unsqueeze(-1)  # (B, T, S)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    enable_gqa = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1), enable_gqa=enable_gqa).transpose(1, 2)


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

    @property
    def max_len(self) -> int:
        return self.k.size(2)

    def positions(self, n_new: int) -> torch.Tensor:
        """Positions (B, n_new) of the next tokens of every row."""
        if self.used + n_new > self.max_len:
            raise ValueError(f"KV cache of {self.max_len} positions is full: {self.used} used, {n_new} more asked for")
        return self.lengths.unsqueeze(1) + torch.arange(n_new, device=self.lengths.device)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor):
        """Store new keys and values (B, T, Hkv, D) of a layer at `positions`; returns all keys and values in use."""
        end = self.used + k.size(1)
        if self.used == 0:
            self.k[layer, :, :end], self.v[layer, :, :end] = k.to(self.k.dtype), v.to(self.v.dtype)
        else:
            rows = torch.arange(k.size(0), device=k.device).unsqueeze(1)
            self.k[layer][rows, positions], self.v[layer][rows, positions] = k.to(self.k.dtype), v.to(self.v.dtype)
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def advance(self, n_new: int, lengths: torch.Tensor | None = None) -> None:
        """Count `n_new` written positions of which the first `lengths[b]` are true tokens (all, if not given)."""
        self.lengths = self.lengths + (n_new if lengths is None else lengths)
        self.used += n_new

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows, each at most once, without new buffers: moving the positions in use is far cheaper."""
        n = len(rows)
        for layer in (*self.k, *self.v):
            layer[:n, : self.used] = layer[rows, : self.used]
        self.k, self.v, self.lengths = self.k[:, :n], self.v[:, :n], self.lengths[rows]

    def repeat(self, n: int) -> None:
        """Every row n times, copies side by side."""
        self.k, self.v = self.k.repeat_interleave(n, dim=1), self.v.repeat_interleave(n, dim=1)
        self.lengths = self.lengths.repeat_interleave(n)
