"""Shape of the Transformer: `GPTConfig`, parameter counts and FLOPs, without building the network."""

from dataclasses import asdict, dataclass, fields

from llm.config.registries import ARCHITECTURES

WINDOW_MULTIPLE = 128  # short windows are rounded up to it: the block size of fast kernels
SMEAR_CHANNELS = 24  # of the embedding, that decide how much of the previous token a token takes in


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model: everything needed to rebuild it without weights. The defaults are those of `classic`."""

    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_embd: int
    seq_len: int
    vocab_size: int  # true vocabulary; tensors are padded to `padded_vocab_size`
    arch: str = "classic"
    rope_base: float = 10_000.0
    softcap: float | None = 15.0  # null: logits as they are
    qk_scale: float = 1.0  # factor on the normed queries and on the keys
    window_pattern: str = "L"  # one letter per layer, repeated: L = full attention, S = short window; the last is L
    window_divisor: int = 4  # a short window is seq_len / this, rounded up to a multiple of WINDOW_MULTIPLE
    value_embeds: bool = False  # a second embedding of the tokens, gated, added to the values of every other layer
    gate_channels: int = 12  # of the layer's input, that set the gate
    gate_range: float = 3.0  # the gate lies between 0 and this
    residual_scalars: bool = False  # x <- r * x + a * x0 before every block
    smear: bool = False  # tokens take in some of the token before
    backout: bool = False  # what the middle of the network has found is taken out again before the head
    tied: bool = False  # the head is the embedding
    bos_id: int | None = None  # every document begins with it, and sees no other; null = all of a row is visible
    vocab_multiple: int = 64  # embedding and head are padded to a multiple of this: even shards, fast kernels
    resid_init: tuple[float, float] = (1.0, 1.0)  # r of the first and the last layer, linear between
    x0_init: tuple[float, float] = (0.0, 0.0)  # a likewise
    backout_init: float = 0.2
    gate_init: float = 0.0  # gates ~ U(0, this)
    embedding_std: float = 1.0
    head_std: float = 0.0
    fc_scale: float = 1.0  # factor on the initial weights of the MLP's first layer

    def __post_init__(self):
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch={self.arch}: choose one of {', '.join(ARCHITECTURES)}")
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(f"model.n_kv_head={self.n_kv_head} must divide the number of heads, {self.n_head}")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even: rotary positions turn pairs of channels")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(
                f"arch.window_pattern={self.window_pattern!r}: one letter per layer, S (short window) or L (full "
                "attention), repeated over the depth, as in SSSL"
            )
        for name, channels in (("arch.gate_channels", self.gate_channels), ("arch.smear", SMEAR_CHANNELS)):
            used = self.value_embeds if name == "arch.gate_channels" else self.smear
            if used and channels > self.n_embd:
                raise ValueError(f"{name} reads {channels} channels, but the model is {self.n_embd} wide")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def window(self, layer: int) -> int | None:
        """Number of earlier positions that a layer sees beside its own; None = all. The last layer sees all."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        if letter == "L" or layer == self.n_layer - 1:
            return None
        short = -(-self.seq_len // (self.window_divisor * WINDOW_MULTIPLE)) * WINDOW_MULTIPLE
        return short if short < self.seq_len else None

    def has_value_embed(self, layer: int) -> bool:
        """Every other layer, the last one among them."""
        return self.value_embeds and (self.n_layer - 1 - layer) % 2 == 0

    def further_block_params(self) -> int:
        """Return how many parameters all blocks have beside those of the three forms; for subclasses with more."""
        return 0

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "GPTConfig":
        """Inverse of `to_dict`; unknown keys are an error, so that a newer model is never silently misread."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown model config keys {sorted(unknown)}: written by a newer version?")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def config_class(arch: str) -> type[GPTConfig]:
    """Return the class of the shape of an architecture. Raises UserError where there is no such architecture."""
    return ARCHITECTURES.get(arch, "arch.name").config_class


def num_params(config: GPTConfig) -> dict[str, int]:
    """Parameter counts by kind and in total, without building the model; kinds that the model lacks are left out."""
    c = config
    table = c.padded_vocab_size * c.n_embd
    q_and_out = 2 * c.n_embd * c.n_head * c.head_dim
    k_and_v = 2 * c.n_embd * c.n_kv_head * c.head_dim
    mlp = 8 * c.n_embd**2
    n_value = sum(c.has_value_embed(layer) for layer in range(c.n_layer))
    blocks = c.n_layer * (q_and_out + k_and_v + mlp) + n_value * c.n_kv_head * c.gate_channels
    blocks += c.further_block_params()
    counts = {"embedding": table, "head": 0 if c.tied else table, "blocks": blocks}
    if c.arch == "gpt2":  # biases of the six projections, weight and bias of the norms
        attention_biases = (c.n_head + 2 * c.n_kv_head) * c.head_dim + c.n_embd
        counts["blocks"] += c.n_layer * (attention_biases + 5 * c.n_embd + 4 * c.n_embd)
        counts |= {"positions": c.seq_len * c.n_embd, "final_norm": 2 * c.n_embd}
    if c.value_embeds:
        counts["value_embeds"] = n_value * c.padded_vocab_size * c.n_kv_head * c.head_dim
    if c.smear:
        counts["smear_gate"] = SMEAR_CHANNELS
    if scalars := 2 * c.n_layer * c.residual_scalars + c.smear + c.backout:
        counts["scalars"] = scalars
    return counts | {"total": sum(counts.values())}


def scaling_params(config: GPTConfig) -> int:
    """The parameters that scaling rules count: matrices of the blocks and of the head (Kaplan et al. 2020)."""
    return num_params(config)["blocks"] + config.padded_vocab_size * config.n_embd


def flops_per_token(config: GPTConfig, seq_len: int | None = None) -> int:
    """Training FLOPs per token: 6 per weight that multiplies (embeddings are look-ups) plus attention.

    Attention: 2 products forward, 4 backward, 2 FLOPs each, over the T keys of a full layer or the window of a short
    one: 12 * H * D * T per layer (PaLM, appendix B, which does not halve for causality).
    """
    c, length = config, seq_len or config.seq_len
    keys = sum(min(c.window(layer) or length, length) for layer in range(c.n_layer))
    return 6 * (scaling_params(c) + num_params(c).get("smear_gate", 0)) + 12 * c.n_head * c.head_dim * keys
