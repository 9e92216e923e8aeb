"""Noise on the embeddings of training steps: `stage.neftune_alpha` (NEFTune, arXiv 2310.05914)."""

import lightning as L
import torch

from llm.parallel import collectives


class EmbeddingNoise(L.Callback):
    """Adds uniform noise between -alpha / sqrt(T C) and its negative to the embeddings (B, T, C) of training passes.

    Evaluations, which compute no gradients, get none. The noise depends on seed, step and process alone, so a resumed
    training sees the noise that it would have seen.
    """

    def __init__(self, alpha: float, seed: int):
        self.alpha, self.seed = alpha, seed
        self.generator: torch.Generator | None = None

    def on_train_start(self, trainer, module) -> None:
        self.generator = torch.Generator(module.device)
        module.net.transformer.wte.register_forward_hook(self.add_noise)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        """Begin the noise of a step."""
        place = module.global_step * collectives.world_size() + collectives.rank()
        self.generator.manual_seed((self.seed * 1_000_003 + place) % 2**63)

    def add_noise(self, table, inputs, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of the embedding table (B, T, C) with noise, or as they are where no gradient is computed."""
        if not torch.is_grad_enabled():
            return rows
        bound = self.alpha / (rows.size(-2) * rows.size(-1)) ** 0.5
        noise = torch.rand(rows.shape, generator=self.generator, device=rows.device, dtype=rows.dtype)
        return rows + (2 * noise - 1) * bound
