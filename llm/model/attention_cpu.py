"""Causal attention on a CPU as large matrix products over blocks of queries, with windows and document masks.

torch's own kernel multiplies small tiles, at a fraction of the speed of a large product. Here a block of queries meets
all the keys it can see in one product for many heads. What lies outside the window is never computed, and no (T, T)
mask exists. Scores of bf16 and fp16 come as two terms, the rounded product and what rounding took from it, so that the
softmax sees them as exactly as fp32 accumulators would give them. Numbers: docs/lab_notebook.md.
"""

import math

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 128  # queries per block
HEADS_BYTES = 1 << 24  # bytes of fp32 scores and sums held at a time: as many heads as fit the processor's cache
KEPT_KEYS = 512  # with more keys per query the backward pass recomputes the probabilities instead of storing them


def is_faster(q: torch.Tensor, window: int | None, documents) -> bool:
    """Return True if this kernel beats torch's SDPA: always, except plain causal fp32 with more than KEPT_KEYS keys.

    q: (B, T, H, D). The backward pass would have to recompute the probabilities of longer plain fp32 rows.
    """
    special = window is not None or documents is not None
    return special or q.dtype != torch.float32 or _reach(q.size(1), window) <= KEPT_KEYS


def attention(q, k, v, scale: float, window: int | None = None, documents=None) -> torch.Tensor:
    """Return softmax(scale * q k^T) v; a position sees itself and the `window` positions before it (None: all).

    q, k, v: (B, T, H, D) in fp32, bf16 or fp16, with equal numbers of heads; documents: (B, T) int, a position sees
    positions of its own document number only. Returns (B, T, H, D).
    """
    keep = torch.is_grad_enabled() and _reach(q.size(1), window) <= KEPT_KEYS
    return _attention(q, k, v, scale, window, documents, keep)[0]


# One operator each for forward and backward: torch.compile takes them as they are instead of tracing their loops.


@torch.library.custom_op("fathom::attention_on_cpu", mutates_args=(), device_types="cpu")
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    documents: torch.Tensor | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (B, T, H, D) and, if `keep`, the probabilities of all blocks in one flat tensor."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    causal = _causal_mask(q.device)
    kept, at = q.new_empty(_kept_numel(*q.shape[:3], window, keep)), 0
    for group in _groups(*q.shape, window):
        queries, keys, values = (_stack(t, group) for t in (q, k, v))
        y, row_documents = torch.empty_like(queries), None if documents is None else documents[group[0]]
        for start, end, key in _blocks(q.size(1), window):
            shape = (len(keys), end - start, end - key)
            p = kept[at : at + math.prod(shape)].view(shape) if keep else q.new_empty(shape)
            at += math.prod(shape)
            keys_in_reach = keys[:, key:end].contiguous()
            _probabilities(
                p, queries[:, start:end], keys_in_reach, scale, (start, end, key), window, causal, row_documents
            )
            torch.bmm(p, values[:, key:end], out=y[:, start:end])
        _unstack(y, out, group)
    return out, kept


@_attention.register_fake
def _(q, k, v, scale, window, documents, keep):
    kept = q.new_empty(_kept_numel(*q.shape[:3], window, keep))
    return torch.empty_like(q, memory_format=torch.contiguous_format), kept


@torch.library.custom_op("fathom::attention_on_cpu_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
    window: int | None,
    documents: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v (B, T, H, D); probabilities that were not kept are recomputed."""
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    causal, at = _causal_mask(q.device), 0
    for group in _groups(*q.shape, window):
        all_queries, all_keys, values, grads = (_stack(t, group) for t in (q, k, v, grad))
        dq_stack, row_documents = torch.empty_like(all_queries), None if documents is None else documents[group[0]]
        dk_sum = torch.zeros(all_keys.shape, dtype=torch.float32)
        dv_sum = torch.zeros_like(dk_sum)
        for start, end, key in _blocks(q.size(1), window):
            queries, keys, g = (
                t.contiguous() for t in (all_queries[:, start:end], all_keys[:, key:end], grads[:, start:end])
            )
            shape = (len(keys), end - start, end - key)
            if len(kept):
                p = kept[at : at + math.prod(shape)].view(shape)
                at += math.prod(shape)
            else:
                p = q.new_empty(shape)
                _probabilities(p, queries, keys, scale, (start, end, key), window, causal, row_documents)
            dv_sum[:, key:end] += torch.bmm(p.mT, g)
            dp = torch.bmm(g, values[:, key:end].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            _product(ds, keys, scale, out=dq_stack[:, start:end])
            dk_sum[:, key:end] += _product(ds.mT, queries, scale)
        for summed, gradient in ((dq_stack, dq), (dk_sum, dk), (dv_sum, dv)):
            _unstack(summed, gradient, group)
    return dq, dk, dv


@_attention_backward.register_fake
def _(grad, q, k, v, kept, scale, window, documents):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, ctx.window, documents, _ = inputs
    ctx.save_for_backward(q, k, v, output[1], documents)


def _backward(ctx, grad, _):
    q, k, v, kept, documents = ctx.saved_tensors
    return *_attention_backward(grad, q, k, v, kept, ctx.scale, ctx.window, documents), *(None,) * 4


_attention.register_autograd(_backward, setup_context=_setup)


def _product(a, b, scale: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return scale * (a @ b) of stacks of matrices, scaled before the result is rounded."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale, out=out)


def _probabilities(out, q, k, scale, block: tuple[int, int, int], window, causal, documents) -> None:
    """Fill `out` (G, n, m) with the softmax over keys of a block of queries q (G, n, D) and keys k (G, m, D).

    block: from `_blocks`; causal: from `_causal_mask`; documents: (rows of the group, T) numbers, or None.
    """
    start, end, key = block
    before, n = start - key, end - start  # keys before the first query, queries
    product = _product(q, k.mT, scale)
    scores = product.float()
    if q.dtype != torch.float32:
        scores += torch.baddbmm(product, q, k.mT, beta=-1, alpha=scale)
    scores[:, :, before:] += causal[:n, :n]
    if window is not None and (within := window - before) < n:  # the first queries see all keys, later ones do not
        scores[:, within:, : n - within] += causal.T[: n - within, : n - within]
    if documents is not None:
        apart = documents[:, start:end].unsqueeze(2) != documents[:, key:end].unsqueeze(1)
        scores.view(len(apart), -1, *apart.shape[1:]).masked_fill_(apart.unsqueeze(1), -math.inf)
    out.copy_(torch.softmax(scores, dim=-1, out=scores))


def _causal_mask(device) -> torch.Tensor:
    """Return a (BLOCK, BLOCK) matrix with -inf above the diagonal and 0 elsewhere."""
    return torch.full((BLOCK, BLOCK), -math.inf, device=device).triu_(1)


def _blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """Return (first query, end of the queries, first key) of each block of queries."""
    starts = range(0, length, BLOCK)
    return [(s, min(s + BLOCK, length), 0 if window is None else max(0, s - window)) for s in starts]


def _reach(length: int, window: int | None) -> int:
    """Return the largest number of keys that one block of queries sees."""
    return length if window is None else min(length, window + BLOCK)


def _groups(rows: int, length: int, heads: int, head_dim: int, window: int | None) -> list[tuple[slice, slice]]:
    """Return (rows, heads) slices to process together: all heads of some rows, or some heads of one row."""
    size = max(1, HEADS_BYTES // (4 * (BLOCK * _reach(length, window) + 2 * length * head_dim)))
    some_rows, parts = max(1, size // heads), -(-heads // size)
    some_heads = -(-heads // parts)
    return [
        (slice(row, row + some_rows), slice(head, head + some_heads))
        for row in range(0, rows, some_rows)
        for head in range(0, heads, some_heads)
    ]


def _stack(t: torch.Tensor, group: tuple[slice, slice]) -> torch.Tensor:
    """Copy a group of (B, T, H, D) into a contiguous stack (G, T, D)."""
    rows, heads = group
    return t[rows, :, heads].transpose(1, 2).flatten(0, 1).contiguous()


def _unstack(stack: torch.Tensor, out: torch.Tensor, group: tuple[slice, slice]) -> None:
    """Write a stack (G, T, D) to the place of its group in `out` (B, T, H, D)."""
    part = out[group[0], :, group[1]].transpose(1, 2)
    part.copy_(stack.view(part.shape))


def _kept_numel(rows: int, length: int, heads: int, window: int | None, keep: bool) -> int:
    """Return how many probabilities the forward pass keeps for the backward pass; 0 unless `keep`."""
    if not keep:  # a product with a bool does not trace under torch 2.11
        return 0
    return rows * heads * sum((end - start) * (end - key) for start, end, key in _blocks(length, window))
