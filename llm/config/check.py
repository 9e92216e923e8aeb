"""Check the values of a composed configuration: what the types of the schemas cannot say."""

import math
import re
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from llm.config.renamed import renamed_key
from llm.config.stages import chat_mixtures
from llm.errors import UserError
from llm.utils.registry import Registry

WIDEST = 2**63 - 1  # largest whole number that files and tensors hold
MOST_PARAMETERS = 10**13
SHOWN = 100  # characters of a value in an error line


def check_values(cfg: Any, prefix: str = "") -> None:
    """Raise `UserError` for the first value outside the words or bounds that its schema states.

    Every number must be finite, also in mappings without a schema (callbacks, options of tasks); a text is not empty.
    """
    _check_mapping(cfg, prefix, {})


def check_model_size(cfg: Any) -> None:
    """Raise `UserError` where `cfg.model` asks for more than `MOST_PARAMETERS` parameters in matrices of its blocks."""
    m = cfg.model
    width = -(-m.depth * m.aspect_ratio // m.head_dim) * m.head_dim
    count = 12 * m.depth * width**2
    if count > MOST_PARAMETERS:
        raise UserError(
            f"model.depth={m.depth} with model.aspect_ratio={m.aspect_ratio} is {width:,} wide and has about "
            f"{count:.1e} parameters: must be at most {MOST_PARAMETERS:.0e}; lower one of them"
        )


def structured(values: Any, schema: type, key: str) -> Any:
    """Return one value of a mapping as its schema has it, with its defaults and within its bounds.

    key: where `values` stand. Raises UserError for keys and values that the schema does not know.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        spec = OmegaConf.merge(OmegaConf.structured(schema), values)
    except (OmegaConfBaseException, TypeError, ValueError, OverflowError) as error:
        known = ", ".join(f.name for f in fields(schema))
        raise UserError(f"{key}={shown(values)}: {str(error).splitlines()[0]}. Keys: {known}") from error
    check_values(spec, f"{key}.")
    return spec


def _check_mapping(cfg: Any, prefix: str, above: Mapping[str, Any]) -> None:
    """Check the values of a mapping; above: what the schema states of the key that holds it."""
    from omegaconf import OmegaConf

    schema = OmegaConf.get_type(cfg)
    stated = {f.name: _statement(f) for f in fields(schema)} if is_dataclass(schema) else {}
    for name in cfg:
        _check_value(_resolved(cfg, name, f"{prefix}{name}"), f"{prefix}{name}", stated.get(str(name), above))


def _statement(spec: Field) -> dict[str, Any]:
    """Return what a field of a schema states: its metadata, and what its type says of lists, mappings and null."""
    parts = get_args(spec.type) if get_origin(spec.type) is UnionType else (spec.type,)
    is_free = Any in parts
    stated = {**spec.metadata, "typed": True, "may_be_null": is_free or NoneType in parts}
    if not is_free:  # OmegaConf compares these with a value, but not with what an interpolation gives
        stated["is_list"] = any(get_origin(part) is list for part in parts)
        stated["is_mapping"] = any(get_origin(part) is dict or is_dataclass(part) for part in parts)
    return stated


def _check_value(value: Any, key: str, stated: Mapping[str, Any]) -> None:
    """Check one value, or all within a mapping or list, against what a schema states of its key."""
    from omegaconf import DictConfig, ListConfig

    if stated.get("words") and not _is_whole(value) and value not in stated["words"]:
        raise UserError(f"{key}={shown(value)}: must be a whole number, or {' or '.join(stated['words'])}")
    for name, kind in (("is_list", ListConfig), ("is_mapping", DictConfig)):
        if stated.get(name) and value is not None and not isinstance(value, kind):
            raise UserError(f"{key}={shown(value)}: must be a {name.removeprefix('is_')}")
    if value is None and not stated.get("may_be_null", True):
        raise UserError(f"{key}=null: must have a value")
    if isinstance(value, DictConfig):
        items = stated.get("items")
        for name in value if items else ():
            structured(_resolved(value, name, f"{key}.{name}"), items, f"{key}.{name}")
        _check_mapping(value, f"{key}.", _of_each(stated))
    elif isinstance(value, ListConfig):
        if "length" in stated and len(value) != stated["length"]:
            raise UserError(f"{key}={shown(value)}: must be a list of {stated['length']} numbers")
        for place in range(len(value)):
            _check_value(_resolved(value, place, f"{key}.{place}"), f"{key}.{place}", _of_each(stated, "typed"))
    elif problem := _violation(value, stated):
        raise UserError(f"{key}={shown(value)}: must be {problem}")


def _of_each(stated: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Return what holds for each value of a mapping or list whose key has this statement: bounds, choices, `more`."""
    return {name: stated[name] for name in ("choices", "low", "high", "above", "below", *more) if name in stated}


def _resolved(cfg: Any, name: Any, key: str) -> Any:
    """Return a value of the configuration; UserError where it has none, or refers to what does not exist."""
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        return cfg[name]
    except MissingMandatoryValue:
        raise UserError(f"{key} has no value: give it in the option's YAML file or the command line") from None
    except (OmegaConfBaseException, RecursionError) as error:
        text = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).splitlines()[0])
        missing = re.search(r"key '([^']+)' not found", text)
        given = shown(cfg._get_node(name)._value())
        raise UserError(f"{key}={given}: {(renamed_key(missing[1]) if missing else None) or text}") from None


def as_text(value: Any) -> str:
    """Write a value as on the command line: null, true, false."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def shown(value: Any) -> str:
    """Write a value for an error: in one line, and cut where it is long."""
    text = as_text(value).replace("\r", "\\r").replace("\n", "\\n")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def check_task_names(data: Any, stage: Any = None) -> None:
    """Raise `UserError` where a mixture, `data.rl`, `data.eval` or `stage.chat_tasks` names none of `data.tasks`.

    So too where `data.mixture` has a key that no chat stage of the table reads.
    """
    stages = chat_mixtures()
    for name in data.mixture:
        if name.removesuffix("_val") not in stages:
            raise UserError(f"data.mixture.{name}: there is no chat stage of this name ({', '.join(stages)})")
    places = {f"data.mixture.{name}": list(weights) for name, weights in data.mixture.items()}
    places |= {"data.rl": [data.rl] if data.rl else [], "data.eval": list(data.eval)}
    check_preferences(data, stage)
    places["stage.chat_tasks"] = list(getattr(stage, "chat_tasks", None) or [])
    for place, names in places.items():
        for name in names:
            if name not in data.tasks:
                raise UserError(f"{place}: there is no task {name!r} in data.tasks ({', '.join(data.tasks)})")


def check_preferences(data: Any, stage: Any) -> None:
    """Raise `UserError` for preferences among the tasks or the reverse, names in both or in none, and no mappings."""
    preferences = data.get("preferences") or {}
    for group, specs, wanted in (("tasks", data.tasks, False), ("preferences", preferences, True)):
        for name, spec in specs.items():
            if spec is not None and not isinstance(spec, Mapping):
                raise UserError(f"data.{group}.{name}={shown(spec)}: must be a mapping such as {{type: ..., ...}}")
            if spec is not None and (spec.get("type") == "preference") != wanted:
                place = "data.preferences" if group == "tasks" else "data.tasks"
                raise UserError(f"data.{group}.{name}.type={spec.get('type')}: rows of this type belong into {place}")
    if both := sorted(set(preferences) & set(data.tasks)):
        raise UserError(f"data.preferences.{both[0]}: data.tasks has this name too; choose another")
    for name in getattr(stage, "preferences", None) or []:
        if name not in preferences:
            raise UserError(f"stage.preferences: there is no {name!r} in data.preferences ({', '.join(preferences)})")


def _violation(value: Any, stated: Mapping[str, Any]) -> str | None:
    """Say in words what `value` must be; None if it is allowed."""
    if value is None:
        return None
    choices = stated.get("choices")
    if choices and as_text(value) not in choices:
        own = f"; {choices.own}" if isinstance(choices, Registry) else ""
        return f"one of {', '.join(choices)}{own}"
    if value == "" and stated.get("typed"):
        return "a text that is not empty"
    if isinstance(value, str) and not value.isascii() and value != value.encode(errors="ignore").decode():
        return "text in UTF-8 (set LC_ALL=C.UTF-8)"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return _out_of_bounds(value, stated)


def _out_of_bounds(value: float, stated: Mapping[str, Any]) -> str | None:
    """Say in words which bound of its key, or of all numbers, `value` does not keep; None if it keeps them."""
    low, above, high, below = (stated.get(name) for name in ("low", "above", "high", "below"))
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if low is not None and value < low:
        return f"at least {low}"
    if above is not None and value <= above:
        return f"more than {above}"
    if below is not None and value >= below:
        return f"less than {below}"
    most = WIDEST if high is None and isinstance(value, int) else high
    if most is not None and value > most:
        return f"at most {most}"
    if isinstance(value, int) and value < -WIDEST:
        return f"at least {-WIDEST}"
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
