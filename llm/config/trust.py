"""Whom a command trusts: code, addresses and data sets of a saved run are used only if the command names them again.

A run folder may come from anybody. Names in the registries (llm.config.registries) are always allowed, and so are
addresses and data sets in the files of conf/, and what was fetched before. A `_target_`, a plugin, an address or a
data set of the hub that is read from a saved file is allowed where this command gives it in `trust=[...]` or, for code,
in `plugins=[...]`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.utils.addresses import ADDRESS, without_secrets

DATA_SET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # on the hub: <owner>/<name>
CONF = Path(__file__).resolve().parent.parent.parent / "conf"

_trusted: set[str] = set()


def trust(names: Iterable[str]) -> None:
    """Trust these modules, dotted names and addresses, and all that lies below them, in this process."""
    _trusted.update(names)


def trust_command(cfg: Any) -> None:
    """Trust what the configuration of this command names in `trust` and `plugins`."""
    trust([*(cfg.get("trust") or []), *(cfg.get("plugins") or [])])


def is_trusted(name: str) -> bool:
    """Return whether this command has named `name`, or what it lies in. Secrets in addresses do not count."""
    name, trusted = without_secrets(name), {without_secrets(known) for known in _trusted if known}
    below = "/" if ADDRESS.search(name) else (".", "/")  # https://example.org.evil is a server of its own
    return any(
        name == known or name.startswith(tuple(f"{known.rstrip('/')}{mark}" for mark in below)) for known in trusted
    )


def check_code(name: Any, where: str) -> None:
    """Raise UserError where a saved file names code that this command does not name."""
    if not isinstance(name, str) or not is_trusted(name):
        raise UserError(
            f"{where} is {str(name)[:80]!r}, code of somebody's own: a saved run imports nothing; if you know it, name "
            f"it in this command: trust=[{str(name)[:80]}]"
        )


def check_plain(value: Any, where: str) -> None:
    """Raise UserError where a saved value, or one below it, holds an interpolation."""
    for text, place in _texts(value, where):
        if "${" in text:
            raise UserError(f"{place} holds an interpolation ({text[:60]!r}): a saved run holds plain values only")


def check_trusted(value: Any, where: str, is_here: Callable[[Mapping], bool] = lambda group: False) -> None:
    """Raise UserError for code, addresses and data sets of the hub in a saved value that this command does not name.

    is_here: tells whether all that a group of the value names was fetched before.
    """
    fetched = [place for group, place in _groups(value, where) if is_here(group)]
    for text, place in _texts(value, where):
        if ADDRESS.search(text) and place.rpartition(".")[0] not in fetched:
            check_fetched(text, place, "an address")
    for group, place in _groups(value, where):
        repo = group.get("repo")
        if isinstance(repo, str) and (place not in fetched or not DATA_SET.fullmatch(repo)):
            check_fetched(repo, f"{place}.repo", "a data set of the hub")
    _check_targets(value, where)


def check_fetched(name: str, where: str, what: str) -> None:
    """Raise UserError where a saved run names something to fetch that neither Fathom nor this command names."""
    if not is_trusted(name) and not _is_ours(name):
        name = without_secrets(name)[:120]
        raise UserError(
            f"{where} is {name!r}, {what}: a saved run fetches nothing by itself; if you know it, name it in this "
            f"command, trust=[{name}], or give other data (data=...)"
        )


def _groups(value: Any, where: str) -> Iterator[tuple[Mapping, str]]:
    """Yield the mappings in a value, itself included, with their places."""
    if isinstance(value, Mapping):
        yield value, where
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in parts:
        yield from _groups(item, f"{where}.{key}")


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


def _check_targets(value: Any, where: str) -> None:
    """Raise UserError for a `_target_` in a saved value that is not trusted."""
    for group, place in _groups(value, where):
        if group.get("_target_") is not None:
            check_code(group["_target_"], f"{place}._target_")


def _is_ours(name: str) -> bool:
    """Return whether an address, or a data set as `repo: <name>`, stands in the configuration that Fathom brings."""
    wanted = f" {name} " if ADDRESS.search(name) else f" repo: {name} "
    texts = (path.read_text(encoding="utf-8").replace("#", " ").split() for path in CONF.rglob("*.yaml"))
    return any(wanted in f" {' '.join(words)} " for words in texts)
