"""The whole decode step on a CPU as one call into our own C++ kernel, decode_cpu.cpp.

A model of this size is bound by the hundreds of small operators of a step, not by its arithmetic. `DecodeStep` packs
the matrices of a network once and then computes embedding, all blocks over the key/value cache and logits for any
number of tokens. A token's numbers do not depend on the tokens beside it. Packed matrices are a copy in the compute
dtype, or with `net.int8` in 8 bits; tables (embeddings, positions, value embeddings) are read in place.
"""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from pathlib import Path

import torch

from llm.model import native
from llm.model.config import SMEAR_CHANNELS, UNSTATED
from llm.model.gpt import GPT, Block, Linear
from llm.model.kv_cache import Part, Prefix, SlotCache, layers_by_window
from llm.model.ngrams import FACTORS, PRIME

SOURCE = Path(__file__).with_name("decode_cpu.cpp")
HEADERS = tuple(SOURCE.with_name(f"cpu_{name}.h") for name in ("model", "product", "team", "thin", "vector"))
MAX_HEAD = 1024  # channels of a head that the kernel has room for
SPARE = 32  # places of a cache beside those of windows: so many tokens of a row attend at a time in layers with one
THIN = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # as the kernel orders them
# Options that the kernel lacks.
LEFT_TO_TORCH = (
    "exclusive_attention", "attention_gate", "activation", "asymmetric_cap", "qk_dim",
    "paired_heads", "copy_candidate",
)  # fmt: skip
THREADS = native.Threads(1 << 24)  # multiplications from which waiting for each other 30 times may pay


class _Matrix(Structure):
    _fields_ = [("weights", c_void_p), ("scales", c_void_p), ("bias", c_void_p), ("n", c_int64), ("k", c_int64)]


class _Layer(Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("qkv", "out", "fc", "proj")),
        *((name, c_void_p * 2) for name in ("norm_1", "norm_2")),
        *((name, c_void_p) for name in ("values", "gate")),
        *((name, c_int64) for name in ("window", "part", "index", "offset")),
        *((name, c_float) for name in ("residual", "x0", "grams")),
    ]


class _Thin(Structure):
    _fields_ = [("down", c_void_p), ("up", c_void_p), *((n, c_int64) for n in "rank k n first".split())]


class _Model(Structure):
    _fields_ = [
        *((n, c_int64) for n in "n_layer n_head n_kv_head head_dim n_embd vocab table_rows seq_len".split()),
        *((n, c_int64) for n in "is_bf16 has_bf16_tables is_gpt2 has_scalars gate_channels".split()),
        *((n, c_int64) for n in "smear_channels middle".split()),
        *((n, c_float) for n in "scale softcap gate_range smear backout norm_eps".split()),
        *((n, c_void_p) for n in "wte wpe cos sin smear_gate".split()),
        ("final_norm", c_void_p * 2),
        ("head", _Matrix),
        ("layers", POINTER(_Layer)),
        ("adapters", POINTER(POINTER(_Thin))),
        *((n, c_int64) for n in "n_adapters low".split()),
        ("grams", c_void_p * 2),
        ("factors", c_void_p),
        *((n, c_int64) for n in "parts gram_rows prime bos".split()),
    ]


class _Part(Structure):
    _fields_ = [
        *((n, c_void_p) for n in "k v".split()),
        *((n, c_int64) for n in "places spare layer_stride row_stride head_stride place_stride".split()),
    ]


class _PrefixPart(Structure):
    _fields_ = [("k", c_void_p), ("v", c_void_p), ("room", c_int64), ("first", c_int64)]


class _Batch(Structure):
    _fields_ = [
        *((n, c_int64) for n in "n capacity".split()),
        *((n, c_void_p) for n in "ids rows at adapters prefix".split()),
        ("lengths", POINTER(c_int64)),
        ("shared", POINTER(_PrefixPart)),
        ("parts", POINTER(_Part)),
        *((n, c_int64) for n in "n_prefixes n_parts cache_rows room".split()),
        *((n, c_void_p) for n in "last_embed last_ids".split()),
        ("n_last", c_int64),
        ("last_keys", c_void_p),
        ("n_offset", c_int64),
        ("outputs", c_void_p),
        ("n_outputs", c_int64),
        *((n, c_void_p) for n in "logits scratch".split()),
    ]


def load() -> ctypes.CDLL | None:
    """Return the kernel's library, compiled if need be; None where it cannot be had."""
    lib = native.library(SOURCE, *HEADERS)
    if lib is not None and not hasattr(lib, "is_ready"):  # ctypes keeps what is set here
        for name in ("struct_bytes", "packed_numbers", "scratch_bytes", "decode"):
            getattr(lib, name).restype = c_int64
        lib.packed_numbers.argtypes = [c_int64] * 3
        lib.scratch_bytes.argtypes = [c_void_p, c_int64]
        lib.decode.argtypes = [c_void_p, c_void_p, c_int64]
        lib.pack.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64]
        structs = (_Matrix, _Layer, _Model, _Part, _PrefixPart, _Batch, _Thin)
        assert all(lib.struct_bytes(c_int64(i)) == ctypes.sizeof(struct) for i, struct in enumerate(structs))
        lib.to_int8.argtypes = [c_void_p, c_int64, c_int64, c_void_p]
        lib.is_ready = True
    return lib


def supports(net) -> bool:
    """Return whether the kernel computes what a network computes: one of our own forms, whole, on a CPU."""
    weights = {type(p.data) for p in net.parameters()}, {p.dtype for p in net.parameters()}
    return (
        type(net) is GPT
        and net.config.arch in ("classic", "modern", "gpt2")
        and all(type(block) is Block for block in net.transformer.h)
        and net.lora is None
        and net.device.type == "cpu"
        and net.compute_dtype in (torch.float32, torch.bfloat16)
        and weights[0] == {torch.Tensor}
        and weights[1] in ({torch.float32}, {torch.bfloat16})
        and net.config.head_dim <= MAX_HEAD
        and (net.ngrams is None or net.config.ngram_into == "residual")
        and all(getattr(net.config, name) == UNSTATED[name] for name in LEFT_TO_TORCH)
    )


def computes(net) -> bool:
    """Return whether the kernel is there and computes what a network computes. May compile for some seconds."""
    return supports(net) and load() is not None


def in_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whole numbers (n, k) from -127 to 127 and scales (n,), both fp32; row i of weight is about scales[i] times
    row i of the numbers, to half a scale. The largest weight of a row is 127 of its scale."""
    weight = weight.float()
    scales = weight.abs().amax(1) / 127
    numbers = (weight / scales.where(scales != 0, 1).unsqueeze(1)).round()
    return numbers.nan_to_num(0.0), scales  # a scale that is not finite reaches the logits


class DecodeStep:
    """The network's pass over new tokens with a cache, by the C++ kernel.

    It reads weights when it is made. Memory: a copy of all matrices in the compute dtype, with `net.int8` in 8 bits
    with an fp32 scale per output, and scratch for the largest batch so far. One thread calls it at a time.
    """

    def __init__(self, net: GPT, lib: ctypes.CDLL):
        self.net, self._lib, self.dtype = net, lib, net.compute_dtype
        self._kept: list[torch.Tensor] = []  # what the structs point to
        self._packed: list[torch.Tensor] = []  # the matrices, in the order of `_read`
        self._batch, self._scratch = _Batch(), torch.empty(0, dtype=torch.uint8)
        self._read()

    @classmethod
    def for_net(cls, net) -> "DecodeStep | None":
        """Return the step of a network, or None where only torch can compute it. May compile for some seconds."""
        return cls(net, load()) if computes(net) else None

    @torch.no_grad()
    def _read(self) -> None:
        """Describe the network to the kernel, and pack its matrices."""
        net, c = self.net, self.net.config
        windows = layers_by_window(net.windows)
        self._windows, self._n_layers = list(windows), [len(layers) for layers in windows.values()]
        self._where = {layer: (i, j) for i, layers in enumerate(windows.values()) for j, layer in enumerate(layers)}
        self._key_layers = [layer for layer in range(c.n_layer) if c.offsets_keys(layer)]
        self._layers = (_Layer * c.n_layer)(*(self._layer(i, block) for i, block in enumerate(net.transformer.h)))
        self._model = m = _Model(layers=self._layers)
        for name in ("n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "seq_len"):
            setattr(m, name, getattr(c, name))
        m.vocab, m.table_rows, m.softcap = c.vocab_size, c.padded_vocab_size, c.softcap or 0.0
        m.is_bf16, m.is_gpt2 = self.dtype == torch.bfloat16, c.arch == "gpt2"
        m.has_bf16_tables = net.transformer.wte.weight.dtype == torch.bfloat16
        m.has_scalars, m.gate_channels, m.gate_range = c.residual_scalars, c.gate_channels, c.gate_range
        m.scale, m.middle = net.transformer.h[0].attn.scale, c.n_layer // 2 if c.backout else -1
        m.wte, m.head = self._table(net.transformer.wte), self._matrix(c.vocab_size, net.head_weight)
        m.final_norm, m.norm_eps = self._norm(net.final_norm), getattr(net.final_norm, "eps", 0.0)
        self._n_packed = sum(packed.numel() for packed in self._packed)
        if m.is_gpt2:
            m.wpe = self._table(net.transformer.wpe)
        else:
            m.cos, m.sin = self._numbers(net.cos), self._numbers(net.sin)
        if c.smear:
            m.smear_channels, m.smear_gate = SMEAR_CHANNELS, self._numbers(net.smear_gate.weight)
            m.smear = self._number(net.smear_scalar)
        if c.backout:
            m.backout = self._number(net.backout_scalar)
        if net.ngrams is not None:
            self._read_grams(m)
        if net.adapters is not None:
            self._read_adapters(m)

    def _read_grams(self, m: _Model) -> None:
        """Describe the tables of n-grams, which stay where they are."""
        grams = self.net.ngrams
        factors = torch.tensor(FACTORS[: grams.parts])
        self._kept.append(factors)
        addresses = {n: self._table(grams.tables[str(n)]) for n in grams.orders}
        m.grams, m.factors = (c_void_p * 2)(addresses.get(2), addresses.get(3)), factors.data_ptr()
        m.parts, m.gram_rows, m.prime, m.bos = grams.parts, grams.rows, PRIME, grams.bos_id

    def _read_adapters(self, m: _Model) -> None:
        """Describe the adapters of the network, whose matrices stay where they are."""
        adapters, width = self.net.adapters, m.head_dim
        first = {"attn.c_k": m.n_head * width, "attn.c_v": (m.n_head + m.n_kv_head) * width}  # behind the queries
        self._thin = []
        for number in range(1, 1 + len(adapters.names)):
            found = []
            for i in range(m.n_layer):
                found += [self._thin_of(f"transformer.h.{i}.{name}", number, first.get(name, 0)) for name in THIN]
                found.append(self._thin_of(f"value_embeds.{i}", number, is_table=True))
            found.append(self._thin_of("transformer.wte", number, is_table=True))
            found.append(self._thin_of("transformer.wte" if self.net.lm_head is None else "lm_head", number))
            self._thin.append((_Thin * len(found))(*found))
        self._adapters = (POINTER(_Thin) * len(self._thin))(*(ctypes.cast(one, POINTER(_Thin)) for one in self._thin))
        m.adapters, m.n_adapters = self._adapters, len(self._thin)
        m.low = 3 * max(max(table.ranks) for table in adapters.tables.values())

    def _thin_of(self, name: str, number: int, first: int = 0, is_table: bool = False) -> _Thin:
        """Describe the matrices that an adapter has for a module, none where it does not change it.

        first: output of the packed matrix where the module's begin. is_table: rows are picked, not multiplied.
        """
        table = self.net.adapters.tables.get(name)
        if table is None or not table.ranks[number]:
            return _Thin()
        down, up = (table.up, table.down) if is_table else (table.down, table.up)
        shape = (down.size(2), up.size(2))
        addresses = (self._address(name, x[number], torch.float32, x.shape[1:]) for x in (down, up))
        return _Thin(*addresses, table.ranks[number], *shape, first)

    def _layer(self, index: int, block: Block) -> _Layer:
        attn, mlp, net, c = block.attn, block.mlp, self.net, self.net.config
        layer = _Layer(norm_1=self._norm(block.norm_1), norm_2=self._norm(block.norm_2))
        layer.qkv = self._linear(attn.c_q, attn.c_k, attn.c_v)
        layer.out, layer.fc, layer.proj = map(self._linear, (attn.c_proj, mlp.c_fc, mlp.c_proj))
        layer.window = -1 if attn.window is None else attn.window
        layer.part, layer.index = self._where[index]
        layer.offset = self._key_layers.index(index) if index in self._key_layers else -1
        if c.has_value_embed(index):
            layer.values = self._table(net.value_embeds[str(index)])
            layer.gate = self._numbers(attn.ve_gate.weight)
        if c.residual_scalars:
            layer.residual, layer.x0 = self._number(net.resid_scalars[index]), self._number(net.x0_scalars[index])
        if net.ngrams is not None:
            layer.grams = self._number(net.ngrams.scalars[index])
        return layer

    def _linear(self, *layers: Linear) -> _Matrix:
        """Describe linear layers with one input as one matrix."""
        weights = [layer.weight for layer in layers]
        matrix = self._matrix(sum(map(len, weights)), *weights)
        if layers[0].bias is not None:
            matrix.bias = self._numbers(torch.cat([layer.bias for layer in layers]))
        return matrix

    def _matrix(self, n: int, *weights: torch.Tensor) -> _Matrix:
        """Pack weights (n_i, k), one below the other; of the last only the rows up to n in all."""
        k, is_bf16, threads = weights[0].size(1), self.dtype == torch.bfloat16, torch.get_num_threads()
        packed = torch.zeros(self._lib.packed_numbers(n, k, is_bf16), dtype=self.dtype)
        at, scales = 0, None
        if self.net.int8:
            numbers, scales = in_int8(torch.cat(weights)[:n])
            weights = (numbers,)
        for weight in weights:
            rows, source = min(len(weight), n - at), weight.detach().contiguous()
            from_bf16 = source.dtype == torch.bfloat16
            self._lib.pack(source.data_ptr(), from_bf16, rows, k, packed.data_ptr(), is_bf16, at, threads)
            at += rows
        matrix = _Matrix(n=n, k=k)
        if scales is not None:
            whole, packed = packed, torch.empty(packed.shape, dtype=torch.int8)
            self._lib.to_int8(whole.data_ptr(), is_bf16, whole.numel(), packed.data_ptr())
            self._kept.append(scales)
            matrix.scales = scales.data_ptr()
        self._packed.append(packed)
        matrix.weights = packed.data_ptr()
        return matrix

    def _norm(self, module):
        """Return the addresses of a LayerNorm's weight and bias, none for RMSNorm."""
        weight = getattr(module, "weight", None)
        return (c_void_p * 2)(*([] if weight is None else (self._numbers(weight), self._numbers(module.bias))))

    def _table(self, embedding) -> int:
        """Return the address of a table, which stays where it is."""
        weight = embedding.weight.detach()
        if not weight.is_contiguous():
            raise ValueError(f"an embedding of shape {tuple(weight.shape)} is not contiguous")
        self._kept.append(weight)
        return weight.data_ptr()

    def _numbers(self, tensor: torch.Tensor) -> int:
        """Return the address of an fp32 copy of a tensor's numbers, rounded to the compute dtype."""
        copy = tensor.detach().to(self.dtype, copy=True).float().contiguous()
        self._kept.append(copy)
        return copy.data_ptr()

    def _number(self, tensor: torch.Tensor) -> float:
        return tensor.detach().to(self.dtype).item()

    def __call__(self, cache: SlotCache, ids: torch.Tensor, adapters: torch.Tensor | None = None) -> torch.Tensor:
        """Feed row i of the cache its next token ids[i]; return the logits (n, V) fp32 behind them.

        Keys, values, `last_embed`, `last_ids` and `last_keys` are written; the caller advances `lengths`. See `extend`.
        """
        return self.extend(cache, ids, cache.lengths[: len(ids)], adapters=adapters)

    def extend(
        self,
        cache: SlotCache,
        ids: torch.Tensor,
        at: torch.Tensor,
        rows: torch.Tensor | None = None,
        outputs: torch.Tensor | None = None,
        adapters: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute new tokens ids (n,) and return the logits (len(outputs), V) fp32 behind some of them.

        at: (n,) place of each token among its row's own tokens; rows: (n,) its row of the cache, None = token i belongs
        to row i; outputs: (m,) tokens whose logits are wanted, None = all. The tokens of one row stand side by side, in
        order; those of rows with one prefix too, where possible. adapters: (n,) number of each token's adapter (see
        `llm.model.adapters`), 0 or None = none. All are int64 tensors.

        cache: a SlotCache of the network's shapes. Raises ValueError for a token outside of vocabulary, cache or
        context, before anything is written.
        """
        n, b, c = len(ids), self._batch, self.net.config
        n_outputs = n if outputs is None else len(outputs)
        adapters = None if adapters is None or not adapters.any() else adapters
        given = {"ids": ids, "at": at, "rows": rows, "adapters": adapters, "outputs": outputs}
        for name, tensor in given.items():
            size = n_outputs if name == "outputs" else n
            setattr(b, name, None if tensor is None else self._address(name, tensor, torch.int64, (size,)))
        self._describe(b, cache)
        if outputs is not None and n_outputs and not 0 <= int(outputs.min()) <= int(outputs.max()) < n:
            raise ValueError(f"outputs must be numbers of tokens, below {n}")
        logits = torch.empty(n_outputs, c.vocab_size)
        b.n, b.n_outputs, b.logits = n, n_outputs, logits.data_ptr()
        self._reserve(max(n, n_outputs))
        work = (n + 2) * self._n_packed  # reading the weights counts as two tokens
        model, batch = ctypes.byref(self._model), ctypes.byref(b)
        wrong = THREADS.run(work, lambda threads: self._lib.decode(model, batch, threads))
        if wrong >= 0:
            row = wrong if rows is None else int(rows[wrong])
            raise ValueError(
                f"token {wrong} (id {int(ids[wrong])}, place {int(at[wrong])} of row {row}) lies outside of the "
                f"vocabulary of {c.padded_vocab_size}, the cache of {b.cache_rows} x {b.room}, the context, or the "
                f"{self._model.n_adapters} adapters"
            )
        return logits

    def _describe(self, b: _Batch, cache: SlotCache) -> None:
        """Fill in the addresses of a cache. Raises ValueError for one of another shape or dtype."""
        b.cache_rows, b.room, b.n_parts = cache.rows, cache.room, len(self._windows)
        windows = [part.window for part in cache.parts]
        if windows != self._windows:
            raise ValueError(f"cache for windows {windows} does not fit the model's {self._windows}")
        b.parts = (_Part * b.n_parts)(*map(self._part, cache.parts, [cache] * b.n_parts))
        b.last_embed = None
        if self.net.config.smear:
            shape = (b.cache_rows, self.net.config.n_embd)
            b.last_embed = self._address("last_embed", cache.last_embed, self.dtype, shape)
        b.last_ids = None
        if self.net.ngrams is not None:
            b.n_last = self.net.config.ids_before
            b.last_ids = self._address("last_ids", cache.last_ids, torch.int64, (b.cache_rows, b.n_last))
        b.last_keys, b.n_offset = None, len(self._key_layers)
        if self._key_layers:
            shape = (b.cache_rows, b.n_offset, self.net.config.n_kv_head, self.net.config.head_dim)
            b.last_keys = self._address("last_keys", cache.last_keys, self.dtype, shape)
        b.prefix, n = self._address("prefix", cache.prefix, torch.int64, (b.cache_rows,)), len(cache.prefixes)
        b.n_prefixes, b.lengths = n, (c_int64 * n)(*(-1 if p is None else p.length for p in cache.prefixes))
        shared = (one for prefix in cache.prefixes for one in self._prefix(prefix))
        b.shared = (_PrefixPart * (n * b.n_parts))(*shared)

    def _part(self, part: Part, cache: SlotCache) -> _Part:
        """Describe a part of a cache. Raises ValueError for one of another shape or dtype."""
        c, k, v = self.net.config, part.k, part.v
        layers, rows, heads, places, width = k.shape
        same = k.shape == v.shape and k.stride() == v.stride() and k.dtype == v.dtype == self.dtype
        fits = (layers, rows, heads, width) == (len(part.layers), cache.rows, c.n_kv_head, c.head_dim)
        if not (same and fits and k.stride(4) == 1):
            raise ValueError(f"cache of shape {tuple(k.shape)} and {k.dtype} does not fit the model")
        spare = places - (part.window or 0)
        if places < cache.room and (part.window is None or spare < 1):
            raise ValueError(f"{places} places of {cache.room} do not hold a window of {part.window}")
        return _Part(k.data_ptr(), v.data_ptr(), places, spare, *k.stride()[:4])

    def _prefix(self, prefix: Prefix | None) -> list[_PrefixPart]:
        """Describe the parts of a prefix. Raises ValueError where tokens are missing that windows reach."""
        if prefix is None:  # a free place in the list
            return [_PrefixPart()] * len(self._windows)
        c, found = self.net.config, []
        for (k, v, first, _), layers, window in zip(prefix.parts, self._n_layers, self._windows, strict=True):
            room = k.size(2)
            shape = (layers, c.n_kv_head, room, c.head_dim)
            addresses = (self._address("prefix", t, self.dtype, shape) for t in (k, v))
            reach = 0 if window is None else max(0, prefix.length - window)
            if not (0 <= first <= reach and first <= prefix.length <= first + room):
                raise ValueError(f"a prefix of {prefix.length} tokens, of which memory holds {room} from {first} on")
            found.append(_PrefixPart(*addresses, room, first))
        return found

    @staticmethod
    def _address(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple) -> int:
        """Return the address of a contiguous tensor. Raises ValueError for another shape, dtype or device."""
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} instead of {shape} {dtype}, contiguous")
        return tensor.data_ptr()

    def _reserve(self, n: int) -> None:
        """Make room in the scratch memory for n tokens."""
        if n > self._batch.capacity or not len(self._scratch):
            self._batch.capacity = max(n, 16)
            size = self._lib.scratch_bytes(ctypes.byref(self._model), self._batch.capacity)
            self._scratch = torch.zeros(size, dtype=torch.uint8)
            self._batch.scratch = self._scratch.data_ptr()
