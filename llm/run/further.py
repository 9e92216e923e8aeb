"""The further models that a configuration names beside the one it starts from, such as a teacher. Needs no torch."""

from omegaconf import DictConfig, ListConfig, OmegaConf

from llm.config.stages import Stage
from llm.errors import UserError


def further_names(cfg: DictConfig, row: Stage) -> dict[str, str]:
    """Return what the keys of `Stage.other_parents` that are set name: a run, run/stage or folder, by the key.

    Each item of a list has a key of its own, such as stage.teachers.0.
    Raises UserError for a value that is no text.
    """
    found = {key: value for key in row.other_parents if (value := _selected(cfg, key)) is not None}
    for key in [key for key, value in found.items() if isinstance(value, ListConfig)]:
        found |= {f"{key}.{i}": value for i, value in enumerate(found.pop(key))}
    for key, value in found.items():
        if not isinstance(value, str) or not value.strip("/ "):
            raise UserError(f"{key}={str(value)[:80]}: name a model, <run>/<stage> or a folder")
    return found


def _selected(cfg: DictConfig, key: str) -> object:
    """Return the value at a key, None where the keys above it hold no mapping: those are checked elsewhere."""
    *above, last = key.split(".")
    node = OmegaConf.select(cfg, above[0])
    for name in above[1:]:
        node = node.get(name) if isinstance(node, DictConfig) else None
    return node.get(last) if isinstance(node, DictConfig) else None
