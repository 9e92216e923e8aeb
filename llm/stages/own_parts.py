"""Looks at a user's own classes before a stage builds anything: that they exist, fit, and take their arguments."""

from typing import Any

from omegaconf import OmegaConf

from llm.config.check import shown
from llm.config.stages import CHAT_KINDS, Stage
from llm.config.targets import check_arguments, load_target, takes
from llm.errors import UserError


def check_own_parts(cfg, row: Stage) -> None:
    """Raise UserError with key and value for a class or function in the configuration that cannot be used."""
    if row.build:
        check_of_trainer(cfg)
    if row.reads_text and cfg.data.name == "custom":
        check_arguments(load_target(cfg.data.source, "data.source"), cfg.data.source, "data.source")
    if row.kind in CHAT_KINDS:
        from tasks.registry import all_specs, place, task_class

        for name, spec in all_specs(cfg.data).items():
            if spec.get("type") is None:
                task_class(spec, place(name, spec))
    if row.kind == "rl":
        from tasks.rewards import reward_kind

        given = OmegaConf.select(cfg, "stage.reward_options")
        for name, options in given.items() if OmegaConf.is_dict(given) else ():
            if OmegaConf.is_dict(options) and "_target_" in options:
                reward_kind(name, options, "stage.reward")


def check_of_trainer(cfg) -> None:
    """Raise UserError for a callback, a logger or a plugin of Lightning that cannot be built."""
    for group in ("callbacks", "logger", "trainer.plugins"):
        for name, part in OmegaConf.select(cfg, group).items():
            check_part(f"{group}.{name}", part)


def check_part(key: str, part) -> type | None:
    """Return the class that a part of Lightning's Trainer must extend, None for any.

    Loggers get `save_dir` if they take it. Raises UserError where a `_target_` cannot be called with its arguments.
    """
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger

    base = {"callbacks": Callback, "logger": Logger}.get(key.partition(".")[0])
    thing = load_target(part, key)
    if isinstance(thing, type) and base is not None:
        load_target(part, key, base)
    more = {"save_dir": ""} if base is Logger and takes(thing, "save_dir") else {}
    check_arguments(thing, {**more, **part}, key)
    return base


def instantiate_part(key: str, part, **more) -> Any:
    """Build what a `_target_` names by Hydra's instantiate. Raises UserError that names the config key."""
    from hydra.utils import instantiate

    base = check_part(key, part)
    try:
        built = instantiate(part, **more)
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"{key}: cannot be built from {shown(part)} ({cause})") from error
    if base is not None and not isinstance(built, base):
        raise UserError(f"{key}._target_={part['_target_']}: gives {type(built).__name__}, and not a {base.__name__}")
    return built
