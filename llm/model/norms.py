"""The norms of a network, each of which its blocks make by `make_norm`."""

import torch.nn.functional as F
from torch import nn

from llm.model.config import GPTConfig
from llm.model.fused_ops import rms_norm


class LayerNorm(nn.LayerNorm):
    """LayerNorm with its weights cast to the dtype of the input."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    """RMSNorm without weights."""

    def forward(self, x):
        return rms_norm(x)


def make_norm(config: GPTConfig) -> nn.Module:
    """Return the norm of an architecture: LayerNorm for gpt2, RMSNorm for all others."""
    return LayerNorm(config.n_embd) if config.arch == "gpt2" else RMSNorm()
