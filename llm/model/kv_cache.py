"""Key/value cache for generation: rows that come and go, and texts that several rows begin with.

Layers with a window keep the tokens that it reaches and few more. This file alone knows where a token lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


def layers_by_window(windows: Sequence[int | None]) -> dict[int | None, list[int]]:
    """Return the numbers of the layers with each window, in the order in which windows come first."""
    found: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        found.setdefault(window, []).append(layer)
    return found


def held(lengths: torch.Tensor, places: int) -> torch.Tensor:
    """Return (rows, places): which token of a row of `lengths` (rows,) tokens lies in each place; below 0: none.

    Token j lies in place j % places, so that each place has the newest token of those that belong there.
    """
    last = lengths.unsqueeze(1) - 1
    return last - (last - torch.arange(places, device=lengths.device)) % places


class PrefixPart(NamedTuple):
    """Keys and values (layers, Hkv, P, D) of a text's tokens from number `first` on, for layers with one window."""

    k: torch.Tensor
    v: torch.Tensor
    first: int
    window: int | None


@dataclass(eq=False)
class Prefix:
    """Text that several rows begin with: keys and values of its `length` tokens, by part of the cache.

    They never change. last_embed: embedding (C,) of the last token, if the model smears; last_ids: those of
    the row, see `SlotCache`; last_keys: (layers, Hkv, d), the last token's keys before their offset.
    """

    parts: list[PrefixPart]
    length: int
    last_embed: torch.Tensor | None = None
    last_ids: torch.Tensor | None = None
    last_keys: torch.Tensor | None = None

    @property
    def least(self) -> int:
        """Fewest first tokens that can be used as a prefix of their own: windows behind fewer reach what is gone."""
        return max((part.first + part.window for part in self.parts if part.first), default=0)

    @property
    def cost(self) -> int:
        """Memory, in tokens that all layers keep."""
        layers = sum(part.k.size(0) for part in self.parts)
        return -(-sum(part.k.size(0) * part.k.size(2) for part in self.parts) // layers)

    def cut(self, n: int, last_embed: torch.Tensor | None, last_ids: torch.Tensor | None = None) -> "Prefix":
        """Return the first n tokens as a prefix of its own, n from `least` on; last_embed, last_ids: of its end."""
        parts = []
        for part in self.parts:
            k, v = (x[:, :, : n - part.first].clone(memory_format=torch.contiguous_format) for x in (part.k, part.v))
            parts.append(part._replace(k=k, v=v))
        last_keys = self.last_keys
        if last_keys is not None and n < self.length:  # the next token's keys hold the half of them that counts
            keys = next(part for part in self.parts if part.window is None).k
            last_keys = keys[:, :, n, : last_keys.size(-1)].clone()
        return Prefix(parts, n, last_embed, last_ids, last_keys)


class Part:
    """Keys and values of the layers with one window, in one buffer per kind: k and v, each (layers, rows, Hkv, S, D).

    A row's own token j lies in place j % S. Without a window S is the row's room; with one it is at most the window and
    `spare` further tokens, so that newer tokens take the places of those that no query sees any more.
    """

    def __init__(self, layers: list[int], window: int | None, spare: int):
        self.layers, self.window = layers, window
        self.most = None if window is None else window + spare
        self.k = self.v = torch.empty(0)

    def places(self, room: int) -> int:
        """Return the places of a row that has room for so many tokens."""
        return room if self.most is None else min(room, self.most)


class SlotCache:
    """Keys and values of rows that come and go, in one `Part` per window of the model's layers.

    A row holds the newest of its own tokens, `lengths` in all, each layer as many as its window reaches. It may stand
    behind a `Prefix`: its own token j is then at position prefix length + j, and it attends to both. lengths, prefix:
    (rows,) int64 on the host, as the caller sets them; prefix is an index of `prefixes`, -1 for none. last_embed:
    (rows, C), the embedding of every row's last token, if the model smears. last_ids: (rows, n) int64, the last
    n = `config.ids_before` ids of every row, the newest last and `vocab_size` for none, if the model reads them.
    last_keys: (rows, layers, Hkv, d), keys of every row's last token in the layers that offset keys, before they do.
    Places without a token hold anything.

    room: tokens that a row may hold. spare: places of a layer beside those of its window, at least 1; so many tokens
    of a row can be written before the first of them attends.
    """

    def __init__(self, config, rows: int, room: int, device="cpu", dtype: torch.dtype = torch.float32, spare: int = 1):
        windows = layers_by_window([config.window(layer) for layer in range(config.n_layer)])
        self.parts = [Part(layers, window, spare) for window, layers in windows.items()]
        self.where = {  # number of the part that holds a layer, and the layer's number there
            layer: (i, j) for i, layers in enumerate(windows.values()) for j, layer in enumerate(layers)
        }
        self.room, self.version = room, 0  # version: grows whenever buffers are replaced
        for part in self.parts:
            shape = (len(part.layers), rows, config.n_kv_head, part.places(room), config.head_dim)
            part.k, part.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.long)
        self.prefix = torch.full((rows,), -1)
        self.prefixes: list[Prefix] = []
        smears = getattr(config, "smear", False)
        self.last_embed = torch.zeros(rows, config.n_embd, device=device, dtype=dtype) if smears else None
        self.no_id, before = config.vocab_size, getattr(config, "ids_before", 0)
        self.last_ids = torch.full((rows, before), self.no_id, device=device) if before else None
        is_offset = getattr(config, "offsets_keys", lambda layer: False)
        self.key_layers = [layer for layer in sorted(self.where) if is_offset(layer)]
        self.last_keys = None
        if self.key_layers:
            shape = (rows, len(self.key_layers), config.n_kv_head, config.key_dim)
            self.last_keys = torch.zeros(shape, device=device, dtype=dtype)
        self.seq_len = config.seq_len

    @property
    def rows(self) -> int:
        """Rows that the buffers hold."""
        return self.parts[0].k.size(1)

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""
        return self.parts[0].k.device

    def cost(self, n: int) -> int:
        """Return the memory of a row with room for n tokens, in tokens that all layers keep."""
        return -(-sum(len(part.layers) * part.places(n) for part in self.parts) // len(self.where))

    def resize(self, rows: int, room: int) -> None:
        """Change the size of the buffers; what rows hold is kept as far as there is a place for it.

        No row may hold more tokens than the smaller one of both rooms: then no token changes its place.
        """
        n = min(rows, self.rows)
        for part in self.parts:
            places = part.places(room)
            for name in ("k", "v"):
                old = getattr(part, name)
                new = old.new_zeros(old.size(0), rows, old.size(2), places, old.size(4))
                kept = min(places, old.size(3))
                new[:, :n, :, :kept] = old[:, :n, :, :kept]
                setattr(part, name, new)
        self.room, self.version = room, self.version + 1
        self.lengths = torch.cat((self.lengths[:n], self.lengths.new_zeros(rows - n)))
        self.prefix = torch.cat((self.prefix[:n], self.prefix.new_full((rows - n,), -1)))
        if self.last_embed is not None:
            old = self.last_embed
            self.last_embed = torch.cat((old[:n], old.new_zeros(rows - n, old.size(1))))
        if self.last_ids is not None:
            old = self.last_ids
            self.last_ids = torch.cat((old[:n], old.new_full((rows - n, old.size(1)), self.no_id)))
        if self.last_keys is not None:
            old = self.last_keys
            self.last_keys = torch.cat((old[:n], old.new_zeros(rows - n, *old.shape[1:])))

    def start(self, row: int, prefix: Prefix | None = None, is_copied: bool = False) -> None:
        """Begin a row anew, behind a prefix or with nothing; is_copied: the prefix becomes its own first tokens."""
        self.prefix[row] = -1
        self._forget_prefixes()
        self.lengths[row] = 0
        if self.last_embed is not None:
            self.last_embed[row] = 0 if prefix is None else prefix.last_embed
        if self.last_ids is not None:
            self.last_ids[row] = self.no_id if prefix is None else prefix.last_ids
        if self.last_keys is not None:
            self.last_keys[row] = 0 if prefix is None else prefix.last_keys
        if prefix is None:
            return
        if not is_copied:
            self.prefix[row] = self._index(prefix)
            return
        for part, (k, v, first, _) in zip(self.parts, prefix.parts, strict=True):
            begin = max(first, prefix.length - part.k.size(3))
            at = torch.arange(begin, prefix.length, device=self.device) % part.k.size(3)
            part.k[:, row].index_copy_(2, at, k[:, :, begin - first : prefix.length - first])
            part.v[:, row].index_copy_(2, at, v[:, :, begin - first : prefix.length - first])
        self.lengths[row] = prefix.length

    def last_of(self, tokens: Sequence[int]) -> torch.Tensor | None:
        """Return the `last_ids` of a row that has read these tokens; None where the model needs none."""
        if self.last_ids is None:
            return None
        most = self.last_ids.size(1)
        return torch.tensor(([self.no_id] * most + list(map(int, tokens[-most:])))[-most:], device=self.device)

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
        for part in self.parts:
            part.k[:, target, :, :length] = part.k[:, source, :, :length]
            part.v[:, target, :, :length] = part.v[:, source, :, :length]
        self.lengths[target], self.prefix[target] = length, self.prefix[source].item()
        if self.last_embed is not None:
            self.last_embed[target] = self.last_embed[source]
        if self.last_ids is not None:
            self.last_ids[target] = self.last_ids[source]
        if self.last_keys is not None:
            self.last_keys[target] = self.last_keys[source]
        self.start(source)

    def snapshot(self, row: int) -> Prefix:
        """Return a copy of all that a row has read and its layers keep, as a prefix for others."""
        before, own = self.prefix_of(row), int(self.lengths[row])
        length = own + (before.length if before else 0)
        parts = []
        for i, part in enumerate(self.parts):
            shared = before and before.parts[i]
            first, k, v = self._kept(part, row, own, before.length if before else 0, shared)
            parts.append(PrefixPart(k, v, first, part.window))
        of_rows = (self.last_embed, self.last_ids, self.last_keys)
        last = (None if of_all is None else of_all[row].clone() for of_all in of_rows)
        return Prefix(parts, length, *last)

    def _kept(self, part: Part, row: int, own: int, before: int, shared: PrefixPart | None):
        """Return (first, k, v): the newest tokens that a row has read in a part, in order, from number `first` on.

        own: the row's own tokens; before: those of the prefix that it stands behind, of which `shared` is the part.
        """
        n = min(own, part.k.size(3))
        at = torch.arange(own - n, own, device=self.device) % part.k.size(3)
        k, v = (buffer[:, row].index_select(2, at) for buffer in (part.k, part.v))
        first = before + own - n
        if shared is not None and (part.most is None or n < part.most):
            begin = shared.first if part.most is None else max(shared.first, first + n - part.most)
            old = (x[:, :, begin - shared.first : before - shared.first] for x in (shared.k, shared.v))
            k, v = (torch.cat(pair, dim=2) for pair in zip(old, (k, v), strict=True))
            first = begin
        return first, k, v
