"""Schemas of the groups model, arch and optim. The values of every option stand in the folders of conf/."""

from dataclasses import dataclass

from llm.config.key import CONTEXT, STEPS, VOCABULARY, key
from llm.config.registries import ARCHITECTURES, OPTIMIZERS

ACTIVATIONS = ("relu_squared", "leaky_relu_squared")
NGRAM_LENGTHS, NGRAM_PLACES = (2, 3), ("residual", "values")
PAIRINGS = ("short", "all")


@dataclass
class LoRAConfig:
    """Part `model.lora`: an adapter to be trained instead of the model that a stage starts from."""

    rank: int | None = key(
        "train low-rank adapters of this rank beside frozen weights; null = train all weights", low=1, high=4096
    )
    alpha: float | None = key("the adapters' product is multiplied by alpha / rank; null = 32", above=0, high=10**6)
    lr: float | None = key(
        "peak learning rate of adapters (AdamW), which stage.lr_frac does not change; null = 0.005", above=0, high=10**6
    )
    targets: list[str] | None = key(
        "matrices with an adapter; null = attention and mlp",
        choices=("attention", "mlp", "head", "embedding", "value_embeds"),
    )


@dataclass
class ModelConfig:
    """Config group `model`: the size of the network."""

    depth: int = key("number of Transformer layers; width and heads follow from it", low=1, high=1000, main=True)
    aspect_ratio: int = key("width = aspect_ratio x depth, rounded up to a multiple of head_dim", low=1, high=4096)
    head_dim: int = key("size of one attention head", low=2, high=1024)
    n_kv_head: int | None = key("key/value heads: null = one per query head, fewer = GQA, 1 = MQA", low=1, high=10**6)
    seq_len: int = key("context length in tokens", low=8, high=CONTEXT, main=True)
    vocab_size: int | None = key(
        "entries that the tokenizer must have; given, dry_run needs no tokenizer; null = any number",
        low=265,
        high=VOCABULARY,
    )
    lora: LoRAConfig = key("adapters of the stages that start from a trained model")


@dataclass
class ArchConfig:
    """Config group `arch`: keys of every architecture."""

    name: str = key("name of the network's architecture", choices=ARCHITECTURES, fixed=True)
    document_masks: bool = key("in a packed row a token sees no other document or conversation")


@dataclass
class ClassicArch(ArchConfig):
    """Architecture of nanochat in October 2025: RoPE, QK-norm, ReLU^2."""

    rope_base: float = key("base of the rotary embedding's wavelengths", above=0, high=1e12)
    rope_scaling: str | None = key(
        "where model.seq_len is above the parent's: yarn = stretch the long wavelengths; null = none is stretched",
        choices=("yarn",),
    )
    # e^70 times a vocabulary is finite in fp32, so the loss subtracts no maximum
    softcap: float = key("bound of the logits: softcap x tanh(logits / softcap)", above=0, high=70)


@dataclass
class ModernArch(ClassicArch):
    """Architecture of 2026: each addition to `ClassicArch` has a switch."""

    qk_scale: float = key("factor on the normed queries and on the keys", above=0, high=1000)
    window_pattern: str = key(
        "attention by layer, repeated over the depth: L = full, S = short window; the last layer is L"
    )
    window_divisor: int = key(
        "length of a short window: model.seq_len / window_divisor, rounded up to window_multiple", low=1, high=CONTEXT
    )
    window_multiple: int | None = key(
        "short windows are rounded up to a multiple of this number; null = not rounded", low=1, high=CONTEXT
    )
    value_embeds: bool = key("add gated embeddings of the tokens to the values of every other layer")
    gate_channels: int = key(
        "channels of a layer's input that set the gates of value embeddings and heads", low=1, high=10**6
    )
    gate_range: float = key("upper end of the gate of the value embeddings, which begins at 0", above=0, high=1000)
    gate_init: float = key(
        "initial weights of the value and smear gates are drawn between 0 and gate_init", low=0, high=100
    )
    residual_scalars: bool = key("before every block x <- r x + a x0, with the embedding x0 and trained r and a")
    resid_init: list[float] = key(
        "initial r of the residual scalars in the first and the last layer, linear between",
        low=-100,
        high=100,
        length=2,
    )
    x0_init: list[float] = key(
        "initial a of the residual scalars in the first and the last layer, linear between",
        low=-100,
        high=100,
        length=2,
    )
    smear: bool = key("tokens take in some of the embedding of the token before")
    backout: bool = key("subtract some of the middle block's output before the head")
    backout_init: float = key("initial backout coefficient", low=-100, high=100)
    exclusive_attention: bool = key("heads lose a trained share of what points along the token's own value")
    attention_gate: bool = key("a gate of the layer's input scales what each head returns")
    activation: str = key("activation of the MLP; leaky = slope 1/2 below 0", choices=ACTIVATIONS)
    ngrams: list[int] = key(
        "tables of hashed n-grams of ids, by length: [2] pairs, [2,3] pairs and triples; [] = none",
        low=2,
        high=3,
    )
    ngram_rows: int = key("rows of every table of arch.ngrams, as a multiple of the vocabulary", low=1, high=4096)
    ngram_into: str = key(
        "what the rows of arch.ngrams are added to: the input of every block, or the value embeddings",
        choices=NGRAM_PLACES,
    )
    asymmetric_cap: bool = key("logits are 23 sigmoid((x + 5) / 7.5) in place of softcap, less a constant")
    key_offset: bool = key("in layers without a window half of a key comes from the token before")
    qk_dim: int | None = key(
        "channels of a head's queries and keys, an even number up to model.head_dim; null = as many as of values",
        low=2,
        high=1024,
    )
    paired_heads: str | None = key(
        "a head sees the keys of a neighbour too, in layers with a short window, then half as long, or in all; null = "
        "in none",
        choices=PAIRINGS,
    )
    copy_candidate: bool = key(
        "the token behind the longest earlier match of a document's last tokens is added to the first block's input "
        "and to that of the last norm"
    )
    loops: int = key("times that the middle half of the blocks runs, always with one set of matrices", low=1, high=64)
    embedding_std: float = key("standard deviation of the initial embedding", above=0, high=100)
    head_std: float = key("standard deviation of the initial output head", low=0, high=100)
    fc_scale: float = key("factor on the initial weights of the MLP's first layer", above=0, high=1000)


@dataclass
class GPT2Arch(ArchConfig):
    """Architecture of GPT-2: learned positions, LayerNorm, GELU."""

    tied: bool = key("the output head has the weights of the embedding")


@dataclass
class Qwen3Arch(ArchConfig):
    """Architecture of Qwen3, and of Llama with qk_norm=false: RMSNorm with weights, SwiGLU, RoPE."""

    rope_base: float = key("base of the rotary embedding's wavelengths", above=0, high=1e12)
    rope_scaling: str | None = key(
        "where model.seq_len is above the parent's: yarn = stretch the long wavelengths; null = none is stretched",
        choices=("yarn",),
    )
    tied: bool = key("the output head has the weights of the embedding")
    width: int | None = key(
        "channels between the blocks; null = heads x model.head_dim, as everywhere else", low=1, high=10**6
    )
    mlp_width: int | None = key(
        "channels inside the feed-forward part; null = three times the width", low=1, high=10**6
    )
    qk_norm: bool = key("norm the heads of queries and keys with weights; false = as Llama, which does not")
    norm_eps: float = key("added to the mean square in every norm", above=0, high=1)


@dataclass
class OptimConfig:
    """Config group `optim`: keys of every optimizer."""

    name: str = key("optimizer", choices=OPTIMIZERS, fixed=True)
    weight_decay: float = key("decoupled weight decay of the block matrices", low=0, high=100)
    decay_schedule: str = key("course of the weight decay over the steps", choices=("constant", "linear", "cosine"))
    scale_lr: bool = key(
        "multiply all learning rates by sqrt(batch.tokens_per_step / 524288), but never by less than 0.71"
    )
    scale_decay: bool = key(
        "multiply weight_decay by sqrt(batch.tokens_per_step / 524288) x tokens of a d12 run / of this run"
    )


@dataclass
class AdamConfig(OptimConfig):
    """Optimizers that update some parameters by AdamW."""

    betas: list[float] = key(
        "AdamW betas of the kinds of parameters for which no other key gives betas", low=0, below=1, length=2
    )
    eps: float = key("AdamW's epsilon, against division by zero", above=0, high=1)


@dataclass
class MuonAdamWConfig(AdamConfig):
    """Muon for the matrices of the blocks, AdamW for all other parameters."""

    matrix_lr: float = key("learning rate of the block matrices (Muon)", above=0, high=10**6)
    embedding_lr: float = key("learning rate of the embedding at width 768 (AdamW)", above=0, high=10**6)
    embedding_betas: list[float] = key("AdamW betas of the embedding", low=0, below=1, length=2)
    embedding_decay: float = key("weight decay of the embedding", low=0, high=100)
    unembedding_lr: float = key("learning rate of the output head at width 768 (AdamW)", above=0, high=10**6)
    unembedding_betas: list[float] = key("AdamW betas of the output head", low=0, below=1, length=2)
    unembedding_decay: float = key("weight decay of the output head", low=0, high=100)
    value_lr: float = key("learning rate of the value embeddings at width 768 (AdamW)", above=0, high=10**6)
    value_betas: list[float] = key("AdamW betas of the value embeddings", low=0, below=1, length=2)
    value_decay: float = key("weight decay of the value embeddings", low=0, high=100)
    ngram_lr: float = key("learning rate of the tables of arch.ngrams at width 768 (AdamW)", above=0, high=10**6)
    ngram_betas: list[float] = key("AdamW betas of the tables of arch.ngrams", low=0, below=1, length=2)
    ngram_decay: float = key("weight decay of the rows of arch.ngrams that a step uses", low=0, high=100)
    copy_lr: float = key("learning rate of scales and biases of arch.copy_candidate (AdamW)", above=0, high=10**6)
    resid_lr: float = key(
        "learning rate of the residual scalars r, of biases and of norms (AdamW)", above=0, high=10**6
    )
    resid_decay: float = key("weight decay of the residual scalars r", low=0, high=100)
    x0_lr: float = key("learning rate of the x0 scalars a (AdamW)", above=0, high=10**6)
    x0_betas: list[float] = key("AdamW betas of the x0 scalars a", low=0, below=1, length=2)
    smear_lr: float = key(
        "learning rate of the parameters of smear, backout and exclusive attention (AdamW)", above=0, high=10**6
    )
    momentum: float = key("Muon's momentum after the warm-up", low=0, high=1)
    momentum_start: float = key("Muon's momentum at step 0", low=0, high=1)
    momentum_warmup: int = key(
        "steps over which Muon's momentum rises from momentum_start to momentum", low=0, high=STEPS
    )
    momentum_final: float | None = key(
        "Muon's momentum at the last step, approached while the rates fall; null = momentum", low=0, high=1
    )
    momentum_overlap: bool = key(
        "let Muon's momentum fall to momentum_final during momentum_warmup already; false = the warm-up ends first"
    )
    orthogonalizer: str = key("how Muon makes an update orthogonal", choices=("polar_express", "newton_schulz"))
    norm_margin: float | None = key(
        "an update's norm times this number divides the update before it is made orthogonal; null = 1.01 for "
        "polar_express, 1 for newton_schulz",
        low=1,
        high=10,
    )
    ns_steps: int = key("iterations of the orthogonalizer", low=1, high=100)
    row_normalize: bool = key("Muon: scale the rows of an update to one length before it is made orthogonal")
    normuon_beta2: float | None = key(
        "NorMuon: averaging factor of the rows' mean squares, by whose root rows are divided; null = off", low=0, high=1
    )
    renormalize: bool = key("Muon: give an update the norm of an exactly orthogonal matrix")
    cautious: bool = key("Muon: decay a weight only where the update shrinks it too")
    coupled_decay: bool = key(
        "Muon: multiply the weight decay of a tall matrix by sqrt(rows / columns), like the learning rate; false = "
        "not, as torch.optim.Muon"
    )
    soap_beta: float | None = key(
        "SOAP-Muon: averaging factor of the gradients' covariances, in whose eigenbasis the momentum is divided by the "
        "root mean square of gradients and then made orthogonal; null = off",
        above=0,
        below=1,
    )
    soap_every: int | None = key("SOAP-Muon: steps between turns of the eigenbases; null = 10", low=1, high=10**6)
    soap_side: int | None = key(
        "SOAP-Muon: a side of a matrix longer than this is left as it is, which saves time; null = 1024",
        low=1,
        high=2**20,
    )
    muon2_beta: float | None = key(
        "Muon^2: averaging factor of the squared gradients, by whose root the momentum is divided before it is made "
        "orthogonal; null = off",
        above=0,
        below=1,
    )
    slow_momentum: float | None = key(
        "Muon: averaging factor of a second, slower momentum that is mixed into the first; null = off", above=0, below=1
    )
    slow_share: float | None = key("Muon: share of slow_momentum in the mixture; null = 0.5", above=0, high=1)
    normuon_rows: bool = key("NorMuon: divide rows, also where a matrix has more columns")
    cautious_update: bool = key("Muon: leave out what goes up the gradient, and enlarge the rest to match")
    row_floor: float | None = key(
        "Muon: smallest length of a row's update, relative to learning rate times length of the row; null = off",
        above=0,
        high=100,
    )
    hyperball: bool = key(
        "MuonH: keep the norm of every matrix; the rate is then relative to the norm, and none decays"
    )
    per_head: bool = key("Muon: make the rows of every attention head of queries, keys and values orthogonal alone")
    dion_rank: float | None = key(
        "Dion in the place of Muon: rank of an update, as a share of the shorter side; null = off", above=0, high=1
    )


@dataclass
class AdamWConfig(AdamConfig):
    """AdamW with one learning rate for all parameters."""

    lr: float = key("learning rate of all parameters", above=0, high=10**6)
    hyperball: bool = key("AdamH: keep the norm of block matrices; the rate is then relative to the norm")
