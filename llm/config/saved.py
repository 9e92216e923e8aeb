"""The kind of values (llm.utils.shapes) that a schema describes, for configurations read from a saved run."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin

from llm.utils.registry import Registry
from llm.utils.shapes import Kind, anything, listing, mapping, maybe, one_of, real, text, truth, whole


def kind_of_schema(schema: type, needs: tuple[str, ...] = ()) -> Kind:
    """Return the kind of mappings that fit a dataclass; keys that it does not know pass, and keys may be missing."""
    return mapping({spec.name: _kind(spec.type, spec.metadata) for spec in fields(schema)}, needs=needs)


def _kind(wanted: Any, facts: Mapping[str, Any]) -> Kind:
    low, high, choices = facts.get("low"), facts.get("high"), facts.get("choices")
    if (above := facts.get("above")) is not None:
        low = above + 1 if wanted is int else math.nextafter(above, math.inf)
    if (below := facts.get("below")) is not None:
        high = below - 1 if wanted is int else math.nextafter(below, -math.inf)
    if get_origin(wanted) in (Union, UnionType):
        inner = [one for one in get_args(wanted) if one is not type(None)]
        kind = _kind(inner[0], facts) if len(inner) == 1 else anything
        return maybe(kind) if len(inner) < len(get_args(wanted)) else kind
    if is_dataclass(wanted):
        return kind_of_schema(wanted)
    if wanted is bool:
        return truth
    if wanted is int:
        return whole(-(2**63) if low is None else int(low), 2**63 - 1 if high is None else int(high))
    if wanted is float:
        return real(-1e300 if low is None else float(low), 1e300 if high is None else float(high))
    if wanted is str:
        return one_of(*choices) if choices and not isinstance(choices, Registry) else text
    if get_origin(wanted) is list:
        return listing(_kind(get_args(wanted)[0], {}))
    if get_origin(wanted) is dict:
        return mapping(others=_kind(get_args(wanted)[1], {}))
    return anything
