"""The check of the command line: a misspelt key, option or value is one helpful line, before any work starts.

Hydra would notice most of these mistakes too, but only say that a key is not in a struct. Here the configuration is
composed with the chosen options once, and each override is tried on it.
"""

import importlib.util
import itertools
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any

from llm.cli.explain import explain
from llm.cli.options import CONF, config_folders, config_groups, group_options, listed, no_option, unknown_key
from llm.config.check import as_text, check_model_size, check_task_names, check_values, shown
from llm.config.renamed import renamed_key
from llm.config.said import note_settings
from llm.config.schema import VARIANTS, known_keys
from llm.errors import UserError

__all__ = ["CONF", "check_overrides", "compose", "config_groups", "group_options"]

MIXTURE = re.compile(r"data\.mixture\.\w+")
CHOOSE_MIXTURES = ("stage", "data", "mixture", "experiment")  # groups that decide which tasks a mixture has


def check_overrides(config_name: str, argv: Sequence[str]) -> None:
    """Raise `UserError` for the first override in `argv` that cannot be meant, for every job of a sweep.

    Groups and their options are compared with the files in `conf/`, keys and values with the composed configuration,
    so what a data or callbacks file adds is known as well.
    """
    from hydra._internal.utils import get_args_parser
    from omegaconf.errors import MissingMandatoryValue

    _check_dashes(argv)
    args = get_args_parser().parse_args(list(argv))
    try:
        _check_all(config_name, argv, args)
    except MissingMandatoryValue as error:
        raise UserError(no_value(error)) from None


def _check_all(config_name: str, argv: Sequence[str], args: Any) -> None:
    """Raise UserError for the first override that cannot be meant; args: `argv` as Hydra's own parser reads it."""
    folders = config_folders(argv)
    overrides = parse(args.overrides)
    _check_launcher(launcher(argv), overrides)
    for override in overrides:
        _check_plugin_of_hydra(override)
    overrides = [o for o in overrides if not re.match(r"hydra[./]", o.key_or_group)]
    if not args.multirun:
        for override in overrides:
            if override.is_sweep_override():
                raise UserError(f"{override.input_line}: several values make a sweep, which needs -m (or --multirun)")
    for override in overrides:
        _check_renamed(override)
    groups = config_groups(config_name)
    chosen, values = [], []
    for override in overrides:
        is_group = override.key_or_group in groups and not isinstance(_values(override)[0], dict)
        (chosen if is_group else values).append(override)
    for override in chosen:
        _check_group(override, groups, folders)
    for override in values:
        _check_first_part(config_name, override, groups)
    for choice in itertools.product(*(_lines(o) for o in chosen)):
        _check_values(config_name, choice, values, args.config_dir)
    if args.multirun:
        _check_sweep(config_name, chosen, values, args.config_dir)


def swept_overrides(argv: Sequence[str]) -> list[Any]:
    """Return the overrides in `argv` that have several values; none without -m."""
    from hydra._internal.utils import get_args_parser

    args = get_args_parser().parse_args(list(argv))
    return [o for o in parse(args.overrides) if o.is_sweep_override()] if args.multirun else []


def launcher(argv: Sequence[str]) -> str:
    """Return the option of `hydra/launcher` in `argv`, which starts the jobs of a sweep; `basic` if none is given."""
    return next((arg.partition("=")[2] for arg in reversed(argv) if arg.startswith("hydra/launcher=")), "basic")


def quote_raw(config_name: str, argv: Sequence[str]) -> list[str]:
    """Return `argv` with the values of free-text keys (`prompt=...`) in quotes, in which Hydra reads no grammar."""
    raw = {name for name, spec in known_keys(config_name).items() if spec.metadata.get("raw")}

    def quote(arg: str) -> str:
        name, equals, text = arg.partition("=")
        if not equals or name not in raw or text == "null":
            return arg
        return f"{name}={_quoted(text)}"

    return [quote(arg) for arg in argv]


def without_groups(config_name: str, argv: Sequence[str]) -> list[str]:
    """Return `argv` with values of `no_group` keys as {name: value}: Hydra takes others for an option of the group."""
    names = {name for name, spec in known_keys(config_name).items() if spec.metadata.get("no_group")}

    def wrap(arg: str) -> str:
        name, equals, _ = arg.partition("=")
        if not equals or name not in names:
            return arg
        return f"{name}=" + ",".join(f"{{name: {_quoted(as_text(value))}}}" for value in _values(parse([arg])[0]))

    return [wrap(arg) for arg in argv if arg.partition("=")[0] not in names or not arg.endswith("=null")]


def whole_mixtures(config_name: str, argv: Sequence[str], config_dir: str | None = None) -> list[str]:
    """Return `argv` with `~data.mixture.sft.<task>` for every task before `data.mixture.sft={...}`.

    So the mapping is the whole mixture; Hydra alone would merge it into the one that is there. Raises UserError in a
    sweep whose jobs have different tasks in this mixture.
    """
    from hydra._internal.utils import get_args_parser

    if not any(_sets_mixture(config_name, arg) for arg in argv):
        return list(argv)
    args, groups = get_args_parser().parse_args(list(argv)), config_groups(config_name)
    overrides = [o for o in parse(args.overrides) if o.key_or_group in groups and o.key_or_group in CHOOSE_MIXTURES]
    choices = list(itertools.product(*(_lines(o) for o in overrides)))
    lines, before = [], []
    for arg in argv:
        new = [arg]
        if _sets_mixture(config_name, arg):
            key = arg.partition("=")[0].lstrip("+")
            jobs = [[*choice, *before] for choice in choices]
            tasks = _tasks_of(config_name, key, jobs, config_dir or args.config_dir)
            new = [*(f"~{key}.{task}" for task in tasks), f"++{arg.lstrip('+')}"]
        lines += new
        of_mixtures = [line for line in new if MIXTURE.match(line.lstrip("+~"))]
        before += [line for line in of_mixtures if not parse([line])[0].is_sweep_override()]
    return lines


def _sets_mixture(config_name: str, arg: str) -> bool:
    """Return whether an argument gives a mapping for a mixture that exists, as in `data.mixture.sft={chat: 1}`."""
    name, _, value = arg.partition("=")
    key = name.lstrip("+")
    return MIXTURE.fullmatch(key) is not None and value.lstrip().startswith("{") and key in known_keys(config_name)


def _tasks_of(config_name: str, key: str, jobs: Sequence[Sequence[str]], config_dir: str | None) -> tuple[str, ...]:
    """Return the tasks of the mixture `key`; UserError where they differ between the jobs of a sweep."""
    from omegaconf import OmegaConf

    found = {tuple(OmegaConf.select(compose(config_name, lines, config_dir), key) or ()) for lines in jobs}
    if len(found) > 1:
        raise UserError(
            f"{key}={{...}}: the jobs of this sweep have different tasks in it: give it to a command of each"
        )
    return found.pop()


def no_value(error: Exception | str) -> str:
    """Return the error line for a key that is read and has no value: the key, or OmegaConf's MissingMandatoryValue."""
    key = str(getattr(error, "full_key", None) or error).splitlines()[0].removeprefix("Missing mandatory value: ")
    return f"{key} has no value: give it in the option's YAML file or the command line"


def _quoted(text: str) -> str:
    """Quote a text so that it arrives unchanged.

    OmegaConf reads ${...} and Hydra reads quotes; both remove a backslash before them and halve the backslashes before.
    """
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def parse(lines: Sequence[str]) -> list[Any]:
    """Parse the settings of a command line into Hydra's overrides. Raises UserError for one that cannot be read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    overrides = []
    for line in lines:
        try:
            overrides.append(parser.parse_override(line))
        except (HydraException, ValueError):  # of Python: a number of more than 4,300 digits
            if "=" not in line:
                raise UserError(f"{line!r} is no setting: write key=value, as in model=d4 or max_steps=100") from None
            name, _, value = line.partition("=")
            if len(value) > 1000:
                raise UserError(f"{name}={shown(value)}: too long a value, or one that cannot be read") from None
            hint = f"put special characters in quotes of their own: \"{name}='{value}'\""
            raise UserError(f"{line!r} cannot be read: {hint}") from None
    return overrides


def _check_dashes(argv: Sequence[str]) -> None:
    """Raise UserError for a setting written with dashes, before argparse answers with a page of usage."""
    from hydra._internal.utils import get_args_parser

    options = {text for action in get_args_parser()._actions for text in action.option_strings}
    for arg in argv:
        name = arg.partition("=")[0]
        if name.startswith("--") and name not in options:
            bare = name.lstrip("-").replace("-", "_")
            raise UserError(f"{arg}: no such option; settings have no dashes: {bare}=<value> (list: --help)")


def _check_launcher(name: str, overrides: list[Any]) -> None:
    """Raise UserError for a launcher that is not installed, or that would start a chain of stages all at once."""
    if name == "basic":
        return
    if re.match("slurm|submitit", name) and importlib.util.find_spec("submitit") is None:
        raise UserError(f"hydra/launcher={name}: needs a package of its own: pip install -e '.[slurm]'")
    if name.endswith("slurm") and shutil.which("sbatch") is None:
        raise UserError(f"hydra/launcher={name}: there is no sbatch here; run this where jobs are submitted")
    if any(o.key_or_group == "stage" and o.is_sweep_override() for o in overrides):
        raise UserError(f"hydra/launcher={name} starts all jobs at once, but stages follow each other: give one stage")


def _check_plugin_of_hydra(override: Any) -> None:
    """Raise UserError for a value in the place of a launcher's settings: Hydra looks at them in a sweep only."""
    name = override.key_or_group
    if name in ("hydra.launcher", "hydra.sweeper") and not all(isinstance(v, dict) for v in _values(override)):
        group = name.replace(".", "/")
        raise UserError(f"{override.input_line}: choose one by name, {group}=<name>; its settings are {name}.<key>")


def _values(override: Any) -> list[Any]:
    """Return the values of an override: one, or all of a sweep."""
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


def _lines(override: Any) -> list[str]:
    """Return the override as a line of text, once for every value of a sweep."""
    if not override.is_sweep_override():
        return [override.input_line]
    return [f"{override.get_key_element()}={text}" for text in override.sweep_string_iterator()]


def _check_renamed(override: Any) -> None:
    """Raise UserError where an override, or a key in its mapping, has an old name."""
    for value in _values(override):
        for name in [override.key_or_group, *(_dotted_keys(value, override.key_or_group))]:
            if problem := renamed_key(name):
                raise UserError(f"{override.input_line}: {problem}")


def _dotted_keys(value: Any, prefix: str) -> Iterable[str]:
    """Yield the dotted keys of a mapping such as batch={micro_batch_size: 4}; nothing for a plain value."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield f"{prefix}.{key}"
        yield from _dotted_keys(inner, f"{prefix}.{key}")


def _check_group(override: Any, groups: dict[str, Any], folders: list[Path]) -> None:
    """Raise UserError where the value of a group is not the name of an option, or a list of names."""
    group = override.key_or_group
    options = group_options(group, folders)
    shown = listed(options)
    if override.is_delete():
        raise UserError(f"{override.input_line}: choose one of {shown} instead")
    if override.is_add() or override.is_force_add():
        raise UserError(f"{override.input_line}: {group!r} is there already; leave out the '+'")
    for value in _values(override):
        if value is None:
            raise UserError(f"{group}=null: {'leave it out' if groups[group] is None else f'choose one of {shown}'}")
        for name in value if isinstance(value, list) else [value]:
            if name in options or _is_file(f"{group}/{name}.yaml", folders):
                continue
            raise UserError(no_option(group, name, options))


def _is_file(name: str, folders: list[Path]) -> bool:
    """Return whether one of the folders has this file; a name that no file can have is none."""
    try:
        return any((folder / name).is_file() for folder in folders)
    except (OSError, ValueError):
        return False


def _check_first_part(config_name: str, override: Any, groups: dict[str, Any]) -> None:
    """Raise UserError where the first part of a dotted key does not exist. Needs no composition."""
    name = override.key_or_group
    if override.package is not None:
        raise UserError(f"{override.input_line}: '@' moves a group to another place, which no setting here needs")
    if name.split(".")[0] not in known_keys(config_name):
        raise UserError(unknown_key(config_name, name, [*groups, *_dotted(compose(config_name), "")]))


def _check_values(config_name: str, choice: Sequence[str], values: list[Any], config_dir: str | None) -> None:
    """Try every value on the configuration composed with the options `choice`."""
    cfg = compose(config_name, choice, config_dir)
    for override in values:
        for value in _values(override):
            _try_override(config_name, cfg, override, value, choice)
            if override.is_sweep_override():
                check_values(cfg)
    check_values(cfg)
    if config_name == "train":
        check_model_size(cfg)
    if cfg.get("data") is not None:
        check_task_names(cfg.data, cfg.stage)


def _check_sweep(config_name: str, chosen: list[Any], values: list[Any], config_dir: str | None) -> None:
    """Raise UserError for a key of a swept group that the default option lacks: Hydra composes that option first."""
    swept = [o.key_or_group for o in chosen if o.is_sweep_override()]
    fixed = [line for o in chosen if not o.is_sweep_override() for line in _lines(o)]
    inside = [o for o in values if o.key_or_group.partition(".")[0] in swept and not o.is_sweep_override()]
    cfg = compose(config_name, fixed, config_dir) if inside else None
    for override in inside:
        try:
            _try_override(config_name, cfg, override, _values(override)[0], fixed)
        except UserError:
            group = override.key_or_group.partition(".")[0]
            raise UserError(
                f"{override.input_line}: not every option of {group} has this key, so a sweep over {group} cannot take "
                f"it; give it to the command of its own {group}, or put it into conf/experiment/<name>/<{group}>.yaml"
            ) from None


def compose(config_name: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> Any:
    """Compose the configuration of an entry point. Raises UserError with file and key for a mistake in a YAML file."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from llm.config.schema import register

    folders = [CONF, *([Path(config_dir).resolve()] if config_dir else [])]
    register(folders)
    lines = without_groups(config_name, whole_mixtures(config_name, overrides, config_dir))
    lines += [f"hydra.searchpath=[file://{folder}]" for folder in folders[1:]]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose(config_name, lines)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OverflowError) as error:
        raise UserError(explain(config_name, error, folders)) from None
    note_settings(cfg, parse(overrides))
    return cfg


def _try_override(config_name: str, cfg: Any, override: Any, value: Any, choice: Sequence[str]) -> None:
    """Apply one override to `cfg` as Hydra will, or raise `UserError`."""
    from omegaconf import OmegaConf

    name, line = override.key_or_group, override.input_line
    _check_parents(cfg, name)
    adds = override.is_add() or override.is_force_add()
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
        verb = "added" if adds else "left out"
        raise UserError(f"{line}: {name!r} cannot be {verb}, {above or 'the top level'} has a fixed set of keys")
    if adds and name.startswith("data.") and cfg.data is None:
        raise UserError(f"{line}: choose data=<option> first ({', '.join(group_options('data'))})")
    if adds and name.startswith("data.tasks.") and name.split(".")[2] not in cfg.data.tasks:
        raise UserError(f"{line}: describe a new task in a file of conf/data/ or conf/experiment/")
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
    owners = [option for option, schema in VARIANTS.get(group, {}).items() if rest in schema.__dataclass_fields__]
    if owners and config_name == "train":
        here = cfg[group].name
        advice = "give it in a command of its own or in conf/experiment/<experiment>/<stage>.yaml"
        tail = f"; {advice}" if group == "stage" and any(line.startswith("stage=") for line in choice) else ""
        return f"{name}: only {group}={' or '.join(owners)} has this key, not {group}={here}{tail}"
    if OmegaConf.select(cfg, group) is None and group in cfg and rest:
        return f"{name}: choose {group}=<option> first ({', '.join(group_options(group))})"
    above = name.rpartition(".")[0]
    parent = OmegaConf.select(cfg, above) if above else None
    siblings = [f"{above}.{key}" for key in parent] if isinstance(parent, DictConfig) else []
    last = name.rpartition(".")[2]
    elsewhere = [key for key in (*cfg, *_dotted(cfg, "")) if key.rpartition(".")[2] == last]
    message = unknown_key(config_name, name, siblings + elsewhere if siblings else _dotted(cfg, ""))
    if isinstance(parent, DictConfig) and not _is_typed(parent):
        message += f"; to add a new one write +{name}=..."
    return message


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
