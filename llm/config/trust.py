"""Whom a command trusts: code and addresses that a saved run names are used only if the command names them again.

A run folder may come from anybody. Names in the registries (llm.config.registries) are always allowed. A dotted name, a
plugin or an address that is read from a saved file is allowed where this command gives it in `trust=[...]` or, for
code, in `plugins=[...]`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.utils.registry import Registry

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
CONF = Path(__file__).resolve().parent.parent.parent / "conf"

_trusted: set[str] = set()


def trust(names: Iterable[str]) -> None:
    """Trust these modules, dotted names and addresses, and all that lies below them, in this process."""
    _trusted.update(names)


def trust_command(cfg: Any) -> None:
    """Trust what the configuration of this command names: `trust`, `plugins`, and its own choices by dotted name."""
    trust([*(cfg.get("trust") or []), *(cfg.get("plugins") or [])])
    arch = cfg.get("arch")
    if arch is not None and "." in str(arch.get("name")):
        trust([arch.name])


def is_trusted(name: str) -> bool:
    """Return whether this command has named `name`, or what it lies in."""
    return any(name == known or name.startswith((f"{known}.", f"{known.rstrip('/')}/")) for known in _trusted if known)


def check_code(name: Any, where: str) -> None:
    """Raise UserError where a saved file names code that this command does not name."""
    if not isinstance(name, str) or not is_trusted(name):
        raise UserError(
            f"{where} is {str(name)[:80]!r}, code of somebody's own: a saved run imports nothing; if you know it, name "
            f"it in this command: trust=[{str(name)[:80]}]"
        )


def check_named(name: Any, where: str, registry: Registry) -> None:
    """Raise UserError where a saved choice is not in the registry, and is no dotted name that this command names."""
    if isinstance(name, str) and name not in registry.entries and "." in name:
        check_code(name, where)


def check_plain(value: Any, where: str) -> None:
    """Raise UserError where a saved value, or one below it, holds an interpolation."""
    for text, place in _texts(value, where):
        if "${" in text:
            raise UserError(f"{place} holds an interpolation ({text[:60]!r}): a saved run holds plain values only")


def check_trusted(value: Any, where: str, schema: Any = None) -> None:
    """Raise UserError for code and addresses in a saved value that this command does not name.

    schema: dataclass of the value's group, whose fields say which texts are names in a registry.
    """
    for text, place in _texts(value, where):
        if ADDRESS.search(text) and not is_trusted(text) and not _is_ours(text):
            raise UserError(
                f"{place} is {text[:120]!r}, an address: a saved run fetches nothing by itself; name it in this "
                f"command, trust=[{text[:120]}], or give other data (data=...)"
            )
    _check_names(value, where, schema)


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield the texts in a value, keys included, with their places."""
    if isinstance(value, str):
        yield value, where
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key), where
            yield from _texts(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, f"{where}[{number}]")


def _check_names(value: Any, where: str, schema: Any) -> None:
    """Raise UserError for a `_target_`, or a dotted name where the schema has a registry, that is not trusted."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            _check_names(item, f"{where}[{number}]", schema)
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        spec = getattr(schema, "__dataclass_fields__", {}).get(key)
        choices = None if spec is None else spec.metadata.get("choices")
        if key == "_target_":
            check_code(item, f"{where}.{key}")
        if isinstance(choices, Registry):
            check_named(item, f"{where}.{key}", choices)
        _check_names(item, f"{where}.{key}", _inner(spec, schema))


def _inner(spec: Any, schema: Any) -> Any:
    """Return the dataclass below a field, or below each entry of a mapping of dataclasses."""
    if spec is None:  # the name of an entry
        return schema
    kinds = (spec.type, *getattr(spec.type, "__args__", ()))
    return next((kind for kind in kinds if is_dataclass(kind)), None)


def _is_ours(address: str) -> bool:
    """Return whether an address stands in the configuration that Fathom brings."""
    return any(address in path.read_text(encoding="utf-8").replace("#", " ").split() for path in CONF.rglob("*.yaml"))
