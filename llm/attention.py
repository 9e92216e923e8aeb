"""Causal attention and the key/value cache: everything that looks across positions."""

from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from llm import attention_cpu
from llm.errors import UserError


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


def choose_backend(device: torch.device, dtype: torch.dtype, special: bool, asked: str = "auto") -> str:
    """The fastest form of `causal_attention` that runs here: cpu | flash3 | flex | sdpa.

    special: whether some layer has a window or documents are kept apart; without, plain SDPA is as good as any.
    Raises UserError where the one `asked` for cannot run.
    """
    fast_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    possible = {
        "cpu": device.type == "cpu" and dtype in attention_cpu.DTYPES,
        "flash3": fast_gpu and torch.cuda.get_device_capability(device)[0] == 9 and flash3() is not None,
        "flex": device.type == "cuda",  # torch has no backward pass of it for CPUs
        "sdpa": True,
    }
    if asked != "auto":
        if not possible[asked]:
            needs = {
                "cpu": "a CPU and fp32, bf16 or fp16",
                "flash3": "a Hopper GPU, bf16 or fp16, and the package flash_attn_3 or kernels",
                "flex": "a CUDA GPU",
            }[asked]
            raise UserError(f"attention={asked} needs {needs}; this is {device} with {dtype}: set attention=auto")
        return asked
    if not special:
        possible["flex"] = False
    return next(name for name, runs in possible.items() if runs)


@cache
def flash3():
    """FlashAttention 3's function, from the wheel flash_attn_3 or a kernel that the package kernels has stored."""
    try:
        from flash_attn_interface import flash_attn_func

        return flash_attn_func
    except ImportError:
        pass
    try:
        from kernels import get_kernel

        return get_kernel("kernels-community/flash-attn3").flash_attn_func
    except Exception:  # not installed, not reachable, made for another version: the next best backend serves
        return None


def document_masks(starts: torch.Tensor, windows: Iterable[int | None], backend: str) -> dict:
    """What `causal_attention` takes as `documents`, per window, for rows whose documents begin where `starts` (B, T)
    is true: the documents' numbers, or what FlexAttention makes of them once for all layers.
    """
    documents = starts.cumsum(1)
    if backend not in ("flash3", "flex"):
        return dict.fromkeys(windows, documents)
    return {window: _document_mask(window, documents) for window in set(windows)}


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
    documents: torch.Tensor | BlockMask | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v, where a position sees itself and the `window` positions before it (None: all).

    q: (B, T, H, D); k, v: (B, T, Hkv, D); documents: (B, T) int, positions see only those of the same number, or from
    `document_masks`; backend: from `choose_backend`, by default what it chooses. Returns (B, T, H, D).
    """
    if window is not None and window >= q.size(1) - 1:
        window = None
    special = window is not None or documents is not None
    backend = backend or choose_backend(q.device, q.dtype, special)
    if backend == "flash3" and documents is None:
        reach = (-1 if window is None else window, 0)
        y = flash3()(q, k, v, softmax_scale=scale, causal=True, window_size=reach)
        return y[0] if isinstance(y, tuple) else y  # older wheels also return the log-sums
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if special and backend in ("flash3", "flex"):
        y = flex(q, k, v, scale, window, documents)
    elif backend == "cpu" and (special or q.dtype != torch.float32 or attention_cpu.keeps(q.size(2), window)):
        y = attention_cpu.attention(*_even(q, k, v), scale, window, documents)
    elif documents is not None:
        y = masked_attention(*_even(q, k, v), scale, window, documents)
    elif window is not None:
        y = banded_attention(*_even(q, k, v), scale, window)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


def _even(q, k, v):
    """As many key and value heads as query heads."""
    if k.size(1) == q.size(1):
        return q, k, v
    return q, *(t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))


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
# Forms of windows and documents for (B, H, T, D).


def banded_attention(q, k, v, scale: float, window: int) -> torch.Tensor:
    """A window by any SDPA kernel: queries in blocks, each against the keys in reach. No (T, T) mask exists."""
    outputs, T = [], q.size(2)
    size = max(64, window // 2)
    bounds = [(0, min(T, window + 1))]  # up to here the window reaches back to the start: plain causal
    bounds += [(at, min(at + size, T)) for at in range(window + 1, T, size)]
    outside = torch.ones(size, size + window, dtype=torch.bool, device=q.device)
    outside = outside.triu(window + 1) | outside.tril(-1)
    mask = torch.zeros(outside.shape, device=q.device, dtype=q.dtype).masked_fill_(outside, -torch.inf)
    for start, end in bounds:
        key, n = max(0, start - window), end - start
        part = (q[:, :, start:end], k[:, :, key:end], v[:, :, key:end])
        shape = {"is_causal": True} if start == 0 else {"attn_mask": mask[:n, : n + window]}
        outputs.append(F.scaled_dot_product_attention(*part, **shape, scale=scale))
    return torch.cat(outputs, dim=2)


def masked_attention(q, k, v, scale: float, window: int | None, documents: torch.Tensor) -> torch.Tensor:
    """Documents apart by a (B, 1, T, T) mask: where nothing better runs."""
    at = torch.arange(q.size(2), device=q.device)
    distance = at.unsqueeze(1) - at
    mask = distance >= 0 if window is None else (distance >= 0) & (distance <= window)
    mask = mask & (documents.unsqueeze(2) == documents.unsqueeze(1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1), scale=scale)


def flex(q, k, v, scale: float, window: int | None, documents: torch.Tensor | BlockMask | None) -> torch.Tensor:
    """FlexAttention: blocks that the window or the documents hide are left out, no mask is held (PyTorch 2.5)."""
    if documents is None:
        mask = _flex_mask(q.size(2), window, q.device)
    else:
        mask = documents if isinstance(documents, BlockMask) else _document_mask(window, documents)
    return _compiled_flex()(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))


@cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


@cache
def _flex_mask(length: int, window: int | None, device: torch.device):
    return create_block_mask(_sees(window), None, None, length, length, device=device)


def _document_mask(window: int | None, documents: torch.Tensor):
    sees, (rows, length) = _sees(window), documents.shape

    def same(b, h, at, key):
        return sees(b, h, at, key) & (documents[b, at] == documents[b, key])

    compiled = documents.device.type == "cuda"  # else it would hold (B, T, T) for a moment
    return create_block_mask(same, rows, None, length, length, device=documents.device, _compile=compiled)


def _sees(window: int | None):
    def sees(b, h, at, key):
        return at >= key if window is None else (at >= key) & (at - key <= window)

    return sees


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
