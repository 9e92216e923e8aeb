"""Functions that plugins call to add an optimizer or an architecture to Fathom; `llm.config.stages` adds stages.

A plugin is a module named by `plugins=[my_module]` (llm.config.plugins); docs/extend.md has a recipe for each. A thing
is given itself, or by its dotted name, which keeps the start of a command line quick. Nothing heavy is imported here.
"""

from collections.abc import Callable
from typing import Any

from llm.config.registries import (
    ARCHITECTURES,
    OPTIMIZERS,
    UPDATE_RULES,
    Architecture,
)
from llm.config.schema import OptimConfig, register_schema
from llm.errors import UserError

# Functions of earlier versions, and the key that now names such a class.
NAMED_BY_KEY = {
    "register_task": "data.tasks.<name>._target_=package.module.Class",
    "register_source": "data=custom data.source._target_=package.module.Class",
    "register_reward": "stage.reward_options.<name>._target_=package.module.Class with stage.reward=<name>",
}


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


def __getattr__(name: str) -> Any:
    """Say which key names what a plugin registered in earlier versions. Raises UserError."""
    if name in NAMED_BY_KEY:
        raise UserError(f"{name} is no longer needed: the configuration names the class, {NAMED_BY_KEY[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
