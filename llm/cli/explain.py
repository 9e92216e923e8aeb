"""Turn the messages of Hydra, OmegaConf and the YAML reader into one line with file and key."""

import re
from collections.abc import Sequence
from pathlib import Path

from llm.cli.hydra_plugins import missing_plugin
from llm.cli.options import CONF, config_groups, group_options, no_option, unknown_key
from llm.config.renamed import renamed_key
from llm.config.schema import known_keys, owners


def explain(config_name: str, error: Exception, folders: Sequence[Path] = (CONF,)) -> str:
    """Return one line, with the file at fault, for a message of Hydra, OmegaConf or the YAML reader."""
    if (mark := getattr(error, "problem_mark", None)) is not None:
        return f"{_shown(Path(mark.name))}: line {mark.line + 1} is not valid YAML ({error.problem})"
    cause = error if error.__cause__ is None else error.__cause__
    text = f"{error}\n{cause}" if cause is not error else str(error)
    where = re.search(r"[Ii]n '([^']+)'", text)
    place = f"{_source(where[1], folders)}: " if where else ""
    if schema := re.search(r"Could not load 'schema/(\w+)/(\w+)'", text):
        return f"{schema[1]}={schema[2]}: no plugin registers its schema; name the module that does: plugins=[<module>]"
    option = re.search(r"Could not find '(.+)/([^/']+)'", text)
    if option and option[1].startswith("hydra/"):
        return missing_plugin(option[1], option[2]) or no_option(option[1], option[2], _of_hydra(option[1], folders))
    if option:
        chosen = rf"override +/?{option[1]} *: *{option[2]}\b"
        files = [f for folder in folders for f in folder.rglob("*.yaml") if re.search(chosen, f.read_text("utf-8"))]
        problem = no_option(option[1], option[2], group_options(option[1], folders))
        return f"{_shown(files[0])}: {problem}" if files else problem
    full_key = re.search(r"full_key: (\S+)", text)
    if full_key and full_key[1].startswith("hydra."):
        line = next((one for one in str(cause).splitlines() if one.strip()), type(cause).__name__)
        return f"{full_key[1]}: {line} (--cfg hydra shows Hydra's own settings)"
    if full_key and (problem := renamed_key(full_key[1])):
        return place + problem
    if full_key and re.search(r"Key '[^']*' (not in|is not in)", text):
        group, _, rest = full_key[1].partition(".")
        if rest and (at_home := owners(full_key[1])):
            advice = "; give it in conf/experiment/<experiment>/<stage>.yaml" if group == "stage" else ""
            return f"{place}{full_key[1]}: only {group}={' or '.join(at_home)} has this key{advice}"
        return place + unknown_key(config_name, full_key[1], known_keys(config_name))
    if full_key and "is not Optional" in text:
        group = f"; a group is left out by `- override /{full_key[1]}: null` in the file's defaults list"
        hint = group if full_key[1] in config_groups(config_name) else ""
        return f"{place}{full_key[1]}=null: must have a value{hint}"
    lines = [re.sub(r"^In '[^']+': ", "", line.strip()) for line in text.splitlines()]
    lines = [line for line in lines if line and not line.endswith("while composing config:")]
    return place + (f"{full_key[1]}: " if full_key else "") + (lines[0] if lines else type(error).__name__)


def _of_hydra(group: str, folders: Sequence[Path]) -> list[str]:
    """Return the options of a group of Hydra: files, and those of Hydra and its plugins that are installed."""
    from hydra.core.config_store import ConfigStore

    stored = [name.removesuffix(".yaml") for name in ConfigStore.instance().list(group)]
    return sorted({*stored, *group_options(group, folders)})


def _source(name: str, folders: Sequence[Path]) -> str:
    """Return the file of a config that Hydra calls `name`, as in experiment/demo; a later folder goes before."""
    found = [folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file()]
    return _shown(found[-1]) if found else f"{CONF.name}/{name}.yaml"


def _shown(file: Path) -> str:
    """Return a path for a message: files of conf/ begin with conf/, other paths are complete."""
    return str(file.relative_to(CONF.parent)) if file.is_relative_to(CONF) else str(file)
