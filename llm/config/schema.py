"""Typed schemas of the configuration: the keys that exist, their types, and one line of help for each.

The values live in `conf/`; a field without a default here must be set there. Hydra merges every YAML file into these
dataclasses, so an unknown key or a value of the wrong type fails while the configuration is composed. What types
cannot say (allowed words, ranges) is in the field metadata and checked by `check_values`.

Nothing heavy is imported here: `train.py --help` and the check of the command line load this file.
"""

import copyreg
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, make_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from llm.config.data_schema import DataConfig, MixtureConfig
from llm.config.device_schema import EstimateConfig, GPUConfig, PrecisionConfig, StrategyConfig
from llm.config.experiments import register_extended
from llm.config.generated import register_generated
from llm.config.key import CONTEXT, ITEMS, SEED, STEPS, VOCABULARY, key
from llm.config.model_schema import (
    AdamWConfig,
    ArchConfig,
    ClassicArch,
    GPT2Arch,
    ModelConfig,
    ModernArch,
    MuonAdamWConfig,
    OptimConfig,
    Qwen3Arch,
)
from llm.config.stage_schema import StageConfig
from llm.config.stages import Stage, all_stages, chat_mixtures, stage_names, stage_row
from llm.errors import UserError
from llm.utils.registry import resolved

# Hydra's launchers pickle schemas by value. The mark "no default" must stay the one object that others compare with.
copyreg.pickle(type(MISSING), lambda mark: "MISSING")

ATTENTION = ("auto", "cpu", "flash3", "flex", "sdpa")


@dataclass
class BatchConfig:
    """Config group `batch`: the size of a step."""

    tokens_per_step: int | None = key(
        "tokens of one optimizer step, over all ranks and micro-batches; null = by llm/scaling/rules.py",
        low=1,
        high=2**30,
        main=True,
    )
    micro_batch_size: Any = key(
        "rows of one micro-batch on one device; auto = as many as fit", words=("auto",), low=1, high=2**20, main=True
    )


@dataclass
class WatchConfig:
    """Limits beyond which a training is taken to have gone wrong."""

    bad_loss: str = key("what to do after a loss that is not finite or jumps", choices=("stop", "roll_back"))
    loss_jump: float = key(
        "a loss is bad if it lies this many nats above the median of the last 50 steps", above=0, high=10**6
    )
    rollbacks: int = key("how often a stage may go back to the last checkpoint and leave out data", low=0, high=10**6)
    data_seconds: float = key("seconds without training data after which a stage gives up", above=0, high=10**7)
    every: int = key("steps between comparisons of the processes: same weights, similar speed", low=1, high=STEPS)
    slow: float = key("report a process whose part of a step takes this many times the median", above=1, high=10**6)


@dataclass
class PathsConfig:
    """Config group `paths`: folders."""

    runs: str = key("folder of all runs; each stage is <runs>/<run>/<stage>", main=True)
    data: str = key("folder of what is fetched from the hub, shared by all runs", main=True)
    queue: str = key("file of the queue of experiments, on a local disk: python -m llm.experiments.queue")


@dataclass
class TrainerConfig:
    """Config group `trainer`: devices and nodes."""

    accelerator: str = key("where to compute", choices=("auto", "cpu", "gpu"))
    devices: Any = key(
        "number of devices of a node, or auto; torchrun and srun decide by themselves",
        words=("auto",),
        low=1,
        high=1024,
        main=True,
    )
    num_nodes: int = key(
        "number of machines; each gets this command and has NODE_RANK, MASTER_ADDR and MASTER_PORT set",
        low=1,
        high=10**5,
    )
    max_restarts: int = key(
        "how often a training whose process or node died begins again from the last checkpoint, on the nodes left",
        low=0,
        high=1000,
    )
    gradient_clip_val: float | None = key(
        "largest norm of a step's gradient over all devices, to which longer ones are scaled down; null = any",
        above=0,
        high=10**6,
    )
    deterministic: bool = key("use kernels of torch that give equal bits each time, or stop where there is none")
    detect_anomaly: bool = key("stop at the operation whose gradient is not a number; steps take longer")
    profiler: str | None = key(
        "where the time of a training goes, a file in the stage's folder; null = not measured",
        choices=("simple", "advanced", "pytorch"),
    )
    overfit_batches: int = key("train on the first steps of data again and again; 0 = on all", low=0, high=10**6)
    enable_progress_bar: bool = key("show a bar in a terminal; false = a line now and then, as in a file")
    benchmark: bool | None = key("let cuDNN try several kernels and take the fastest; null = as torch does")
    plugins: dict[str, Any] = key("plugins of Lightning: a mapping from a name to a _target_")
    activation_checkpointing: bool = key("compute blocks again in the backward pass: less memory, a third more time")


@dataclass
class TrainConfig:
    """Everything that `train.py` reads: `conf/train.yaml` and its groups."""

    stage: StageConfig = key("phase of training")
    model: ModelConfig = key("size of the network")
    arch: ArchConfig = key("architecture of the network")
    optim: OptimConfig = key("optimizer")
    data: DataConfig = key("text and tasks")
    batch: BatchConfig = key("size of a step; follows the stage")
    precision: PrecisionConfig = key("number formats")
    gpu: GPUConfig = key("faster forms of a step, for GPUs, that no GPU has run yet")
    compile: Any = key(
        "torch.compile for training steps: auto = where it pays",
        main=True,
        choices=("auto", "true", "false"),
    )
    attention: str = key("attention kernel of training steps: auto = the fastest that runs here", choices=ATTENTION)
    trainer: TrainerConfig = key("devices")
    strategy: StrategyConfig = key("how devices work together")
    callbacks: dict[str, Any] = key("what happens beside the training steps")
    watch: WatchConfig = key("what is wrong with a training, and what happens then")
    logger: dict[str, Any] = key("where metrics go beside metrics.csv")
    estimate: EstimateConfig = key("what dry_run tells about a GPU")
    paths: PathsConfig = key("folders")
    plugins: list[str] = key("modules of your own that are imported first (docs/extend.md)")
    trust: list[str] = key("what saved runs may use: modules, package.module.Name, addresses, data sets of the hub")
    verify: bool = key(
        "compare every file of a loaded model with the checksum in manifest.json; false = quicker, for giants"
    )
    run: str | None = key("name of the chain of stages; null = d<depth>", main=True)
    init_from: str | None = key("start from this run/stage or model folder; null = the stage before", main=True)
    max_steps: int | None = key("optimizer steps; null = the stage's own horizon", low=1, high=STEPS, main=True)
    max_minutes: float | None = key(
        "minutes after which training ends with a learning rate that has decayed by then; null = no limit",
        above=0,
        high=10**7,
        main=True,
    )
    save_every: int = key("steps between checkpoints; the last step is always saved", low=1, high=STEPS, main=True)
    save_minutes: float | None = key(
        "minutes after which a checkpoint is saved in any case; null = by save_every alone", above=0, high=10**7
    )
    save_async: bool = key("write checkpoints while training goes on; needs host memory for a copy of the state")
    save_mirror: str | None = key(
        "address (s3://bucket/folder, ...) to which a run is copied while it trains, and fetched from where it is lost"
    )
    keep_last: int = key(
        "checkpoints that are kept; an older one is used where the newest is damaged", low=1, high=10**6
    )
    log_every: int = key("steps between rows of metrics.csv", low=1, high=STEPS, main=True)
    resume: bool = key("continue an unfinished stage from the last checkpoint", main=True)
    overwrite: bool = key("delete what the stage wrote before and start again", main=True)
    objective: str | None = key("column of metrics.csv that a search compares jobs by, such as bpb; null = no search")
    objective_mode: str = key(
        "which value of the objective's column counts in a search", choices=("last", "min", "max")
    )
    dry_run: bool = key("print how long it takes here and on a GPU, and the derived numbers, then stop", main=True)
    verbose: bool = key("print the whole configuration and the derived numbers at the start too", main=True)
    device_price: float | None = key(
        "price of one device for an hour, in dollars, for the cost in the report; null = no cost is given",
        low=0,
        high=10**6,
    )
    seed: int = key("seed of initial weights, data order and sampling", low=0, high=SEED, main=True)


@dataclass
class EvalConfig:
    """Config group `eval` of evaluate.py: what is measured, and on how much."""

    bpb: bool = key("measure bits per byte on the validation text (eval=[bpb])")
    chat: bool = key("measure the accuracy of data.eval's tasks (eval=[chat])")
    samples: bool = key("print continuations and answers (eval=[samples])")
    core: bool = key("measure the CORE metric with eval.bundle (eval=[core])")
    lm_eval: bool = key("measure eval.tasks by lm-eval, the field's harness (eval=lm_eval)")
    tokens: int = key("validation tokens for bits per byte", low=1, high=10**12)
    max_per_task: int | None = key("items of one task; null = all", low=1, high=ITEMS, main=True)
    seq_len: int | None = key(
        "model=hf: tokens of context to use; null = the model's own, at most 2048", low=8, high=CONTEXT
    )
    max_new_tokens: int = key("length limit of a generated answer", low=1, high=CONTEXT)
    num_samples: int = key(
        "answers per item of generative tasks: 1 = a greedy one, more = drawn, for pass@k", low=1, high=10**4
    )
    ks: list[int] | None = key("values of k of pass@k; null = 1 and num_samples", low=1, high=10**4)
    temperature: float = key("sampling temperature of drawn answers", above=0, high=100)
    python: bool = key("run the Python that a model writes between python markers, in the sandbox")
    bundle: str | None = key("folder or zip of a CORE evaluation bundle", main=True)
    core_tasks: list[str] | None = key("tasks of eval.bundle to measure; null = all, whose mean is CORE")
    tasks: list[str] | None = key(
        "eval=lm_eval: tasks, groups or tags of lm-eval, as in [arc_easy,hellaswag]", main=True
    )
    num_fewshot: int | None = key(
        "eval=lm_eval: solved examples in a prompt; null = as each task says", low=0, high=1000
    )
    include_path: str | None = key("eval=lm_eval: folder of task files (YAML) of your own")
    chat_template: bool = key("eval=lm_eval: prompts in the model's chat format")
    batch_size: int = key("sequences evaluated together", low=1, high=2**16)
    judges: dict[str, Any] = key("judges of your own: a mapping from a name to a _target_ (docs/extend.md)")


@dataclass
class EvaluateConfig:
    """Everything that `evaluate.py` reads."""

    stage: Any = key("stage to evaluate; null = the last finished one of the pipeline", main=True, no_group=True)
    eval: EvalConfig = key("what to measure")
    data: DataConfig | None = key("data to evaluate on; null = what the run was trained with")
    paths: PathsConfig = key("folders")
    plugins: list[str] = key("modules of your own that are imported first, beside those of the run (docs/extend.md)")
    trust: list[str] = key("what saved runs may use: modules, package.module.Name, addresses, data sets of the hub")
    verify: bool = key(
        "compare every file of a loaded model with the checksum in manifest.json; false = quicker, for giants"
    )
    run: str | None = key("run to evaluate", main=True)
    model: Any = key("instead of a run: hf:<owner>/<name> of the hub, or hf:<folder>", main=True, no_group=True)


@dataclass
class ApiConfig:
    """Config group `api` of serve.py: the HTTP API and worker processes."""

    access_key: str | None = key(
        "key that requests must bring (Authorization: Bearer KEY); null = none is asked for; "
        "default: the environment variable FATHOM_API_KEY"
    )
    rows: int = key("sequences that a worker decodes together", low=1, high=4096)
    queue: int = key("sequences that may wait; further requests are refused (429)", low=0, high=10**6)
    timeout: float = key("seconds that a request may take", above=0, high=10**6)
    truncation: str = key(
        "conversations that do not fit the context, where a request does not say: disabled = refuse, "
        "auto = leave out functions that fill half of the context, then the oldest messages",
        choices=("disabled", "auto"),
    )
    drain: float = key("seconds that answers under way have after SIGTERM", low=0, high=10**6)
    origins: list[str] = key("addresses of web pages elsewhere that may send requests, as in https://chat.example.org")
    log: str = key(
        "log of requests, a line of JSON each, to stderr; text = with messages and answers",
        choices=("none", "requests", "text"),
    )


@dataclass
class PanelConfig:
    """Config group `panel` of serve.py: the page of runs, comparisons and trainings (ui=panel)."""

    readonly: bool = key(
        "show runs and jobs, and start, stop, note, label, ask, move and delete nothing, as for sharing"
    )


@dataclass
class ServeConfig:
    """Everything that `serve.py` reads."""

    stage: Any = key("stage to chat with; null = the last finished one of the pipeline", main=True, no_group=True)
    paths: PathsConfig = key("folders")
    plugins: list[str] = key("modules of your own that are imported first, beside those of the run (docs/extend.md)")
    trust: list[str] = key("what saved runs may use: modules, package.module.Name, addresses, data sets of the hub")
    verify: bool = key(
        "compare every file of a loaded model with the checksum in manifest.json; false = quicker, for giants"
    )
    run: str | None = key("run to chat with", main=True)
    model: Any = key("instead of a run: hf:<owner>/<name> of the hub, or hf:<folder>", main=True, no_group=True)
    ui: str = key(
        "gradio = a page and the HTTP API, api = the HTTP API alone, cli = in the terminal, panel = a page of runs and "
        "trainings, with run or model also chat and API",
        choices=("gradio", "api", "cli", "panel"),
        main=True,
    )
    prompt: str | None = key("question to answer once before exiting; null = a chat", main=True, raw=True)
    host: str = key("address that the server listens on", main=True)
    port: int = key("port that the server listens on; 0 = any free one", low=0, high=65535, main=True)
    public_names: list[str] = key("further names by which the server is reached, as behind a proxy or a tunnel")
    workers: Any = key(
        "processes with a copy of the model each; auto = one per GPU, or one on a CPU",
        words=("auto",),
        low=1,
        high=256,
        main=True,
    )
    compute: str = key(
        "number format of a trained model's weights: auto = bf16 where it is fast, fp32 = answers that do not depend "
        "on what else is being answered",
        choices=("auto", "fp32", "bf16"),
    )
    weights: str | None = key(
        "int8 = matrices rounded to 8 bits, on a CPU with a C++ compiler: large models answer faster, a little "
        "differently; null = not rounded",
        choices=("int8",),
    )
    api: ApiConfig = key("the HTTP API and worker processes")
    panel: PanelConfig = key("the page of runs and trainings")
    offer: str | None = key(
        "other models to switch to on the page: all = every finished stage in paths.runs, none; null = all where only "
        "this computer is served, else none",
        choices=("all", "none"),
    )
    adapters: list[str] | None = key(
        "stages trained with model.lora.rank beside the served model: run/stage or folders, all in one engine; null = "
        "where offer=all holds, the finished ones in paths.runs; [] = none",
        main=True,
    )
    temperature: float = key("sampling temperature; 0 = always the most likely token", low=0, high=100, main=True)
    top_k: int = key("sample among the k most likely tokens; 0 = all", low=0, high=VOCABULARY, main=True)
    top_p: float = key("sample among the likeliest tokens, of this probability in all; 1 = all tokens", above=0, high=1)
    max_new_tokens: int = key("length limit of an answer", low=1, high=CONTEXT, main=True)
    seed: int = key("seed of sampling", low=0, high=SEED, main=True)


@dataclass
class ExportConfig:
    """Everything that `python -m llm.export` reads."""

    stage: Any = key("stage to export; null = the last finished one of the pipeline", main=True, no_group=True)
    paths: PathsConfig = key("folders")
    plugins: list[str] = key("modules of your own that are imported first, beside those of the run (docs/extend.md)")
    trust: list[str] = key("what saved runs may use: modules, package.module.Name, addresses, data sets of the hub")
    verify: bool = key(
        "compare every file of a loaded model with the checksum in manifest.json; false = quicker, for giants"
    )
    run: str | None = key("run to export", main=True)
    to: str = key(
        "hf = a folder for transformers, gguf = a file for llama.cpp (arch=qwen3, tokenizer with stage.pattern=qwen2)",
        choices=("hf", "gguf"),
        main=True,
    )
    out: str | None = key("folder to write; null = exports/<run>-<stage>-<to> beside paths.runs", main=True)
    dtype: str = key("number format of the weights", choices=("fp32", "bf16", "fp16"), main=True)
    overwrite: bool = key("replace the folder `out` if an export wrote it")
    licence: str | None = key(
        "licence of the model for the card, as in mit or apache-2.0; null = not stated", main=True
    )
    push: str | None = key("<owner>/<name>: upload the folder to the Hugging Face hub too, with HF_TOKEN", main=True)
    private: bool = key("a repository that push makes is private")


ROOTS = {"train": TrainConfig, "evaluate": EvaluateConfig, "serve": ServeConfig, "export": ExportConfig}


class _StageSchemas(Mapping):
    """The schemas of the stages by name, those that plugins register included."""

    def __getitem__(self, name: str) -> type:
        if name not in stage_names(in_run=False):
            raise KeyError(name)
        schema = stage_row(name).schema
        return resolved(schema, f"schema of stage={name}")

    def __iter__(self) -> Iterator[str]:
        return (row.name for row in all_stages())

    def __len__(self) -> int:
        return len(all_stages())


# Schemas whose class depends on the chosen option; the YAML files of these groups name theirs in their defaults list.
VARIANTS: dict[str, Mapping[str, type]] = {
    "stage": _StageSchemas(),
    "arch": {"classic": ClassicArch, "modern": ModernArch, "gpt2": GPT2Arch, "qwen3": Qwen3Arch},
    "optim": {"muon_adamw": MuonAdamWConfig, "adamw": AdamWConfig},
    "data": {},  # the sources of text share DataConfig; those of plugins may have keys of their own
}


def owners(name: str) -> list[str]:
    """Return the options of its group, as in stage or optim, that have the dotted key `name`."""
    group, _, rest = name.partition(".")
    return [option for option, schema in VARIANTS.get(group, {}).items() if rest in schema.__dataclass_fields__]


def root_schema(config_name: str) -> type:
    """Return the schema of an entry point, in which `data.mixture` has the keys of every chat stage of the table."""
    return _root_schema(config_name, tuple(chat_mixtures()))


@lru_cache
def _root_schema(config_name: str, mixtures: tuple[str, ...]) -> type:
    root = ROOTS[config_name]
    return _with_type(root, "data", _data_schema(mixtures)) if "data" in root.__dataclass_fields__ else root


@lru_cache
def _data_schema(mixtures: tuple[str, ...]) -> type:
    """Return DataConfig whose `mixture` has the keys <stage> and <stage>_val for each of `mixtures`."""
    trained = "task: repeats in the training of {} (a fraction below 1 = the first part, 0 = leave out)"
    held_out = "task: repeats of the held-out rows that {} is validated on; empty = once all tasks trained on"
    texts = {stage: trained.format(stage) for stage in mixtures}
    texts |= {f"{stage}_val": held_out.format(stage) for stage in mixtures}
    keys = [
        (name, dict[str, float], field(default_factory=dict, metadata={"help": text, "low": 0, "high": 10**4}))
        for name, text in texts.items()
    ]
    mixture = make_dataclass("MixtureConfig", keys, bases=(MixtureConfig,))
    return _with_type(DataConfig, "mixture", mixture)


def _with_type(schema: type, name: str, kind: type) -> type:
    """Return the dataclass `schema` with another type for the field `name`; one that may be null still may."""
    old = schema.__dataclass_fields__[name]
    new = kind | None if type(None) in get_args(old.type) else kind
    return make_dataclass(schema.__name__, [(name, new, field(metadata=old.metadata))], bases=(schema,))


def register_schema(group: str, name: str, schema: type) -> None:
    """Add a plugin's schema to a group: `/schema/<group>/<name>@_here_` of the defaults list in its YAML file.

    Raises UserError where it is not a subclass of the group's own schema.
    """
    base = ROOTS["train"].__dataclass_fields__[group].type
    if not (is_dataclass(schema) and issubclass(schema, base)):
        raise UserError(f"schema of {group}={name}: {schema.__name__} must be a dataclass and extend {base.__name__}")
    VARIANTS[group][name] = schema
    _known_keys.cache_clear()


def register(folders: Sequence[Path] = ()) -> None:
    """Give Hydra the schemas (`schema/train`, `schema/stage/sft`, ...) and the options that no file holds.

    `folders`: conf/ and those of a user, whose files take the place of generated options.
    """
    from hydra.core.config_store import ConfigStore

    store, mixtures = ConfigStore.instance(), tuple(chat_mixtures())
    store.__deepcopy__ = lambda memo: store  # Hydra would copy all of it for every composition, and never changes it
    for name in ROOTS:
        _store(store, "schema", name, root_schema(name), "_global_")
    for group, variants in VARIANTS.items():
        for name, schema in variants.items():
            _store(
                store, f"schema/{group}", name, _with_mixtures(schema, mixtures) if group == "data" else schema, group
            )
    register_generated(store, folders)
    register_extended(store, folders)


def _store(store: Any, group: str, name: str, schema: type, package: str) -> None:
    """Put a schema into Hydra's ConfigStore, unless it is there: the command line is composed several times."""
    from omegaconf import OmegaConf

    place = store.repo
    for part in group.split("/"):
        place = place.get(part, {})
    there = place.get(f"{name}.yaml")
    if there is None or OmegaConf.get_type(there.node) is not schema:
        store.store(group=group, name=name, node=schema, package=package, provider="fathom")


@lru_cache
def _with_mixtures(schema: type, mixtures: tuple[str, ...]) -> type:
    """Return a plugin's schema of `data` with the keys of data.mixture, which DataConfig itself lacks."""
    return make_dataclass(schema.__name__, [], bases=(_data_schema(mixtures), schema))


def known_keys(config_name: str) -> dict[str, Field]:
    """Return all dotted keys of an entry point with their schema fields, over all variants of its groups."""
    return _known_keys(config_name, all_stages())


@lru_cache
def _known_keys(config_name: str, _table: tuple[Stage, ...]) -> dict[str, Field]:
    return dict(_walk(root_schema(config_name), ""))


def _walk(schema: type, prefix: str) -> Iterator[tuple[str, Field]]:
    for spec in fields(schema):
        yield prefix + spec.name, spec
        variants = VARIANTS.get(spec.name, {}).values() if spec.type is not Any and not prefix else ()
        nested = [t for t in (spec.type, *getattr(spec.type, "__args__", ())) if is_dataclass(t)]
        is_mapping = getattr(spec.type, "__origin__", None) is dict
        for inner in dict.fromkeys([*nested, *variants]):
            yield from _walk(inner, f"{prefix}{spec.name}.{'<name>.' if is_mapping else ''}")
