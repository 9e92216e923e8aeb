"""Kinds of values in files that anybody may have written: types, ranges and lengths, checked before they are used.

A kind is a function `kind(value, where)` that returns nothing and raises UserError, which names the file and the key.
"""

import math
from collections.abc import Callable
from typing import Any

from llm.errors import UserError

Kind = Callable[[Any, str], None]
MOST_ENTRIES = 1_000_000  # of a mapping or list
MOST_SHOWN = 60  # characters of a wrong value


def refuse(value: Any, where: str, wanted: str) -> None:
    """Raise UserError: `where` (file and key) must be `wanted`."""
    shown = "null" if value is None else repr(value)
    shown = shown if len(shown) <= MOST_SHOWN else shown[:MOST_SHOWN] + "..."
    raise UserError(f"{where} is {shown}, but must be {wanted}; restore the file, or run the stage again")


def text(value: Any, where: str) -> None:
    """Take a string of at most a million characters."""
    if not isinstance(value, str) or len(value) > MOST_ENTRIES:
        refuse(value, where, "a text")


def truth(value: Any, where: str) -> None:
    """Take true or false."""
    if not isinstance(value, bool):
        refuse(value, where, "true or false")


def whole(low: int = 0, high: int = 2**63 - 1) -> Kind:
    """Return the kind of whole numbers from `low` to `high`; 4.0 and "4" are none."""

    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            refuse(value, where, f"a whole number from {low:,} to {high:,}")

    return check


def real(low: float = -math.inf, high: float = math.inf) -> Kind:
    """Return the kind of finite numbers from `low` to `high`."""

    def check(value: Any, where: str) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= 1e300 or not low <= value <= high:
            bounds = "" if (low, high) == (-math.inf, math.inf) else f" from {low:g} to {high:g}"
            refuse(value, where, f"a number{bounds}")

    return check


def one_of(*words: str) -> Kind:
    """Return the kind of these words."""

    def check(value: Any, where: str) -> None:
        if value not in words:
            refuse(value, where, f"one of {', '.join(words)}")

    return check


def maybe(kind: Kind) -> Kind:
    """Return the kind of null and what `kind` takes."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            kind(value, where)

    return check


def anything(value: Any, where: str) -> None:
    """Take any value."""


def either(*kinds: Kind) -> Kind:
    """Return the kind of what one of `kinds` takes; the last one says what was wanted."""

    def check(value: Any, where: str) -> None:
        for kind in kinds[:-1]:
            try:
                return kind(value, where)
            except UserError:
                continue
        return kinds[-1](value, where)

    return check


def mapping(fields: dict[str, Kind] | None = None, others: Kind = anything, needs: tuple[str, ...] = ()) -> Kind:
    """Return the kind of objects: `fields` by name, the values of all other names, and names that must be there."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > MOST_ENTRIES:
            refuse(value, where, "a mapping")
        for name in needs:
            if name not in value:
                raise UserError(f"{_below(where, name)} is missing; restore the file, or run the stage again")
        for name, item in value.items():
            (fields or {}).get(name, others)(item, _below(where, name))

    return check


def listing(kind: Kind, lengths: tuple[int, int] = (0, MOST_ENTRIES)) -> Kind:
    """Return the kind of lists of `kind` with a length within `lengths`."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or not lengths[0] <= len(value) <= lengths[1]:
            refuse(value, where, "a list" + (f" of {lengths[0]}" if lengths[0] == lengths[1] else ""))
        for number, item in enumerate(value):
            kind(item, f"{where}[{number}]")

    return check


def _below(where: str, name: str) -> str:
    """Return the place of a key: `run.json: config.seed` in the object `run.json: config`."""
    return f"{where}.{str(name)[:80]}" if ": " in where else f"{where}: {str(name)[:80]}"
