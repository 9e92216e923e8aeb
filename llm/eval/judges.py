"""Judges of a user's own: functions that score a model, named in the configuration by `eval.judges`."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from omegaconf import OmegaConf

from llm.errors import UserError
from llm.utils.format import duration
from llm.utils.registry import imported

Scores = dict[str, Any]


def judges(options: Any, subject: Any) -> dict[str, Callable[[], Scores]]:
    """Return the functions that measure `subject` for each of `eval.judges`, by name.

    A judge is `{_target_: package.module.function, ...}`; it is called as `function(subject, **rest)` and returns
    {metric: number}, anything that JSON holds. subject: see `llm.eval.evaluate.Subject`. A function returned here gives
    {"judges": {name: scores}}. Raises UserError where a `_target_` is missing or cannot be imported.
    """
    found = {}
    for name, part in (OmegaConf.to_container(options.judges, resolve=True) or {}).items():
        key = f"eval.judges.{name}"
        if not isinstance(part, Mapping) or "." not in str(part.get("_target_")):
            raise UserError(f"{key}={part}: give {{_target_: package.module.function}} and its arguments")
        rest = {option: value for option, value in part.items() if option != "_target_"}
        found[name] = partial(_measure, name, imported(part["_target_"], f"{key}._target_"), subject, rest)
    return found


def _measure(name: str, judge: Callable[..., Scores], subject: Any, rest: Mapping[str, Any]) -> Scores:
    start = time.perf_counter()
    scores = judge(subject, **rest)
    if not isinstance(scores, Mapping):
        raise UserError(f"eval.judges.{name}: {judge.__name__} returned {scores!r}; a judge returns {{metric: number}}")
    print(f"{name}: {duration(time.perf_counter() - start)}", flush=True)
    return {"judges": {name: dict(scores)}}
