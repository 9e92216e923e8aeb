"""The table of stages: one row per phase of training, with everything that other modules must know about it.

A new stage is one row here, one file `conf/stage/<name>.yaml`, and one builder file. From outside the repository a
plugin adds its row by `register_stage` (docs/extend.md). Nothing outside a stage's row and builder asks for its name.
Nothing heavy is imported here: builders, runners and schemas are dotted names that are imported when they are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llm.errors import UserError

TASKS = ("data.tasks", "data.tasks_path", "data.mixture", "data.rl")
TEXT = ("data.path", "data.repo", "data.revision", "data.files", "data.shards", "data.sources", "data.column")
TEXT += ("data.train", "data.val", "data.encoding", "data.separator", "data.end_of_text")
TEXT += ("data.seed", "data.size", "data.val_size", "data.packing", "data.shuffle", "data.near_duplicates")
MODEL = ("model", "arch", "optim", "batch", "precision", "gpu", "compile", "attention", "trainer")
# Kind of stage -> patterns of config keys that such a stage does not read. "" stands for a plugin that is not loaded.
KINDS: dict[str, tuple[str, ...]] = {
    "data": (),
    "tokenizer": (*TASKS, "data.preferences", *MODEL, "data.packing", "data.shuffle", "max_steps", "seed"),
    "text": (*TASKS, "data.preferences"),
    "chat": (*TEXT, "data.rl", "data.preferences"),
    "rl": (*TEXT, "batch.tokens_per_step", "compile", "gpu.joint_qkv", "gpu.tuned_products"),
    "preference": (*TEXT, *TASKS, "batch.tokens_per_step", "compile", "gpu.tuned_products"),
    "": (),
}
CHAT_KINDS = ("chat", "rl", "preference")
TAKES = ("nothing", "tokenizer", "weights")
UNKNOWN_RANK = 1_000_000


@dataclass(frozen=True)
class Stage:
    """Row of the table: what a stage is called, where it starts from, who builds or runs it, what others may expect."""

    name: str
    rank: int  # place in the pipeline; serve.py and evaluate.py choose the highest finished one
    kind: str  # what it works on: one of KINDS
    schema: str | type  # dataclass of its settings, a subclass of StageConfig, or the dotted name of one
    build: str | Callable = ""  # model stages: `build(cfg, parent) -> BuiltStage`, or its dotted name; "" = no model
    parents: tuple[str, ...] = ()  # stages that it can follow, preferred first; () = it starts from nothing
    takes: str = "weights"  # what its parent's model/ folder must hold: one of TAKES; pretrain takes weights if there
    run: str = "llm.stages.train_model.run"  # dotted name of `run(job) -> results`; outside a run `run(cfg)`
    check: str = ""  # dotted name of `check(cfg, config)`: UserErrors by arithmetic, before processes start
    derive: str = ""  # dotted name of `derive(cfg)`: the derived numbers of a dry run before a parent exists
    in_run: bool = True  # whether it writes a folder of a run
    parallel: bool = True  # whether several processes share its work; False: the first one does it
    fixed_shapes: bool = True  # whether all its steps have one shape, as torch.compile needs
    servable: bool = True  # whether its model generates text: serve.py and evaluate.py take it
    mixture: str = ""  # key of data.mixture whose held-out rows it is validated on; "" = a chat stage's own name
    ignores: tuple[str, ...] = ()  # patterns of config keys that it does not read, beside those of its kind
    other_parents: tuple[str, ...] = ()  # keys such as stage.teacher that name further models (see find_further)
    no_curves: tuple[str, ...] = ()  # columns of metrics.csv that mean something else for this stage

    @property
    def makes_model(self) -> bool:
        return bool(self.build) or not self.kind

    @property
    def is_chat(self) -> bool:
        """True if its model answers questions and does not only continue texts."""
        return self.kind in CHAT_KINDS and self.servable

    @property
    def draws_answers(self) -> bool:
        """True if it trains on answers that its own network draws."""
        return self.kind == "rl"

    @property
    def reads_text(self) -> bool:
        """True if it reads the documents of `data`."""
        return self.kind in ("tokenizer", "text")

    @property
    def mixture_key(self) -> str:
        return self.mixture or self.name


REWARD_MODELS = ("stage.reward_options.reward_model.model", "stage.judge")  # keys of stages that sample answers
_SCHEMA, _STAGES = "llm.config.stage_schema", "llm.stages"
_BUILTIN = (
    Stage(
        name="download",
        rank=-10,
        kind="data",
        schema=f"{_SCHEMA}.StageConfig",
        takes="nothing",
        run=f"{_STAGES}.download.run",
        in_run=False,
    ),
    Stage(
        name="check",
        rank=-5,
        kind="data",
        schema=f"{_SCHEMA}.CheckStage",
        takes="nothing",
        run=f"{_STAGES}.check.run",
        in_run=False,
    ),
    Stage(
        name="write_tokens",
        rank=-4,
        kind="data",
        schema=f"{_SCHEMA}.WriteTokensStage",
        takes="nothing",
        run=f"{_STAGES}.write_tokens.run",
        in_run=False,
    ),
    Stage(
        name="tokenizer",
        rank=0,
        kind="tokenizer",
        schema=f"{_SCHEMA}.TokenizerStage",
        takes="nothing",
        run=f"{_STAGES}.tokenizer.run",
        parallel=False,
        servable=False,
    ),
    Stage(
        name="pretrain",
        rank=10,
        kind="text",
        schema=f"{_SCHEMA}.PretrainStage",
        build=f"{_STAGES}.pretrain.build",
        check=f"{_STAGES}.plan.check_pretraining",
        parents=("tokenizer",),
        takes="tokenizer",
        derive=f"{_STAGES}.pretrain.derived_without_tokenizer",
        other_parents=("stage.teachers",),
    ),
    Stage(
        name="midtrain",
        rank=20,
        kind="chat",
        schema=f"{_SCHEMA}.ChatStage",
        build=f"{_STAGES}.finetune.build",
        check=f"{_STAGES}.plan.check_finetuning",
        parents=("pretrain",),
    ),
    Stage(
        name="sft",
        rank=30,
        kind="chat",
        schema=f"{_SCHEMA}.ChatStage",
        build=f"{_STAGES}.finetune.build",
        check=f"{_STAGES}.plan.check_finetuning",
        parents=("midtrain", "pretrain"),
    ),
    Stage(
        name="reward",
        rank=35,
        kind="preference",
        schema=f"{_SCHEMA}.RewardStage",
        build=f"{_STAGES}.reward.build",
        check=f"{_STAGES}.plan.check_shares",
        parents=("sft",),
        fixed_shapes=False,
        servable=False,  # its head of one number is trained, not its words
        mixture="sft",
        no_curves=("loss", "reward"),  # of pairs, given to answers and not for them
    ),
    Stage(
        name="distill",
        rank=36,
        kind="rl",
        schema=f"{_SCHEMA}.DistillStage",
        build=f"{_STAGES}.distill.build",
        check=f"{_STAGES}.choices.check_distill",
        parents=("sft",),
        fixed_shapes=False,
        mixture="sft",  # trained or rehearsed on, and validated on
        other_parents=("stage.teacher", *REWARD_MODELS),
        no_curves=("loss", "core"),
    ),
    Stage(
        name="best_of_n",
        rank=37,
        kind="rl",
        schema=f"{_SCHEMA}.BestOfNStage",
        build=f"{_STAGES}.best_of_n.build",
        check=f"{_STAGES}.choices.check_sampled",
        parents=("sft",),
        fixed_shapes=False,
        mixture="sft",  # rehearsed on, and validated on
        other_parents=REWARD_MODELS,
        no_curves=("loss", "core"),  # of answers that change with the weights
    ),
    Stage(
        name="dpo",
        rank=38,
        kind="preference",
        schema=f"{_SCHEMA}.DPOStage",
        build=f"{_STAGES}.dpo.build",
        check=f"{_STAGES}.choices.check_kto",
        parents=("sft",),
        fixed_shapes=False,
        mixture="sft",  # drift is measured on it
        ignores=("stage.max_new_tokens",),  # of answers that are compared with the parent's
        other_parents=("stage.judge",),
        no_curves=("loss",),  # of pairs
    ),
    Stage(
        name="ppo",
        rank=39,
        kind="rl",
        schema=f"{_SCHEMA}.PPOStage",
        build=f"{_STAGES}.ppo.build",
        check=f"{_STAGES}.choices.check_sampled",
        parents=("sft",),
        fixed_shapes=False,
        mixture="sft",  # rehearsed on, and validated on
        other_parents=REWARD_MODELS,
        no_curves=("loss", "core"),  # the loss of a policy gradient is no measure of progress
    ),
    Stage(
        name="grpo",
        rank=40,
        kind="rl",
        schema=f"{_SCHEMA}.GRPOStage",
        build=f"{_STAGES}.grpo.build",
        check=f"{_STAGES}.choices.check_grpo",
        parents=("sft",),
        fixed_shapes=False,
        mixture="sft",  # rehearsed on, and validated on
        other_parents=REWARD_MODELS,
        no_curves=("loss", "core"),  # the loss of a policy gradient is no measure of progress
    ),
)
_TABLE: dict[str, Stage] = {}


def register_stage(row: Stage) -> None:
    """Add a row to the table. Raises UserError where it contradicts itself or the rows that are there."""
    where = f"register_stage({row.name!r})"
    if not row.name.isidentifier() or row.name.endswith("_val"):
        raise UserError(f"{where}: the name must be a plain word that does not end in _val")
    if _TABLE.get(row.name, row) != row:
        raise UserError(f"{where}: a stage of this name exists already; choose another name")
    if unknown := [name for name in row.parents if name not in _TABLE]:
        raise UserError(f"{where}: parents name {unknown[0]!r}, which is no stage ({', '.join(_TABLE)})")
    for key, value, words in (("kind", row.kind, [*filter(None, KINDS)]), ("takes", row.takes, TAKES)):
        if value not in words:
            raise UserError(f"{where}: {key}={value!r}, must be one of {', '.join(words)}")
    if (row.takes == "nothing") == bool(row.parents):
        raise UserError(f"{where}: takes={row.takes!r} and parents={row.parents!r} contradict each other")
    if row.parents and row.rank <= min(_TABLE[name].rank for name in row.parents):
        raise UserError(f"{where}: rank={row.rank} must be above that of a parent ({', '.join(row.parents)})")
    _TABLE[row.name] = row


def all_stages() -> tuple[Stage, ...]:
    """Return the rows in pipeline order: by rank, then as registered."""
    return tuple(sorted(_TABLE.values(), key=lambda row: row.rank))


def stage_names(*, in_run: bool = True) -> list[str]:
    """Return names in pipeline order: of the stages that belong to a run, or with in_run=False of all."""
    return [row.name for row in all_stages() if row.in_run or not in_run]


def chat_mixtures() -> list[str]:
    """Return the keys <stage> of `data.mixture` that are trained on: one per chat stage, in pipeline order."""
    return list(dict.fromkeys(row.mixture_key for row in all_stages() if row.kind == "chat"))


def stage_row(name: str) -> Stage:
    """Return the row of a stage. Raises UserError for a name that is not in the table."""
    if name not in _TABLE:
        raise UserError(
            f"stage={name} does not exist; choose one of {', '.join(stage_names(in_run=False))}, or name the plugin "
            "that registers it: plugins=[<module>]"
        )
    return _TABLE[name]


def row_or_stranger(name: str) -> Stage:
    """Return the row of a stage; for one whose plugin is not loaded a row of kind "" that claims nothing about it."""
    stranger = Stage(name, UNKNOWN_RANK, "", "", servable=False)
    return _TABLE.get(name, stranger)


def unread_keys(row: Stage) -> tuple[str, ...]:
    """Return patterns of config keys that cannot change what the stage makes, because it does not read them."""
    others = [f"data.mixture.{name}" for name in chat_mixtures() if name != row.mixture_key]
    return (*KINDS[row.kind], *row.ignores, *(others if row.kind in ("chat", "rl") else ()))


for _row in _BUILTIN:
    register_stage(_row)
