"""`arch=qwen3`: Qwen3's blocks (arXiv 2505.09388), or Llama's where `qk_norm` is off, in the network of `llm.model`.

RMSNorm with weights before each sublayer and before the head, on queries and keys before they are rotated, SwiGLU
(arXiv 2002.05202), grouped queries, rotary positions, no biases, embedding tied to the head or not.
"""

import torch
import torch.nn.functional as F
from torch import nn

from llm.model.attention import apply_rotary, causal_attention
from llm.model.cached_attention import AttentionOptions
from llm.model.config import GPTConfig
from llm.model.gpt import GPT, Attention, Block, _normal_
from llm.model.linear import Linear

TIED_STD = 0.02  # of an embedding that is the head too: with 1 the first logits would be as large as sqrt(n_embd)


class WeightedRMSNorm(nn.Module):
    """RMSNorm over the last dimension, with a weight per channel."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


class Qwen3Attention(Attention):
    """Attention whose queries and keys are normed with weights before they are rotated, or not normed at all."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__(config, layer)
        if config.qk_norm:
            self.q_norm = WeightedRMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = WeightedRMSNorm(config.head_dim, config.norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, value_embed, rotary, mask, backend, cache, positions):
        B, T, _ = x.shape
        q, k, v = self.project(x)
        q, k = apply_rotary(self.q_norm(q), *rotary), apply_rotary(self.k_norm(k), *rotary)
        if cache is None:
            y = causal_attention(q, k, v, self.scale, self.window, mask, backend)
        else:
            y = cache.attend(self.layer, q, k, v, positions, AttentionOptions(self.scale, self.window, mask, backend))
        return self.c_proj(y.reshape(B, T, -1))


class SwiGLU(nn.Module):
    """Feed-forward part: silu(gate) times a second projection, projected back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_gate = Linear(config.n_embd, config.inner)
        self.c_fc = Linear(config.n_embd, config.inner)
        self.c_proj = Linear(config.inner, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class Qwen3Block(Block):
    """One block; its forward pass is that of `Block`."""

    def __init__(self, config: GPTConfig, layer: int):
        nn.Module.__init__(self)
        self.norm_1, self.attn = WeightedRMSNorm(config.n_embd, config.norm_eps), Qwen3Attention(config, layer)
        self.norm_2, self.mlp = WeightedRMSNorm(config.n_embd, config.norm_eps), SwiGLU(config)


class Qwen3(GPT):
    """The network of `arch=qwen3`."""

    block_class = Qwen3Block
    tied_learns_as_head = True

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.final_norm = WeightedRMSNorm(config.n_embd, config.norm_eps)
        self.sin = -self.sin  # `apply_rotary` turns by minus the angle, these models by plus

    @torch.no_grad()
    def init_weights(self, seed: int = 42) -> GPT:
        """Fill all weights from `seed` as for classic; norms 1, and a tied embedding N(0, TIED_STD)."""
        super().init_weights(seed)
        for module in self.modules():
            if isinstance(module, WeightedRMSNorm):
                module.weight.fill_(1.0)
        if self.lm_head is None:
            self.transformer.wte.weight.mul_(TIED_STD / self.config.embedding_std)
        return self

    def _init_block(self, block: Block, bound: float, generator: torch.Generator) -> None:
        super()._init_block(block, bound, generator)
        _normal_(block.mlp.c_gate.weight, block.mlp.c_gate.in_features**-0.5, generator)

    def embed(self, x: torch.Tensor, cache, at, starts: torch.Tensor | None) -> torch.Tensor:
        """Return the input of the first block (B, T, n_embd): rows of the embedding as they are."""
        return x.to(self.compute_dtype)
