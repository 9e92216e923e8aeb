"""Compositions of the configuration, one at a time: Hydra keeps what it is at in one place of the process."""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from llm.cli.compose import compose
from llm.cli.options import group_options
from llm.errors import UserError
from llm.run.config_diff import diff_configs
from llm.utils.files import plain

LOCK = threading.Lock()
NAMED = ("arch", "optim", "data")  # groups whose option is in the configuration, as `name`


@lru_cache(maxsize=64)
def defaults(settings: tuple[str, ...]) -> dict[str, Any]:
    """Return the configuration of train.py with some settings, as plain data. Raises UserError for wrong ones."""
    with LOCK:
        return composed(settings)


def composed(settings: Sequence[str]) -> dict[str, Any]:
    """Compose without taking the lock, which the caller has."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    cfg = compose("train", settings)
    try:
        return plain(OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None


def differences_from_defaults(config: dict[str, Any], stage: str) -> list[tuple[str, Any, Any]]:
    """Return (key, default, value) of all keys in which a saved configuration differs from its groups' defaults.

    The groups are those that the configuration names; `run` and folders are left out.
    """
    options = [f"stage={stage}"] if stage in group_options("stage") else []
    for group in NAMED:
        name = (config.get(group) or {}).get("name")
        if name in group_options(group):
            options.append(f"{group}={name}")
    return diff_configs(defaults(tuple(options)), config, ("run", "paths"))
