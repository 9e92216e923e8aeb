"""Functions that plugins call to add to Fathom: a task type, an optimizer, an architecture, a source of text, a reward.

A plugin is a module named by `plugins=[my_module]` (llm.config.plugins); docs/extend.md has a recipe for each. A thing
is given itself, or by its dotted name, which keeps the start of a command line quick. Nothing heavy is imported here.
"""

from collections.abc import Callable
from typing import Any

from llm.config.registries import (
    ARCHITECTURES,
    OPTIMIZERS,
    REWARDS,
    TASK_TYPES,
    TEXT_SOURCES,
    UPDATE_RULES,
    Architecture,
    TextSource,
)
from llm.config.schema import DataConfig, OptimConfig, register_schema


def register_task(name: str, task: str | type) -> None:
    """Make `data.tasks.<any>.type=<name>` a task of the class `task`."""
    TASK_TYPES.register(name, task)


def register_update_rule(kind: str, rule: Any) -> None:
    """Make parameter groups of `kind` be updated by `rule`, under every strategy."""
    UPDATE_RULES.register(kind, rule)


def register_optimizer(name: str, groups: str | Callable, schema: type | None = None) -> None:
    """Make `name` an optimizer: `groups(network, optim)` returns its parameter groups.

    schema: dataclass of the config group, a subclass of `llm.config.schema.OptimConfig`; None = that class itself. The
    YAML file optim/<option>.yaml begins with `defaults: [/schema/optim/<name>@_here_, _self_]` and sets `name`.
    """
    OPTIMIZERS.register(name, groups)
    register_schema("optim", name, schema or OptimConfig)


def register_arch(name: str, network: str | type, schema: type, config: str | type = Architecture.config) -> None:
    """Make `name` an architecture: network class, dataclass of the config group arch, and class of the model's shape.

    Fields of `schema` beside those of `ArchConfig` are handed to `config` by name.
    """
    ARCHITECTURES.register(name, Architecture(network, config))
    register_schema("arch", name, schema)


def register_source(name: str, build: str | Callable, schema: type | None = None, is_remote: bool = False) -> None:
    """Make `data.name=<name>` a source of text, which `build(data, cache)` returns (llm.data.documents.DocumentSource).

    schema: dataclass of the config group, a subclass of `llm.config.data_schema.DataConfig` with the keys of its own.
    """
    TEXT_SOURCES.register(name, TextSource(build, is_remote))
    register_schema("data", name, schema or DataConfig)


def register_reward(name: str, reward: str | Callable) -> None:
    """Make `stage.reward=<name>`, and `<name>` in stage.rewards, reward answers.

    reward: a function (conversation, completion) -> number, or a subclass of `tasks.rewards.Reward`, which may have
    options.
    """
    REWARDS.register(name, reward)
