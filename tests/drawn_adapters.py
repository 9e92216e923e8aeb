"""Adapters of random numbers, and networks that hold them merged, for tests of several adapters beside one base."""

import torch

from llm.model.gpt import GPT, with_weights
from llm.model.lora import Adapter, LoRA, targeted


def targets_of(net: GPT) -> tuple[str, ...]:
    """All targets that a network has."""
    head = () if net.lm_head is None else ("head",)
    return ("attention", "mlp", *head, "embedding", *(("value_embeds",) if net.value_embeds else ()))


def drawn_adapter(net: GPT, rank: int, seed: int, targets: tuple[str, ...] | None = None, size: float = 0.1) -> Adapter:
    """An adapter whose every matrix has an effect; size: spread of the numbers of B."""
    lora, g, weights = LoRA(rank, 8.0, targets or targets_of(net)), torch.Generator().manual_seed(seed), {}
    for name, module in targeted(net, lora):
        out, width = module.weight.shape
        weights[f"{name}.lora_A"] = torch.randn(rank, width, generator=g) / width**0.5
        weights[f"{name}.lora_B"] = torch.randn(out, rank, generator=g) * size
    return Adapter(lora, weights)


def merged_with(net: GPT, adapter: Adapter | None) -> GPT:
    """A network with the adapter's products added to copies of the weights; without an adapter the network itself."""
    if adapter is None:
        return net
    weights = dict(net.state_dict())
    for name, _ in targeted(net, adapter.lora):
        a, b = (adapter.weights[f"{name}.lora_{part}"] for part in "AB")
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + adapter.lora.scale * b @ a
    return with_weights(net, weights)
