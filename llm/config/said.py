"""Note which keys a command names: a stage takes the rest of the model's shape from its parent.

A composed configuration does not tell a value of the command line from one of a preset. So whoever composes it notes
the settings it was composed with, and the options of its groups, to find what differs from the defaults.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm.utils.source import conf_folder

# Attributes of the configuration; a copy loses them, and then nothing is known.
NOTE = "_settings_of_the_command"
ORIGIN = "_composed_of"
MODEL_FILES = conf_folder() / "model"


class Origin(NamedTuple):
    """Origin of a configuration: its main file, the chosen options by group, folders, and its values."""

    config_name: str
    choices: dict[str, Any]
    sources: Any  # llm.cli.options.Sources
    values: dict[str, Any]  # ${...} as it stands


def note_settings(cfg: Any, settings: Sequence[Any]) -> None:
    """Note on `cfg` the parsed overrides (Hydra's) that it was composed with."""
    vars(cfg)[NOTE] = [key for setting in settings for key in _keys(setting.key_or_group, setting.value())]


def said(cfg: Any, key: str) -> bool:
    """Return whether the command named `key`, a value or its whole group; True where nothing was noted."""
    noted = vars(cfg).get(NOTE)
    return noted is None or key in noted or key.partition(".")[0] in noted


def names_key(cfg: Any, key: str) -> bool:
    """Return whether it was noted that the command named this very key, and not its group alone."""
    return key in vars(cfg).get(NOTE, ())


def knows_settings(cfg: Any) -> bool:
    """Return whether it was noted what `cfg` was composed with."""
    return NOTE in vars(cfg)


def note_origin(cfg: Any, config_name: str, choices: Mapping[str, Any], sources: Any) -> None:
    """Note on `cfg`, not resolved and not changed yet, what it was composed of: see `Origin`."""
    from omegaconf import OmegaConf

    vars(cfg)[ORIGIN] = Origin(config_name, dict(choices), sources, OmegaConf.to_container(cfg, resolve=False))


def origin_of(cfg: Any) -> Origin | None:
    """Return what `cfg` was composed of, None where nothing was noted."""
    return vars(cfg).get(ORIGIN)


def _keys(name: str, value: Any) -> Iterator[str]:
    """Yield the keys that `name`=`value` sets. model=d<n> sets the depth alone, other options all of their group."""
    if isinstance(value, dict):
        for inner, part in value.items():
            yield from _keys(f"{name}.{inner}", part)
    elif name == "model" and re.fullmatch(r"d\d+", str(value)) and not (MODEL_FILES / f"{value}.yaml").is_file():
        yield "model.depth"
    else:
        yield name
