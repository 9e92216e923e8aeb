"""The settings of a run that differ from the defaults: options of groups, and keys."""

from typing import Any

from omegaconf import OmegaConf

from llm.cli.compose import compose
from llm.cli.options import config_groups
from llm.config.check import shown
from llm.config.said import origin_of
from llm.errors import UserError
from llm.run.config_diff import ABSENT, flatten
from llm.utils.addresses import public

UNSET = (None, ABSENT, {})
ABOUT_OUTPUT = ("dry_run", "verbose", "stage.name")  # keys that go without saying


def changes(cfg: Any) -> list[str]:
    """Return what differs from the defaults of the chosen stage, as settings: `experiment=tiny`, `seed=7`.

    First come options of groups other than the default ones, then keys that differ from the values of these options; so
    what an experiment sets is listed, and what `data=hub` brings is not. Changes since the configuration was composed
    do not count, but what the parent's shape has replaced is not listed. Empty where it is not known what it was
    composed of, or the defaults cannot be composed.
    """
    origin = origin_of(cfg)
    if origin is None:
        return []
    defaults, choices = config_groups(origin.config_name, origin.sources), origin.choices
    groups = {name: defaults[name] for name in sorted(defaults, key=lambda n: n != "experiment") if name in choices}
    chosen = {name: choices[name] for name in groups}
    lines = [f"{name}={as_option(chosen[name])}" for name in groups if is_changed(groups[name], chosen[name], name)]
    own = ("experiment", "local")  # whose values are what differs
    base = [f"{name}={as_option(option)}" for name, option in chosen.items() if name not in own]
    try:
        before = OmegaConf.to_container(compose(origin.config_name, base, origin.sources), resolve=False)
    except UserError:
        return []
    before, after = flatten(public(before)), flatten(public(origin.values))
    for name, key in (("model", "model.depth"), ("arch", "arch.name")):
        if is_replaced(cfg, key, after.get(key)):
            lines = [line for line in lines if not line.startswith(f"{name}=")]
    for key in {**after, **before}:
        pair = before.get(key, ABSENT), after.get(key, ABSENT)
        if (
            pair[0] != pair[1]
            and not is_replaced(cfg, key, pair[1])
            and key not in ABOUT_OUTPUT
            and not (pair[0] in UNSET and pair[1] in UNSET)
        ):
            lines.append(f"~{key}" if pair[1] == ABSENT else f"{key}={shown(pair[1])}")
    return lines


def is_replaced(cfg: Any, key: str, value: Any) -> bool:
    """Return whether a key of the model's shape has no longer the value that it was composed with."""
    is_shape = key.startswith(("model.", "arch.")) and key != "model.vocab_size"
    return is_shape and "${" not in str(value) and value != OmegaConf.select(cfg, key, default=ABSENT)


def as_option(option: Any) -> str:
    """Return the option of a group as it is written in a setting."""
    return "null" if option is None else f"[{','.join(option)}]" if isinstance(option, list) else str(option)


def is_changed(default: Any, chosen: Any, name: str) -> bool:
    """Return whether an option is another than the group's default; one that follows another group is none."""
    return name != "stage" and not (isinstance(default, str) and "${" in default) and chosen != default
