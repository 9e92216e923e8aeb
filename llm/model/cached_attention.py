"""Attention of new tokens over a key/value cache: the passes that a network's blocks are given as `cache`."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F

from llm.model.attention import causal_attention, pair_heads
from llm.model.kv_cache import Prefix, SlotCache, held


class AttentionOptions(NamedTuple):
    """The arguments of `causal_attention` behind q, k and v."""

    scale: float
    window: int | None
    mask: torch.Tensor | None
    backend: str | None
    paired: bool = False


class SlotPass:
    """One forward pass of new tokens over rows [first, first + n) of a SlotCache, each behind what it holds.

    It is the `cache` argument of the network. The caller sets the cache's lengths afterwards. live: so many of the rows
    count; others only fill the batch, and change nothing but places behind their ends.
    """

    def __init__(self, cache: SlotCache, first: int, n: int, live: int | None = None):
        self.cache, self.rows, self.live = cache, slice(first, first + n), n if live is None else live
        self.device = cache.device
        own = cache.lengths[self.rows]
        self.shortest, self.longest = int(own.min()), int(own.max())
        self.own = own.to(self.device)  # (n,)
        index = cache.prefix[self.rows].tolist()
        before = torch.tensor([0 if i < 0 else cache.prefixes[i].length for i in index])
        self.before, self.least_position = before.to(self.device), int((before + own).min())
        self.groups = self._grouped(index)
        self.is_fresh = self.longest == 0 and not self.groups
        self.last_embed = None if cache.last_embed is None else cache.last_embed[self.rows].unsqueeze(1)
        most = max(2, int((before + own).max()))  # an n-gram reads two ids
        self.last_ids = None if cache.last_ids is None else cache.last_ids[self.rows, -most:]
        self.fed: torch.Tensor | None = None  # embeddings (n, T, C) of the tokens just fed, if the model smears
        self.fed_ids: torch.Tensor | None = None  # ids (n, T) of them, if the cache has ids
        self.fed_keys: dict[int, torch.Tensor] = {}  # keys (n, T, Hkv, D) of them, by layer that offsets keys
        self.lengths: torch.Tensor | None = None
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

    def expect(self, lengths: torch.Tensor | None) -> None:
        """Note how many new tokens (n,) of right-padded rows are true ones; None = all."""
        self.lengths = lengths

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

    def keys_before(self, layer: int, k: torch.Tensor) -> torch.Tensor:
        """Return the keys (n, 1, Hkv, D) in front of new ones k (n, T, Hkv, D), all before their offset."""
        self.fed_keys[layer] = k
        return self.cache.last_keys[self.rows, self.cache.key_layers.index(layer)].unsqueeze(1)

    def attend(self, layer: int, q, k, v, positions, options: AttentionOptions) -> torch.Tensor:
        """Store keys and values (n, T, Hkv, D) of new tokens; return the attention (n, T, H, D) of their queries."""
        number, index = self.cache.where[layer]
        part = self.cache.parts[number]
        keys, values = part.k[index, self.rows], part.v[index, self.rows]  # (n, Hkv, S, D)
        new = [x.to(keys.dtype).transpose(1, 2) for x in (k, v)]
        end, takes_places = self.longest + q.size(1), self.longest + q.size(1) > keys.size(2)
        if takes_places and q.size(1) > 1 and not self.is_fresh:  # of tokens that some of the queries still see
            own = [torch.cat(pair, dim=2) for pair in zip((keys, values), new, strict=True)]
            mask = self._own_mask(0, keys.size(2), options, "before")
            self._store(keys, values, *new)
        else:
            self._store(keys, values, *new)
            if self.is_fresh:
                return causal_attention(q, k, v, *options)
            start = 0 if options.window is None or takes_places else max(0, self.shortest - options.window)
            end = min(end, keys.size(2))
            own = [keys[:, :, start:end], values[:, :, start:end]]
            mask = self._own_mask(start, end, options, "ring" if takes_places else "line")
        shape = q.shape
        if options.paired:
            q, own = pair_heads(q), [halves_in_line(x) for x in own]
        if not self.groups:
            return _sdpa(q, *own, mask, options.scale).reshape(shape)
        y, weight = attention_with_weight(q, *own, mask, options.scale)
        for prefix, rows in self.groups:
            y = self._add_prefix(y, weight, number, index, prefix, rows, q, options)
        return y.reshape(shape)

    def _store(self, keys, values, k, v) -> None:
        """Write keys and values (n, Hkv, T, D) of new tokens into their places of (n, Hkv, S, D)."""
        n_new, S = k.size(2), keys.size(2)
        at, fits = self.shortest % S, self.longest + n_new <= S
        for target, new in ((keys, k), (values, v)):
            if self.shortest == self.longest and (fits or n_new == 1):
                target[:, :, at : at + n_new] = new
            elif fits or n_new == 1:
                rows = torch.arange(len(new), device=self.device).unsqueeze(1)
                target[rows, :, self.places % S] = new.transpose(1, 2)
            else:
                tokens = held(self.own + (n_new if self.lengths is None else self.lengths), S) - self.own.unsqueeze(1)
                chosen = tokens.clamp(min=0)[:, None, :, None].expand(-1, new.size(1), -1, new.size(3))
                target.copy_(torch.where((tokens >= 0)[:, None, :, None], new.gather(2, chosen), target))

    def _own_mask(self, start: int, end: int, options: AttentionOptions, form: str) -> torch.Tensor | None:
        """Return the mask of `seen_by` for the own keys of every row; None: all are seen.

        The keys lie in places start to end. form: "line" = every token in the place of its number; "ring" = the new
        ones have taken places of old ones; "before" = they are about to, and stand behind the places.
        """
        window = options.window
        key = (start, end, window, form, options.paired)
        if key not in self._masks:
            n_new = self.places.size(1)
            if form == "line":
                tokens = torch.arange(start, end, device=self.device).unsqueeze(0)  # (1, keys)
            elif form == "ring":
                tokens = held(self.own + n_new, end)
            else:
                tokens = torch.cat((held(self.own, end), self.places), dim=1)
            alone = n_new == 1 and self.shortest == self.longest and not options.paired
            is_whole = alone and (window is None or end - start <= window + 1)
            self._masks[key] = None if is_whole else seen_by(tokens, self.places, window, options.paired)
        return self._masks[key]

    def _add_prefix(self, y, weight, number: int, index: int, prefix: Prefix, rows, q, options) -> torch.Tensor:
        """Return y (n, T, H, D), the attention over own keys, with that over a prefix mixed in by their weights.

        With paired heads y and q have the shape that `pair_heads` gives.

        weight: logarithm (n, T, H) of the sum that y was divided by; rows: which of them stand behind the prefix;
        number, index: part of the cache that holds the layer, and the layer's number there.
        """
        part = prefix.parts[number]
        start = part.first if options.window is None else max(part.first, self.least_position - options.window)
        if start >= prefix.length:
            return y
        queries = q if rows is None else q[rows]
        mask, key = None, (id(prefix), start, options.window, options.paired)
        if options.window is not None:
            if key not in self._masks:
                places = self.before.unsqueeze(1) + self.places
                tokens = torch.arange(start, prefix.length, device=self.device).unsqueeze(0)
                seen = seen_by(tokens, places if rows is None else places[rows], options.window, options.paired)
                self._masks[key] = seen.view(1, -1, seen.size(-1))
            mask = self._masks[key]
        keys, values = (x[index, :, start - part.first :].unsqueeze(0) for x in (part.k, part.v))
        if options.paired:
            keys, values = halves_in_line(keys), halves_in_line(values)
        flat = queries.reshape(1, -1, *queries.shape[2:])  # one long row: the keys are read once
        shared, log_sum = attention_with_weight(flat, keys, values, mask, options.scale)
        own = weight if rows is None else weight[rows]
        share = torch.sigmoid(log_sum.view(own.shape) - own).unsqueeze(-1)
        if rows is None:
            return torch.lerp(y.float(), shared.view(y.shape).float(), share).to(y.dtype)
        part = torch.lerp(y[rows].float(), shared.view(queries.shape).float(), share)
        return y.index_copy(0, rows, part.to(y.dtype))

    def advance(self, n_new: int) -> None:
        """Keep the embedding and keys of every live row's last token, and its last ids."""
        if self.fed is None and self.fed_ids is None and not self.fed_keys:
            return
        rows = torch.arange(self.live, device=self.device)
        last = torch.full_like(rows, n_new - 1) if self.lengths is None else self.lengths[: self.live] - 1
        kept = slice(self.rows.start, self.rows.start + self.live)
        if self.fed is not None:
            self.cache.last_embed[kept] = self.fed[rows, last].to(self.cache.last_embed.dtype)
        if self.fed_ids is not None:
            ids = self.cache.last_ids
            line, most = torch.cat((ids[self.rows], self.fed_ids), dim=1), ids.size(1)
            at = last.unsqueeze(1) + torch.arange(1, most + 1, device=self.device)  # in the line: behind its old ids
            ids[kept] = line[: self.live].gather(1, at)
        for layer, keys in self.fed_keys.items():
            self.cache.last_keys[kept, self.cache.key_layers.index(layer)] = keys[rows, last]
        self.fed, self.fed_ids, self.fed_keys = None, None, {}


def seen_by(tokens: torch.Tensor, at: torch.Tensor, window: int | None, paired: bool = False) -> torch.Tensor:
    """Return booleans (n, T, S), true where a query sees a key: itself and the `window` tokens before it (None: all).

    tokens: (n, S), the numbers of the keys' tokens, below 0 = none, n or 1; at: (n, T), those of the queries. paired:
    (n, 2 T, 2 S) for queries of `pair_heads` and keys of `halves_in_line`, token t of the two at places 2 t, 2 t + 1.
    """
    if paired:
        tokens, at = torch.cat((2 * tokens, 2 * tokens + 1), dim=1), torch.stack((2 * at, 2 * at + 1), dim=2).flatten(1)
        window = None if window is None else 2 * window
    tokens, at = tokens.unsqueeze(1), at.unsqueeze(2)
    mask = (tokens >= 0) & (tokens <= at)
    return mask if window is None else mask & (tokens >= at - window)


def halves_in_line(x: torch.Tensor) -> torch.Tensor:
    """Return keys or values (B, Hkv, S, D) as (B, Hkv / 2, 2 S, D), those of head h and then those of h + Hkv / 2."""
    return torch.cat(x.chunk(2, dim=1), dim=2)


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


class StepPass:
    """One new token behind each of rows [0, n) of a SlotCache, computed without a look at any number on the host.

    Shapes alone decide which operations run, so that they can be recorded once and replayed. lengths: (n,) int64,
    tokens that the rows hold; live: () int64, how many of the rows count; both lie on the device and are read when the
    operations run. reach: no row has a token behind its first `reach` places. way: "flash" or "sdpa", see `ways`. No
    row stands behind a prefix. Raises ValueError where windows have spare places: which ones count is then not plain.
    """

    def __init__(self, cache: SlotCache, lengths: torch.Tensor, live: torch.Tensor, reach: int, way: str):
        if any(part.most is not None and part.most != part.window + 1 for part in cache.parts):
            raise ValueError("the cache's windows have spare places: make it with spare=1")
        self.cache, self.lengths, self.live, self.reach, self.way = cache, lengths, live, reach, way
        self.n = len(lengths)
        self.last_embed = None if cache.last_embed is None else cache.last_embed[: self.n].unsqueeze(1)
        self.last_ids = None if cache.last_ids is None else cache.last_ids[: self.n]
        self.fed: torch.Tensor | None = None  # embeddings (n, 1, C) of the tokens just fed, if the model smears
        self.fed_ids: torch.Tensor | None = None  # ids (n, 1) of them, if the cache has ids
        self.fed_keys: dict[int, torch.Tensor] = {}  # keys (n, 1, Hkv, D) of them, by layer that offsets keys

    def expect(self, lengths: None) -> None:
        """Do nothing: there is no padding behind a single token."""

    def positions(self, n_new: int) -> torch.Tensor:
        """Return the positions (n, 1) of the new tokens."""
        return self.lengths.clamp(max=self.cache.seq_len - 1).unsqueeze(1)

    def keys_before(self, layer: int, k: torch.Tensor) -> torch.Tensor:
        """Return the keys (n, 1, Hkv, D) in front of new ones k of that shape, all before their offset."""
        self.fed_keys[layer] = k
        return self.cache.last_keys[: self.n, self.cache.key_layers.index(layer)].unsqueeze(1)

    def attend(self, layer: int, q, k, v, positions, options: AttentionOptions) -> torch.Tensor:
        """Store keys and values (n, 1, Hkv, D) of new tokens; return the attention (n, 1, H, D) of their queries."""
        number, index = self.cache.where[layer]
        part = self.cache.parts[number]
        keys, values = part.k[index, : self.n], part.v[index, : self.n]  # (n, Hkv, S, D)
        rows, places = torch.arange(self.n, device=keys.device), self.lengths % keys.size(2)
        keys[rows, :, places], values[rows, :, places] = k[:, 0].to(keys.dtype), v[:, 0].to(keys.dtype)
        end = min(keys.size(2), self.reach)  # of a window's places all count once they are full
        keys, values = keys[:, :, :end], values[:, :, :end]
        if options.paired:
            tokens = held(self.lengths + 1, part.k.size(3))[:, :end]
            mask = seen_by(tokens, self.lengths.unsqueeze(1), options.window, paired=True)
            y = _sdpa(pair_heads(q), halves_in_line(keys), halves_in_line(values), mask, options.scale)
            return y.reshape(q.shape)
        if self.way == "flash":
            return _flash_one(q, keys, values, (self.lengths + 1).clamp(max=end), options.scale)
        seen = torch.arange(end, device=keys.device) <= self.lengths.unsqueeze(1)  # (n, end)
        grouped = q.view(self.n, keys.size(1), -1, q.size(3))  # query heads of one key/value head are as rows of it
        mask = seen[:, None, None]
        y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=options.scale)
        return y.reshape(q.shape)  # a copy where a GPU's kernel lays heads of a group apart

    def advance(self, n_new: int) -> None:
        """Keep the embedding and keys of every live row's token, and its last ids."""
        counts = (torch.arange(self.n, device=self.live.device) < self.live).unsqueeze(1)
        if self.fed is not None:
            kept = self.cache.last_embed[: self.n]
            kept.copy_(torch.where(counts, self.fed[:, 0].to(kept.dtype), kept))
        if self.fed_ids is not None:
            kept = self.last_ids
            kept.copy_(torch.where(counts, torch.cat((kept[:, 1:], self.fed_ids), dim=1), kept))
        for layer, keys in self.fed_keys.items():
            kept = self.cache.last_keys[: self.n, self.cache.key_layers.index(layer)]
            kept.copy_(torch.where(counts.unsqueeze(-1), keys[:, 0].to(kept.dtype), kept))
        self.fed, self.fed_ids, self.fed_keys = None, None, {}


def ways(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Return the attentions that `StepPass` may use, best first: FlashAttention 3 with a cache, torch with a mask."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    half = dtype in (torch.bfloat16, torch.float16)
    flash = hopper and half and head_dim % 8 == 0 and head_dim <= 256 and flash_with_cache() is not None
    return ["flash", "sdpa"] if flash else ["sdpa"]


@cache
def flash_with_cache() -> Callable | None:
    """Return FlashAttention 3 over a key/value cache, from the wheel flash_attn_3; None where it is not there."""
    with suppress(ImportError, OSError, RuntimeError):  # not installed, or made for another version of torch
        return import_module("flash_attn_interface").flash_attn_with_kvcache
    return None


def _flash_one(q, keys, values, counts: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the attention (n, 1, H, D) of q over the first `counts` (n,) of keys and values (n, Hkv, S, D)."""
    lengths = counts.to(torch.int32)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    y = flash_with_cache()(q, keys, values, cache_seqlens=lengths, softmax_scale=scale, causal=True)
    return y[0] if isinstance(y, tuple) else y


class SharedPrefixPass:
    """Pass over `n` continuations of every row of a SlotCache, computed at once over ids (B * n, T) and not stored.

    Continuation b * n + i sees the tokens of row b and its own. The prefix is read in place, not copied n times: all
    continuations of a row are queries of one attention, and a mask keeps them apart.
    """

    def __init__(self, cache: SlotCache, n: int, seq_len: int):
        self.cache, self.n, self.seq_len = cache, n, seq_len
        self.lengths = cache.lengths.to(cache.device)
        last = cache.last_embed
        self.last_embed = None if last is None else last.unsqueeze(1).repeat_interleave(n, dim=0)
        self.last_ids = None if cache.last_ids is None else cache.last_ids.repeat_interleave(n, dim=0)
        self._masks: dict[tuple, torch.Tensor] = {}

    def positions(self, n_new: int) -> torch.Tensor:
        """Return the positions (B * n, n_new) of the continuations' tokens.

        Padding behind short continuations may lie beyond the context; it gets the last position.
        """
        first = self.lengths.repeat_interleave(self.n).unsqueeze(1)
        return (first + torch.arange(n_new, device=first.device)).clamp(max=self.seq_len - 1)

    def keys_before(self, layer: int, k: torch.Tensor) -> torch.Tensor:
        """Return the keys (B n, 1, Hkv, D) in front of the continuations, before their offset."""
        last = self.cache.last_keys[:, self.cache.key_layers.index(layer)]
        return last.unsqueeze(1).repeat_interleave(self.n, dim=0)

    def attend(self, layer: int, q, k, v, positions, options: AttentionOptions) -> torch.Tensor:
        """Return the attention (B n, T, H, D) of the continuations over the prefix and over themselves."""
        n_new, rows, shape = q.size(1), len(self.lengths), q.shape
        q, k, v = (t.reshape(rows, self.n * n_new, *t.shape[2:]) for t in (q, k, v))  # (B, n T, H, D)
        number, index = self.cache.where[layer]
        part = self.cache.parts[number]
        keys, values = (torch.cat((old[index], new.transpose(1, 2)), dim=2) for old, new in ((part.k, k), (part.v, v)))
        if options.paired:
            q, keys, values = pair_heads(q), halves_in_line(keys), halves_in_line(values)
        mask = self._mask(n_new, part.k.size(3), options.window, options.paired)
        return _sdpa(q, keys, values, mask, options.scale).reshape(shape)

    def _mask(self, n_new: int, places: int, window: int | None, paired: bool) -> torch.Tensor:
        """Return the mask (B, n T, places + n T) of `seen_by` for the prefix's keys and then those of continuations."""
        if (window, paired) not in self._masks:
            new = torch.arange(self.n * n_new, device=self.lengths.device)
            at = self.lengths.unsqueeze(1) + new % n_new
            seen = seen_by(torch.cat((held(self.lengths, places), at), dim=1), at, window, paired)
            apart = (new // n_new).unsqueeze(1) != new // n_new  # (n T, n T)
            apart = F.pad(apart, (places, 0))
            if paired:
                apart = torch.cat((apart, apart), dim=1).repeat_interleave(2, dim=0)
            self._masks[window, paired] = seen & ~apart
        return self._masks[window, paired]
