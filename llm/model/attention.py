"""Causal attention: rotary positions, the choice of a kernel, windows and document masks."""

import math
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

from llm.errors import UserError
from llm.model import attention_cpu, fused_attention_cpu

FLASH3_KERNEL = {"repo_id": "kernels-community/flash-attn3", "version": 1}  # on the Hugging Face hub
flash_attn_func = None  # FlashAttention 3, once `has_flash3` has found it


def rotary_tables(
    seq_len: int, head_dim: int, base: float, original: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of the rotary angles, each (seq_len, head_dim / 2) fp32 (RoFormer, arXiv 2104.09864).

    original: the context in tokens that a model was trained with before it got `seq_len`; its frequencies are stretched
    by YaRN. None leaves them as they are.
    """
    inv_freq = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if original is not None:
        inv_freq = yarn_frequencies(inv_freq, base, original, seq_len / original)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device="cpu"), inv_freq)
    return angles.cos(), angles.sin()


def yarn_frequencies(inv_freq: torch.Tensor, base: float, original: int, factor: float) -> torch.Tensor:
    """Stretch rotary frequencies (head_dim / 2,) by parts, as YaRN does for a context `factor` times `original`.

    Channels that turn more than 32 times within the original context stay; those that turn less than once are slowed by
    `factor`; between the two the share grows with the channel's number, linearly (arXiv 2309.00071, section 3.2, in
    whole channels as its authors' code has it). The paper's temperature on the logits is left out: queries and keys
    are normed after the rotation.
    """
    head_dim = 2 * len(inv_freq)

    def channel(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), head_dim - 1)
    slowed = ((torch.arange(len(inv_freq), dtype=torch.float32, device="cpu") - low) / max(high - low, 1e-3)).clamp(
        0, 1
    )
    return inv_freq * (1 - slowed) + inv_freq / factor * slowed


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of each head by minus the position's angle.

    x: (B, T, H, D); cos, sin: (T, D/2) or (B, T, D/2), broadcast over heads.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def offset_keys(
    k: torch.Tensor, before: torch.Tensor | None = None, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Take the slow half of every key's channels from the token before it (partial key offset of modded-nanogpt, 2025).

    A query then finds, by one product, what came behind a token like its own: the first layer of an induction head is
    not needed. k: (B, T, Hkv, D), normed and rotated; before: (B, 1, Hkv, D), the keys in front of the first ones;
    positions: (B, T), in a row or in its documents. The token at position 0 keeps its own; without positions that is
    the first one. Slow are channels D/4 to D/2 and 3 D/4 to D, whose rotary wavelengths are the longer ones; the source
    has no rotation at all there.
    """
    shifted = torch.cat((k[:, :1] if before is None else before, k[:, :-1]), dim=1)
    if positions is not None:
        shifted = torch.where((positions == 0)[:, :, None, None], k, shifted)
    D = k.size(-1)
    is_slow = torch.arange(D, device=k.device) % (D // 2) >= D // 4
    return torch.where(is_slow, shifted, k)


def places_in_documents(starts: torch.Tensor | None) -> torch.Tensor | None:
    """Return the positions (B, T) of tokens in their documents; starts: (B, T), true where one begins, or None."""
    if starts is None:
        return None
    at = torch.arange(starts.size(1), device=starts.device)
    return at - (at * starts).cummax(1).values


def without_own(y: torch.Tensor, v: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Take from y (B, T, H, D) the `share` (H,) of the part that points along v (B, T, Hkv, D), both of one token."""
    v = v.repeat_interleave(y.size(2) // v.size(2), dim=2)
    along = (y * v).sum(-1, keepdim=True, dtype=torch.float32) / v.float().square().sum(-1, keepdim=True).clamp(1e-12)
    return y - (share.unsqueeze(-1) * along).to(y.dtype) * v


def pair_heads(x: torch.Tensor) -> torch.Tensor:
    """Return x (B, T, H, D) as (B, 2 T, H / 2, D): heads h and h + H/2 become one head, interleaved along time.

    Token t of the first lies at place 2 t, of the second at 2 t + 1. Causal attention of such queries, keys and values
    is that of paired heads (modded-nanogpt, track 1, 2026): a query meets keys of its own head and of the other one in
    one softmax. Of the other head the first one sees earlier tokens, the second one the same token too. A window of 2 W
    places reaches W tokens back. Both heads turn by the token's position; in the source the second turns half a step
    further, which is a change of basis of its weights. Contiguous tensors are not copied.
    """
    B, T, H, D = x.shape
    return x.reshape(B, 2 * T, H // 2, D)


def plain_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend for any shape and length, as evaluation, sampling and reinforcement learning need it."""
    return "cpu" if device.type == "cpu" and dtype in attention_cpu.DTYPES else "sdpa"


def has_flash3() -> bool:
    """Return whether FlashAttention 3 is there: the wheel flash_attn_3, or the hub kernel of `kernels`."""
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
    """Return whether the wheel of FlashAttention 3 was built without a backward pass, as those for serving are."""
    with suppress(Exception):
        flags = import_module("flash_attn_config").CONFIG["build_flags"]
        return bool(flags.get("FLASHATTENTION_DISABLE_BACKWARD"))
    return False


@cache
def hub_answers(seconds: float = 3.0) -> bool:
    """Return whether the Hugging Face hub answers within `seconds`; asked once, so that no start waits for it twice."""
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
    """Return {window: mask} for `causal_attention`; built once per pass and shared by all layers.

    windows: earlier positions a layer sees, None = all; starts: (B, length), true where a document begins, None = rows
    are not divided. A mask is None where the window alone suffices. Otherwise it holds the document numbers (B, length)
    for "cpu", a BlockMask for "flex", or booleans (B, 1, length, length) for "sdpa".
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


def layer_masks(
    windows: list[int | None],
    paired: list[bool],
    length: int,
    starts: torch.Tensor | None,
    backend: str,
    device: torch.device,
) -> list:
    """Return the mask of `attention_masks` for each layer; paired: of which layers heads are paired (`pair_heads`)."""
    layers = list(zip(windows, paired, strict=True))
    masks = attention_masks((window for window, pairs in layers if not pairs), length, starts, backend, device)
    if not any(paired):
        return [masks[window] for window in windows]
    starts = None if starts is None else torch.stack((starts, torch.zeros_like(starts)), dim=2).flatten(1)
    reaches = (_twice(window) for window, pairs in layers if pairs)
    of_pairs = attention_masks(reaches, 2 * length, starts, backend, device)
    return [of_pairs[_twice(window)] if pairs else masks[window] for window, pairs in layers]


def _twice(window: int | None) -> int | None:
    return None if window is None else 2 * window


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
    mask: torch.Tensor | BlockMask | None = None,
    backend: str | None = None,
    paired: bool = False,
) -> torch.Tensor:
    """Return softmax(scale * q k^T) v; a position sees itself and the `window` positions before it (None: all).

    q: (B, T, H, D); k, v: (B, T, Hkv, D); mask: from `attention_masks`; backend: from `choose_backend`, by default
    `plain_backend`; paired: heads are, see `pair_heads`. Returns (B, T, H, D).
    """
    if paired:
        y = causal_attention(*map(pair_heads, (q, k, v)), scale, _twice(window), mask, backend)
        return y.reshape(q.shape)
    if window is not None and window >= q.size(1) - 1:
        window = None
    backend = backend or plain_backend(q.device, q.dtype)
    if backend == "flash3":
        reach = (-1 if window is None else window, 0)
        y = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=reach)
        return y[0] if isinstance(y, tuple) else y  # older wheels also return the log-sums
    if backend == "cpu" and fused_attention_cpu.computes(q):
        return fused_attention_cpu.attention(*_repeat_kv_heads(q, k, v), scale, window, mask)
    if backend == "cpu" and attention_cpu.is_faster(q, window, mask):
        return attention_cpu.attention(*_repeat_kv_heads(q, k, v), scale, window, mask)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    is_grouped = q.size(1) != k.size(1)
    if backend == "flex" and mask is not None:
        kernel = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        y = kernel(q, k, v, block_mask=mask, scale=scale, enable_gqa=is_grouped)
    elif mask is not None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=is_grouped)
    elif window is not None:
        y = banded_attention(*_repeat_kv_heads(q, k, v, dim=1), scale, window)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=is_grouped)
    return y.transpose(1, 2)


def _repeat_kv_heads(q, k, v, dim: int = 2):
    """Repeat key and value heads (dimension `dim`) until there are as many as query heads."""
    if k.size(dim) == q.size(dim):
        return q, k, v
    return q, *(t.repeat_interleave(q.size(dim) // t.size(dim), dim=dim) for t in (k, v))


# ---------------------------------------------------------------------------------------------------------------------
# Windows and documents for (B, H, T, D).


def banded_attention(q, k, v, scale: float, window: int) -> torch.Tensor:
    """Compute windowed attention with any SDPA kernel: blocks of queries, each against the keys within reach.

    q, k, v: (B, H, T, D), also the result. No (T, T) mask is built.
    """
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
    """Return booleans (B, 1, T, T), true where a query sees a key of its own document; documents: (B, T) numbers."""
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

    def same_document(b, h, at, key):
        return sees(b, h, at, key) & (documents[b, at] == documents[b, key])

    make = _compiled_block_mask() if documents.device.type == "cuda" else create_block_mask
    return make(same_document, rows, None, length, length, device=documents.device)


def _sees(window: int | None):
    """Return the mask function (batch, head, query, key) -> bool of FlexAttention for a window."""

    def sees(b, h, at, key):
        return at >= key if window is None else (at >= key) & (at - key <= window)

    return sees
