"""Schemas of the groups model, arch and optim. The values of every option stand in the folders of conf/."""

from dataclasses import dataclass

from llm.config.key import key
from llm.config.registries import ARCHITECTURES, OPTIMIZERS


@dataclass
class ModelConfig:
    depth: int = key("number of Transformer layers; sets width and heads", low=1, main=True)
    aspect_ratio: int = key("width = aspect_ratio x depth, rounded up to a multiple of head_dim", low=1)
    head_dim: int = key("size of one attention head", low=2)
    n_kv_head: int | None = key("key/value heads: null = one per query head, fewer = GQA, 1 = MQA", low=1)
    seq_len: int = key("context length in tokens", low=8, main=True)
    vocab_size: int | None = key("what the tokenizer must have; lets dry_run do without one; null = anything", low=265)


@dataclass
class ArchConfig:
    name: str = key("set of block features", choices=ARCHITECTURES, fixed=True)
    document_masks: bool = key("tokens see their own document or conversation only, not the others of a packed row")


@dataclass
class ClassicArch(ArchConfig):
    rope_base: float = key("base of the rotary embedding's wavelengths", above=0)
    softcap: float = key("logits are softcap x tanh(logits / softcap)", above=0)


@dataclass
class ModernArch(ClassicArch):
    qk_scale: float = key("factor on the normed queries and on the keys", above=0)
    window_pattern: str = key("a letter per layer, repeated: L = full attention, S = short window; the last layer is L")
    window_divisor: int = key("a short window is seq_len / this, rounded up to a multiple of 128", low=1)
    value_embeds: bool = key("add gated embeddings of the tokens to the values of every other layer")
    gate_channels: int = key("channels of the layer's input that set those gates", low=1)
    gate_range: float = key("the gates lie between 0 and this", above=0)
    gate_init: float = key("their initial weights, and those of the smear gate, are drawn from U(0, this)", low=0)
    residual_scalars: bool = key("x <- r x + a x0 before every block, with trained r and a")
    resid_init: list[float] = key("r of the first and the last layer, linear between")
    x0_init: list[float] = key("a of the first and the last layer, linear between")
    smear: bool = key("tokens take in some of the embedding of the token before")
    backout: bool = key("subtract some of the middle block's output before the head")
    backout_init: float = key("how much of it at the start")
    embedding_std: float = key("standard deviation of the initial embedding", above=0)
    head_std: float = key("standard deviation of the initial head", low=0)
    fc_scale: float = key("factor on the initial weights of the MLP's first layer", above=0)


@dataclass
class GPT2Arch(ArchConfig):
    tied: bool = key("the head is the embedding")


@dataclass
class OptimConfig:
    name: str = key("optimizer", choices=OPTIMIZERS, fixed=True)
    betas: list[float] = key("AdamW's two averaging factors, where a kind of parameters has none of its own")
    eps: float = key("AdamW's term against division by zero", above=0)
    weight_decay: float = key("decoupled weight decay of the block matrices", low=0)
    decay_schedule: str = key("weight decay over the steps", choices=("constant", "linear", "cosine"))
    scale_lr: bool = key(
        "multiply all rates by sqrt(batch.tokens_per_step / 524288), and by 0.71 for steps below 262144"
    )
    scale_decay: bool = key(
        "multiply weight_decay by sqrt(batch.tokens_per_step / 524288) x (a d12 run's tokens) / (this one's)"
    )


@dataclass
class MuonAdamWConfig(OptimConfig):
    matrix_lr: float = key("learning rate of the block matrices (Muon)", above=0)
    embedding_lr: float = key("learning rate of the embedding at width 768 (AdamW)", above=0)
    embedding_betas: list[float] = key("its averaging factors")
    embedding_decay: float = key("its weight decay", low=0)
    unembedding_lr: float = key("learning rate of the output head at width 768 (AdamW)", above=0)
    unembedding_betas: list[float] = key("its averaging factors")
    unembedding_decay: float = key("its weight decay", low=0)
    value_lr: float = key("learning rate of the value embeddings at width 768 (AdamW)", above=0)
    value_betas: list[float] = key("their averaging factors")
    value_decay: float = key("their weight decay", low=0)
    resid_lr: float = key("learning rate of the residual scalars, and of biases and norms (AdamW)", above=0)
    resid_decay: float = key("weight decay of the residual scalars", low=0)
    x0_lr: float = key("learning rate of the x0 scalars (AdamW)", above=0)
    x0_betas: list[float] = key("their averaging factors")
    smear_lr: float = key("learning rate of smear and backout (AdamW)", above=0)
    momentum: float = key("Muon's momentum after its warm-up", low=0, high=1)
    momentum_start: float = key("Muon's momentum at step 0", low=0, high=1)
    momentum_warmup: int = key("steps over which the momentum rises", low=0)
    momentum_final: float | None = key(
        "momentum at the end, approached while the rate falls; null = no fall", low=0, high=1
    )
    orthogonalizer: str = key("how the update is made orthogonal", choices=("polar_express", "newton_schulz"))
    ns_steps: int = key("its iterations", low=1)
    row_normalize: bool = key("scale the rows of the momentum to one length first")
    normuon_beta2: float | None = key(
        "divide rows by their running root mean square (NorMuon); null = no", low=0, high=1
    )
    renormalize: bool = key("give the update the norm of an exactly orthogonal matrix")
    cautious: bool = key("decay a weight only where the update shrinks it too")


@dataclass
class AdamWConfig(OptimConfig):
    lr: float = key("learning rate of all parameters", above=0)
