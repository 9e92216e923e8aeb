"""Write docs/reference/: every key with its default, meaning and bounds, and the public API from its docstrings.

`make docs` runs it. The pages come from the schemas in llm/config and the values in conf/, and are not committed.
"""

import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import llm
from llm.cli.compose import compose
from llm.cli.help import PURPOSE
from llm.config.schema import VARIANTS, known_keys
from llm.utils.source import command

OUT = Path(__file__).resolve().parent / "reference"
LISTED = 200  # characters of a default value that are shown


def leaves(schema: type, prefix: str) -> Iterator[tuple[str, Field]]:
    """Yield the dotted keys of a schema that hold values, with their fields."""
    for spec in fields(schema):
        inner = [kind for kind in (spec.type, *getattr(spec.type, "__args__", ())) if is_dataclass(kind)]
        if not inner:
            yield prefix + spec.name, spec
        mapping = getattr(spec.type, "__origin__", None) is dict
        for kind in inner:
            yield from leaves(kind, f"{prefix}{spec.name}.{'<name>.' if mapping else ''}")


def is_leaf(spec: Field) -> bool:
    """Return True for a field that holds a value and no section of further keys."""
    return not any(is_dataclass(kind) for kind in (spec.type, *getattr(spec.type, "__args__", ())))


def bounds(spec: Field) -> str:
    """Return the values that a key may have, in words; empty where its type says all."""
    meta, words = spec.metadata, []
    if choices := meta.get("choices"):
        words.append("one of " + ", ".join(f"`{choice}`" for choice in choices))
    names = (("low", "at least"), ("above", "above"), ("high", "at most"), ("below", "below"))
    words += [f"{text} {meta[name]:,}" for name, text in names if meta.get(name) is not None]
    if meta.get("length"):
        words.append(f"{meta['length']} elements")
    if meta.get("words"):
        words.append("or " + ", ".join(f"`{word}`" for word in meta["words"]))
    return ", ".join(words)


def type_name(kind: Any) -> str:
    """Return a type as a reader knows it: `int`, `str or null`, `list[int]`."""
    if kind is Any:
        return "any"
    text = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    return text.replace("typing.", "").replace(" | None", " or null").replace("|", "or")


def default(cfg: DictConfig, key: str) -> str:
    """Return the value of a key in conf/, as written there; a dash where nothing sets it."""
    group, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, group, throw_on_missing=False) if group else cfg
    if not isinstance(node, DictConfig) or name not in node or OmegaConf.is_missing(node, name):
        return "-"
    value = OmegaConf.to_container(OmegaConf.create({"v": node._get_node(name)}), resolve=False)["v"]
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or "''"
    return f"`{textwrap.shorten(text, LISTED)}`".replace("|", "\\|")


def table(keys: Iterator[tuple[str, Field]], cfg: DictConfig) -> list[str]:
    """Return the table of some keys."""
    lines = ["| key | type | default | meaning | values |", "|---|---|---|---|---|"]
    for key, spec in keys:
        cells = [f"`{key}`", type_name(spec.type), default(cfg, key), prose(spec.metadata["help"]), bounds(spec)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def prose(text: str) -> str:
    """Return a text in which Markdown sees no marks."""
    for sign in "\\*_<>|$[]`":
        text = text.replace(sign, f"\\{sign}")
    return text


def command_page(name: str) -> str:
    """Return the page of an entry point: all keys by group, with one table for each option that has its own keys."""
    cfg = compose(name)
    lines = [f"# Keys of `{command(name)}`", "", PURPOSE[name], ""]
    lines += ["Generated from the schemas in `llm/config` and the values in `conf/`. A dash: no default.", ""]
    keys = {key: spec for key, spec in known_keys(name).items() if is_leaf(spec)}
    variants = [group for group in ("stage", "arch", "optim") if VARIANTS.get(group) and name == "train"]
    by_group: dict[str, list[tuple[str, Field]]] = {}
    for key, spec in keys.items():
        group, dot, _ = key.partition(".")
        by_group.setdefault(group if dot else "", []).append((key, spec))
    for group, members in by_group.items():
        if group not in variants:
            lines += [f"## {f'`{group}`' if group else 'Keys without a group'}", "", *table(members, cfg)]
    for group in variants:
        for option, schema in VARIANTS[group].items():
            lines += [f"## `{group}={option}`", "", *table(leaves(schema, f"{group}."), variant(group, option))]
    return "\n".join(lines)


def variant(group: str, option: str) -> DictConfig:
    """Return what an option of a group sets."""
    return compose("train", [f"{group}={option}"])


def api_page() -> str:
    """Return the page of what `import llm` offers, from signatures and docstrings."""
    lines = ["# Python API", "", "Generated from docstrings. [In Python](../python.md) shows the use.", ""]
    for name in llm.__all__:
        thing = getattr(llm, name)
        lines += [f"## `llm.{name}`", ""]
        lines += described(thing)
        if inspect.isclass(thing):
            for part, member in vars(thing).items():
                inner = getattr(member, "fget", member)
                if part.startswith("_") or not (callable(inner) and inspect.getdoc(inner)):
                    continue
                lines += [f"### `{name}.{part}`", "", *described(inner)]
            if is_dataclass(thing):
                lines += ["Fields:", "", *(f"- `{one.name}`: {code(one)}" for one in fields(thing)), ""]
    return "\n".join(lines)


def code(one: Field) -> str:
    """Return the type of a dataclass field, and its default where it has a plain one."""
    plain = "" if one.default is MISSING else f" = {one.default!r}"
    return f"`{one.type if isinstance(one.type, str) else inspect.formatannotation(one.type)}{plain}`"


def described(thing: Any) -> list[str]:
    """Return signature and docstring of a class or function."""
    try:
        signature = f"{thing.__name__}{inspect.signature(thing)}"
    except (TypeError, ValueError):
        signature = thing.__name__
    return ["```text", textwrap.fill(signature, 100), "", inspect.getdoc(thing) or "", "```", ""]


def write(out: Path = OUT) -> list[Path]:
    """Write all pages and return them."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {f"{name}.md": command_page(name) for name in PURPOSE} | {"python_api.md": api_page()}
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
