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


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """softmax(scale * q k^T) v, where a position sees itself and the `window` positions before it (None: all).

    q: (B, T, H, D); k, v: (B, T, Hkv, D); returns (B, T, H, D).
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if window is not None and window < q.size(2) - 1:
        if k.size(1) != q.size(1):
            k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
        attend = _BandedOnCPU.apply if q.device.type == "cpu" and q.dtype in CPU_FLASH_DTYPES else banded_attention
        return attend(q, k, v, scale, window).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


def cached_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    """Attention of new queries over a cache in which key j of a row stands at position j.

    q: (B, T, H, D) at `positions` (B, T); k, v: (B, S, Hkv, D). A query sees the keys at or before its own position
    (and within the window), which hides whatever lies behind a row's end (padding, stale entries).
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


# ---------------------------------------------------------------------------------------------------------------------
# Sliding windows: queries in blocks, each against the keys that its window reaches. What lies outside is never
# computed, and no (T, T) mask exists: time and memory follow T x window.

CPU_FLASH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _blocks(length: int, window: int) -> list[tuple[int, int, int]]:
    """(first query, behind the last query, first key) per block. The first block is plain causal, later ones banded."""
    size = max(64, window // 2)
    first = min(length, window + 1)  # up to here the window reaches back to the start
    blocks = [(0, first, 0)]
    return blocks + [(at, min(at + size, length), at - window) for at in range(first, length, size)]


def _band(n: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask (n, n + window): query i sees the keys i to i + window of its block."""
    outside = torch.ones(n, n + window, dtype=torch.bool, device=like.device)
    outside = outside.triu(window + 1) | outside.tril(-1)
    return torch.zeros(n, n + window, device=like.device, dtype=like.dtype).masked_fill_(outside, -torch.inf)


def banded_attention(q, k, v, scale: float, window: int) -> torch.Tensor:
    """Windowed attention of (B, H, T, D) by any SDPA kernel, differentiable by autograd."""
    outputs, mask = [], None
    for start, end, key in _blocks(q.size(2), window):
        part = (q[:, :, start:end], k[:, :, key:end], v[:, :, key:end])
        if start == 0:
            outputs.append(F.scaled_dot_product_attention(*part, is_causal=True, scale=scale))
            continue
        n = end - start
        mask = _band(n, window, q) if mask is None else mask
        outputs.append(F.scaled_dot_product_attention(*part, attn_mask=mask[:n, : n + window], scale=scale))
    return torch.cat(outputs, dim=2)


class _BandedOnCPU(torch.autograd.Function):
    """The same with torch's flash kernels for the CPU and gradients added up in place.

    Autograd's own backward of a slice writes a full tensor of zeros per block.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale: float, window: int):
        blocks = _blocks(q.size(2), window)
        out, sums = torch.empty_like(q), []
        mask = _band(blocks[1][1] - blocks[1][0], window, q)
        for start, end, key in blocks:
            y, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, start:end],
                k[:, :, key:end],
                v[:, :, key:end],
                is_causal=start == 0,
                attn_mask=None if start == 0 else mask[: end - start, : end - key],
                scale=scale,
            )
            out[:, :, start:end] = y
            sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, mask, *sums)
        ctx.scale, ctx.blocks = scale, blocks
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, mask, *sums = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, end, key), log_sum in zip(ctx.blocks, sums, strict=True):
            d = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, start:end],
                q[:, :, start:end],
                k[:, :, key:end],
                v[:, :, key:end],
                out[:, :, start:end],
                log_sum,
                0.0,
                start == 0,
                attn_mask=None if start == 0 else mask[: end - start, : end - key],
                scale=ctx.scale,
            )
            dq[:, :, start:end] = d[0]
            dk[:, :, key:end] += d[1]
            dv[:, :, key:end] += d[2]
        return dq, dk, dv, None, None


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
        self.fed: torch.Tensor | None = None  # embeddings of the tokens just fed (B, T, C), where the model smears
        self.last_embed: torch.Tensor | None = None  # of every row's last token (B, 1, C)

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
        if self.fed is not None:
            rows = torch.arange(len(self.fed), device=self.fed.device)
            last = torch.full_like(rows, n_new - 1) if lengths is None else lengths - 1
            self.last_embed, self.fed = self.fed[rows, last].unsqueeze(1), None
        self.lengths = self.lengths + (n_new if lengths is None else lengths)
        self.used += n_new

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows, each at most once, without new buffers: moving the positions in use is far cheaper."""
        n = len(rows)
        for layer in (*self.k, *self.v):
            layer[:n, : self.used] = layer[rows, : self.used]
        self.k, self.v, self.lengths = self.k[:, :n], self.v[:, :n], self.lengths[rows]
        if self.last_embed is not None:
            self.last_embed = self.last_embed[rows]

    def repeat(self, n: int) -> None:
        """Every row n times, copies side by side."""
        self.k, self.v = self.k.repeat_interleave(n, dim=1), self.v.repeat_interleave(n, dim=1)
        self.lengths = self.lengths.repeat_interleave(n)
        if self.last_embed is not None:
            self.last_embed = self.last_embed.repeat_interleave(n, dim=0)
