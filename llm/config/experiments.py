"""Experiments that extend experiments: values "for one stage" of the inner ones hold too, where the outer is silent.

`experiment=mine` reads experiment/mine.yaml and experiment/mine/<stage>.yaml. Where mine.yaml has another experiment in
its defaults list, Hydra finds that one's file, but not its values for one stage. They are stored here as an option
`extended/mine/<stage>`, in which all values come in their order: an experiment wins over one that it extends.
"""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

GROUP = "extended"
EXTENDS = re.compile(r"^\s*-\s+(?!override\b|_self_)\S|defaults:\s*\[", re.M)  # may have another file in its defaults


def register_extended(store: Any, folders: Sequence[Path]) -> None:
    """Put `extended/<experiment>/<stage>` into Hydra's ConfigStore `store` for experiments that extend others.

    folders: of YAML files; of two files with one name the first counts.
    """
    store.repo.pop(GROUP, None)
    for name, stage, content in _extended_stages(tuple(_texts(folders).items())):
        store.store(group=f"{GROUP}/{name}", name=stage, node=content, package="_global_", provider="fathom")


@lru_cache(maxsize=4)  # a command composes several times, a panel for every page
def _extended_stages(files: tuple[tuple[str, str], ...]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (experiment, stage, values) of experiments that extend others. files: names and texts of experiments."""
    texts, found = dict(files), []
    for name in (name for name, text in files if EXTENDS.search(text)):
        layers = list(_layers(name, texts, ()))
        inner = dict.fromkeys(layer for layer, is_stage in layers if is_stage)
        stages = {other.rpartition("/")[2] for other in texts if other.rpartition("/")[0] in inner}
        found += [(name, stage, _merged(layers, stage, texts)) for stage in sorted(stages) if len(inner) > 1]
    return found


def _texts(folders: Iterable[Path]) -> dict[str, str]:
    """Return the texts of experiments by name; those in subfolders too, as sub/mine and mine/sft."""
    found: dict[str, str] = {}
    for folder in folders:
        for file in sorted((folder / "experiment").rglob("*.yaml")):
            name = file.relative_to(folder / "experiment").with_suffix("").as_posix()
            if name not in found:
                found[name] = file.read_text(encoding="utf-8", errors="replace")
    return found


def _layers(name: str, texts: Mapping[str, str], above: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Yield (experiment, False) for its own values and (experiment, True) for those of one stage, inner ones first.

    above: experiments that led here; a circle ends, and Hydra reports it.
    """
    entries = _read(name, texts).get("defaults") or []
    if name in above or not isinstance(entries, list):
        return
    for entry in entries if "_self_" in entries else [*entries, "_self_"]:
        if entry == "_self_":
            yield name, False
        for inner in _extended(entry, name):
            yield from _layers(inner, texts, (*above, name))
    yield name, True


def _extended(entry: Any, name: str) -> list[str]:
    """Return the experiments that an entry of the defaults list of experiment `name` brings in; [] for all others."""
    if isinstance(entry, dict):
        group, chosen = next(iter(entry.items()))
        group = re.sub(r"^optional\s+|@.*", "", str(group))
        names = chosen if isinstance(chosen, list) else [chosen]
        return [str(one) for one in names if one] if group == "/experiment" else []
    path = re.sub(r"^optional\s+|@.*|\.yaml$", "", str(entry))
    if path.startswith("/experiment/"):
        return [path.removeprefix("/experiment/")]
    if path.startswith("/") or path == "_self_":
        return []
    folder = name.rpartition("/")[0]
    return [f"{folder}/{path}" if folder else path]


def _merged(layers: Sequence[tuple[str, bool]], stage: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Return what the layers set for `stage`, later ones over earlier. Files for one stage cannot choose options."""
    from omegaconf import OmegaConf

    contents = [_read(f"{name}/{stage}" if is_stage else name, texts) for name, is_stage in layers]
    plain = [{key: value for key, value in content.items() if key != "defaults"} for content in contents]
    return OmegaConf.to_container(OmegaConf.merge({}, *plain))


def _read(name: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of an experiment's file; {} where there is none or it cannot be read."""
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(texts[name])))
    except Exception:  # Hydra reads it too, and says what is wrong
        return {}
    return content if isinstance(content, dict) else {}
