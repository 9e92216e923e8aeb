"""Fathom's own architectures for transformers 5: `arch=modern` with its switches, and `arch=gpt2`.

A copy of this file lies in the `model/` folders of these architectures; `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` runs the copy. It imports torch and transformers only. Rows may be padded on either side if an
attention mask says so; with a cache a row is one conversation.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

SMEAR_CHANNELS = 24
EPS = torch.finfo(torch.float32).eps
PRIME, FACTORS = (
    2**31 - 1,
    (  # of the hashes of n-grams: a row per part of a table, a column per id, newest first
        (185_981_177, 1_137_067_680, 2_021_590_067),
        (323_902_399, 40_330_515, 1_565_646_089),
        (196_216_772, 1_595_807_544, 793_371_239),
        (133_916_831, 1_636_180_724, 1_168_765_833),
    ),
)
COPY_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # of what is looked for earlier in a document
# Options of config.json's section `fathom.model` that the code below reads, or that say only how training began.
READ = {
    "n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "seq_len", "vocab_size", "arch", "rope_base", "softcap",
    "rope_scaling", "rope_original", "qk_scale", "window_pattern", "window_divisor", "window_multiple", "value_embeds",
    "gate_channels", "gate_range", "residual_scalars", "smear", "backout", "tied", "bos_id", "scalar_head",
    "exclusive_attention", "attention_gate", "activation", "ngrams", "ngram_rows", "ngram_into", "ngram_bos",
    "asymmetric_cap", "key_offset", "qk_dim", "paired_heads", "copy_candidate", "copy_bos", "loops",
}  # fmt: skip
INITIAL = {
    "vocab_multiple", "resid_init", "x0_init", "backout_init", "gate_init", "embedding_std", "head_std", "fc_scale",
}  # fmt: skip


class FathomConfig(PretrainedConfig):
    """Configuration whose section `fathom` holds the shape of the model."""

    model_type = "fathom"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, fathom=None, use_cache=True, **kwargs):
        self.fathom, self.use_cache = fathom or {}, use_cache
        super().__init__(**kwargs)


class Shape:
    """The options of `fathom.model` as attributes. Raises ValueError for an option that this file does not know."""

    def __init__(self, options: dict):
        unknown = [name for name in options if name not in READ | INITIAL and options[name]]
        if unknown or options["arch"] not in ("modern", "gpt2"):
            what = unknown[0] if unknown else f"arch={options['arch']}"
            raise ValueError(f"modeling_fathom.py does not compute {what}; take the file of the release that wrote it")
        self.__dict__.update(options)
        self.paired_heads = options.get("paired_heads")
        self.key_dim = options.get("qk_dim") or options["head_dim"]  # channels of queries and keys

    def window(self, layer: int) -> int | None:
        """Return how many earlier positions a layer sees; None = all."""
        if self.window_pattern[layer % len(self.window_pattern)] == "L" or layer == self.n_layer - 1:
            return None
        if self.window_multiple is None:
            short = max(1, self.seq_len // self.window_divisor)
        else:
            short = -(-self.seq_len // (self.window_divisor * self.window_multiple)) * self.window_multiple
        if short >= self.seq_len:
            return None
        return max(1, short // 2) if self.paired_heads else short

    def pairs_heads(self, window: int | None) -> bool:
        """Return whether the heads of layers with a window are paired."""
        return self.paired_heads == "all" or self.paired_heads == "short" and window is not None

    def has_values(self, layer: int) -> bool:
        """Return whether a layer adds value embeddings."""
        return self.value_embeds and (self.n_layer - 1 - layer) % 2 == 0


def rms_norm(x):
    """Return x divided by its root mean square, which is taken in fp32."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm without weights."""

    def forward(self, x):
        return rms_norm(x)


def make_norm(shape):
    """Return the norm of an architecture."""
    return nn.LayerNorm(shape.n_embd) if shape.arch == "gpt2" else RMSNorm()


def rotary(shape, positions, dtype):
    """Return cos and sin (B, T, 1, key_dim / 2) of the positions (B, T); frequencies as YaRN stretches them."""
    D, base = shape.key_dim, shape.rope_base
    turns = base ** (-torch.arange(0, D, 2, dtype=torch.float32, device=positions.device) / D)
    if shape.rope_scaling and shape.rope_original:
        length, factor = shape.rope_original, shape.seq_len / shape.rope_original

        def channel(n):
            return D * math.log(length / (n * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), D - 1)
        slowed = (torch.arange(D // 2, device=positions.device).float() - low) / max(high - low, 1e-3)
        slowed = slowed.clamp(0, 1)
        turns = turns * (1 - slowed) + turns / factor * slowed
    angles = (positions.float().unsqueeze(-1) * turns).unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def offset_keys(k, follows):
    """Return keys (B, Hkv, S, D) whose slow channels are those of the key before; follows: (B, S), false = own ones."""
    D = k.size(-1)
    is_slow = torch.arange(D, device=k.device) % (D // 2) >= D // 4
    return torch.where((follows.unsqueeze(-1) & is_slow).unsqueeze(1), torch.cat((k[:, :, :1], k[:, :, :-1]), 2), k)


class Attention(nn.Module):
    """Causal attention of one layer."""

    def __init__(self, shape, layer):
        super().__init__()
        self.shape, self.layer, self.window = shape, layer, shape.window(layer)
        bias = shape.arch == "gpt2"
        self.c_q = nn.Linear(shape.n_embd, shape.n_head * shape.key_dim, bias=bias)
        self.c_k = nn.Linear(shape.n_embd, shape.n_kv_head * shape.key_dim, bias=bias)
        self.c_v = nn.Linear(shape.n_embd, shape.n_kv_head * shape.head_dim, bias=bias)
        self.c_proj = nn.Linear(shape.n_head * shape.head_dim, shape.n_embd, bias=bias)
        self.out_gate = nn.Linear(shape.gate_channels, shape.n_head, bias=False) if shape.attention_gate else None
        self.exclusion = nn.Parameter(torch.zeros(shape.n_head)) if shape.exclusive_attention else None
        self.offsets_keys = getattr(shape, "key_offset", False) and self.window is None
        self.pairs_heads = shape.pairs_heads(self.window)
        if shape.has_values(layer):
            self.ve_gate = nn.Linear(shape.gate_channels, shape.n_kv_head, bias=False)

    def forward(self, x, values, angles, mask, cache, kept, follows):
        """Return (B, T, n_embd). mask: (B, 1, T, S), true = seen; kept, follows (B, S): see `FathomForCausalLM`."""
        (B, T, _), shape = x.shape, self.shape
        q, k = (layer(x).view(B, T, -1, shape.key_dim) for layer in (self.c_q, self.c_k))
        v = self.c_v(x).view(B, T, -1, shape.head_dim)
        if values is not None:
            gate = shape.gate_range * torch.sigmoid(self.ve_gate(x[..., : shape.gate_channels]))
            v = v + gate.unsqueeze(-1) * values.view_as(v)
        if angles is not None:
            cos, sin = angles
            turned = (
                torch.cat((a * cos + b * sin, b * cos - a * sin), -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1))
            )
            q, k = (rms_norm(t) for t in turned)
        own = v  # (B, T, Hkv, D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            if kept is not None:  # it lies behind the values, so that whatever moves rows moves it too
                v = torch.cat((v, kept.transpose(1, 2)), -1)
            k, v = cache.update(k, v, self.layer)
            v = v[..., : shape.head_dim]
        if self.offsets_keys:  # the cache holds keys as they are
            k = offset_keys(k, follows)
        scale = shape.qk_scale**2 / shape.key_dim**0.5
        if self.pairs_heads:  # heads h and h + H/2 become one, token t of the two at places 2 t and 2 t + 1
            q, k, v = (torch.stack(t.chunk(2, 1), 3).flatten(2, 3) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=k.size(1) != q.size(1))
        y = y.transpose(1, 2).reshape(B, T, shape.n_head, -1)
        if self.exclusion is not None:  # a share of what points along the token's own value is taken away
            own = own.repeat_interleave(shape.n_head // shape.n_kv_head, dim=2)
            along = (y * own).sum(-1, keepdim=True).float() / own.float().square().sum(-1, keepdim=True).clamp(1e-12)
            y = y - (torch.tanh(self.exclusion).unsqueeze(-1) * along).to(y.dtype) * own
        if self.out_gate is not None:
            y = torch.sigmoid(self.out_gate(x[..., : shape.gate_channels])).unsqueeze(-1) * y
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """Squared ReLU, or GELU for gpt2."""

    def __init__(self, shape):
        super().__init__()
        self.is_gpt2, self.slope = shape.arch == "gpt2", 0.5 if shape.activation.startswith("leaky") else 0.0
        self.c_fc = nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=self.is_gpt2)
        self.c_proj = nn.Linear(4 * shape.n_embd, shape.n_embd, bias=self.is_gpt2)

    def forward(self, x):
        h = self.c_fc(x)
        return self.c_proj(F.gelu(h, approximate="tanh") if self.is_gpt2 else F.leaky_relu(h, self.slope).square())


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, shape, layer):
        super().__init__()
        self.norm_1, self.attn = make_norm(shape), Attention(shape, layer)
        self.norm_2, self.mlp = make_norm(shape), MLP(shape)

    def forward(self, x, values, angles, mask, cache, kept, follows):
        x = x + self.attn(self.norm_1(x), values, angles, mask, cache, kept, follows)
        return x + self.mlp(self.norm_2(x))


class NGrams(nn.Module):
    """Tables of hashed n-grams: rows that the last ids of a token's document choose together."""

    def __init__(self, shape):
        super().__init__()
        self.shape, width = shape, shape.n_embd
        if shape.ngram_into == "values":
            width = shape.n_kv_head * shape.head_dim
        self.parts, self.rows = math.gcd(len(FACTORS), width), shape.ngram_rows * shape.vocab_size
        size = self.parts * self.rows, width // self.parts
        self.tables = nn.ModuleDict({str(n): nn.Embedding(*size) for n in shape.ngrams})
        self.scalars = nn.Parameter(torch.zeros(shape.n_layer))

    def forward(self, ids, before):
        """Return the sum of the tables' rows (B, T, width) for ids (B, T); before: (B, T, 2), the ids in front of each.

        The nearest is the first; -1 stands for none.
        """
        nothing, line = self.shape.vocab_size, [ids]
        for earlier in before.unbind(-1):
            ends = (line[-1] == self.shape.ngram_bos) | (line[-1] == nothing) | (earlier < 0)
            line.append(earlier.masked_fill(ends, nothing))
        found = 0
        for n in self.shape.ngrams:
            hashes = [
                sum(x * a for x, a in zip(line[:n], row, strict=False)) % PRIME % self.rows
                for row in FACTORS[: self.parts]
            ]
            places = torch.stack([h + part * self.rows for part, h in enumerate(hashes)], -1)
            found = found + self.tables[str(n)](places).flatten(-2)
        return found


class CopyAdded(nn.Module):
    """The part that is added for the candidates of copies, by the number of their lengths."""

    def __init__(self, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(len(COPY_LENGTHS)))
        self.bias = nn.Parameter(torch.zeros(len(COPY_LENGTHS), shape.n_embd))

    def forward(self, x, embedded, numbers):
        chosen = (numbers.unsqueeze(-1) == torch.arange(1, len(COPY_LENGTHS) + 1, device=x.device)).to(x.dtype)
        return x + (chosen @ self.scale).unsqueeze(-1) * embedded + chosen @ self.bias


def copy_candidates(line, bos_id):
    """Return (B, S) what followed the longest earlier match in the document, and the number of its length, 0 = none.

    line: (B, S) ids, -1 for padding. Sequences of one length get names, equal where they and their documents are.
    """

    def named(keys):
        ordered, order = torch.sort(keys, stable=True)
        again = F.pad(ordered[1:] == ordered[:-1], (1, 0))
        found = torch.stack(((~again).cumsum(0), torch.where(again, order.roll(1), -1)))
        return torch.empty_like(found).scatter_(1, order.expand(2, -1), found).unbind(0)

    starts = (line == bos_id) | (F.pad(line[:, :-1], (1, 0), value=-1) < 0)
    names, earlier = {}, {}
    names[1], earlier[1] = named(starts.flatten().cumsum(0) * (1 << 32) + line.flatten())
    for shorter, length in pairwise(COPY_LENGTHS):
        rest = F.pad(names[length - shorter], (shorter, 0))[: line.numel()]
        names[length], earlier[length] = named(names[shorter] * (line.numel() + 1) + rest)
    at = numbers = torch.zeros_like(earlier[1])
    for number, length in enumerate(COPY_LENGTHS, 1):
        found = earlier[length] >= 0
        at, numbers = torch.where(found, earlier[length] + 1, at), torch.where(found, number, numbers)
    found = line.flatten()[at.clamp(max=line.numel() - 1)].masked_fill(numbers == 0, 0)
    return found.view_as(line), numbers.view_as(line)


class FathomForCausalLM(PreTrainedModel, GenerationMixin):
    """Language model of Fathom."""

    config_class = FathomConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.shape = shape = Shape(config.fathom["model"])
        rows, kv = shape.vocab_size, shape.n_kv_head * shape.head_dim
        blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.n_layer))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(rows, shape.n_embd), "h": blocks})
        if shape.arch == "gpt2":
            self.transformer["wpe"] = nn.Embedding(shape.seq_len, shape.n_embd)
        self.final_norm, self.lm_head = make_norm(shape), nn.Linear(shape.n_embd, rows, bias=False)
        layers = [layer for layer in range(shape.n_layer) if shape.has_values(layer)]
        self.value_embeds = nn.ModuleDict({str(layer): nn.Embedding(rows, kv) for layer in layers})
        self.ngrams = NGrams(shape) if shape.ngrams else None
        self.copies = None
        if getattr(shape, "copy_candidate", False):
            self.copies = nn.ModuleList(CopyAdded(shape) for _ in range(2))
        if shape.residual_scalars:
            self.resid_scalars = nn.Parameter(torch.ones(shape.n_layer))
            self.x0_scalars = nn.Parameter(torch.zeros(shape.n_layer))
        if shape.smear:
            self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_scalar = nn.Parameter(torch.zeros(1))
        if shape.backout:
            self.backout_scalar = nn.Parameter(torch.zeros(1))
        if shape.scalar_head:
            self.scalar_head = nn.Linear(shape.n_embd, 1, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        """Return the embedding of the tokens."""
        return self.transformer["wte"]

    def set_input_embeddings(self, value):
        """Replace the embedding of the tokens. Raises ValueError where other tables have a row per token too."""
        if (len(self.value_embeds) or self.ngrams) and value.weight.shape[0] != self.shape.vocab_size:
            raise ValueError("a model with value embeddings or tables of n-grams keeps its vocabulary")
        self.transformer["wte"] = value

    def get_output_embeddings(self):
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, value):
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Return logits (B, T, V) in fp32 for ids (B, T), of the last `logits_to_keep` positions alone if it is not 0.

        attention_mask: (B, past + T), 0 = padding. labels: (B, T), -100 = not trained, for the loss.
        """
        (B, T), shape = input_ids.shape, self.shape
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(B, past + T, device=input_ids.device)
        real = attention_mask.bool()
        if position_ids is None:
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        if past + T > shape.seq_len and int(position_ids.max()) >= shape.seq_len:
            raise ValueError(f"the context of {shape.seq_len} tokens is full")
        x = self.transformer["wte"](input_ids)
        starts = input_ids == shape.bos_id if shape.bos_id is not None and past_key_values is None else None
        follows = F.pad(real, (1, 0))[:, :-1]  # (B, S), true = a token of the same document comes before
        if starts is not None:
            follows = follows & ~starts
        angles, fed = None, None
        if shape.arch == "gpt2":
            x = x + self.transformer["wpe"](position_ids)
        else:
            x = fed = rms_norm(x)
            angles = rotary(shape, position_ids, x.dtype)
        if shape.smear:
            x = self.smeared(x, follows, past_key_values, past)
        grams, copied = None, None
        line = self.line(input_ids, real, past_key_values, past)
        if self.ngrams is not None:
            filled = F.pad(line, (2, 0), value=-1)
            before = torch.stack([filled[:, -T - 1 : -1], filled[:, -T - 2 : -2]], -1)
            grams = self.ngrams(input_ids, before).to(x.dtype)
        if self.copies is not None:
            found, numbers = (t[:, -T:] for t in copy_candidates(line, shape.copy_bos))
            copied = rms_norm(self.transformer["wte"](found)), numbers
            x = self.copies[0](x, *copied)
        kept = self.kept(fed if shape.smear else None, input_ids, x.dtype)
        x = self.run_blocks(
            x, input_ids, angles, self.masks(real, starts, T), past_key_values, kept, grams, follows, copied
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.lm_head(x[:, keep if isinstance(logits_to_keep, int) else logits_to_keep]).float()
        if shape.asymmetric_cap:
            logits = 11.5 * torch.tanh((logits + 5) / 15)
        elif shape.softcap is not None:
            logits = shape.softcap * torch.tanh(logits / shape.softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.size(-1), **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def smeared(self, x, follows, cache, past):
        """Return the embeddings (B, T, C) with some of the one before; none of padding or of another document."""
        before = torch.zeros_like(x[:, :1])
        if past:
            D = self.shape.head_dim
            values = cache.layers[0].values[:, :, -1:, D : D + self.shape.n_embd // self.shape.n_kv_head]
            before = values.transpose(1, 2).reshape(before.shape).to(x.dtype)
        before = torch.cat((before, x[:, :-1]), dim=1)
        before = before.masked_fill(~follows[:, -x.size(1) :].unsqueeze(-1), 0)
        return x + self.smear_scalar * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS])) * before

    def kept(self, fed, ids, dtype):
        """Return what layer 0 keeps behind its values, (B, T, Hkv, D'), or None: embeddings for smear, digits of ids.

        An id has three digits of 256, which every number format holds exactly; each head keeps them.
        """
        (B, T), heads = ids.shape, self.shape.n_kv_head
        parts = [] if fed is None else [fed.view(B, T, heads, -1)]
        if self.ngrams is not None or self.copies is not None:
            digits = torch.stack([ids >> 16, (ids >> 8) & 255, ids & 255], -1).to(dtype)
            parts.append(digits.unsqueeze(2).expand(B, T, heads, 3))
        return torch.cat(parts, -1) if parts else None

    def line(self, ids, real, cache, past):
        """Return the ids (B, S) of all tokens, as far as something reads them, the newest last; -1 for padding."""
        T = ids.size(1)
        line = ids.masked_fill(~real[:, -T:], -1)
        if past and (self.ngrams is not None or self.copies is not None):
            digits = cache.layers[0].values[:, 0, :, -3:].long()
            old = (digits[..., 0] << 16) + (digits[..., 1] << 8) + digits[..., 2]
            line = torch.cat((old.masked_fill(~real[:, -T - old.size(1) : -T], -1), line), dim=1)
        return line

    def masks(self, real, starts, T):
        """Return {window: (B, 1, T, S)}, true where a query sees a key; padding sees itself.

        Of layers with paired heads (B, 1, 2 T, 2 S).
        """
        keys, may = torch.arange(real.size(1), device=real.device), real.unsqueeze(1)
        back = keys[-T:].unsqueeze(1) - keys  # (T, S)
        if starts is not None:
            documents = starts.cumsum(1)
            may = may & (documents.unsqueeze(2) == documents.unsqueeze(1))
        found = {}
        for window in {self.shape.window(layer) for layer in range(self.shape.n_layer)}:
            apart, allowed, reach = back, may | (back == 0), window
            if self.shape.pairs_heads(window):
                place = torch.arange(2, device=real.device)
                apart = (2 * back[:, None, :, None] + place[:, None, None] - place).flatten(2).flatten(0, 1)
                allowed = allowed.repeat_interleave(2, 1).repeat_interleave(2, 2)
                reach = None if window is None else 2 * window
            seen = allowed & (apart >= 0)
            found[window] = (seen if reach is None else seen & (apart <= reach)).unsqueeze(1)
        return found

    def run_blocks(self, x, ids, angles, masks, cache, kept, grams, follows, copied):
        """Return the normed output (B, T, C) of the last block."""
        shape, x0 = self.shape, x
        for layer, block in enumerate(self.transformer["h"]):
            if shape.residual_scalars:
                x = self.resid_scalars[layer] * x + self.x0_scalars[layer] * x0
            if grams is not None and shape.ngram_into == "residual":
                x = x + self.ngrams.scalars[layer] * grams
            values = self.value_embeds[str(layer)](ids) if shape.has_values(layer) else None
            if values is not None and grams is not None and shape.ngram_into == "values":
                values = values + self.ngrams.scalars[layer] * grams
            x = block(x, values, angles, masks[block.attn.window], cache, kept if layer == 0 else None, follows)
            if layer == shape.n_layer // 2:
                middle = x
        if shape.backout:
            x = x - self.backout_scalar * middle
        return self.final_norm(x if copied is None else self.copies[1](x, *copied))
