"""The check of the command line: a misspelt key, option or value is one helpful line, before any work starts.

Hydra would notice most of these mistakes too, but only say that a key is not in a struct. Here the configuration is
composed with the chosen options once, and each override is tried on it.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any

from llm.cli.compose import MIXTURE, compose, compose_all, find_sources, flags_of, hydra_parser, parse
from llm.cli.hydra_plugins import SEARCHES, SUBMITTED, check_launcher, check_of_hydra, check_search
from llm.cli.options import CONF, Sources, config_groups, group_options, listed, no_option, unknown_key
from llm.cli.sweep import check_sweep_kinds, expand_glob, lines_of, sweep_params, values_of
from llm.config.check import check_model_size, check_task_names, check_values, shown
from llm.config.renamed import renamed_key
from llm.config.schema import known_keys, owners
from llm.errors import UserError

# Groups that take one name, and what a list is written as instead.
ONE_NAME = {
    "experiment": "give one name; an experiment takes others over in its file: defaults: [/experiment/<name>, ...]",
    "stage": "give one name; several in a row are a sweep: -m stage=tokenizer,pretrain",
}
# Keys that are null until a mapping of any keys is given.
MAPPINGS = ("stage.reward_options.", "stage.rewards.", "data.source.", "data.sources.")

__all__ = ["CONF", "check_overrides", "compose", "config_groups", "group_options"]


@dataclass(frozen=True)
class Command:
    """A command line that has passed the check."""

    sources: Sources  # where its configuration lies
    argv: list[str]  # what Hydra reads, without the arguments that are in `sources`
    swept: list[Any]  # parsed overrides that have several values; none where it is one job
    launcher: str = "basic"  # starts the jobs of a sweep: option of hydra/launcher
    searches: str = ""  # the sweeper, if it chooses values by what earlier jobs have reached
    sweeps: bool = True  # False: one job, where that is known


def check_overrides(config_name: str, argv: Sequence[str], *, is_launched: bool = False) -> Command:
    """Raise `UserError` for the first override in `argv` that cannot be meant, for every job of a sweep.

    Groups and their options are compared with the files in `conf/`, keys and values with the composed configuration,
    so what a data or callbacks file adds is known as well. is_launched: whether torchrun or srun started the command.
    """
    from omegaconf.errors import MissingMandatoryValue

    _check_dashes(argv)
    sources, argv = find_sources(config_name, argv)
    try:
        return _check_all(config_name, argv, sources, is_launched)
    except MissingMandatoryValue as error:
        raise UserError(no_value(error)) from None


def _check_all(config_name: str, argv: list[str], sources: Sources, is_launched: bool) -> Command:
    """Check `argv`, from which the arguments in `sources` are gone. Raises UserError."""
    groups, args = config_groups(config_name, sources), flags_of(argv)
    of_hydra, lines, on_line = [], [], []
    for line, override in zip(args.overrides, parse(args.overrides), strict=True):
        if override.is_hydra_override():
            check_of_hydra(override)
            if override.key_or_group == "hydra.sweeper.params" and override.value():  # OmegaConf fails to merge these
                on_line += sweep_params(override.value())
            else:
                of_hydra.append(line)
        elif override.key_or_group in groups and override.value() is None:
            if groups[override.key_or_group] is not None:  # else nothing is chosen already
                lines.append(f"~{override.key_or_group}")  # Hydra knows no group=null
        else:
            lines.append(expand_glob(line, override, groups, sources.folders))
    lines += _params(on_line, lines, groups, sources)
    chosen, values = _sorted_out(config_name, lines, groups, sources)
    first = [lines_of(override)[0] for override in chosen]
    cfg, own = compose_all(config_name, [*first, *of_hydra], sources)
    sweeps, swept = args.multirun or str(own["mode"]).endswith("MULTIRUN"), []
    if sweeps:
        if more := _params(sweep_params(own["sweeper"].get("params")), lines, groups, sources):
            lines += more
            chosen, values = _sorted_out(config_name, lines, groups, sources)
            cfg = None
        swept = [override for override in (*chosen, *values) if override.is_sweep_override()]
        swept.sort(key=lambda override: lines.index(override.input_line))
    for override in () if sweeps else (*chosen, *values):
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: several values make a sweep, which needs -m (or --multirun)")
    kinds = own["runtime"]["choices"]
    launcher, sweeper = kinds["hydra/launcher"] or "basic", kinds["hydra/sweeper"] or "basic"
    check_launcher(launcher, swept)
    if str(own["launcher"].get("submitit_folder")).startswith("${hydra.sweep.dir}"):
        of_hydra.append(SUBMITTED)
    check_sweep_kinds(swept, sweeper)
    search = SEARCHES.match(own["sweeper"]["_target_"]) if sweeps else None
    for choice in itertools.product(*(lines_of(override) for override in chosen)):
        cfg = cfg if cfg is not None else compose(config_name, choice, sources)
        _check_values(config_name, cfg, choice, values)
        if search:
            check_search(cfg, sweeper, own["sweeper"].get("direction"), is_launched)
        cfg = None
    if sweeps:
        _check_sweep(config_name, chosen, values, sources)
    flags = [arg for arg in argv if arg not in args.overrides]
    return Command(sources, [*flags, *of_hydra, *lines], swept, launcher, search[1] if search else "", sweeps)


def _sorted_out(
    config_name: str, lines: Sequence[str], groups: dict[str, Any], sources: Sources
) -> tuple[list[Any], list[Any]]:
    """Return the parsed overrides that choose options and those that set values. Raises UserError for a name unknown.

    An added group, `+search=lr`, is one whose folder a user has made.
    """
    chosen, values = [], []
    for override in parse(lines):
        _check_renamed(override)
        name, is_mapping = override.key_or_group, isinstance(values_of(override)[0], dict)
        is_new = override.is_add() and name not in known_keys(config_name) and _is_there(name, sources.folders)
        (chosen if (name in groups or is_new) and not is_mapping and override.package is None else values).append(
            override
        )
    for override in chosen:
        _check_group(config_name, override, groups, sources)
    for override in values:
        _check_first_part(config_name, override, groups, sources)
    return chosen, values


def _params(params: list[str], lines: Sequence[str], groups: dict[str, Any], sources: Sources) -> list[str]:
    """Return the settings of `hydra.sweeper.params` with their globs spelt out, without the keys that `lines` give."""
    given = {override.get_key_element() for override in parse(lines)}
    return [
        expand_glob(line, override, groups, sources.folders)
        for line, override in zip(params, parse(params), strict=True)
        if override.get_key_element() not in given
    ]


def no_value(error: Exception | str) -> str:
    """Return the error line for a key that is read and has no value: the key, or OmegaConf's MissingMandatoryValue."""
    key = str(getattr(error, "full_key", None) or error).splitlines()[0].removeprefix("Missing mandatory value: ")
    return f"{key} has no value: give it in the option's YAML file or the command line"


def _check_dashes(argv: Sequence[str]) -> None:
    """Raise UserError for a setting written with dashes, before argparse answers with a page of usage."""
    options = {text for action in hydra_parser()._actions for text in action.option_strings}
    for arg in argv:
        name = arg.partition("=")[0]
        if name.startswith("--") and name not in options:
            bare = name.lstrip("-").replace("-", "_")
            raise UserError(f"{arg}: no such option; settings have no dashes: {bare}=<value> (list: --help)")


def _check_renamed(override: Any) -> None:
    """Raise UserError where an override, or a key in its mapping, has an old name."""
    for value in values_of(override):
        for name in [override.key_or_group, *(_dotted_keys(value, override.key_or_group))]:
            if problem := renamed_key(name):
                raise UserError(f"{override.input_line}: {problem}")


def _dotted_keys(value: Any, prefix: str) -> Iterable[str]:
    """Yield the dotted keys of a mapping such as batch={micro_batch_size: 4}; nothing for a plain value."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield f"{prefix}.{key}"
        yield from _dotted_keys(inner, f"{prefix}.{key}")


def _check_group(config_name: str, override: Any, groups: dict[str, Any], sources: Sources) -> None:
    """Raise UserError where the value of a group is not the name of an option, or a list of names."""
    group = override.key_or_group
    options = group_options(group, sources.folders)
    if override.is_delete():
        try:
            check_values(compose(config_name, [f"~{group}"]))
        except UserError:
            raise UserError(f"~{group}: something is needed here; choose one of {listed(options)}") from None
        return
    if override.is_force_add() or (override.is_add() and group in groups):
        raise UserError(f"{override.input_line}: {group!r} is there already; leave out the '+'")
    for value in values_of(override):
        for name in value if isinstance(value, list) else [value]:
            if name not in options and not _is_there(f"{group}/{name}.yaml", sources.folders):
                elsewhere = [other for other in groups if name in group_options(other, sources.folders)]
                raise UserError(no_option(group, name, options, elsewhere))
        if isinstance(value, list) and group in ONE_NAME:
            raise UserError(f"{override.input_line}: {ONE_NAME[group]}")


def _is_there(name: str, folders: Iterable[Path]) -> bool:
    """Return whether one of the folders has this file or folder; a name that no file can have is none."""
    try:
        return any((folder / name).exists() for folder in folders)
    except (OSError, ValueError):
        return False


def _check_first_part(config_name: str, override: Any, groups: dict[str, Any], sources: Sources) -> None:
    """Raise UserError where the first part of a dotted key does not exist. Needs no composition."""
    name = override.key_or_group
    if override.package is not None:
        raise UserError(f"{override.input_line}: '@' moves a group to another place, which no setting here needs")
    if name.split(".")[0] not in known_keys(config_name):
        if override.value() is not None and _is_there(name, [f for f in sources.folders if f != CONF]):
            raise UserError(f"{override.input_line}: {name} is a folder of yours, no group yet: +{override.input_line}")
        experiments = group_options("experiment", sources.folders) if "experiment" in groups else ()
        if any(override.value() == option for option in experiments):
            raise UserError(f"{override.input_line}: there is no group {name}; write experiment={override.value()}")
        raise UserError(unknown_key(config_name, name, [*groups, *_dotted(compose(config_name), "")]))


def _check_values(config_name: str, cfg: Any, choice: Sequence[str], values: list[Any]) -> None:
    """Try every value on `cfg`, the configuration composed with the options `choice`."""
    for override in values:
        for value in values_of(override):
            _try_override(config_name, cfg, override, value, choice)
            if override.is_sweep_override():
                check_values(cfg)
    check_values(cfg)
    if config_name == "train":
        check_model_size(cfg)
    if cfg.get("data") is not None:
        check_task_names(cfg.data, cfg.stage)


def _check_sweep(config_name: str, chosen: list[Any], values: list[Any], sources: Sources) -> None:
    """Raise UserError for a key of a swept group that the default option lacks: Hydra composes that option first."""
    swept = [o.key_or_group for o in chosen if o.is_sweep_override()]
    fixed = [line for o in chosen if not o.is_sweep_override() for line in lines_of(o)]
    inside = [o for o in values if o.key_or_group.partition(".")[0] in swept and not o.is_sweep_override()]
    cfg = compose(config_name, fixed, sources) if inside else None
    for override in inside:
        try:
            _try_override(config_name, cfg, override, values_of(override)[0], fixed)
        except UserError:
            group = override.key_or_group.partition(".")[0]
            raise UserError(
                f"{override.input_line}: not every option of {group} has this key, so a sweep over {group} cannot take "
                f"it; give it to the command of its own {group}, or put it into conf/experiment/<name>/<{group}>.yaml"
            ) from None


def _try_override(config_name: str, cfg: Any, override: Any, value: Any, choice: Sequence[str]) -> None:
    """Apply one override to `cfg` as Hydra will, or raise `UserError`."""
    from omegaconf import OmegaConf

    name, line = override.key_or_group, override.input_line
    _check_parents(cfg, name)
    adds = override.is_add() or (override.is_force_add() and not _exists(cfg, name))
    if not adds and not override.is_delete():
        _try_value(config_name, cfg, name, value, choice)
        return
    above = name.rpartition(".")[0]
    parent = OmegaConf.select(cfg, above) if above else cfg
    if override.is_add() and _exists(cfg, name):
        raise UserError(f"{line}: {name!r} is there already; leave out the '+'")
    if override.is_delete() and not _exists(cfg, name):
        raise UserError(_missing(config_name, cfg, name, choice))
    if _is_typed(parent):
        if override.is_force_add():
            raise UserError(_missing(config_name, cfg, name, choice))
        verb = "added" if adds else "left out"
        raise UserError(f"{line}: {name!r} cannot be {verb}, {above or 'the top level'} has a fixed set of keys")
    if adds and name.startswith("data.") and cfg.data is None:
        raise UserError(f"{line}: choose data=<option> first ({', '.join(group_options('data'))})")
    if adds and (advice := _in_a_file(cfg, name)):
        raise UserError(f"{line}: {advice}")
    if adds:
        _update(config_name, cfg, name, value, add=True)


def _check_parents(cfg: Any, name: str) -> None:
    """Raise UserError where a mapping that the dotted key `name` lies in has no value."""
    from omegaconf import DictConfig, OmegaConf

    node = cfg
    for number, part in enumerate(parts := name.split(".")[:-1], start=1):
        if not isinstance(node, DictConfig) or part not in list(node.keys()):
            return
        if OmegaConf.is_missing(node, part):
            raise UserError(no_value(".".join(parts[:number])))
        node = node[part]


def _try_value(config_name: str, cfg: Any, name: str, value: Any, choice: Sequence[str]) -> None:
    """Set `name` in `cfg`; a mapping is merged key by key, as Hydra does, or replaces a null or a whole mixture."""
    spec = _spec(config_name, name)
    if spec is not None and spec.metadata.get("fixed"):
        raise UserError(f"{name}={shown(value)}: the name comes with the option; choose {name.split('.')[0]}=<option>")
    if not _exists(cfg, name):
        raise UserError(_missing(config_name, cfg, name, choice))
    if not isinstance(value, dict) or (_is_null(cfg, name) and spec is not None and spec.type is Any):
        _update(config_name, cfg, name, value)
        return
    if name == "data.mixture":
        raise UserError(f"{name}={{...}}: give each mixture by itself, as in data.mixture.sft={{<task>: <repeats>}}")
    if MIXTURE.fullmatch(name):
        _try_mixture(config_name, cfg, name, value)
        return
    for key, inner in value.items():
        _try_value(config_name, cfg, f"{name}.{key}", inner, choice)


def _try_mixture(config_name: str, cfg: Any, name: str, repeats: dict) -> None:
    """Put a whole mixture into `cfg`, or raise UserError for a task that does not exist and for wrong repeats."""
    from omegaconf import OmegaConf

    tasks = list(OmegaConf.select(cfg, "data.tasks") or ())
    OmegaConf.update(cfg, name, {}, merge=False)
    for task, value in repeats.items():
        if task not in tasks:
            raise UserError(
                unknown_key(config_name, f"{name}.{task}", [f"{name}.{other}" for other in tasks])
                + f"; data.tasks has {', '.join(tasks) or 'no task'}"
            )
        _update(config_name, cfg, f"{name}.{task}", value, add=True)


def _is_null(cfg: Any, name: str) -> bool:
    from omegaconf import OmegaConf

    return OmegaConf.select(cfg, name) is None


def _update(config_name: str, cfg: Any, name: str, value: Any, *, add: bool = False) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.update(cfg, name, value, merge=True, force_add=add)
    except (OmegaConfBaseException, OverflowError) as error:
        spec = _spec(config_name, name)
        wanted = f"expected {_in_words(spec.type)}" if spec is not None else str(error).splitlines()[0]
        hint = f" (write {int(value)})" if isinstance(value, float) and value.is_integer() else ""
        raise UserError(f"{name}={shown(value)}: {wanted}{hint}") from None


def _spec(config_name: str, name: str) -> Field | None:
    """Return the schema field of a dotted key, also below a user's name (`data.tasks.mine.limit`), or None."""
    known = known_keys(config_name)
    parts = name.split(".")
    for pattern, spec in known.items():
        pieces = pattern.split(".")
        if len(pieces) == len(parts) and all(a == b or a == "<name>" for a, b in zip(pieces, parts, strict=True)):
            return spec
    return None


def _missing(config_name: str, cfg: Any, name: str, choice: Sequence[str]) -> str:
    """Return the error line for a key that this composition lacks: misspelt, or at home in another option."""
    from omegaconf import DictConfig, OmegaConf

    group, _, rest = name.partition(".")
    at_home = owners(name)
    if at_home and config_name == "train":
        here = cfg[group].name
        advice = "give it in a command of its own or in conf/experiment/<experiment>/<stage>.yaml"
        tail = f"; {advice}" if group == "stage" and any(line.startswith("stage=") for line in choice) else ""
        return f"{name}: only {group}={' or '.join(at_home)} has this key, not {group}={here}{tail}"
    if OmegaConf.select(cfg, group) is None and group in cfg and rest:
        return f"{name}: choose {group}=<option> first ({', '.join(group_options(group))})"
    above = name.rpartition(".")[0]
    parent = OmegaConf.select(cfg, above) if above else None
    siblings = [f"{above}.{key}" for key in parent] if isinstance(parent, DictConfig) else []
    last = name.rpartition(".")[2]
    elsewhere = [key for key in (*cfg, *_dotted(cfg, "")) if key.rpartition(".")[2] == last]
    message = unknown_key(config_name, name, siblings + elsewhere if siblings else _dotted(cfg, ""))
    if advice := _in_a_file(cfg, name):
        return f"{message}; {advice}"
    is_open = isinstance(parent, DictConfig) and not _is_typed(parent)
    if is_open or (parent is None and name.startswith(MAPPINGS)):
        message += f"; to add a new one write +{name}=..."
    return message


def _in_a_file(cfg: Any, name: str) -> str | None:
    """Return where to describe the new task or source of preferences that `name` belongs to; None for other keys."""
    for group, what in (("tasks", "task"), ("preferences", "source of preferences")):
        if name.startswith(f"data.{group}.") and cfg.data is not None and name.split(".")[2] not in cfg.data[group]:
            return f"describe a new {what} in a file of conf/data/ or conf/experiment/ (docs/data.md has one)"
    return None


def _dotted(cfg: Any, prefix: str) -> Iterable[str]:
    """Yield all dotted keys of a composed configuration."""
    from omegaconf import DictConfig

    for name in cfg:
        yield f"{prefix}{name}"
        node = cfg._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _dotted(node, f"{prefix}{name}.")


def _exists(cfg: Any, name: str) -> bool:
    from omegaconf import DictConfig, ListConfig, OmegaConf

    parent, _, last = name.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if isinstance(node, DictConfig):
        return last in list(node)
    return isinstance(node, ListConfig) and last.isdigit() and int(last) < len(node)


def _is_typed(node: Any) -> bool:
    """Return whether a dataclass fixes the keys of this node; those of tasks, callbacks and loggers are free."""
    from omegaconf import OmegaConf

    return hasattr(OmegaConf.get_type(node), "__dataclass_fields__") if node is not None else False


def _in_words(kind: Any) -> str:
    """Put a type into users' words: `int | None` is "a whole number or null"."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if kind in words:
        return words[kind]
    parts = getattr(kind, "__args__", ())
    origin = getattr(kind, "__origin__", kind)
    if origin is list:
        return "a list" + (f" of {_in_words(parts[0]).removeprefix('a ')}s" if parts else "")
    if origin is dict or hasattr(kind, "__dataclass_fields__"):
        return "a mapping"
    return " or ".join(_in_words(part) for part in parts) or kind.__name__
