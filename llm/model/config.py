"""Shape of the Transformer: `GPTConfig`, its parameter counts and FLOPs. Builds no network."""

from dataclasses import asdict, dataclass, fields
from types import MappingProxyType

from llm.config.model_schema import ACTIVATIONS, NGRAM_LENGTHS, NGRAM_PLACES, PAIRINGS
from llm.config.registries import ARCHITECTURES
from llm.model.logit_bound import ASYMMETRIC, Bound

COPY_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # of what is looked for earlier in a document, see llm.model.copies
SMEAR_CHANNELS = 24  # channels of the embedding that set how much of the previous token is taken in

# What an option is where nobody states it: in a config.json that was written before the option existed, and in a shape
# built by hand. The values of the architectures stand in conf/arch/, which states every option it offers.
# These rows are frozen: changing one changes what old models compute. A new option gets a row that means "off".
UNSTATED = MappingProxyType(
    {
        "arch": "classic",
        "rope_base": 10_000.0,
        "rope_scaling": None,
        "rope_original": None,
        "softcap": 15.0,
        "qk_scale": 1.0,
        "window_pattern": "L",
        "window_divisor": 4,
        "window_multiple": 128,
        "value_embeds": False,
        "gate_channels": 12,
        "gate_range": 3.0,
        "residual_scalars": False,
        "smear": False,
        "backout": False,
        "tied": False,
        "bos_id": None,
        "vocab_multiple": 64,
        "resid_init": (1.0, 1.0),
        "x0_init": (0.0, 0.0),
        "backout_init": 0.2,
        "gate_init": 0.0,
        "embedding_std": 1.0,
        "head_std": 0.0,
        "fc_scale": 1.0,
        "scalar_head": False,
        "exclusive_attention": False,
        "attention_gate": False,
        "activation": "relu_squared",
        "ngrams": (),
        "ngram_rows": 4,
        "ngram_into": "residual",
        "ngram_bos": None,
        "asymmetric_cap": False,
        "key_offset": False,
        "qk_dim": None,
        "paired_heads": None,
        "copy_candidate": False,
        "copy_bos": None,
        "loops": 1,
    }
)


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model: everything needed to rebuild it without weights. Raises ValueError for one that cannot be."""

    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_embd: int
    seq_len: int
    vocab_size: int  # true vocabulary; tensors are padded to `padded_vocab_size`
    arch: str = UNSTATED["arch"]
    rope_base: float = UNSTATED["rope_base"]  # base of the rotary embedding's wavelengths
    rope_scaling: str | None = UNSTATED["rope_scaling"]  # yarn = the wavelengths are stretched for a longer context
    rope_original: int | None = UNSTATED["rope_original"]  # context before it was made longer; None = it never was
    softcap: float | None = UNSTATED["softcap"]  # logits are softcap x tanh(logits / softcap); None = as they are
    qk_scale: float = UNSTATED["qk_scale"]  # factor on the normed queries and on the keys
    window_pattern: str = UNSTATED["window_pattern"]  # a letter per layer, repeated: L = full, S = short; the last is L
    window_divisor: int = UNSTATED["window_divisor"]  # short: seq_len / this, rounded up to window_multiple
    window_multiple: int | None = UNSTATED["window_multiple"]  # 128 = blocks of fast kernels; None = not rounded
    value_embeds: bool = UNSTATED["value_embeds"]  # gated embeddings, added to the values of every other layer
    gate_channels: int = UNSTATED["gate_channels"]  # channels of a layer's input that set the gate of value_embeds
    gate_range: float = UNSTATED["gate_range"]  # the gate of value_embeds lies between 0 and this
    residual_scalars: bool = UNSTATED["residual_scalars"]  # x <- r * x + a * x0 before every block
    smear: bool = UNSTATED["smear"]  # tokens take in some of the embedding of the token before
    backout: bool = UNSTATED["backout"]  # subtract some of the middle block's output before the head
    tied: bool = UNSTATED["tied"]  # the head is the embedding
    bos_id: int | None = UNSTATED["bos_id"]  # a token sees its own document, from this id on; None = the whole row
    vocab_multiple: int = UNSTATED["vocab_multiple"]  # tables are padded to it: even shards, fast kernels
    resid_init: tuple[float, float] = UNSTATED["resid_init"]  # r of the first and the last layer, linear between
    x0_init: tuple[float, float] = UNSTATED["x0_init"]  # a of the first and the last layer, linear between
    backout_init: float = UNSTATED["backout_init"]  # initial backout coefficient
    gate_init: float = UNSTATED["gate_init"]  # initial gate weights are drawn from U(0, this)
    embedding_std: float = UNSTATED["embedding_std"]  # standard deviation of the initial embedding
    head_std: float = UNSTATED["head_std"]  # standard deviation of the initial head
    fc_scale: float = UNSTATED["fc_scale"]  # factor on the initial weights of the MLP's first layer
    exclusive_attention: bool = UNSTATED["exclusive_attention"]  # heads lose some of what points along the own value
    attention_gate: bool = UNSTATED["attention_gate"]  # a gate of the layer's input scales what each head returns
    activation: str = UNSTATED["activation"]  # of the MLP, for all but gpt2: one of ACTIVATIONS
    ngrams: tuple[int, ...] = UNSTATED["ngrams"]  # tables of hashed sequences of so many ids each: 2, 3
    ngram_rows: int = UNSTATED["ngram_rows"]  # rows of such a table, in vocabularies
    ngram_into: str = UNSTATED["ngram_into"]  # one of NGRAM_PLACES, to which their rows are added
    ngram_bos: int | None = UNSTATED["ngram_bos"]  # no sequence reaches back beyond this id; None = there is none
    asymmetric_cap: bool = UNSTATED["asymmetric_cap"]  # logits are bounded by ASYMMETRIC in place of softcap
    key_offset: bool = UNSTATED["key_offset"]  # keys of full layers hold half of the key of the token before
    qk_dim: int | None = UNSTATED["qk_dim"]  # channels of a head's queries and keys; None = head_dim, as its values
    paired_heads: str | None = UNSTATED["paired_heads"]  # layers whose heads see a neighbour's keys: one of PAIRINGS
    copy_candidate: bool = UNSTATED["copy_candidate"]  # what followed the longest earlier match is added, see copies
    copy_bos: int | None = UNSTATED["copy_bos"]  # no match reaches back beyond this id; None = there is none
    loops: int = UNSTATED["loops"]  # times that the middle half of the blocks runs: n_layer counts them every time
    scalar_head: bool = UNSTATED["scalar_head"]  # a second head gives one number per token: a reward, or a value

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
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"arch.activation={self.activation}: choose one of {', '.join(ACTIVATIONS)}")
        if self.qk_dim is not None and not (2 <= self.qk_dim <= self.head_dim and self.qk_dim % 2 == 0):
            raise ValueError(
                f"arch.qk_dim={self.qk_dim}: give an even number from 2 to model.head_dim={self.head_dim}, or null"
            )
        if self.key_offset and self.key_dim % 4:
            key = "model.head_dim" if self.qk_dim is None else "arch.qk_dim"
            raise ValueError(f"{key}={self.key_dim} must be divisible by 4 with arch.key_offset=true")
        self._check_pairs()
        self._check_ngrams()
        if self.loops > 1 and len(self.places) != self.n_layer:
            raise ValueError(f"n_layer={self.n_layer}: no number of blocks makes it with arch.loops={self.loops}")
        for name, channels in (("arch.gate_channels", self.gate_channels), ("arch.smear", SMEAR_CHANNELS)):
            used = self.value_embeds or self.attention_gate if name == "arch.gate_channels" else self.smear
            if used and channels > self.n_embd:
                raise ValueError(f"{name} reads {channels} channels, but the model is {self.n_embd} wide")

    def _check_pairs(self) -> None:
        if self.paired_heads is None:
            return
        if self.paired_heads not in PAIRINGS:
            raise ValueError(f"arch.paired_heads={self.paired_heads}: choose one of {', '.join(PAIRINGS)}, or null")
        if self.n_kv_head % 2:
            raise ValueError(
                f"arch.paired_heads={self.paired_heads}: {self.n_kv_head} key/value heads cannot be paired; take an "
                "even number of them, as by another model.head_dim or model.n_kv_head, or set arch.paired_heads=null"
            )
        if not any(map(self.pairs_heads, range(self.n_layer))):
            raise ValueError(
                "arch.paired_heads=short pairs heads of layers with a short window, and no layer has one: set "
                "arch.paired_heads=all, or arch.window_pattern=SSSL and a model.seq_len beyond the window"
            )

    def _check_ngrams(self) -> None:
        if any(n not in NGRAM_LENGTHS for n in self.ngrams) or len(set(self.ngrams)) < len(self.ngrams):
            raise ValueError(
                f"arch.ngrams={list(self.ngrams)}: give [2], [3] or [2,3], the ids of a sequence, or [] for none"
            )
        if self.ngram_into not in NGRAM_PLACES:
            raise ValueError(f"arch.ngram_into={self.ngram_into}: choose one of {', '.join(NGRAM_PLACES)}")
        if self.ngrams and self.ngram_into == "values" and not self.value_embeds:
            raise ValueError("arch.ngram_into=values: needs value embeddings; set arch.value_embeds=true, or residual")

    @property
    def n_blocks(self) -> int:
        """Return how many blocks have weights of their own: `n_layer`, but fewer where some run several times."""
        return depth_of(self.n_layer, self.loops)

    @property
    def places(self) -> list[int]:
        """Return the number of the block that runs at each place, in order."""
        half = self.n_blocks // 2
        start = (self.n_blocks - half) // 2
        order = list(range(self.n_blocks))
        return order[:start] + self.loops * order[start : start + half] + order[start + half :]

    @property
    def key_dim(self) -> int:
        """Return the channels of a query and of a key."""
        return self.head_dim if self.qk_dim is None else self.qk_dim

    @property
    def ngram_width(self) -> int:
        """Return the channels of what the tables of n-grams give for a token."""
        return self.n_embd if self.ngram_into == "residual" else self.n_kv_head * self.head_dim

    @property
    def ids_before(self) -> int:
        """Return how many ids in front of a token the network reads beside its keys and values: all for copies."""
        return self.seq_len - 1 if self.copy_candidate else max(self.ngrams, default=1) - 1

    @property
    def bound(self) -> float | Bound | None:
        """Return the bound of the logits, for `llm.model.cross_entropy`: `softcap`, or the asymmetric one."""
        return ASYMMETRIC if self.asymmetric_cap else self.softcap

    @property
    def rope_factor(self) -> float:
        """Return by how much the longest wavelengths are stretched: 1 where rope_scaling is off."""
        return self.seq_len / self.rope_original if self.rope_scaling and self.rope_original else 1.0

    @property
    def padded_vocab_size(self) -> int:
        """Return the rows of embedding and head: `vocab_size` rounded up to `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def window(self, layer: int) -> int | None:
        """Return how many earlier positions a layer sees beside its own; None = all, as the last layer does.

        With paired heads a short window is half as long: each head sees the keys of two.
        """
        letter = self.window_pattern[layer % len(self.window_pattern)]
        if letter == "L" or layer == self.n_layer - 1:
            return None
        multiple = self.window_multiple
        if multiple is None:
            short = max(1, self.seq_len // self.window_divisor)
        else:
            short = -(-self.seq_len // (self.window_divisor * multiple)) * multiple
        if short >= self.seq_len:
            return None
        return max(1, short // 2) if self.paired_heads else short

    def pairs_heads(self, layer: int) -> bool:
        """Return whether a layer's heads are paired: in all layers, or in those with a window."""
        return self.paired_heads == "all" or self.paired_heads == "short" and self.window(layer) is not None

    def has_value_embed(self, layer: int) -> bool:
        """Return whether a layer adds value embeddings: every other layer does, the last one among them."""
        return self.value_embeds and (self.n_layer - 1 - layer) % 2 == 0

    def offsets_keys(self, layer: int) -> bool:
        """Return whether a layer's keys are offset: with key_offset those of layers without a window are."""
        return self.key_offset and self.window(layer) is None

    def further_block_params(self) -> int:
        """Return how many parameters all blocks have beside those of the three forms; for subclasses with more."""
        return 0

    def further_params(self) -> dict[str, int]:
        """Return parameters outside of the blocks by kind, beside those of the three forms; for subclasses."""
        return {}

    def to_dict(self) -> dict:
        """Return all options by name, for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "GPTConfig":
        """Read what `to_dict` returned, in this or an older version: options it lacks are those of UNSTATED.

        Raises ValueError for an unknown option: a newer model is never silently misread.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown model config keys {sorted(unknown)}: written by a newer version?")
        stated = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**(UNSTATED | stated))


def depth_of(n_layer: int, loops: int) -> int:
    """Return how many blocks make `n_layer` places where half of them run `loops` times."""
    return next(n for n in range(n_layer + 1) if n + (loops - 1) * (n // 2) >= n_layer)


def config_class(arch: str) -> type[GPTConfig]:
    """Return the class of the shape of an architecture. Raises UserError where there is no such architecture."""
    return ARCHITECTURES.get(arch, "arch.name").config_class


def block_matrices(c: GPTConfig) -> int:
    """Count the parameters in the matrices of a block of the three forms."""
    return c.n_embd * (c.n_head + c.n_kv_head) * (c.key_dim + c.head_dim) + 8 * c.n_embd**2


def num_params(config: GPTConfig) -> dict[str, int]:
    """Count the parameters by kind and in total, without building the model. Kinds that it lacks are left out."""
    c = config
    table = c.padded_vocab_size * c.n_embd
    n_value = sum(c.has_value_embed(layer) for layer in range(c.n_layer))
    blocks = c.n_blocks * block_matrices(c) + n_value * c.n_kv_head * c.gate_channels
    blocks += c.n_layer * c.n_head * c.gate_channels * c.attention_gate + c.further_block_params()
    counts = {"embedding": table, "head": 0 if c.tied else table, "blocks": blocks}
    if c.arch == "gpt2":  # biases of the six projections, weight and bias of the norms
        attention_biases = (c.n_head + c.n_kv_head) * c.key_dim + c.n_kv_head * c.head_dim + c.n_embd
        counts["blocks"] += c.n_layer * (attention_biases + 5 * c.n_embd + 4 * c.n_embd)
        counts |= {"positions": c.seq_len * c.n_embd, "final_norm": 2 * c.n_embd}
    counts |= c.further_params()
    if c.value_embeds:
        counts["value_embeds"] = n_value * c.padded_vocab_size * c.n_kv_head * c.head_dim
    if c.ngrams:
        counts["ngrams"] = len(c.ngrams) * c.ngram_rows * c.vocab_size * c.ngram_width
    if c.copy_candidate:
        counts["copies"] = 2 * len(COPY_LENGTHS) * (1 + c.n_embd)
    if c.smear:
        counts["smear_gate"] = SMEAR_CHANNELS
    exclusions = c.n_layer * c.n_head * c.exclusive_attention
    ngram_scalars = c.n_layer * bool(c.ngrams)
    if scalars := 2 * c.n_layer * c.residual_scalars + c.smear + c.backout + exclusions + ngram_scalars:
        counts["scalars"] = scalars
    if c.scalar_head:
        counts["scalar_head"] = c.n_embd
    return counts | {"total": sum(counts.values())}


def scaling_params(config: GPTConfig) -> int:
    """Count the parameters of scaling rules: matrices of the blocks and of the head (Kaplan et al. 2020)."""
    return num_params(config)["blocks"] + config.padded_vocab_size * config.n_embd


def flops_per_token(config: GPTConfig, seq_len: int | None = None) -> int:
    """Return the training FLOPs per token: 6 per weight that multiplies (embeddings are look-ups) plus attention.

    Attention: 2 products forward, 4 backward, 2 FLOPs each, over the T keys of a full layer or the window of a short
    one, twice as many where heads are paired: 12 * H * D * T per layer (PaLM, appendix B, which does not halve for
    causality). Half of them are of queries with keys, whose D is `key_dim`.
    """
    c, length = config, seq_len or config.seq_len
    keys = sum(min(c.window(layer) or length, length) * (1 + c.pairs_heads(layer)) for layer in range(c.n_layer))
    again = (c.n_layer - c.n_blocks) * block_matrices(c)  # matrices that multiply once more
    multiplied = scaling_params(c) + again + num_params(c).get("smear_gate", 0)
    return 6 * multiplied + 6 * c.n_head * (c.key_dim + c.head_dim) * keys
