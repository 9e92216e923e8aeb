"""Typed schemas of the configuration: the keys that exist, their types, and one line of help for each.

The values live in `conf/`; a field without a default here must be set there. Hydra merges every YAML file into these
dataclasses, so an unknown key or a value of the wrong type fails while the configuration is composed. What types
cannot say (allowed words, ranges) is in the field metadata and checked by `check_values`.

Nothing heavy is imported here: `train.py --help` and the check of the command line load this file.
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import lru_cache
from typing import Any

from llm.config.registries import ARCHITECTURES, OPTIMIZERS, TASK_TYPES, TEXT_SOURCES
from llm.errors import UserError
from llm.utils.registry import Registry

ATTENTION = ("auto", "cpu", "flash3", "flex", "sdpa")
STAGES = ("tokenizer", "pretrain", "midtrain", "sft", "grpo")
DOWNLOAD = "download"  # an option of the group `stage` that fetches data and belongs to no run


def key(
    text: str, *, choices: Collection[str] | Registry = (), low: float | None = None, high: float | None = None, **more
) -> Any:
    """A field that YAML must set: `text` is its line in `--help`, the rest are the bounds that `check_values` tests.

    In `more`: `above` = exclusive lower bound; `main` = listed in the short `--help`; `nonempty` = not an empty text;
    `fixed` = set by choosing the group's option, not by hand; `raw` = text taken from the command line as it is;
    `option_name` = the name of the chosen option is all that counts; `no_group` = a value, though `conf/` has a group
    of this name for another entry point.
    """
    return field(metadata={"help": text, "choices": choices, "low": low, "high": high, **more})


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
class BatchConfig:
    tokens_per_step: int | None = key(
        "tokens of one optimizer step, over all ranks and micro-batches; null = by llm/scaling/rules.py",
        low=1,
        main=True,
    )
    micro_batch_size: Any = key("rows of one micro-batch on one device; auto = as many as fit", main=True)


@dataclass
class PrecisionConfig:
    compute: str = key(
        "arithmetic of the network: auto = bf16 where the hardware has it",
        choices=("auto", "fp32", "bf16", "fp16"),
        main=True,
    )
    fp8: bool = key("the blocks' matrix products in 8 bits, on Hopper GPUs and newer; elsewhere a message and bf16")


@dataclass
class EstimateConfig:
    gpu: str = key("GPU whose memory, time and cost dry_run estimates")
    devices: int = key("how many of them", low=1)
    mfu: float = key("share of their bf16 peak that training reaches", above=0, high=1)


@dataclass
class WatchConfig:
    bad_loss: str = key("what a loss that is not finite or jumps means", choices=("stop", "roll_back"))
    loss_jump: float = key("nats above the median of the last 50 steps from which a step's loss is bad", above=0)
    rollbacks: int = key("how often a stage may go back to its last checkpoint and leave out data", low=0)
    data_seconds: float = key("seconds without training data after which a stage gives up", above=0)
    every: int = key("steps between comparisons of the processes: same weights, similar speed", low=1)
    slow: float = key("report a process that takes so many times the median for its part of a step", above=1)


@dataclass
class PathsConfig:
    runs: str = key("folder of all runs; each stage is <runs>/<run>/<stage>", main=True)
    data: str = key("folder of what is fetched from the hub, shared by all runs", main=True)


@dataclass
class TrainerConfig:
    accelerator: str = key("where to compute", choices=("auto", "cpu", "gpu"))
    devices: Any = key("number of devices of a node, or auto; torchrun and srun decide by themselves", main=True)
    num_nodes: int = key("machines, each with the same command and its NODE_RANK, MASTER_ADDR, MASTER_PORT set", low=1)
    activation_checkpointing: bool = key("compute blocks again in the backward pass: less memory, a third more time")


@dataclass
class StrategyConfig:
    name: str = key(
        "auto picks by the number of devices", choices=("auto", "single", "muon", "ddp", "fsdp"), fixed=True
    )


@dataclass
class OptimConfig:
    name: str = key("optimizer", choices=OPTIMIZERS, fixed=True)
    weight_decay: float = key("decoupled weight decay of the block matrices", low=0)
    decay_schedule: str = key("weight decay over the steps", choices=("constant", "linear", "cosine"))
    scale_lr: bool = key(
        "multiply all rates by sqrt(batch.tokens_per_step / 524288), and by 0.71 for steps below 262144"
    )
    scale_decay: bool = key(
        "multiply weight_decay by sqrt(batch.tokens_per_step / 524288) x (a d12 run's tokens) / (this one's)"
    )


@dataclass
class AdamConfig(OptimConfig):
    """Optimizers that update some parameters by AdamW."""

    betas: list[float] = key("AdamW's two averaging factors, where a kind of parameters has none of its own")
    eps: float = key("AdamW's term against division by zero", above=0)


@dataclass
class MuonAdamWConfig(AdamConfig):
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
class AdamWConfig(AdamConfig):
    lr: float = key("learning rate of all parameters", above=0)


@dataclass
class StageConfig:
    name: str = key("phase", choices=(*STAGES, DOWNLOAD), fixed=True)


@dataclass
class TokenizerStage(StageConfig):
    vocab_size: int = key("entries of the vocabulary, the nine special tokens included", low=265)
    pretrained: str | None = key("instead of training: a tiktoken encoding (r50k_base, cl100k_base) or tokenizer.json")
    digits: int = key("digits of a number that may become one token", low=1, high=3)
    marks: bool = key("combining marks belong to words, as Hindi, Thai or Arabic need")
    pattern: str | None = key("regular expression that cuts text into pieces; null = ours, by digits and marks")
    max_chars: int = key("characters of text to train on, at most", low=1)
    doc_cap: int = key("characters taken of one document, at most", low=1)
    compare: list[str] = key("others to compare with: tiktoken names such as gpt2, tokenizer folders or files")


@dataclass
class ModelStage(StageConfig):
    lr_frac: float = key("learning rates of this stage as a fraction of optim's", above=0)
    warmup_steps: int = key("steps in which the learning rate rises from 0, at most a quarter of all", low=0)
    warmdown_ratio: float = key("share of the steps, at the end, in which it falls", low=0, high=1)
    final_lr_frac: float = key("learning rate of the last step as a fraction of the peak", low=0, high=1)
    eval_every: int = key("steps between evaluations on held-out data, also after the last step; 0 = never", low=0)
    sample_every: int = key("steps between printed samples, also after the last step; 0 = never", low=0)


@dataclass
class PretrainStage(ModelStage):
    eval_tokens: int = key("tokens of one evaluation (bits per byte)", low=1)
    tokens_per_param: float = key(
        "horizon: training tokens per parameter (max_steps and target_flops come first)", above=0
    )
    count_params: str = key(
        "parameters that count: all, or the matrices of blocks and head", choices=("all", "matrices")
    )
    target_flops: float | None = key("horizon: training FLOPs; null = by ratio", above=0)
    buffer: int = key("documents that best-fit packing chooses from", low=1)
    core_every: int = key("steps between CORE evaluations, also after the last step; 0 = never", low=0)
    core_max_per_task: int | None = key("examples of one task in such an evaluation; null = all", low=1)
    core_bundle: str | None = key("folder or zip of a CORE evaluation bundle; null = no CORE evaluations")


@dataclass
class AssistantStage(ModelStage):
    """Stages whose model answers: their answers can be judged."""

    chat_every: int = key("steps between chat task evaluations, also after the last step; 0 = never", low=0)
    chat_max_per_task: int | None = key("items of one task in such an evaluation; null = all", low=1)
    chat_tasks: list[str] | None = key("tasks of such an evaluation; null = data.eval")


@dataclass
class ChatStage(AssistantStage):
    eval_tokens: int = key("tokens of one evaluation (bits per byte)", low=1)
    epochs: float = key("horizon: passes over the mixture (max_steps comes first)", above=0)
    train_on: str = key("tokens with a loss", choices=("all", "assistant"))


@dataclass
class GRPOStage(AssistantStage):
    task: str | None = key("task to be rewarded for; null = data.rl")
    reward: str | None = key("function that rewards an answer, package.module.function; null = as the task scores it")
    prompts_per_step: int = key("questions of one step", low=1)
    samples_per_prompt: int = key("answers drawn per question; the group of the advantage", low=2)
    max_new_tokens: int = key("length limit of an answer", low=1)
    temperature: float = key("sampling temperature of the answers", above=0)
    top_k: int = key("sample among the k most likely tokens; 0 = all", low=0)
    epochs: float = key("horizon: passes over the task (max_steps comes first)", above=0)
    rehearsal: int = key("conversations of data.mixture.sft trained on beside the answers, per step; 0 = none", low=0)
    rehearsal_weight: float = key("weight of their mean loss per token", above=0)
    eval_examples: int = key("held-out questions of a pass@k evaluation", low=1)
    eval_samples: int = key("answers per question of that evaluation: the largest k of pass@k", low=1)


@dataclass
class TaskSpec:
    """One task of `data.tasks`. Without defaults only `type` and `source` must be given."""

    type: str = key("kind of task, or package.module.Class of your own (docs/extend.md)", choices=TASK_TYPES)
    source: str = key(
        "embedded = generated, template = identity of your own model, local = files, hub = data set on the hub",
        choices=("embedded", "template", "local", "hub"),
    )
    train: Any = field(
        default=None, metadata={"help": "training rows: file, pattern, https:// address or list of them; hub: split"}
    )
    test: Any = field(default=None, metadata={"help": "held-out rows, likewise; hub: such as test or train[-500:]"})
    repo: str | None = field(default=None, metadata={"help": "hub: data set, <owner>/<name>"})
    subset: str | None = field(default=None, metadata={"help": "hub: its configuration, where it has several"})
    revision: str | None = field(default=None, metadata={"help": "hub: its branch, tag or commit; null = main"})
    shuffle_seed: int | None = field(
        default=None, metadata={"help": "hub: seed of the order of the rows; null = as published", "low": 0}
    )
    size: int | None = field(
        default=None, metadata={"help": "training items to generate (embedded, template, spelling)", "low": 0}
    )
    test_size: int | None = field(default=None, metadata={"help": "held-out items to generate", "low": 0})
    limit: int | None = field(default=None, metadata={"help": "use only the first items of a split", "low": 1})
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "arguments of this kind of task"})


@dataclass
class MixtureConfig:
    midtrain: dict[str, float] = key("task: repeats (a fraction below 1 = its first part, 0 = leave out)")
    sft: dict[str, float] = key("task: repeats")
    midtrain_val: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "task: repeats of its held-out rows, to validate on; empty = all of the tasks trained on"},
    )
    sft_val: dict[str, float] = field(default_factory=dict, metadata={"help": "the same for sft"})


@dataclass
class SourceSpec:
    """One source of `data.sources`: files of this machine (path) or of the hub (repo)."""

    weight: float = field(default=1.0, metadata={"help": "share of the characters, relative to the others", "low": 0})
    path: str | None = field(default=None, metadata={"help": "as data.path"})
    repo: str | None = field(default=None, metadata={"help": "as data.repo"})
    revision: str | None = field(default=None, metadata={"help": "as data.revision"})
    files: str | None = field(default=None, metadata={"help": "as data.files"})
    shards: int | None = field(default=None, metadata={"help": "as data.shards", "low": 1})
    column: str = field(default="text", metadata={"help": "as data.column"})
    val_size: int | None = field(default=None, metadata={"help": "as data.val_size", "low": 1})
    streaming: bool = field(default=False, metadata={"help": "as data.streaming"})


@dataclass
class DataConfig:
    name: str = key("where text comes from", choices=TEXT_SOURCES, fixed=True)
    path: str | None = key("folder, file or pattern of text: parquet, jsonl or txt (data=local)", main=True)
    repo: str | None = key("data set on the Hugging Face hub, <owner>/<name>: parquet, jsonl or txt shards", main=True)
    revision: str | None = key("its branch, tag or commit; null = main")
    files: str | None = key("pattern of its shards, such as 'data/train-*.parquet'; null = all")
    shards: int | None = key("train on its first so many shards; null = all but the last", low=1, main=True)
    workers: int = key("files fetched from the hub at the same time", low=1)
    streaming: bool = key("read the shards over the network while training and store nothing (data=hub)")
    sources: Any = key("sources by name: {books: {path: ..., weight: 2}, web: {repo: ...}} (data=mixture)")
    column: str = key("column or field that holds the text")
    packing: str = key(
        "pretrain: rows of whole documents, crops kept | of whole documents, crops dropped | one flat stream",
        choices=("best_fit", "crop", "stream"),
    )
    token_cache: Any = key("pretrain: keep the tokens of text files in this folder; true = <paths.runs>/token_cache")
    tasks_path: str = key("folder that the task files of data=local lie in", main=True)
    seed: int = key("seed of the generator (data=embedded)", low=0)
    size: int | None = key("documents to generate for training (data=embedded)", low=1)
    val_size: int | None = key("documents for validation: generated, or the last ones of the last file", low=1)
    tasks: dict[str, TaskSpec] = key("all tasks by name")
    mixture: MixtureConfig = key("conversations that midtrain and sft train on")
    rl: str | None = key("task that grpo trains on")
    eval: list[str] = key("tasks of chat evaluations")


@dataclass
class TrainConfig:
    """Everything that `train.py` reads: `conf/train.yaml` and its groups."""

    stage: StageConfig = key("phase of training")
    model: ModelConfig = key("size of the network")
    arch: ArchConfig = key("features of its blocks")
    optim: OptimConfig = key("optimizer")
    data: DataConfig = key("text and tasks")
    batch: BatchConfig = key("size of a step; follows the stage")
    precision: PrecisionConfig = key("number formats")
    compile: Any = key("torch.compile for training steps: auto = where it pays, true, false", main=True)
    attention: str = key("attention kernel of training steps: auto = the fastest that runs here", choices=ATTENTION)
    trainer: TrainerConfig = key("devices")
    strategy: StrategyConfig = key("how devices work together")
    callbacks: dict[str, Any] = key("what happens beside the training steps")
    watch: WatchConfig = key("what is wrong with a training, and what happens then")
    logger: dict[str, Any] = key("where metrics go beside metrics.csv")
    estimate: EstimateConfig = key("what dry_run tells about a GPU")
    paths: PathsConfig = key("folders")
    plugins: list[str] = key("modules of your own that are imported first (docs/extend.md)")
    run: str | None = key("name of the chain of stages; null = d<depth>", main=True, nonempty=True)
    init_from: str | None = key("start from this run/stage or model folder; null = the stage before", main=True)
    max_steps: int | None = key("optimizer steps; null = the stage's own horizon", low=1, main=True)
    save_every: int = key("steps between checkpoints; the last step is always saved", low=1, main=True)
    save_minutes: float | None = key("save also when the last checkpoint is so many minutes old", above=0)
    save_async: bool = key("write checkpoints beside the training; needs host memory for a copy of the state")
    keep_last: int = key("checkpoints that are kept; an older one is used where the newest is damaged", low=1)
    log_every: int = key("steps between rows of metrics.csv", low=1, main=True)
    resume: bool = key("continue an unfinished stage from its last checkpoint", main=True)
    overwrite: bool = key("delete what the stage wrote before and start again", main=True)
    dry_run: bool = key("print the resolved config and the derived numbers, then stop", main=True)
    seed: int = key("seed of initial weights, data order and sampling", low=0, main=True)


@dataclass
class EvalConfig:
    bpb: bool = key("measure bits per byte on the validation text (eval=[bpb])")
    chat: bool = key("measure the accuracy of data.eval's tasks (eval=[chat])")
    samples: bool = key("print continuations and answers (eval=[samples])")
    core: bool = key("measure the CORE metric with eval.bundle (eval=[core])")
    lm_eval: bool = key("measure eval.tasks by lm-eval, the field's harness (eval=lm_eval)")
    tokens: int = key("validation tokens for bits per byte", low=1)
    max_per_task: int | None = key("items of one task; null = all", low=1, main=True)
    seq_len: int | None = key("model=hf: tokens of context to use; null = the model's own, at most 2048", low=8)
    max_new_tokens: int = key("length limit of a generated answer", low=1)
    num_samples: int = key("answers per item of generative tasks: 1 = a greedy one, more = drawn, for pass@k", low=1)
    ks: list[int] | None = key("which pass@k; null = 1 and num_samples")
    temperature: float = key("sampling temperature of drawn answers", above=0)
    bundle: str | None = key("folder or zip of a CORE evaluation bundle", main=True)
    core_tasks: list[str] | None = key("tasks of the bundle to measure; null = all, whose mean is CORE")
    tasks: list[str] | None = key("eval=lm_eval: its tasks, groups or tags, as in [arc_easy,hellaswag]", main=True)
    num_fewshot: int | None = key("eval=lm_eval: solved examples in a prompt; null = as each task says", low=0)
    include_path: str | None = key("eval=lm_eval: folder of task files (YAML) of your own")
    chat_template: bool = key("eval=lm_eval: prompts in the model's chat format")
    batch_size: int = key("sequences evaluated together", low=1)
    judges: dict[str, Any] = key("judges of your own by name, each with its _target_ (docs/extend.md)")


@dataclass
class EvaluateConfig:
    """Everything that `evaluate.py` reads."""

    stage: Any = key("stage to evaluate; null = the best finished one", option_name=True)
    eval: EvalConfig = key("what to measure")
    data: DataConfig | None = key("data to evaluate on; null = what the run was trained with")
    paths: PathsConfig = key("folders")
    plugins: list[str] = key("modules of your own that are imported first, beside those of the run (docs/extend.md)")
    run: str | None = key("run to evaluate", main=True, nonempty=True)
    model: Any = key("instead of a run: hf:<owner>/<name> of the hub, or hf:<folder>", main=True, no_group=True)


@dataclass
class ServeConfig:
    """Everything that `serve.py` reads."""

    stage: Any = key("stage to chat with; null = the best finished one", option_name=True)
    paths: PathsConfig = key("folders")
    plugins: list[str] = key("modules of your own that are imported first, beside those of the run (docs/extend.md)")
    run: str | None = key("run to chat with", main=True, nonempty=True)
    ui: str = key("gradio = in the browser, cli = in the terminal", choices=("gradio", "cli"), main=True)
    prompt: str | None = key("answer this once and exit", main=True, raw=True)
    host: str = key("address that the browser chat listens on", main=True)
    port: int = key("its port", low=0, high=65535, main=True)
    temperature: float = key("0 = always the most likely token", low=0, main=True)
    top_k: int = key("sample among the k most likely tokens; 0 = all", low=0, main=True)
    max_new_tokens: int = key("length limit of an answer", low=1, main=True)
    seed: int = key("seed of sampling", low=0, main=True)


ROOTS = {"train": TrainConfig, "evaluate": EvaluateConfig, "serve": ServeConfig}

# Schemas whose class depends on the chosen option; the YAML files of these groups name theirs in their defaults list.
VARIANTS: dict[str, dict[str, type]] = {
    "stage": {
        DOWNLOAD: StageConfig,
        "tokenizer": TokenizerStage,
        "pretrain": PretrainStage,
        "midtrain": ChatStage,
        "sft": ChatStage,
        "grpo": GRPOStage,
    },
    "arch": {"classic": ClassicArch, "modern": ModernArch, "gpt2": GPT2Arch},
    "optim": {"muon_adamw": MuonAdamWConfig, "adamw": AdamWConfig},
    "data": {},  # the sources of text share DataConfig; those of plugins may have keys of their own
}


def register_schema(group: str, name: str, schema: type) -> None:
    """Add a plugin's schema to a group: `/schema/<group>/<name>@_here_` of the defaults list in its YAML file.

    Raises UserError where it is not a subclass of the group's own schema.
    """
    base = ROOTS["train"].__dataclass_fields__[group].type
    if not (is_dataclass(schema) and issubclass(schema, base)):
        raise UserError(f"schema of {group}={name}: {schema.__name__} must be a dataclass and extend {base.__name__}")
    VARIANTS[group][name] = schema
    known_keys.cache_clear()


def register() -> None:
    """Give Hydra the schemas: `schema/train`, `schema/stage/sft`, ... for the defaults lists in `conf/`."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for name, root in ROOTS.items():
        store.store(group="schema", name=name, node=root, package="_global_", provider="fathom")
    for group, variants in VARIANTS.items():
        for name, schema in variants.items():
            store.store(group=f"schema/{group}", name=name, node=schema, package=group, provider="fathom")


def check_values(cfg: Any, prefix: str = "") -> None:
    """Raise `UserError` for the first value outside the words or bounds that its schema states."""
    from omegaconf import DictConfig, OmegaConf

    schema = OmegaConf.get_type(cfg)
    bounds = {f.name: f for f in fields(schema)} if is_dataclass(schema) else {}
    for name in cfg:
        value = cfg[name]
        if isinstance(value, DictConfig):
            check_values(value, f"{prefix}{name}.")
        elif name in bounds:
            problem = _violation(bounds[str(name)], value)
            if problem:
                raise UserError(f"{prefix}{name}={value}: must be {problem}")


def check_task_names(data: Any, stage: Any = None) -> None:
    """Raise `UserError` where a mixture, `data.rl`, `data.eval` or `stage.chat_tasks` names none of `data.tasks`."""
    places = {f"data.mixture.{name}": list(weights) for name, weights in data.mixture.items()}
    places |= {"data.rl": [data.rl] if data.rl else [], "data.eval": list(data.eval)}
    places["stage.chat_tasks"] = list(getattr(stage, "chat_tasks", None) or [])
    for place, names in places.items():
        for name in names:
            if name not in data.tasks:
                raise UserError(f"{place}: there is no task {name!r} in data.tasks ({', '.join(data.tasks)})")


def _violation(spec: Field, value: Any) -> str | None:
    """What `value` should have been, or None if it is fine."""
    choices, low, high, above = (spec.metadata.get(k) for k in ("choices", "low", "high", "above"))
    if value is None:
        return None
    if choices and value not in choices:
        return f"one of {', '.join(choices)}"
    if isinstance(value, float) and math.isnan(value):
        return "a number"
    if low is not None and value < low:
        return f"at least {low}"
    if above is not None and value <= above:
        return f"more than {above}"
    if high is not None and value > high:
        return f"at most {high}"
    if spec.metadata.get("nonempty") and value == "":
        return "a name"
    return None


@lru_cache
def known_keys(config_name: str) -> dict[str, Field]:
    """All dotted keys of an entry point with their schema fields, over all variants of its groups."""
    return dict(_walk(ROOTS[config_name], ""))


def _walk(schema: type, prefix: str) -> Iterator[tuple[str, Field]]:
    for spec in fields(schema):
        yield prefix + spec.name, spec
        variants = VARIANTS.get(spec.name, {}).values() if spec.type is not Any and not prefix else ()
        nested = [t for t in (spec.type, *getattr(spec.type, "__args__", ())) if is_dataclass(t)]
        is_mapping = getattr(spec.type, "__origin__", None) is dict
        for inner in dict.fromkeys([*nested, *variants]):
            yield from _walk(inner, f"{prefix}{spec.name}.{'<name>.' if is_mapping else ''}")
