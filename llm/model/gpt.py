"""The Transformer, in three forms that one config describes.

`classic` is nanochat's model of October 2025: rotary positions, QK-norm, squared-ReLU MLP, parameter-free RMSNorm after
the embedding, before each sublayer and before the head, untied embedding and head without biases, optional grouped-
query attention, logits soft-capped at 15. `modern` (2026) adds, each by its own switch: value embeddings, residual and
x0 scalars, sliding windows, smear, backout, a q/k scale, and what is off by default: exclusive attention, a gate of the
heads, a leaky activation, tables of n-grams, copy candidates, an asymmetric cap, an offset of keys, narrow queries and
keys, paired heads, loops. `gpt2` is the baseline of 2019: learned positions, LayerNorm, GELU, biases, tied embedding.
Weights are fp32, products in `compute_dtype`. This file knows nothing of training, configuration or files.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llm.config.registries import ARCHITECTURES
from llm.model.attention import (
    apply_rotary,
    causal_attention,
    choose_backend,
    layer_masks,
    offset_keys,
    places_in_documents,
    plain_backend,
    rotary_tables,
    without_own,
)
from llm.model.cached_attention import AttentionOptions, SharedPrefixPass, SlotPass
from llm.model.config import SMEAR_CHANNELS, GPTConfig
from llm.model.copies import CopyAdded, copy_candidates
from llm.model.cross_entropy import Products, chunk_loss, linear_cross_entropy, softcapped
from llm.model.fused_ops import leaky_relu_squared, relu_squared
from llm.model.fused_ops import rms_norm as norm
from llm.model.joint_qkv import joint_product
from llm.model.kv_cache import SlotCache
from llm.model.linear import Linear, Table
from llm.model.loops import share_matrices
from llm.model.ngrams import NGrams
from llm.model.norms import make_norm


class Attention(nn.Module):
    """Causal self-attention of one layer, with its projections and the gate of its value embedding.

    Two switches change what a head returns, y (D), for a token with value v and layer input x. attention_gate: y
    becomes sigmoid(w x[:gate_channels]) y, w zero at first (modded-nanogpt, 2025). exclusive_attention: y loses
    tanh(a) (y v) v / (v v), a trained number a per head, zero at first: what a token has of its own already reaches the
    next layer through the residual stream (exclusive self-attention, parameter-golf 2026).

    A third makes queries and keys narrower than values. qk_dim: they have that many channels d, rotary positions and
    norm are over these, and the scores are q k / sqrt(d): to find a token takes fewer channels than to say what it
    holds (modded-nanogpt, pull request 344, 2026). Zeros up to head_dim follow, as there: what is saved are weights and
    products of c_q and c_k. A fourth pairs heads: `llm.model.attention.pair_heads`.
    """

    joint_qkv = False  # set by llm.model.joint_qkv.enable_joint_qkv

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.window(layer)
        self.is_gpt2 = config.arch == "gpt2"
        self.key_dim, self.scale = config.key_dim, config.qk_scale**2 / config.key_dim**0.5
        self.gate_channels, self.gate_range = config.gate_channels, config.gate_range
        self.c_q = Linear(config.n_embd, config.n_head * config.key_dim, bias=self.is_gpt2)
        self.c_k = Linear(config.n_embd, config.n_kv_head * config.key_dim, bias=self.is_gpt2)
        self.c_v = Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=self.is_gpt2)
        self.c_proj = Linear(config.n_head * config.head_dim, config.n_embd, bias=self.is_gpt2)
        self.out_gate = Linear(config.gate_channels, config.n_head) if config.attention_gate else None
        self.exclusion = nn.Parameter(torch.empty(config.n_head)) if config.exclusive_attention else None
        self.offsets_keys, self.pairs_heads = config.offsets_keys(layer), config.pairs_heads(layer)
        if config.has_value_embed(layer):
            self.ve_gate = Linear(config.gate_channels, config.n_kv_head)

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return queries (B, T, H, d), keys (B, T, Hkv, d) and values (B, T, Hkv, D) of the input (B, T, n_embd)."""
        layers, joint = (self.c_q, self.c_k, self.c_v), self.joint_qkv and torch.is_grad_enabled()
        parts = joint_product(x, layers) if joint else [layer(x) for layer in layers]
        sizes = (self.key_dim, self.key_dim, self.head_dim)
        return [part.view(*x.shape[:2], -1, size) for part, size in zip(parts, sizes, strict=True)]

    def forward(self, x, value_embed, rotary, mask, backend, cache: SlotPass | SharedPrefixPass | None, positions):
        B, T, _ = x.shape
        q, k, v = self.project(x)
        if value_embed is not None:
            gate = self.gate_range * torch.sigmoid(self.ve_gate(x[..., : self.gate_channels]))  # (B, T, Hkv)
            v = v + gate.unsqueeze(-1) * value_embed.view_as(v)
        if not self.is_gpt2:
            q, k = norm(apply_rotary(q, *rotary)), norm(apply_rotary(k, *rotary))
        if self.offsets_keys:
            before = None if cache is None else cache.keys_before(self.layer, k)
            k = offset_keys(k, before, positions)
        if self.key_dim < self.head_dim:  # zeros add nothing to a product
            q, k = (F.pad(t, (0, self.head_dim - self.key_dim)) for t in (q, k))
        if cache is None:
            y = causal_attention(q, k, v, self.scale, self.window, mask, backend, self.pairs_heads)
        else:
            options = AttentionOptions(self.scale, self.window, mask, backend, self.pairs_heads)
            y = cache.attend(self.layer, q, k, v, positions, options)
        if self.exclusion is not None:
            y = without_own(y, v, torch.tanh(self.exclusion))
        if self.out_gate is not None:
            y = torch.sigmoid(self.out_gate(x[..., : self.gate_channels])).unsqueeze(-1) * y
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """Feed-forward part of a block, four times as wide inside: a squared ReLU, leaky or not, or GELU for gpt2."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.is_gpt2 = config.arch == "gpt2"
        self.activation = leaky_relu_squared if config.activation == "leaky_relu_squared" else relu_squared
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=self.is_gpt2)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=self.is_gpt2)

    def forward(self, x):
        h = self.c_fc(x)
        return self.c_proj(F.gelu(h, approximate="tanh") if self.is_gpt2 else self.activation(h))


class Block(nn.Module):
    """One Transformer block: attention and MLP, each behind a norm and added to the residual stream (B, T, n_embd)."""

    dropout = 0.0  # share of what attention and MLP add that training passes zero, set by callbacks.dropout

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.norm_1, self.attn = make_norm(config), Attention(config, layer)
        self.norm_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, value_embed, rotary, mask, backend, cache, positions):
        x = x + self.dropped(self.attn(self.norm_1(x), value_embed, rotary, mask, backend, cache, positions))
        return x + self.dropped(self.mlp(self.norm_2(x)))

    def dropped(self, update: torch.Tensor) -> torch.Tensor:
        return F.dropout(update, self.dropout) if self.dropout and torch.is_grad_enabled() else update


def build_network(config: GPTConfig) -> "GPT":
    """Build the network class of `config.arch`, weights not yet set. Raises UserError for an unknown architecture."""
    return ARCHITECTURES.get(config.arch, "arch.name").network_class(config)


class GPT(nn.Module):
    """Transformer language model: token ids in, logits or loss out.

    `compute_dtype` is the dtype of all activations up to the logits. A subclass with other blocks sets `block_class`
    and is registered by `llm.config.extend.register_arch`.
    """

    block_class = Block
    can_share_prefix = True  # `continue_prefixes` works
    has_slots = True  # `new_cache` gives a cache whose rows come and go
    tied_learns_as_head = False  # a tied embedding has the learning rate of the head
    lora = None  # the shape of its adapter, a llm.model.lora.LoRA
    int8 = False  # our kernel multiplies by matrices of 8 bits (llm.model.decode_cpu); torch by the weights as they are
    adapters = None  # several, of which each row of a pass has one or none, a llm.model.adapters.Adapters

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.activation_checkpointing = False
        # llm.model.compile puts compiled ones here, llm.stages.device products in fp8
        self.training_forward_blocks, self.loss_kernel, self.head_products = None, chunk_loss, Products
        self.training_attention: str | None = None  # set by set_attention; None = plain_backend
        self.windows = [config.window(layer) for layer in range(config.n_layer)]
        kv_dim = config.n_kv_head * config.head_dim
        self.transformer = nn.ModuleDict(
            {
                "wte": Table(config.padded_vocab_size, config.n_embd),
                "h": nn.ModuleList(self.block_class(config, layer) for layer in range(config.n_layer)),
            }
        )
        share_matrices(self.transformer.h, config.places)
        if config.arch == "gpt2":
            self.transformer["wpe"] = Table(config.seq_len, config.n_embd)
        self.final_norm = make_norm(config)
        self.lm_head = None if config.tied else Linear(config.n_embd, config.padded_vocab_size)
        self.scalar_head = Linear(config.n_embd, 1) if config.scalar_head else None
        self.value_embeds = nn.ModuleDict(
            {
                str(layer): Table(config.padded_vocab_size, kv_dim)
                for layer in range(config.n_layer)
                if config.has_value_embed(layer)
            }
        )
        self.ngrams = NGrams(config) if config.ngrams else None
        self.copies = nn.ModuleList(CopyAdded(config) for _ in range(2)) if config.copy_candidate else None
        if config.residual_scalars:
            self.resid_scalars = nn.Parameter(torch.empty(config.n_layer))
            self.x0_scalars = nn.Parameter(torch.empty(config.n_layer))
        if config.smear:
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
            self.smear_scalar = nn.Parameter(torch.empty(1))
        if config.backout:
            self.backout_scalar = nn.Parameter(torch.empty(1))
        if config.arch != "gpt2":
            original = config.rope_original if config.rope_scaling else None
            cos, sin = rotary_tables(config.seq_len, config.key_dim, config.rope_base, original)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.transformer.wte.weight.device

    @property
    def head_weight(self) -> torch.Tensor:
        """Weight (padded vocabulary, n_embd) of the head: its own matrix, or the embedding if they are tied."""
        return self.head_module.merged_weight()

    @property
    def head_module(self) -> Linear | Table:
        """Module whose weight the head multiplies by: its own, or the embedding if they are tied."""
        return self.transformer.wte if self.lm_head is None else self.lm_head

    @torch.no_grad()
    def init_weights(self, seed: int = 42) -> "GPT":
        """Fill all weights from `seed`, with equal results on any device; returns the network.

        classic: embedding N(0, 1); block inputs N(0, s), s = min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in).
        modern: block inputs and value embeddings U(-b, b), b = sqrt(3 / n_embd), the MLP's times `fc_scale`; gates
        U(0, gate_init), smear off. Both: projections back into the residual stream start at zero, so with a zero head
        (classic) the first loss is exactly ln(vocabulary).
        gpt2: N(0, 0.02), projections N(0, 0.02 / sqrt(2 n_layer)), positions N(0, 0.01), biases 0.
        """
        c, generator = self.config, torch.Generator().manual_seed(seed)
        if self.scalar_head is not None:
            self.scalar_head.weight.zero_()
        if c.arch == "gpt2":
            self._init_gpt2(generator)
            return self
        bound = (3 / c.n_embd) ** 0.5
        _normal_(self.transformer.wte.weight, c.embedding_std, generator)
        for block in self.transformer.h:
            self._init_block(block, bound, generator)
        for table in self.value_embeds.values():
            _uniform_(table.weight, -bound, bound, generator)
        if self.ngrams is not None:
            self.ngrams.init_weights()
        for p in () if self.copies is None else self.copies.parameters():
            p.zero_()
        if c.residual_scalars:
            self.resid_scalars.copy_(torch.linspace(*c.resid_init, c.n_layer))
            self.x0_scalars.copy_(torch.linspace(*c.x0_init, c.n_layer))
        if c.smear:
            _uniform_(self.smear_gate.weight, 0.0, c.gate_init, generator)
            self.smear_scalar.zero_()
        if c.backout:
            self.backout_scalar.fill_(c.backout_init)
        if self.lm_head is not None:
            _normal_(self.lm_head.weight, c.head_std, generator)
        return self

    def _init_gpt2(self, generator: torch.Generator) -> None:
        for name, p in self.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif name.endswith("c_proj.weight"):
                _normal_(p, 0.02 / (2 * self.config.n_layer) ** 0.5, generator)
            else:
                _normal_(p, 0.01 if "wpe" in name else 0.02, generator)

    def _init_block(self, block: Block, bound: float, generator: torch.Generator) -> None:
        for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
            fan_out, fan_in = linear.weight.shape
            if self.config.arch == "modern":
                _uniform_(linear.weight, -bound, bound, generator)
            else:
                _normal_(linear.weight, min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5, generator)
        block.mlp.c_fc.weight.mul_(self.config.fc_scale)
        block.attn.c_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()
        if block.attn.exclusion is not None:
            block.attn.exclusion.zero_()
        if block.attn.out_gate is not None:
            block.attn.out_gate.weight.zero_()
        if hasattr(block.attn, "ve_gate"):
            _uniform_(block.attn.ve_gate.weight, 0.0, self.config.gate_init, generator)

    def set_attention(self, asked: str, device: torch.device, fixed_shapes: bool) -> str:
        """Choose the attention backend of training steps on `device` and return its name.

        Raises UserError if the backend `asked` for cannot run there.
        """
        c, windows = self.config, any(self.windows)
        shape = (self.compute_dtype, c.head_dim, windows, c.bos_id is not None, fixed_shapes)
        self.training_attention = choose_backend(asked, device, *shape)
        return self.training_attention

    def embed(self, x: torch.Tensor, cache: SlotPass | None, at, starts: torch.Tensor | None) -> torch.Tensor:
        """Return the input of the first block (B, T, n_embd) for rows of the embedding of that shape.

        at: positions of the tokens; starts: (B, T) true where a document begins, if documents are kept apart.
        """
        if self.config.arch == "gpt2":
            return (x + self.transformer.wpe.weight[at]).to(self.compute_dtype)
        x = norm(x.to(self.compute_dtype))
        if self.config.smear:
            first = torch.zeros_like(x[:, :1]) if cache is None else cache.last_embed
            before = torch.cat((first, x[:, :-1]), dim=1)
            if starts is not None:
                before = before.masked_fill(starts.unsqueeze(-1), 0)
            if cache is not None:
                cache.fed = x
            gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))  # (B, T, 1)
            x = x + self.smear_scalar.to(x.dtype) * gate * before
        return x

    def smear_input(self, token: int) -> torch.Tensor:
        """Return the embedding (n_embd,) of a token of which a part is mixed into the token behind it."""
        row = self.transformer.wte(torch.tensor([[token]], device=self.device))[0, 0]
        return norm(row.to(self.compute_dtype))

    def forward_blocks(
        self,
        x: torch.Tensor,
        values: list,
        starts: torch.Tensor | None,
        masks: list,
        backend: str,
        cache: SlotPass | None = None,
        ngrams: torch.Tensor | None = None,
        copied: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run all blocks on rows of the embedding (B, T, n_embd); return the normed output of the last one.

        values: rows of the value embeddings (B, T, kv_dim), None for layers without; starts: (B, T) true where a
        document begins, None if rows are not divided; masks: by layer, from `layer_masks`; ngrams: rows of tables (B,
        T, n_embd), a part of which goes into every block; copied: rows of the embedding (B, T, n_embd) of copy
        candidates and the numbers (B, T) of their lengths. The output (B, T, n_embd) has the compute dtype.
        """
        T, c = x.size(1), self.config
        positions = places_in_documents(starts) if cache is None else cache.positions(T)
        at = slice(0, T) if cache is None else positions
        rotary = None if c.arch == "gpt2" else [table[at].to(self.compute_dtype) for table in (self.cos, self.sin)]
        x = self.embed(x, cache, at, starts)
        if copied is not None:
            copied = norm(copied[0].to(x.dtype)), copied[1]
            x = self.copies[0](x, *copied)
        x0 = x
        ngrams = None if ngrams is None else ngrams.to(x.dtype)
        for layer, block in enumerate(self.transformer.h):
            if c.residual_scalars:
                x = self.resid_scalars[layer].to(x.dtype) * x + self.x0_scalars[layer].to(x.dtype) * x0
            if ngrams is not None:
                x = x + self.ngrams.scalars[layer].to(x.dtype) * ngrams
            value_embed = None if values[layer] is None else values[layer].to(x.dtype)
            inputs = (x, value_embed, rotary, masks[layer], backend, cache, positions)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
            if layer == c.n_layer // 2:
                middle = x
        if c.backout:
            x = x - self.backout_scalar.to(x.dtype) * middle
        return self.final_norm(x if copied is None else self.copies[1](x, *copied))

    def hidden(self, ids: torch.Tensor, cache: SlotPass | None = None, is_training: bool = False) -> torch.Tensor:
        """Return the normed output (B, T, n_embd) of the last block for ids (B, T). Does not advance the cache.

        is_training: use the attention backend and the compiled blocks that were chosen for training steps. Raises
        ValueError for more tokens than the context holds.
        """
        if ids.size(1) > self.config.seq_len:
            raise ValueError(f"{ids.size(1)} tokens do not fit the model's context of {self.config.seq_len}")
        layers, c = range(self.config.n_layer), self.config
        values = [self.value_embeds[str(i)](ids) if c.has_value_embed(i) else None for i in layers]
        before, ngrams, copied = None if cache is None else cache.last_ids, None, None
        if before is not None:
            cache.fed_ids = ids
        if self.copies is None:
            x = self.transformer.wte(ids)
        else:
            found, numbers = copy_candidates(ids, before, c.copy_bos, c.vocab_size)
            x = self.transformer.wte(ids)
            copied = self.transformer.wte.forward(found), numbers  # without hooks: noise is for the tokens themselves
        if self.ngrams is not None:
            ngrams = self.ngrams(ids, before)
            if c.ngram_into == "values":
                pairs = zip(values, self.ngrams.scalars, strict=True)
                values, ngrams = [None if v is None else v + s * ngrams for v, s in pairs], None
        apart = c.bos_id is not None and cache is None  # with a cache a row holds one conversation
        starts = ids == c.bos_id if apart else None
        backend = (is_training and self.training_attention) or plain_backend(x.device, self.compute_dtype)
        masks = layer_masks(self.windows, [*map(c.pairs_heads, layers)], ids.size(1), starts, backend, x.device)
        if is_training and self.training_forward_blocks is not None:
            return self.training_forward_blocks(x, values, starts, masks, backend, None, ngrams, copied)
        return self.forward_blocks(x, values, starts, masks, backend, cache, ngrams, copied)

    def new_cache(self, rows: int, room: int, spare: int = 1) -> SlotCache:
        """Return an empty cache for `rows` rows of at most `room` tokens each; spare: see `SlotCache`."""
        return SlotCache(self.config, rows, room, device=self.device, dtype=self.compute_dtype, spare=spare)

    def continue_prefixes(
        self, prefixes: torch.Tensor, lengths: torch.Tensor, n: int, rest: torch.Tensor
    ) -> torch.Tensor:
        """Compute each prefix once and `n` continuations behind it; return their outputs (B n, 1 + T, n_embd).

        prefixes: (B, S), of which the first `lengths` (B,) tokens count; rest: (B n, T), the continuations. The outputs
        are those at the last token of the prefix and at every token of the continuation.
        """
        cache = self.new_cache(*prefixes.shape)
        one_pass = SlotPass(cache, 0, len(prefixes))
        one_pass.expect(lengths)
        hidden = self.hidden(prefixes, one_pass)
        one_pass.advance(prefixes.size(1))
        cache.lengths = lengths.cpu()
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].unsqueeze(1)
        hidden = last.repeat_interleave(n, dim=0)
        if rest.size(1):
            hidden = torch.cat((hidden, self.hidden(rest, SharedPrefixPass(cache, n, self.config.seq_len))), dim=1)
        return hidden

    def scalars(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the fp32 number (B, T) that the scalar head gives to each token of ids (B, T)."""
        return self(ids, scalars=True)

    def scalar_outputs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the fp32 numbers (B, T) of the scalar head for outputs of the last block (B, T, n_embd)."""
        return F.linear(hidden.to(self.scalar_head.weight.dtype), self.scalar_head.weight).squeeze(-1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return soft-capped fp32 logits (..., V) over the true vocabulary; the padding of the head is cut off."""
        logits = F.linear(hidden, self.head_weight.to(hidden.dtype))
        if self.head_module.by_row is not None:
            logits = logits + self.head_module.by_row.of_inputs(hidden)
        return softcapped(logits[..., : self.config.vocab_size], self.config.bound)

    def forward(
        self,
        ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        reduction: str = "mean",
        token_weights: torch.Tensor | None = None,
        cache: SlotPass | None = None,
        lengths: torch.Tensor | None = None,
        last_only: bool = False,
        scalars: bool = False,
        head: Callable[[torch.Tensor], Any] | None = None,
    ) -> Any:
        """Return logits (B, T, V), or with `targets` the cross-entropy in nats, or with `scalars` those (B, T).

        targets and scalars: both, in this order, from one pass.
        ids: (B, T) long. targets: (B, T) long, -1 = not trained; reduction sum | mean | none (fp32 scalar or (B, T))
        | both (see `linear_cross_entropy`); token_weights: (B, T), factors of the tokens' losses.
        cache: continue every row behind its cached tokens, of which the caller keeps count; lengths: (B,) true tokens
        per row of right-padded ids.
        last_only: return logits (B, 1, V) at each row's last true token only.
        head: return what this function makes of the output (B, T, n_embd) of the last block, in place of logits. It
        may call `self.logits`: strategies that divide the weights have gathered them meanwhile.
        """
        is_training = (targets is not None or scalars or head is not None) and cache is None and torch.is_grad_enabled()
        if cache is not None:
            cache.expect(lengths)
        hidden = self.hidden(ids, cache, is_training)
        if cache is not None:
            cache.advance(ids.size(1))
        if last_only:
            last = hidden.size(1) - 1 if lengths is None else (lengths - 1)
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last].unsqueeze(1)
        if head is not None:
            return head(hidden)
        numbers = self.scalar_outputs(hidden) if scalars else None
        if numbers is not None and targets is None:
            # processes that train together want a gradient of every parameter
            return numbers + 0.0 * self.head_weight[:1].sum() if torch.is_grad_enabled() else numbers
        if targets is None:
            return self.logits(hidden)
        true_head = self.head_weight[: self.config.vocab_size]
        how = (self.loss_kernel, self.head_products) if is_training else ()
        found = linear_cross_entropy(hidden, true_head, targets, self.config.bound, token_weights, reduction, *how)
        return found if numbers is None else (found, numbers)


def with_weights(net: GPT, weights: dict[str, torch.Tensor]) -> GPT:
    """Return a network of the same shape, for generation, that holds the tensors `weights` by name; none is copied."""
    with torch.device("meta"):
        copy = type(net)(net.config)
    copy.load_state_dict(weights, assign=True)
    copy.compute_dtype, copy.int8 = net.compute_dtype, net.int8
    return copy.to(net.device).eval()


# Numbers are drawn on the CPU, so that every device starts from equal weights.


def _normal_(weight: torch.Tensor, std: float, generator: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def _uniform_(weight: torch.Tensor, low: float, high: float, generator: torch.Generator) -> None:
    weight.copy_(torch.rand(weight.shape, generator=generator) * (high - low) + low)
