"""Low-rank adapters: train two thin matrices beside each large one, which stays as it is (LoRA, arXiv 2106.09685).

A matrix W (out, in) becomes W + (alpha / rank) B A, with A (rank, in) drawn at random and B (out, rank) zero, so that
training begins at the base. The base has neither gradients nor optimizer state. `Linear` and `Table` hold A and B and
multiply by them separately; `merged` adds the products to copies of the weights, for generation and for saving.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from llm.errors import UserError
from llm.model.gpt import GPT, with_weights
from llm.model.linear import LowRank

ALPHA = 32.0  # with alpha fixed, the best rate hardly depends on the rank
LEARNING_RATE = 5e-3  # of networks of some million parameters (docs/post_training.md)
# Name of a target -> what names of its modules end with; a target that ends with a dot is a list of tables.
TARGETS = {
    "attention": (".attn.c_q", ".attn.c_k", ".attn.c_v", ".attn.c_proj"),
    "mlp": (".mlp.c_gate", ".mlp.c_fc", ".mlp.c_proj"),
    "head": ("lm_head",),
    "embedding": ("transformer.wte",),
    "value_embeds": ("value_embeds.",),
}
DEFAULT_TARGETS = ("attention", "mlp")


@dataclass(frozen=True)
class LoRA:
    """Shape of an adapter, its learning rate, and its base: the SHA-256 of the weights in that model folder."""

    rank: int
    alpha: float = ALPHA
    targets: tuple[str, ...] = DEFAULT_TARGETS
    lr: float = LEARNING_RATE
    base: str | None = None

    @property
    def scale(self) -> float:
        """Return the factor alpha / rank on the product B A."""
        return self.alpha / self.rank


@dataclass(frozen=True, eq=False)
class Adapter:
    """Adapter apart from its base: its shape, and `<module>.lora_A` (rank, in), `<module>.lora_B` (out, rank)."""

    lora: LoRA
    weights: dict[str, torch.Tensor]


def targeted(net: GPT, lora: LoRA) -> Iterator[tuple[str, LowRank]]:
    """Yield the modules that an adapter changes, with their names. Raises UserError for a target without modules."""
    for target in lora.targets:
        found = [(name, module) for name, module in net.named_modules() if _belongs(name, TARGETS[target])]
        if not found:
            why = "the head is the embedding: take embedding" if target == "head" else "the architecture has none"
            raise UserError(f"model.lora.targets: {target} has no matrices in this model ({why})")
        yield from found


def _belongs(name: str, places: tuple[str, ...]) -> bool:
    return any(name.startswith(p) and name != p if p.endswith(".") else name.endswith(p) for p in places)


@torch.no_grad()
def add_adapter(net: GPT, lora: LoRA, seed: int = 0) -> GPT:
    """Freeze a network and give it an adapter; returns the network, which computes what it did before.

    A scalar head stays trained: the base has none.
    A is drawn from N(0, 1 / in) by `seed`, with equal numbers on any device; B is zero. Raises UserError for a network
    whose blocks run several times, where every turn would have a product of its own.
    """
    if net.config.loops > 1:
        raise UserError(f"model.lora.rank={lora.rank}: not made for arch.loops={net.config.loops}; set it to null")
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        p.requires_grad_(is_trained(name))
    for _, module in targeted(net, lora):
        out, width = module.weight.shape
        like = {"dtype": module.weight.dtype, "device": module.weight.device}
        drawn = torch.randn((lora.rank, width), generator=generator) / width**0.5
        module.lora_A, module.lora_B = nn.Parameter(drawn.to(**like)), nn.Parameter(torch.zeros(out, lora.rank, **like))
        module.lora_scale = lora.scale
    net.lora = lora
    return net


@torch.no_grad()
def merged(net: GPT) -> GPT:
    """Return the network, or where it has an adapter a copy of equal outputs, with the products added to the weights.

    The sums are made in fp32, the format of the weights. Other weights are shared, not copied.
    """
    if getattr(net, "lora", None) is None:
        return net
    changed = {f"{name}.weight": module.merged_weight() for name, module in targeted(net, net.lora)}
    return with_weights(net, base_weights(net) | changed)


def base_weights(net: GPT) -> dict[str, torch.Tensor]:
    """Return the weights of a network by name, without those of an adapter."""
    return {name: weight for name, weight in net.state_dict().items() if not is_adapter(name)}


def adapter_weights(net: GPT) -> dict[str, torch.Tensor]:
    """Return A and B of a network's adapter by name."""
    return {name: weight for name, weight in net.state_dict().items() if is_adapter(name)}


def is_trained(name: str) -> bool:
    """Return whether a parameter of this name is trained in a network with an adapter."""
    return is_adapter(name) or name.startswith("scalar_head.")


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter."""
    return name.endswith((".lora_A", ".lora_B"))
