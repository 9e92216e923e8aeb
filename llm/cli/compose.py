"""Read the settings of a command line, and compose the configuration of an entry point with them."""

import itertools
import re
import sys
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm.cli.explain import explain
from llm.cli.options import CONF, OURS, Sources, config_groups, content_of
from llm.cli.sweep import lines_of, values_of
from llm.config.check import as_text, shown
from llm.config.said import note_origin, note_settings
from llm.config.schema import known_keys
from llm.errors import UserError
from llm.utils.source import local_folders

MIXTURE = re.compile(r"data\.mixture\.\w+")
CHOOSE_MIXTURES = ("stage", "data", "mixture", "experiment")  # groups that decide which tasks a mixture has


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
            raise UserError(_unreadable(line)) from None
    return overrides


def _unreadable(line: str) -> str:
    """Return the error line for a setting that Hydra's grammar does not have, with how it is written."""
    name, equals, value = line.partition("=")
    if not equals:
        return f"{line!r} is no setting: write key=value, as in model=d4 or max_steps=100"
    if len(value) > 1000:
        return f"{name}={shown(value)}: too long a value, or one that cannot be read"
    if bare := re.fullmatch(r"[\s/]+(.+)", name):
        return f"{line!r} cannot be read: a key begins with a letter: {bare[1]}={value}"
    hint = f"put special characters in quotes of their own: \"{name}='{value}'\""
    if call := re.fullmatch(r"(\w+)\((.*)\)", value):
        hint = f"put special characters in quotes of their own: \"{name}={call[1]}('{call[2]}')\""
    if value.startswith("{"):
        keys = re.sub(r"""(["'])([\w.]+)\1\s*:""", r"\2:", value)
        hint = f"keys in braces have no quotes, texts with special characters have some, as in '{name}={keys}'"
    return f"{line!r} cannot be read: {hint}"


def hydra_parser() -> ArgumentParser:
    """Return Hydra's parser of the command line. Raises UserError on a Python that is too new for this Hydra."""
    import hydra
    from hydra._internal.utils import get_args_parser

    try:
        return get_args_parser()
    except ValueError as error:  # argparse of Python 3.14 takes no help text but a str
        version = ".".join(map(str, sys.version_info[:2]))
        raise UserError(
            f"Hydra {hydra.__version__} cannot read a command line on Python {version} ({error}): use Python 3.13, "
            "or a Hydra that knows this one"
        ) from error


def flags_of(argv: Sequence[str]) -> Any:
    """Return Hydra's own arguments of a command line, parsed, with the settings as `overrides`.

    Raises UserError where Hydra would print a page of usage.
    """

    def refuse(message: str) -> None:
        raise UserError(f"{message.removeprefix('argument ')} (Hydra's own arguments: --hydra-help)")

    parser = hydra_parser()
    parser.error = refuse
    return parser.parse_args(list(argv))


def quote_raw(config_name: str, argv: Sequence[str]) -> list[str]:
    """Return `argv` with the values of free-text keys (`prompt=...`) in quotes, in which Hydra reads no grammar."""
    raw = {name for name, spec in known_keys(config_name).items() if spec.metadata.get("raw")}

    def quote(arg: str) -> str:
        name, equals, text = arg.partition("=")
        if not equals or name not in raw or text == "null":
            return arg
        return f"{name}={quoted(text)}"

    return [quote(arg) for arg in argv]


def without_groups(config_name: str, argv: Sequence[str]) -> list[str]:
    """Return `argv` with values of `no_group` keys as {name: value}: Hydra takes others for an option of the group."""
    names = {name for name, spec in known_keys(config_name).items() if spec.metadata.get("no_group")}

    def wrap(arg: str) -> str:
        name, equals, _ = arg.partition("=")
        if not equals or name not in names:
            return arg
        return f"{name}=" + ",".join(f"{{name: {quoted(as_text(value))}}}" for value in values_of(parse([arg])[0]))

    return [wrap(arg) for arg in argv if arg.partition("=")[0] not in names or not arg.endswith("=null")]


def unwrap_names(cfg: Any) -> None:
    """Put back the plain values of keys that share their name with a group: `stage=sft` of evaluate.py is a name."""
    from omegaconf import DictConfig, OmegaConf

    schema = OmegaConf.get_type(cfg)
    for name, spec in schema.__dataclass_fields__.items():
        if spec.metadata.get("no_group") and isinstance(cfg[name], DictConfig):
            cfg[name] = cfg[name].name


def whole_mixtures(config_name: str, argv: Sequence[str], sources: Sources = OURS) -> list[str]:
    """Return `argv` with `~data.mixture.sft.<task>` for every task before `data.mixture.sft={...}`.

    So the mapping is the whole mixture; Hydra alone would merge it into the one that is there. Raises UserError in a
    sweep whose jobs have different tasks in this mixture.
    """
    if not any(_sets_mixture(config_name, arg) for arg in argv):
        return list(argv)
    args, groups = flags_of(argv), config_groups(config_name)
    overrides = [o for o in parse(args.overrides) if o.key_or_group in groups and o.key_or_group in CHOOSE_MIXTURES]
    choices = list(itertools.product(*(lines_of(o) for o in overrides)))
    lines, before = [], []
    for arg in argv:
        new = [arg]
        if _sets_mixture(config_name, arg):
            key = arg.partition("=")[0].lstrip("+")
            jobs = [[*choice, *before] for choice in choices]
            tasks = _tasks_of(config_name, key, jobs, sources)
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


def _tasks_of(config_name: str, key: str, jobs: Sequence[Sequence[str]], sources: Sources) -> tuple[str, ...]:
    """Return the tasks of the mixture `key`; UserError where they differ between the jobs of a sweep."""
    from omegaconf import OmegaConf

    found = {tuple(OmegaConf.select(compose(config_name, lines, sources), key) or ()) for lines in jobs}
    if len(found) > 1:
        raise UserError(
            f"{key}={{...}}: the jobs of this sweep have different tasks in it: give it to a command of each"
        )
    return found.pop()


def quoted(text: str) -> str:
    """Quote a text so that it arrives unchanged.

    OmegaConf reads ${...} and Hydra reads quotes; both remove a backslash before them and halve the backslashes before.
    """
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def compose(config_name: str, overrides: Sequence[str] = (), sources: Sources = OURS) -> Any:
    """Compose the configuration of an entry point. Raises UserError with file and key for a mistake in a YAML file."""
    return compose_all(config_name, overrides, sources)[0]


def compose_all(config_name: str, overrides: Sequence[str] = (), sources: Sources = OURS) -> tuple[Any, dict]:
    """Compose like `compose`; return the configuration and, as a plain mapping, that of Hydra itself."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from llm.config.schema import register

    register(sources.folders)
    lines = [*without_groups(config_name, whole_mixtures(config_name, overrides, sources)), *search_path(sources)]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(sources.folders[0]), version_base="1.3"):
            _prefer_files(sources.folders)
            cfg = hydra.compose(sources.primary or config_name, lines, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OverflowError) as error:
        raise UserError(explain(config_name, error, sources.folders)) from None
    own = OmegaConf.to_container(cfg.hydra)
    with open_dict(cfg):
        del cfg["hydra"]
    note_settings(cfg, [o for o in parse(overrides) if not o.is_hydra_override()])
    note_origin(cfg, config_name, own["runtime"]["choices"], sources)
    return cfg, own


def _prefer_files(folders: Sequence[Path]) -> None:
    """Forget options of Hydra's plugins that a file in `folders` replaces: Hydra refuses a file of a stored name."""
    from hydra.core.config_store import ConfigStore

    for group in ("launcher", "sweeper"):
        stored = ConfigStore.instance().repo.get("hydra", {}).get(group, {})
        for folder in folders:
            for file in (folder / "hydra" / group).glob("*.yaml"):
                stored.pop(file.name, None)


def search_path(sources: Sources) -> list[str]:
    """Return the setting of Hydra that adds all folders but the first, its main one; nothing where there is one."""
    folders = ",".join(quoted(f"file://{folder}") for folder in sources.folders[1:])
    return [f"hydra.searchpath=[{folders}]"] if folders else []


def find_sources(config_name: str, argv: Sequence[str]) -> tuple[Sources, list[str]]:
    """Return where the configuration lies, and `argv` without the arguments that say so.

    These are --config-dir, --config-path, --config-name and hydra.searchpath. Our own files are always found, and those
    in conf/local/, of this folder and of the source tree. Raises UserError for a folder or a main file that does not
    exist.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, short in (("--config-path", "-cp"), ("--config-dir", "-cd"), ("--config-name", "-cn")):
        parser.add_argument(name, short)
    try:
        args, rest = parser.parse_known_args(list(argv))
    except ArgumentError as error:
        raise UserError(str(error).removeprefix("argument ")) from None
    first = [_folder(args.config_path, "--config-path")] if args.config_path else [CONF]
    last = [_folder(args.config_dir, "--config-dir")] if args.config_dir else []
    primary = args.config_name.removesuffix(".yaml") if args.config_name else None
    further = [arg for arg in rest if re.match(r"\+*hydra\.searchpath=", arg)]
    if further:
        rest = [arg for arg in rest if arg not in further]
        entries = parse(further[-1:])[0].value()
    else:
        entries = _own_search_path([*first, *last], primary or config_name)
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"hydra.searchpath={entries}: must be a list of folders, as in [file:///my/conf]")
    between = [_folder(entry, "hydra.searchpath") for entry in entries]
    folders = dict.fromkeys([*first, *between, *last, CONF, *local_folders()])
    holders = [folder for folder in folders if (folder / f"{primary or config_name}.yaml").is_file()]
    if not holders:
        raise UserError(f"--config-name {primary}: there is no {primary}.yaml in {', '.join(map(str, folders))}")
    return Sources(tuple(dict.fromkeys([holders[0], *folders])), primary), rest  # Hydra wants the main file's first


def _own_search_path(folders: Sequence[Path], name: str) -> list[Any]:
    """Return `hydra.searchpath` of a main configuration file of the user's; [] for ours, which has none."""
    file = next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), CONF / f"{name}.yaml")
    if file.parent == CONF:
        return []
    of_hydra = content_of(file).get("hydra")
    return of_hydra.get("searchpath") or [] if isinstance(of_hydra, dict) else []


def _folder(entry: str, where: str) -> Path:
    """Return the folder that a path, file://path or pkg://package stands for. Raises UserError if there is none."""
    if entry.startswith("pkg://"):
        try:
            spec = find_spec(entry.removeprefix("pkg://").replace("/", "."))
        except (ModuleNotFoundError, ValueError):
            spec = None
        places = (spec and spec.submodule_search_locations) or ()
        if not places:
            raise UserError(f"{where}: there is no package {entry}; put its folder on PYTHONPATH, or install it")
        folder = Path(next(iter(places)))
    else:
        folder = Path(entry.removeprefix("file://")).resolve()
    if not folder.is_dir():
        raise UserError(f"{where}: there is no folder {folder}")
    return folder
