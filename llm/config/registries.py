"""Tables of everything that a configuration chooses by name. Plugins add optimizers, update rules and architectures.

Entries of Fathom's own are dotted names, imported when they are first used: nothing heavy is imported here.
"""

from dataclasses import dataclass
from typing import Any

from llm.utils.registry import Registry, resolved

# type of data.tasks.<name> -> subclass of tasks.base.Task
TASK_TYPES = Registry(
    "task type",
    {
        "multiple_choice": "tasks.multiple_choice.MultipleChoice",
        "gsm8k": "tasks.gsm8k.GSM8K",
        "second_try": "tasks.hints.SecondTry",
        "humaneval": "tasks.humaneval.HumanEval",
        "exact": "tasks.answers.Exact",
        "keywords": "tasks.answers.Keywords",
        "identity": "tasks.chat.Identity",
        "chat": "tasks.chat.Chat",
        "preference": "tasks.preferences.Preferences",
        "simple_spelling": "tasks.spelling.SimpleSpelling",
        "spelling_bee": "tasks.spelling.SpellingBee",
    },
    own="a class of your own is named by data.tasks.<name>._target_=package.module.Class (docs/extend.md)",
)

# optim.name -> function (network, config group optim) -> parameter groups
OPTIMIZERS = Registry(
    "optimizer", {"muon_adamw": "llm.optim.build.muon_adamw_groups", "adamw": "llm.optim.build.adamw_groups"}
)

# kind of a parameter group -> llm.optim.update_rules.ElementwiseRule or MatrixRule
UPDATE_RULES = Registry(
    "update rule",
    {
        "muon": "llm.optim.muon_adamw.MUON",
        "adamw": "llm.optim.muon_adamw.ADAMW",
        "row_adamw": "llm.optim.other_rules.ROW_ADAMW",
        "adamh": "llm.optim.other_rules.ADAMH",
        "dion": "llm.optim.other_rules.DION",
    },
)

# stage.reward, key of stage.rewards -> tasks.rewards.Reward subclass, or function (conversation, completion) -> number
REWARDS = Registry(
    "reward",
    {
        "task": "tasks.rewards.TaskReward",
        "number": "tasks.rewards.NumberReward",
        "tag": "tasks.rewards.TagReward",
        "format": "tasks.rewards.FormatReward",
        "code": "tasks.rewards.CodeReward",
        "json": "tasks.rewards.JsonReward",
        "length": "tasks.rewards.LengthReward",
        "language": "tasks.rewards.LanguageReward",
        "reward_model": "llm.stages.reward_model.RewardModelReward",
    },
    own="a function or class of your own is named by stage.reward_options.<name>._target_=package.module.Name "
    "with stage.reward=<name> (docs/extend.md)",
)


@dataclass(frozen=True)
class TextSource:
    """Source of documents: `build`, dotted name of a function (config group data, cache folder) -> DocumentSource.

    is_remote: the text lies on the network, so a dry run does not look at it.
    """

    build: str
    is_remote: bool = False

    def __call__(self, data: Any, cache: str) -> Any:
        return resolved(self.build, "source of text")(data, cache)


# data.name -> TextSource
TEXT_SOURCES = Registry(
    "source of text",
    {
        "embedded": TextSource("llm.data.sources.embedded_source"),
        "local": TextSource("llm.data.sources.local_source"),
        "hub": TextSource("llm.data.sources.hub_source", is_remote=True),
        "tokens": TextSource("llm.data.sources.tokens_source"),
        "mixture": TextSource("llm.data.sources.mixture_source", is_remote=True),
        "custom": TextSource("llm.data.sources.custom_source"),
    },
    own="a class of your own is named by data=custom data.source._target_=package.module.Class (docs/extend.md)",
)


@dataclass(frozen=True)
class Architecture:
    """Classes behind an `arch.name`: of the network (llm.model.gpt.GPT) and of its shape (llm.model.config.GPTConfig).

    Either is a class or its dotted name.
    """

    network: str | type
    config: str | type = "llm.model.config.GPTConfig"

    @property
    def network_class(self) -> type:
        """Return the class of the network; imports torch."""
        return resolved(self.network, "architecture")

    @property
    def config_class(self) -> type:
        """Return the class of the shape."""
        return resolved(self.config, "architecture")


# arch.name -> Architecture
ARCHITECTURES = Registry(
    "architecture",
    {name: Architecture("llm.model.gpt.GPT") for name in ("classic", "modern", "gpt2")}
    | {"qwen3": Architecture("llm.model.qwen3.Qwen3", "llm.model.qwen3_config.Qwen3Config")},
)
