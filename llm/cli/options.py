"""Groups, options and keys that exist, and what to say about a name that does not."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.config.generated import GENERATED
from llm.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
LOCAL = CONF / "local"  # users' own defaults and options on this machine


@dataclass(frozen=True)
class Sources:
    """Folders and main file of a command's configuration.

    folders: of YAML files; where several have a file of one name, the first counts. primary: name of the main file,
    where --config-name gives one.
    """

    folders: tuple[Path, ...] = (CONF,)
    primary: str | None = None


OURS = Sources()


def config_groups(config_name: str, sources: Sources = OURS) -> dict[str, Any]:
    """Return the groups of an entry point with their default options, in the order of its defaults list.

    sources: those of a main file of the user's are added, where it brings some.
    """
    groups: dict[str, Any] = {}
    own = [folder / f"{sources.primary or config_name}.yaml" for folder in sources.folders]
    for file in dict.fromkeys((CONF / f"{config_name}.yaml", next(filter(Path.is_file, own)))):
        for entry in _defaults_list(file):
            name, option = next(iter(entry.items())) if isinstance(entry, dict) else ("@", None)
            name = name.removeprefix("optional ").removeprefix("/")
            if "@" not in name and name != "hydra" and not name.startswith(("override ", "hydra/")):
                groups[name] = option
    return groups


def _defaults_list(file: Path) -> list[Any]:
    """Return the defaults list of a YAML file; [] where it has none."""
    found = content_of(file).get("defaults")
    return found if isinstance(found, list) else []


def content_of(file: Path) -> dict[str, Any]:
    """Return what a YAML file holds, ${...} as it stands; {} where that is no mapping. UserError for one without form.

    Whatever else is wrong with it, Hydra says when it composes.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    return content if isinstance(content, dict) else {}


def group_options(group: str, folders: Iterable[Path] = (CONF,)) -> list[str]:
    """List the options of a group, d2 before d10: generated ones, and YAML files that begin with no underscore."""
    files = {f.stem for folder in folders for f in (folder / group).glob("*.yaml") if not f.name.startswith("_")}
    names = files | GENERATED.get(group, {}).keys()
    return sorted(names, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)])


def nearest(word: str, candidates: Iterable[str], floor: float = 0.6) -> str | None:
    """Return the candidate most like `word` in spelling, then in the number within; None if none reaches `floor`.

    A word without a dot is also compared with the last part of a dotted candidate, and found as a part of it:
    `depth` finds `model.depth`, `lr` finds `optim.matrix_lr`, `optim.lr_frac` finds `stage.lr_frac`.
    """

    def likeness(name: str) -> tuple[float, float]:
        numbers = [re.findall(r"\d+", text) for text in (word, name)]
        distance = abs(int(numbers[0][0]) - int(numbers[1][0])) if all(numbers) else 0
        ratio = difflib.SequenceMatcher(None, word, name).ratio()
        last = name.rpartition(".")[2]
        deep = 0.3 * max(0, name.count(".") - 1)  # lr is rather optim.matrix_lr than model.lora.lr
        if last != name and "." not in word:
            ratio = max(ratio, difflib.SequenceMatcher(None, word, last).ratio() - 0.01 - deep)
        if last == word.rpartition(".")[2]:  # in another place, as trainer.strategy for strategy
            ratio = max(ratio, 0.95 - deep)
        if set(word.split("_")) <= set(last.split("_")):
            ratio = max(ratio, (0.76 if last.endswith(word) else 0.75) - deep)
        if all(numbers) and re.sub(r"\d+", "", word) == re.sub(r"\d+", "", name):
            ratio = max(ratio, 0.9)
        return ratio, -distance

    best = max(candidates, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= floor else None


def no_option(group: str, name: Any, options: list[str], elsewhere: Sequence[str] = ()) -> str:
    """Return the error line for an option that a group does not have, with the option most like it.

    elsewhere: groups that have an option of this name.
    """
    hint = f"did you mean {group}={nearest(str(name), options, floor=0)}?"
    if not isinstance(name, str) and not any(re.search(r"\d", option) for option in options):
        hint = f"its values are written {group}.<key>=<value>"
    if str(name).lower() == "none":
        hint = f"did you mean {group}=null?"
    elif elsewhere:
        hint = f"did you mean {elsewhere[0]}={name}?"
    return f"{group}={name} does not exist; {hint} (options: {listed(options)})"


def listed(options: list[str]) -> str:
    """Return the names for a message, only the first two and the last where they are many."""
    return f"{options[0]}, {options[1]} ... {options[-1]}" if len(options) > 20 else ", ".join(options)


def unknown_key(config_name: str, name: str, candidates: Iterable[str]) -> str:
    """Return the error line for a key that does not exist, with the key most like it if any is."""
    best = nearest(name, candidates)
    hint = f"; did you mean {best!r}?" if best else ""
    return f"unknown key {name!r}{hint} (list: python {config_name}.py --help all)"
