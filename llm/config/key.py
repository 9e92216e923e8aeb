"""`key`: a field of a schema, with its line in `--help` and the bounds of its values."""

from collections.abc import Collection
from dataclasses import field
from typing import Any

from llm.utils.registry import Registry


def key(
    text: str, *, choices: Collection[str] | Registry = (), low: float | None = None, high: float | None = None, **more
) -> Any:
    """Make a field that YAML must set. `text` is its line in `--help`; `check_values` tests the other arguments.

    In `more`: `above` = exclusive lower bound; `main` = listed in the short `--help`; `nonempty` = not an empty text;
    `fixed` = set by choosing the group's option, not by hand; `raw` = text taken from the command line as it is;
    `no_group` = a value, though `conf/` has a group of this name for another entry point.
    """
    return field(metadata={"help": text, "choices": choices, "low": low, "high": high, **more})
