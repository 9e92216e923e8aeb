"""The form of the Train tab, made from the typed configuration: every key with help and bounds, and its mistakes.

A form holds what the user chose and typed; `settings` turns that into the words of a command line, and nothing else is
ever started. Words that would load code, lead out of `paths.*` or read the environment are refused.
"""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any

from llm.cli.compose import parse, quoted
from llm.cli.options import group_options
from llm.cli.overrides import check_overrides
from llm.config.check import as_text
from llm.config.schema import known_keys
from llm.errors import UserError
from llm.panel.defaults import LOCK, defaults
from llm.run.config_diff import flatten
from llm.utils.format import value
from llm.utils.source import command

GROUPS = ("experiment", "stage", "model", "arch", "optim", "data", "mixture", "trainer", "strategy")
CLOSED = ("plugins", "trust", "paths", "hydra", "callbacks", "logger")  # not from a browser: code, folders, processes
FILES = re.compile(r"(^|[._])(out|path|bundle|cache|mirror)$")  # keys whose value is a path in any case
PLAIN = re.compile(r"[\w./%-]+")  # values that need no quotes
NAMES = ("run",)  # keys whose value is a plain name, checked elsewhere
MOST_PROBLEMS = 6  # that are looked for at once; each costs a composition
MOST_LETTERS = 4000  # of a value


@dataclass(frozen=True)
class Entry:
    """A key as the form shows it: its value if the user gave one, what holds else, help, and what is wrong."""

    key: str
    given: str | None
    default: str
    help: str
    choices: tuple[str, ...] = ()
    problem: str = ""


@dataclass
class Form:
    """Chosen options by group, and typed values by key. sweep: several values of a key make several jobs."""

    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    sweep: bool = False

    def settings(self) -> list[str]:
        """Return the words of the command line, without the name of the program."""
        chosen = [f"{group}={option}" for group, option in self.groups.items() if option]
        return [*(["-m"] if self.sweep else []), *chosen, *(_setting(key, text) for key, text in self.values.items())]

    def line(self, more: Sequence[str] = ()) -> str:
        """Return the command to copy. more: further settings, such as the panel's folders."""
        return f"{command('train')} {shlex.join([*self.settings(), *more])}".rstrip()


def options_of(group: str) -> list[str]:
    """Return the options of a group that the form offers."""
    return group_options(group)


def _setting(key: str, given: str) -> str:
    """Return key=value, in quotes where the key takes text that Hydra's grammar does not have."""
    line = f"{key}={given}"
    spec = spec_of(key)
    if spec is None or str not in (spec.type, *getattr(spec.type, "__args__", ())):
        return line
    try:
        plain = not spec.metadata.get("raw") and parse([line])[0].value() is not None
    except UserError:
        plain = False
    return line if plain or given == "null" else f"{key}={quoted(given)}"


def assigned(key: str, content: object) -> str:
    """Return key=content, the content in quotes where it has signs that Hydra's grammar knows."""
    written = str(content)
    return f"{key}={written if PLAIN.fullmatch(written) else quoted(written)}"


def spec_of(key: str) -> Field | None:
    """Return the schema field of a key, also below a user's name (`data.tasks.mine.limit`); None without one."""
    known = known_keys("train")
    if key in known:
        return known[key]
    parts = key.split(".")
    for pattern, spec in known.items():
        pieces = pattern.split(".")
        if len(pieces) == len(parts) and all(a in ("<name>", b) for a, b in zip(pieces, parts, strict=True)):
            return spec
    return None


def base_of(form: Form) -> dict[str, Any]:
    """Return the keys and values of what the groups compose, flat. Raises UserError where they do not go together."""
    return flatten(defaults(tuple(f"{group}={option}" for group, option in form.groups.items() if option)))


def entries(
    form: Form, search: str = "", section: str = "main", changed: bool = False, problems: dict[str, str] | None = None
) -> list[Entry]:
    """Return the keys that fit a search, in the order of the configuration.

    search: words that key or help contain; section: main = the main keys, all, or a group; a search looks in all keys
    where section is main. changed: only keys that the user gave. Raises UserError where the groups do not go together.
    """
    base, words, problems = base_of(form), search.lower().split(), problems or {}
    found = []
    for key in dict.fromkeys((*base, *form.values, *problems)):
        spec = spec_of(key)
        if key.split(".")[0] in CLOSED or (spec is not None and spec.metadata.get("fixed")):
            continue
        about = spec.metadata["help"] if spec is not None else ""
        wanted = all(word in f"{key} {about}".lower() for word in words)
        if section == "main" and not words:
            wanted = wanted and spec is not None and bool(spec.metadata.get("main"))
        elif section not in ("main", "all"):
            wanted = wanted and key.split(".")[0] == section
        kept = key in form.values or key in problems
        if kept if changed else (wanted or key in problems):
            choices = tuple(map(str, spec.metadata.get("choices") or ())) if spec is not None else ()
            default = _shown(base.get(key))
            found.append(Entry(key, form.values.get(key), default, key_help(spec), choices, problems.get(key, "")))
    return found


def sections(form: Form) -> list[str]:
    """Return the sections of keys: main, all, and the first parts of keys."""
    first = dict.fromkeys(key.split(".")[0] for key in base_of(form) if "." in key)
    return ["main", "all", *(name for name in first if name not in CLOSED)]


def _shown(content: Any) -> str:
    return as_text(content) if not isinstance(content, list | dict) else str(content)


def key_help(spec: Field | None) -> str:
    """Return the help of a key with its type and bounds."""
    if spec is None:
        return ""
    stated = spec.metadata
    bounds = [("from", stated.get("low")), ("above", stated.get("above"))]
    bounds += [("to", stated.get("high")), ("below", stated.get("below"))]
    words = [f"{word} {value(bound)}" for word, bound in bounds if bound is not None]
    kind = _kind(spec.type)
    return stated["help"] + (f" ({', '.join(filter(None, [kind, *words]))})" if kind or words else "")


def _kind(kind: Any) -> str:
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    parts = getattr(kind, "__args__", None)
    if kind in names:
        return names[kind]
    if getattr(kind, "__origin__", None) is list:
        return "list"
    return " or ".join(filter(None, map(_kind, parts))) if parts else ""


def problems_of(form: Form, folders: Iterable[Path]) -> tuple[dict[str, str], str]:
    """Return what is wrong, by key as the command line says it, and what belongs to no key; ({}, "") for nothing."""
    found: dict[str, str] = {}
    for key, given in form.values.items():
        if (wrong := refusal(key, given, folders)) is not None:
            found[key] = wrong
    left = Form(form.groups, {key: given for key, given in form.values.items() if key not in found}, form.sweep)
    for _ in range(MOST_PROBLEMS):
        try:
            with LOCK:
                check_overrides("train", left.settings())
            return found, ""
        except UserError as error:
            message = str(error)
        named = [key for key in left.values if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", message)]
        if not named:
            return found, message
        key = min(named, key=message.find)
        found[key] = message
        del left.values[key]
    return found, ""


def refusal(key: str, given: str, folders: Iterable[Path]) -> str | None:
    """Say why the panel does not take a value that the command line may take; None where it does."""
    if key.split(".")[0].lstrip("+~") in CLOSED or "_target_" in key or not re.fullmatch(r"[\w.\-]+", key):
        return f"{key}: the panel does not set this key; give it in the terminal or in conf/local/"
    if "${" in given or "_target_" in given:
        return f"{key}: the panel takes no references to other values and no names of code"
    if len(given) > MOST_LETTERS:
        return f"{key}: {len(given):,} letters, at most {MOST_LETTERS:,} are taken"
    allowed = [Path(folder).resolve() for folder in folders]
    for word in [] if key in NAMES else _words(given):
        if leads_out(word, allowed, is_file=FILES.search(key) is not None):
            places = ", ".join(map(str, allowed))
            return f"{key}={word}: the panel takes paths in these folders only: {places} (paths.* of serve.py)"
    return None


def _words(given: str) -> list[str]:
    """Return the words of a value, those of its lists and mappings too; an address stays whole."""
    words = re.split(r"[\s,\[\]{}()'\"]+", given)
    return [part for word in words for part in ([word] if "://" in word else word.split(":")) if part]


def leads_out(word: str, allowed: Sequence[Path], is_file: bool) -> bool:
    """Say whether a word is a path, or an address, outside the allowed folders.

    is_file: it is a path in any case. Else it is one where it is written as one, or where a file of this name lies
    here: `demo/sft` is a path only where there is a file or folder `demo`.
    """
    if word in ("null", "true", "false"):
        return False
    if "://" in word:
        return True
    path = Path(os.path.expanduser(word))
    try:
        written_as_one = re.search(r"^[~./\\]|\.\.|[*?\\]", word) is not None
        if not (is_file or written_as_one or Path(path.parts[0]).exists()):
            return False
        resolved = path.resolve()
    except (OSError, ValueError, RuntimeError, IndexError):
        return True
    return not any(resolved == folder or folder in resolved.parents for folder in allowed)
