"""The Transformer.

`classic` is nanochat's model of October 2025: rotary positions, QK-norm, squared-ReLU MLP, parameter-free RMSNorm
after the embedding, before each sublayer and before the head, untied embedding and head without biases, optional
grouped-query attention, logits soft-capped at 15. Weights are kept in fp32 and multiplied in `compute_dtype`. This file
knows nothing of training loops, configuration or files.
"""

from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from llm.attention import KVCache, apply_rotary, cached_attention, causal_attention, rotary_tables
from llm.eager import relu_squared
from llm.eager import rms_norm as norm
from llm.loss_head import linear_cross_entropy, softcapped
from llm.precision import Linear

VOCAB_MULTIPLE = 64  # embedding and head are padded to a multiple of this: even shards, fast kernels
ARCHS = ("classic",)


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model: everything needed to rebuild it without weights."""

    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_embd: int
    seq_len: int
    vocab_size: int  # true vocabulary; tensors are padded to `padded_vocab_size`
    arch: str = "classic"
    rope_base: float = 10_000.0
    softcap: float = 15.0

    def __post_init__(self):
        if self.arch not in ARCHS:
            raise ValueError(f"arch={self.arch}: choose one of {', '.join(ARCHS)}")
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(f"model.n_kv_head={self.n_kv_head} must divide the number of heads, {self.n_head}")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even: rotary positions turn pairs of channels")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "GPTConfig":
        """Inverse of `to_dict`; unknown keys are an error, so that a newer model is never silently misread."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown model config keys {sorted(unknown)}: written by a newer version?")
        return cls(**values)


def num_params(config: GPTConfig) -> dict[str, int]:
    """Parameter counts by kind and in total, without building the model."""
    table = config.padded_vocab_size * config.n_embd
    q_and_out = 2 * config.n_embd * config.n_head * config.head_dim
    k_and_v = 2 * config.n_embd * config.n_kv_head * config.head_dim
    mlp = 8 * config.n_embd**2
    blocks = config.n_layer * (q_and_out + k_and_v + mlp)
    return {"embedding": table, "head": table, "blocks": blocks, "total": 2 * table + blocks}


def flops_per_token(config: GPTConfig, seq_len: int | None = None) -> int:
    """Training FLOPs per token: 6 per weight that multiplies (the embedding is a lookup) plus attention at full length.

    Attention: 2 products forward, 4 backward, 2 FLOPs each, over T keys: 12 * L * H * D * T (PaLM, appendix B).
    """
    n = num_params(config)
    attention = 12 * config.n_layer * config.n_head * config.head_dim * (seq_len or config.seq_len)
    return 6 * (n["total"] - n["embedding"]) + attention


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.c_q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_proj = Linear(config.n_head * config.head_dim, config.n_embd)

    def forward(self, x, cos, sin, cache: KVCache | None, positions):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim) for proj in (self.c_q, self.c_k, self.c_v))  # (B, T, H, D)
        q, k = norm(apply_rotary(q, cos, sin)), norm(apply_rotary(k, cos, sin))
        if cache is None:
            y = causal_attention(q, k, v)
        else:
            first = cache.used == 0
            keys, values = cache.update(self.layer, k, v, positions)
            y = causal_attention(q, k, v) if first else cached_attention(q, keys, values, positions)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(relu_squared(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache, positions):
        x = x + self.attn(norm(x), cos, sin, cache, positions)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Token ids in, logits or loss out. `compute_dtype` is the dtype of all activations up to the logits."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd, _weight=self._empty_table(config)),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            }
        )
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
        cos, sin = rotary_tables(config.seq_len, config.head_dim, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @staticmethod
    def _empty_table(config: GPTConfig) -> torch.Tensor:
        return torch.empty(config.padded_vocab_size, config.n_embd)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @torch.no_grad()
    def init_weights(self, seed: int = 42) -> "GPT":
        """Fill all weights, reproducibly on any device.

        Embedding N(0, 1); block inputs N(0, s) with s = min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in); the projections
        back into the residual stream and the head start at zero, so the first loss is exactly ln(vocabulary).
        """
        generator = torch.Generator().manual_seed(seed)

        def normal_(weight: torch.Tensor, std: float) -> None:
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)

        normal_(self.transformer.wte.weight, 1.0)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                fan_out, fan_in = linear.weight.shape
                normal_(linear.weight, min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        self.lm_head.weight.zero_()
        return self

    def hidden(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Normed output of the last block, (B, T, n_embd) in the compute dtype. Does not advance the cache."""
        T = ids.size(1)
        if T > self.config.seq_len:
            raise ValueError(f"{T} tokens do not fit the model's context of {self.config.seq_len}")
        positions = None if cache is None else cache.positions(T)
        at = slice(0, T) if cache is None else positions
        cos, sin = self.cos[at].to(self.compute_dtype), self.sin[at].to(self.compute_dtype)
        x = norm(F.embedding(ids, self.transformer.wte.weight).to(self.compute_dtype))
        for block in self.transformer.h:
            x = block(x, cos, sin, cache, positions)
        return norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Soft-capped fp32 logits over the true vocabulary; the padding of the head is cut off."""
        return softcapped(self.lm_head(hidden)[..., : self.config.vocab_size], self.config.softcap)

    def forward(
        self,
        ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        reduction: str = "mean",
        token_weights: torch.Tensor | None = None,
        cache: KVCache | None = None,
        lengths: torch.Tensor | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Logits (B, T, V), or with `targets` the cross-entropy in nats.

        ids: (B, T) long. targets: (B, T) long, -1 = not trained; reduction sum | mean | none (fp32 scalar or (B, T));
        token_weights (B, T) multiply the tokens' losses.
        cache: continue every row behind its cached tokens; `lengths` (B,) true tokens per row of right-padded ids.
        last_only: logits (B, 1, V) at each row's last true token only.
        """
        hidden = self.hidden(ids, cache)
        if cache is not None:
            cache.advance(ids.size(1), lengths)
        if last_only:
            last = hidden.size(1) - 1 if lengths is None else (lengths - 1)
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last].unsqueeze(1)
        if targets is None:
            return self.logits(hidden)
        true_head = self.lm_head.weight[: self.config.vocab_size]
        return linear_cross_entropy(hidden, true_head, targets, self.config.softcap, token_weights, reduction)
