"""`key`: a field of a schema, with its line in `--help` and the bounds of its values."""

from collections.abc import Collection
from dataclasses import field
from typing import Any

from llm.utils.registry import Registry

# Upper bounds that several keys share: far above what is useful, far below what fills memory or never ends.
STEPS = 10**9
ITEMS = 10**9  # documents, rows or questions
CONTEXT = 2**22  # tokens of one text
VOCABULARY = 2**22  # tokens
SEED = 2**63 - 1


def key(
    text: str, *, choices: Collection[str] | Registry = (), low: float | None = None, high: float | None = None, **more
) -> Any:
    """Make a field that YAML must set. `text` is its line in `--help`; `check_values` tests the other arguments.

    Bounds hold for a number, and for each number of a list or mapping. In `more`: `above` and `below` = exclusive
    bounds; `length` = number of elements of a list; `words` = words that may stand instead of a whole number;
    `items` = schema of each value of a mapping whose type is Any; `main` = listed in the short `--help`;
    `fixed` = set by choosing the group's option, not by hand; `raw` = text taken from the command line as it is;
    `no_group` = a value, though `conf/` has a group of this name for another entry point.
    """
    return field(metadata={"help": text, "choices": choices, "low": low, "high": high, **more})
