"""Dropout in training passes: a share of what every attention and MLP adds to the residual stream is zeroed."""

import lightning as L
import torch

from llm.parallel import collectives


class Dropout(L.Callback):
    """Zeroes a `share` of what sub-layers add, and divides the rest by 1 - share (Srivastava et al., 2014).

    Passes without gradient, as those of evaluations, are whole. What is zeroed depends on seed, step and process alone,
    so a resumed training zeroes what it would have zeroed. torch's generator goes on behind a step where it was before.
    """

    def __init__(self, share: float, seed: int):
        self.share, self.seed = share, seed
        self.before: torch.Tensor | None = None  # state of torch's generator outside of steps

    def on_train_start(self, trainer, module) -> None:
        for block in module.net.transformer.h:
            block.dropout = self.share

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        """Begin the draws of a step."""
        place = module.global_step * collectives.world_size() + collectives.rank()
        self.before = generator(module.device).get_state()
        generator(module.device).manual_seed((self.seed * 1_000_003 + place) % 2**63)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Give torch the generator back."""
        generator(module.device).set_state(self.before)


def generator(device: torch.device) -> torch.Generator:
    """Return torch's default generator of a device."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
