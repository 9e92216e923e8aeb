"""Check the values of a composed configuration: what the types of the schemas cannot say."""

import math
import re
from dataclasses import Field, fields, is_dataclass
from typing import Any

from llm.config.renamed import renamed_key
from llm.config.stages import chat_mixtures
from llm.errors import UserError
from llm.utils.registry import Registry


def check_values(cfg: Any, prefix: str = "") -> None:
    """Raise `UserError` for the first value outside the words or bounds that its schema states."""
    from omegaconf import DictConfig, OmegaConf

    schema = OmegaConf.get_type(cfg)
    bounds = {f.name: f for f in fields(schema)} if is_dataclass(schema) else {}
    for name in cfg:
        value = _resolved(cfg, name, prefix)
        if isinstance(value, DictConfig):
            check_values(value, f"{prefix}{name}.")
        elif name in bounds:
            problem = _violation(bounds[str(name)], value)
            if problem:
                raise UserError(f"{prefix}{name}={value}: must be {problem}")


def _resolved(cfg: Any, name: Any, prefix: str) -> Any:
    """Return a value of the configuration; UserError where it has none, or refers to a key that does not exist."""
    from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

    try:
        return cfg[name]
    except MissingMandatoryValue:
        raise UserError(f"{prefix}{name} has no value: give it in the option's YAML file or the command line") from None
    except InterpolationResolutionError as error:
        text = str(error).splitlines()[0]
        missing = re.search(r"key '([^']+)' not found", text)
        raise UserError(f"{prefix}{name}: {(renamed_key(missing[1]) if missing else None) or text}") from None


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
    places["stage.chat_tasks"] = list(getattr(stage, "chat_tasks", None) or [])
    for place, names in places.items():
        for name in names:
            if name not in data.tasks:
                raise UserError(f"{place}: there is no task {name!r} in data.tasks ({', '.join(data.tasks)})")


def _violation(spec: Field, value: Any) -> str | None:
    """Say in words what `value` must be; None if it is allowed."""
    choices, low, high, above = (spec.metadata.get(k) for k in ("choices", "low", "high", "above"))
    if value is None:
        return None
    if choices and value not in choices:
        own = ", or module.Class of your own (docs/extend.md)" if isinstance(choices, Registry) else ""
        return f"one of {', '.join(choices)}{own}"
    if isinstance(value, float) and math.isnan(value):
        return "a number"
    if low is not None and value < low:
        return f"at least {low}"
    if above is not None and value <= above:
        return f"more than {above}"
    if high is not None and value > high:
        return f"at most {high}"
    if spec.metadata.get("nonempty") and value == "":
        return "a name"
    return None
