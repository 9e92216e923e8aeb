"""Key/value cache for generation, and the attention of new tokens over it."""

from dataclasses import dataclass
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


@dataclass(eq=False)
class Prefix:
    """Keys and values (L, Hkv, P, D) of tokens that several rows begin with; they never change.

    length: the first so many of the P places count. last_embed: embedding (C,) of the last token, if the model smears.
    """

    k: torch.Tensor
    v: torch.Tensor
    length: int
    last_embed: torch.Tensor | None = None


class SlotCache:
    """Keys and values of rows that come and go, in one buffer per kind: k and v, each (L, rows, Hkv, room, D).

    A row holds its own tokens in its first `lengths` places, so that the next one is written behind them. It may stand
    behind a `Prefix`: its own token j is then at position prefix length + j, and it attends to both. lengths, prefix:
    (rows,) int64 on the host, as the caller sets them; prefix is an index of `prefixes`, -1 for none. last_embed:
    (rows, C), the embedding of every row's last token, if the model smears. Places behind a row's end hold anything.
    """

    def __init__(self, config, rows: int, room: int, device="cpu", dtype: torch.dtype = torch.float32):
        shape = (config.n_layer, rows, config.n_kv_head, room, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long)
        self.prefix = torch.full((rows,), -1)
        self.prefixes: list[Prefix] = []
        smears = getattr(config, "smear", False)
        self.last_embed = torch.zeros(rows, config.n_embd, device=device, dtype=dtype) if smears else None
        self.seq_len = config.seq_len

    @property
    def rows(self) -> int:
        """Rows that the buffers hold."""
        return self.k.size(1)

    @property
    def room(self) -> int:
        """Places for a row's own tokens."""
        return self.k.size(3)

    def resize(self, rows: int, room: int) -> None:
        """Change the size of the buffers; what rows hold is kept as far as there is a place for it."""
        n, length = min(rows, self.rows), min(room, self.room)
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_zeros(old.size(0), rows, old.size(2), room, old.size(4))
            new[:, :n, :, :length] = old[:, :n, :, :length]
            setattr(self, name, new)
        self.lengths = torch.cat((self.lengths[:n], self.lengths.new_zeros(rows - n)))
        self.prefix = torch.cat((self.prefix[:n], self.prefix.new_full((rows - n,), -1)))
        if self.last_embed is not None:
            old = self.last_embed
            self.last_embed = torch.cat((old[:n], old.new_zeros(rows - n, old.size(1))))

    def start(self, row: int, prefix: Prefix | None = None, is_copied: bool = False) -> None:
        """Begin a row anew, behind a prefix or with nothing; is_copied: the prefix becomes its own first tokens."""
        self.prefix[row] = -1
        self._forget_prefixes()
        self.lengths[row] = 0
        if self.last_embed is not None:
            self.last_embed[row] = 0 if prefix is None else prefix.last_embed
        if prefix is None:
            return
        if is_copied:
            self.k[:, row, :, : prefix.length] = prefix.k[:, :, : prefix.length]
            self.v[:, row, :, : prefix.length] = prefix.v[:, :, : prefix.length]
            self.lengths[row] = prefix.length
        else:
            self.prefix[row] = self._index(prefix)

    def _index(self, prefix: Prefix) -> int:
        """Return the place of a prefix in `prefixes`, at whose end it is put if it is not there."""
        if prefix not in self.prefixes:
            self.prefixes.append(prefix)
        return self.prefixes.index(prefix)

    def _forget_prefixes(self) -> None:
        """Let go of prefixes that no row stands behind, and number the others anew."""
        used = sorted(set(self.prefix.tolist()) - {-1})
        if len(used) < len(self.prefixes):
            numbers = torch.full((len(self.prefixes) + 1,), -1)  # the last one is that of no prefix
            numbers[used] = torch.arange(len(used))
            self.prefix, self.prefixes = numbers[self.prefix], [self.prefixes[i] for i in used]

    def prefix_of(self, row: int) -> Prefix | None:
        """Return the prefix that a row stands behind."""
        index = int(self.prefix[row])
        return None if index < 0 else self.prefixes[index]

    def move(self, source: int, target: int) -> None:
        """Put a row in the place of another one; its own place is then free."""
        length = int(self.lengths[source])
        self.k[:, target, :, :length] = self.k[:, source, :, :length]
        self.v[:, target, :, :length] = self.v[:, source, :, :length]
        self.lengths[target], self.prefix[target] = length, self.prefix[source].item()
        if self.last_embed is not None:
            self.last_embed[target] = self.last_embed[source]
        self.start(source)

    def snapshot(self, row: int) -> Prefix:
        """Return a copy of all that a row has read, as a prefix for others."""
        before, length = self.prefix_of(row), int(self.lengths[row])
        parts = [self.k[:, row, :, :length], self.v[:, row, :, :length]]
        if before is not None:
            shared = (before.k[:, :, : before.length], before.v[:, :, : before.length])
            parts = [torch.cat(pair, dim=2) for pair in zip(shared, parts, strict=True)]
        k, v = (part.clone(memory_format=torch.contiguous_format) for part in parts)
        last = None if self.last_embed is None else self.last_embed[row].clone()
        return Prefix(k, v, k.size(2), last)


class SlotPass:
    """One forward pass of new tokens over rows [first, first + n) of a SlotCache, each behind what it holds.

    It is the `cache` argument of the network. The caller sets the cache's lengths afterwards. live: so many of the rows
    count; others only fill the batch, and change nothing but places behind their ends.
    """

    def __init__(self, cache: SlotCache, first: int, n: int, live: int | None = None):
        self.cache, self.rows, self.live = cache, slice(first, first + n), n if live is None else live
        self.device = cache.k.device
        own = cache.lengths[self.rows]
        self.shortest, self.longest = int(own.min()), int(own.max())
        self.own = own.to(self.device)  # (n,)
        index = cache.prefix[self.rows].tolist()
        before = torch.tensor([0 if i < 0 else cache.prefixes[i].length for i in index])
        self.before, self.least_position = before.to(self.device), int((before + own).min())
        self.groups = self._grouped(index)
        self.is_fresh = self.longest == 0 and not self.groups
        self.last_embed = None if cache.last_embed is None else cache.last_embed[self.rows].unsqueeze(1)
        self.fed: torch.Tensor | None = None  # embeddings (n, T, C) of the tokens just fed, if the model smears
        self._masks: dict[tuple, torch.Tensor | None] = {}

    def _grouped(self, index: list[int]) -> list[tuple[Prefix, torch.Tensor | None]]:
        """Return every prefix with the rows (a tensor of places; None: all) that stand behind it."""
        found: dict[int, list[int]] = {}
        for row, i in enumerate(index):
            if i >= 0:
                found.setdefault(i, []).append(row)
        return [
            (self.cache.prefixes[i], None if len(rows) == len(index) else torch.tensor(rows, device=self.device))
            for i, rows in found.items()
        ]

    def positions(self, n_new: int) -> torch.Tensor:
        """Return the positions (n, n_new) of the new tokens. Raises ValueError where a row has no room for them.

        Padding may lie beyond the context; it gets the last position.
        """
        if self.longest + n_new > self.cache.room:
            raise ValueError(
                f"KV cache of {self.cache.room} places is full: {self.longest} used, {n_new} more asked for"
            )
        new = torch.arange(n_new, device=self.device)
        self.places = self.own.unsqueeze(1) + new  # among a row's own tokens
        return (self.before.unsqueeze(1) + self.places).clamp(max=self.cache.seq_len - 1)

    def attend(self, layer: int, q, k, v, positions, options: AttentionOptions) -> torch.Tensor:
        """Store keys and values (n, T, Hkv, D) of new tokens; return the attention (n, T, H, D) of their queries."""
        self._store(layer, k, v)
        if self.is_fresh:
            return causal_attention(q, k, v, *options)
        start = 0 if options.window is None else max(0, self.shortest - options.window)
        end = self.longest + q.size(1)
        own = (cache[layer, self.rows, :, start:end] for cache in (self.cache.k, self.cache.v))
        mask = self._own_mask(start, end, options.window)
        if not self.groups:
            return _sdpa(q, *own, mask, options.scale)
        y, weight = attention_with_weight(q, *own, mask, options.scale)
        for prefix, rows in self.groups:
            y = self._add_prefix(y, weight, layer, prefix, rows, q, options)
        return y

    def _store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write keys and values (n, T, Hkv, D) behind the ends of the rows."""
        for cache, new in ((self.cache.k, k), (self.cache.v, v)):
            target, new = cache[layer, self.rows], new.to(cache.dtype)
            if self.shortest == self.longest:
                target[:, :, self.longest : self.longest + new.size(1)] = new.transpose(1, 2)
            else:
                rows = torch.arange(len(new), device=self.device).unsqueeze(1)
                target[rows, :, self.places] = new

    def _own_mask(self, start: int, end: int, window: int | None) -> torch.Tensor | None:
        """Return booleans (n, T, end - start), true where a query sees an own key of its row; None: all are seen."""
        key = (start, end, window)
        if key not in self._masks:
            at = torch.arange(start, end, device=self.device)
            mask = at <= self.places.unsqueeze(-1)
            if window is not None:
                mask &= at >= self.places.unsqueeze(-1) - window
            alone = self.places.size(1) == 1 and self.shortest == self.longest
            self._masks[key] = None if alone and (window is None or end - start <= window + 1) else mask
        return self._masks[key]

    def _add_prefix(self, y, weight, layer: int, prefix: Prefix, rows, q, options: AttentionOptions) -> torch.Tensor:
        """Return y (n, T, H, D), the attention over own keys, with that over a prefix mixed in by their weights.

        weight: logarithm (n, T, H) of the sum that y was divided by; rows: which of them stand behind the prefix.
        """
        start = 0 if options.window is None else max(0, self.least_position - options.window)
        if start >= prefix.length:
            return y
        queries = q if rows is None else q[rows]
        mask, key = None, (id(prefix), start, options.window)
        if options.window is not None:
            if key not in self._masks:
                places = self.before.unsqueeze(1) + self.places
                at = torch.arange(start, prefix.length, device=self.device)
                seen = at >= (places if rows is None else places[rows]).unsqueeze(-1) - options.window
                self._masks[key] = seen.view(1, -1, seen.size(-1))
            mask = self._masks[key]
        keys, values = (part[layer, :, start : prefix.length].unsqueeze(0) for part in (prefix.k, prefix.v))
        flat = queries.reshape(1, -1, *queries.shape[2:])  # one long row: the keys are read once
        shared, log_sum = attention_with_weight(flat, keys, values, mask, options.scale)
        own = weight if rows is None else weight[rows]
        share = torch.sigmoid(log_sum.view(own.shape) - own).unsqueeze(-1)
        if rows is None:
            return torch.lerp(y.float(), shared.view(y.shape).float(), share).to(y.dtype)
        part = torch.lerp(y[rows].float(), shared.view(queries.shape).float(), share)
        return y.index_copy(0, rows, part.to(y.dtype))

    def advance(self, n_new: int, lengths: torch.Tensor | None = None) -> None:
        """Keep the embedding of every live row's last token; lengths: true tokens of rows that were padded."""
        if self.fed is None:
            return
        rows = torch.arange(self.live, device=self.device)
        last = torch.full_like(rows, n_new - 1) if lengths is None else lengths[: self.live] - 1
        first = self.rows.start
        self.cache.last_embed[first : first + self.live] = self.fed[rows, last].to(self.cache.last_embed.dtype)
        self.fed = None


def _sdpa(q, k, v, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return the attention (B, T, H, D) of q (B, T, H, D) over k, v (B, Hkv, S, D) where mask (B, T, S) is true."""
    q, mask = q.transpose(1, 2), None if mask is None else mask.unsqueeze(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


def attention_with_weight(q, k, v, mask: torch.Tensor | None, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of q (B, T, H, D) over k, v (B, Hkv, S, D), and its weight (B, T, H).

    The weight is the logarithm of the sum of exponentials that the attention was divided by: attentions over parts of
    the keys are put together by it. mask: (B, T, S), true where a query sees a key; one that sees none has the
    weight -inf.
    """
    B, T, H, D = q.shape
    heads, repeats = k.size(1), H // k.size(1)
    q = q.reshape(B, T, heads, repeats, D).permute(0, 2, 3, 1, 4).reshape(B, heads, repeats * T, D)
    bias = None
    if mask is not None:
        mask = mask.unsqueeze(1).expand(B, repeats, T, -1).reshape(B, 1, repeats * T, -1)
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    if q.device.type == "cpu" and q.dtype != torch.float64:
        y, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    else:
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = scale * (q.to(exact) @ k.to(exact).transpose(-1, -2))
        scores = scores if bias is None else scores + bias
        weight = scores.logsumexp(dim=-1)
        y = (torch.exp(scores - weight.unsqueeze(-1)) @ v.to(exact)).to(q.dtype)
    if mask is not None:
        blind = ~mask.any(dim=-1).expand_as(weight)
        y, weight = y.masked_fill(blind.unsqueeze(-1), 0), weight.masked_fill(blind, -torch.inf)
    y = y.view(B, heads, repeats, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
    return y, weight.view(B, heads, repeats, T).permute(0, 3, 1, 2).reshape(B, T, H)


class SharedPrefixPass:
    """Pass over `n` continuations of every row of a SlotCache, computed at once over ids (B * n, T) and not stored.

    Continuation b * n + i sees the tokens of row b and its own. The prefix is read in place, not copied n times: all
    continuations of a row are queries of one attention, and a mask keeps them apart.
    """

    def __init__(self, cache: SlotCache, n: int, seq_len: int):
        self.cache, self.n, self.seq_len, self.used = cache, n, seq_len, cache.room
        self.lengths = cache.lengths.to(cache.k.device)
        last = cache.last_embed
        self.last_embed = None if last is None else last.unsqueeze(1).repeat_interleave(n, dim=0)
        self._masks: dict[int | None, torch.Tensor] = {}

    def positions(self, n_new: int) -> torch.Tensor:
        """Return the positions (B * n, n_new) of the continuations' tokens.

        Padding behind short continuations may lie beyond the context; it gets the last position.
        """
        first = self.lengths.repeat_interleave(self.n).unsqueeze(1)
        return (first + torch.arange(n_new, device=first.device)).clamp(max=self.seq_len - 1)

    def attend(self, layer: int, q, k, v, positions, options: AttentionOptions) -> torch.Tensor:
        """Return the attention (B n, T, H, D) of the continuations over the prefix and over themselves."""
        n_new, rows = q.size(1), len(self.lengths)
        q, k, v = (t.reshape(rows, self.n * n_new, *t.shape[2:]).transpose(1, 2) for t in (q, k, v))  # (B, H, n T, D)
        keys, values = (
            torch.cat((old[layer, :, :, : self.used], new), dim=2)
            for old, new in ((self.cache.k, k), (self.cache.v, v))
        )
        mask, is_grouped = self._mask(n_new, options.window), q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=options.scale, enable_gqa=is_grouped)
        return y.transpose(1, 2).reshape(rows * self.n, n_new, *y.shape[1::2])

    def _mask(self, n_new: int, window: int | None) -> torch.Tensor:
        """Return a mask (B, 1, n T, used + n T), true where a query sees a key: the prefix's keys, then new ones."""
        if window not in self._masks:
            lengths = self.lengths.view(-1, 1, 1, 1)
            at = torch.arange(self.used, device=lengths.device)
            new = torch.arange(self.n * n_new, device=lengths.device)
            continuation, offset = new // n_new, (new % n_new).unsqueeze(1)
            reach = self.seq_len if window is None else window
            old = (at < lengths) & (lengths + offset - at <= reach)  # (B, 1, n T, used)
            own = (continuation.unsqueeze(1) == continuation) & (offset >= offset.T) & (offset - offset.T <= reach)
            self._masks[window] = torch.cat((old, own.expand(len(old), 1, -1, -1)), dim=-1)
        return self._masks[window]
