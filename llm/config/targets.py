"""Classes and functions of a user's own: a mapping with `_target_`, their dotted name, and their arguments beside it.

Callbacks, loggers, plugins of Lightning, tasks, sources of text, rewards and judges are named so. The module may lie in
the current folder, on PYTHONPATH or in an installed package; `__main__` is the notebook or script that is running.
"""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from llm.config.check import shown
from llm.errors import UserError
from llm.utils.registry import imported

TARGET = "_target_"
OF_HYDRA = (TARGET, "_args_", "_partial_", "_recursive_", "_convert_")  # say how to call, and are no arguments
FORM = "{_target_: package.module.Name} and its arguments"


def load_target(part: Any, key: str, base: type | None = None) -> Any:
    """Import what the `_target_` of the mapping `part` names. Raises UserError if there is none, or it is another kind.

    key: where `part` stands in the configuration. base: class that it must extend; None = anything that can be called.
    """
    name = part.get(TARGET) if isinstance(part, Mapping) else None
    if not isinstance(name, str):
        hint = f"; ~{key} leaves it out" if part is None else ""
        raise UserError(f"{key}={shown(part)}: must be a mapping, {FORM} (docs/extend.md){hint}")
    where = f"{key}.{TARGET}={name}"
    thing = imported(name, where)
    if base is not None and not (isinstance(thing, type) and issubclass(thing, base)):
        raise UserError(f"{where}: must be a class that extends {base.__module__}.{base.__qualname__}")
    if not callable(thing):
        raise UserError(f"{where}: must be a class or a function, not {type(thing).__name__}")
    return thing


def arguments_of(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments in a mapping with `_target_`, as plain mappings and lists."""
    return {str(name): as_plain(value) for name, value in part.items() if name not in OF_HYDRA}


def as_plain(value: Any) -> Any:
    """Return mappings and lists of a composed configuration as plain ones."""
    if isinstance(value, Mapping):
        return {key: as_plain(inner) for key, inner in value.items()}
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return [as_plain(inner) for inner in value] if is_list else value


def check_arguments(thing: Any, part: Mapping[str, Any], key: str, given: tuple[str, ...] = ()) -> None:
    """Raise UserError where a class or function lacks an argument that `part` names, or needs one that it does not.

    given: names of arguments that Fathom adds in front of them. What has no signature is not looked at.
    """
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return
    own, name = arguments_of(part), getattr(thing, "__name__", str(thing))
    known = [one for one in signature.parameters.values() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    taken = [one.name for one in known[len(given) :]]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
    listed = ", ".join(taken) or "none"
    for argument in own if not takes_any else ():
        if argument not in taken:
            near = get_close_matches(argument, taken, 1)
            hint = f"; did you mean {key}.{near[0]}?" if near else ""
            raise UserError(
                f"{key}.{argument}={shown(own[argument])}: {name} has no such argument{hint} (it has {listed})"
            )
    if part.get("_partial_"):
        return
    try:
        signature.bind(*given, *(part.get("_args_") or ()), **own)
    except TypeError as error:
        form = f"+{key}.<argument>=<value>"
        raise UserError(f"{key}: {name}: {error}; give it as {form} (it has {listed})") from error


def takes(thing: Any, argument: str) -> bool:
    """Return whether a class or function has an argument of this name; also where nobody knows."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(one.name == argument or one.kind is one.VAR_KEYWORD for one in parameters)
