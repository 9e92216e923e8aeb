"""Causal attention and the key/value cache: everything that looks across positions."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from functools import cache, lru_cache
from importlib import import_module
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._triton import has_triton

from llm import attention_cpu
from llm.errors import UserError

FLASH3_KERNEL = {"repo_id": "kernels-community/flash-attn3", "version": 1}  # on the Hugging Face hub
flash_attn_func = None  # FlashAttention 3, once `has_flash3` has found it


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


def plain_backend(device: torch.device, dtype: torch.dtype) -> str:
    """What serves any shape and length: evaluation, sampling, reinforcement learning."""
    return "cpu" if device.type == "cpu" and dtype in attention_cpu.DTYPES else "sdpa"


def has_flash3() -> bool:
    """Whether FlashAttention 3 is there: the wheel flash_attn_3, or what the package `kernels` has or fetches."""
    global flash_attn_func
    if flash_attn_func is None and not _is_forward_only():
        with suppress(ImportError, OSError, RuntimeError):  # not installed, or made for another version of torch
            from flash_attn_interface import flash_attn_func
    if flash_attn_func is None:
        with suppress(Exception):  # the hub cannot be reached, or has nothing for this torch: others serve
            kernels = import_module("kernels")
            if hub_answers():
                flash_attn_func = kernels.get_kernel(**FLASH3_KERNEL).flash_attn_func
    return flash_attn_func is not None


def _is_forward_only() -> bool:
    """Whether the wheel of FlashAttention 3 was built without a backward pass, as those for serving are."""
    with suppress(Exception):
        flags = import_module("flash_attn_config").CONFIG["build_flags"]
        return bool(flags.get("FLASHATTENTION_DISABLE_BACKWARD"))
    return False


@cache
def hub_answers(seconds: float = 3.0) -> bool:
    """Whether the Hugging Face hub answers soon; asked once. What cannot be reached must not hold up the start."""
    from huggingface_hub import constants

    def ask() -> None:
        try:
            urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=seconds).close()
        except HTTPError:  # an answer too
            pass
        except (OSError, ValueError):
            return
        answers.append(True)

    answers: list[bool] = []
    if not constants.HF_HUB_OFFLINE:
        thread = Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
        thread.start()
        thread.join(seconds)
    return bool(answers)


def choose_backend(
    asked: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    windows: bool,
    documents: bool,
    fixed_shapes: bool = True,
) -> str:
    """Backend of `causal_attention` for training steps: cpu | flash3 | flex | sdpa; auto = the fastest that can.

    windows, documents: whether some layer has a window, and whether documents are kept apart; fixed_shapes: whether all
    steps are alike, as compiled kernels need. Raises UserError where the one `asked` for cannot do it.
    """
    fast_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    hopper = fast_gpu and torch.cuda.get_device_capability(device)[0] == 9
    compiles = device.type == "cuda" and has_triton() and any(map(shutil.which, ("cc", "gcc", "clang")))
    can = {  # asked one after the other: has_flash3 may fetch something
        "cpu": (lambda: plain_backend(device, dtype) == "cpu", "a CPU and fp32, bf16 or fp16"),
        "flash3": (
            lambda: hopper and head_dim % 8 == 0 and head_dim <= 256 and not documents and has_flash3(),
            "a Hopper GPU, bf16 or fp16, the package flash_attn_3 or kernels, heads up to 256, and no document masks",
        ),
        "flex": (  # torch has no backward pass of it for CPUs
            lambda: compiles and dtype != torch.float64 and head_dim >= 16 and fixed_shapes,
            "a CUDA GPU, Triton and a C compiler, heads of at least 16, and steps of one shape",
        ),
        "sdpa": (lambda: True, ""),
    }
    if asked == "auto":
        useful = [name for name in can if name != "flex" or windows or documents]
        return next(name for name in useful if can[name][0]())
    possible, needs = can[asked]
    if not possible():
        raise UserError(f"attention={asked} needs {needs}; this is {device} with {dtype}: set attention=auto")
    return asked


def attention_masks(
    windows: Iterable[int | None], length: int, starts: torch.Tensor | None, backend: str, device: torch.device
) -> dict:
    """What `causal_attention` needs beside the window, for each of the windows; made once per pass for all layers.

    starts: (B, length) true where a document begins, None = all of a row is visible. The masks are None, the numbers of
    the documents (B, length) for "cpu", a BlockMask for "flex", or (B, 1, length, length) where nothing better runs.
    """
    windows = set(windows)
    if starts is None:
        hides = {window for window in windows if backend == "flex" and window is not None and window < length - 1}
        return dict.fromkeys(windows) | {window: _window_mask(window, length, device) for window in hides}
    documents = starts.cumsum(1)
    if backend == "cpu":
        return dict.fromkeys(windows, documents)
    make = _document_block_mask if backend == "flex" else _document_mask
    return {window: make(window, documents) for window in windows}


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
    mask: torch.Tensor | BlockMask | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v, where a position sees itself and the `window` positions before it (None: all).

    q: (B, T, H, D); k, v: (B, T, Hkv, D); mask: from `attention_masks`; backend: from `choose_backend`, by default
    `plain_backend`. Returns (B, T, H, D).
    """
    if window is not None and window >= q.size(1) - 1:
        window = None
    backend = backend or plain_backend(q.device, q.dtype)
    if backend == "flash3":
        reach = (-1 if window is None else window, 0)
        y = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=reach)
        return y[0] if isinstance(y, tuple) else y  # older wheels also return the log-sums
    if backend == "cpu" and attention_cpu.is_faster(q, window, mask):
        return attention_cpu.attention(*_even(q, k, v), scale, window, mask)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    is_grouped = q.size(1) != k.size(1)
    if backend == "flex" and mask is not None:
        kernel = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        y = kernel(q, k, v, block_mask=mask, scale=scale, enable_gqa=is_grouped)
    elif mask is not None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=is_grouped)
    elif window is not None:
        y = banded_attention(*_even(q, k, v, dim=1), scale, window)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=is_grouped)
    return y.transpose(1, 2)


def _even(q, k, v, dim: int = 2):
    """As many key and value heads, dimension `dim`, as query heads."""
    if k.size(dim) == q.size(dim):
        return q, k, v
    return q, *(t.repeat_interleave(q.size(dim) // t.size(dim), dim=dim) for t in (k, v))


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
# Windows and documents for (B, H, T, D).


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


def _document_mask(window: int | None, documents: torch.Tensor) -> torch.Tensor:
    at = torch.arange(documents.size(1), device=documents.device)
    return (_sees(window)(0, 0, at.unsqueeze(1), at) & (documents.unsqueeze(2) == documents.unsqueeze(1))).unsqueeze(1)


# FlexAttention (PyTorch 2.5) leaves out the blocks that its BlockMask hides and holds no (T, T) mask.


@cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


@cache
def _compiled_block_mask():
    return torch.compile(create_block_mask)  # uncompiled it holds all pairs of positions for a moment


@lru_cache(maxsize=8)
def _window_mask(window: int, length: int, device: torch.device) -> BlockMask:
    return create_block_mask(_sees(window), None, None, length, length, device=device)


def _document_block_mask(window: int | None, documents: torch.Tensor) -> BlockMask:
    sees, (rows, length) = _sees(window), documents.shape

    def same(b, h, at, key):
        return sees(b, h, at, key) & (documents[b, at] == documents[b, key])

    make = _compiled_block_mask() if documents.device.type == "cuda" else create_block_mask
    return make(same, rows, None, length, length, device=documents.device)


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

    def attend(self, layer: int, q, k, v, positions, scale: float, window: int | None, mask, backend) -> torch.Tensor:
        """Store the keys and values of new tokens, and let the queries see them and all before them: (B, T, H, D)."""
        first = self.used == 0
        keys, values = self.update(layer, k, v, positions)
        if first:
            return causal_attention(q, k, v, scale, window, mask, backend)
        return cached_attention(q, keys, values, positions, scale, window)

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


class Branches:
    """`n` continuations of every row of a KVCache, computed in one pass over ids (B * n, T) and not stored.

    Continuation b * n + i sees the tokens of row b and its own. The cache is read where it lies, not copied n times:
    the continuations of a row are queries of one attention whose mask keeps them apart. Stands in for a cache in the
    forward pass of the network, once.
    """

    def __init__(self, cache: KVCache, n: int, seq_len: int):
        self.cache, self.n, self.seq_len, self.used = cache, n, seq_len, cache.used
        self.last_embed = None if cache.last_embed is None else cache.last_embed.repeat_interleave(n, dim=0)
        self._masks: dict[int | None, torch.Tensor] = {}

    def positions(self, n_new: int) -> torch.Tensor:
        """Positions (B * n, n_new). What pads short continuations may lie beyond the context and is put at its end."""
        first = self.cache.lengths.repeat_interleave(self.n).unsqueeze(1)
        return (first + torch.arange(n_new, device=first.device)).clamp(max=self.seq_len - 1)

    def attend(self, layer: int, q, k, v, positions, scale: float, window: int | None, mask, backend) -> torch.Tensor:
        n_new, rows = q.size(1), len(self.cache.lengths)
        q, k, v = (t.reshape(rows, self.n * n_new, *t.shape[2:]).transpose(1, 2) for t in (q, k, v))  # (B, H, n T, D)
        keys, values = (
            torch.cat((old[layer, :, : self.used].transpose(1, 2), new), dim=2)
            for old, new in ((self.cache.k, k), (self.cache.v, v))
        )
        y = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=self._mask(n_new, window), scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
        return y.transpose(1, 2).reshape(rows * self.n, n_new, *y.shape[1::2])

    def _mask(self, n_new: int, window: int | None) -> torch.Tensor:
        """(B, 1, n T, used + n T): true where a query sees a key, first those of the cache, then the new ones."""
        if window not in self._masks:
            lengths = self.cache.lengths.view(-1, 1, 1, 1)
            at = torch.arange(self.used, device=lengths.device)
            new = torch.arange(self.n * n_new, device=lengths.device)
            branch, offset = new // n_new, (new % n_new).unsqueeze(1)
            reach = self.seq_len if window is None else window
            old = (at < lengths) & (lengths + offset - at <= reach)  # (B, 1, n T, used)
            own = (branch.unsqueeze(1) == branch) & (offset >= offset.T) & (offset - offset.T <= reach)
            self._masks[window] = torch.cat((old, own.expand(len(old), 1, -1, -1)), dim=-1)
        return self._masks[window]
