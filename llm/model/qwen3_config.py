"""Shape of `arch=qwen3`: blocks as those of Qwen3 (arXiv 2505.09388), or of Llama where `qk_norm` is off."""

from dataclasses import dataclass

from llm.model.config import UNSTATED, GPTConfig

# Switches of other architectures that these blocks do not have.
FOREIGN = (
    "softcap", "qk_scale", "window_pattern", "value_embeds", "residual_scalars", "smear", "backout",
    "exclusive_attention", "attention_gate", "activation", "ngrams", "asymmetric_cap",
    "key_offset", "qk_dim", "paired_heads", "copy_candidate", "loops",
)  # fmt: skip


@dataclass(frozen=True)
class Qwen3Config(GPTConfig):
    """Shape of a Qwen3 or Llama model. Raises ValueError for one that cannot be."""

    arch: str = "qwen3"
    rope_base: float = 1_000_000.0
    softcap: float | None = None
    mlp_width: int | None = None  # channels inside the MLP; None = three times the width of the model
    qk_norm: bool = True  # norms with weights on the heads of queries and keys
    norm_eps: float = 1e-6  # added to the mean square of every norm

    def __post_init__(self):
        super().__post_init__()
        foreign = [name for name in FOREIGN if getattr(self, name) != (None if name == "softcap" else UNSTATED[name])]
        if foreign:
            raise ValueError(f"{foreign[0]}={getattr(self, foreign[0])} is no part of arch=qwen3")

    @property
    def inner(self) -> int:
        """Return the channels inside the MLP."""
        return 3 * self.n_embd if self.mlp_width is None else self.mlp_width

    def further_block_params(self) -> int:
        """Return what all blocks have beside attention: three matrices in place of two, and the norms' weights."""
        mlp = 3 * self.n_embd * self.inner - 8 * self.n_embd**2  # the second term is what `num_params` has counted
        return self.n_layer * (mlp + 2 * self.n_embd + 2 * self.head_dim * self.qk_norm)

    def further_params(self) -> dict[str, int]:
        """Return the weights of the norm before the head."""
        return {"final_norm": self.n_embd}
