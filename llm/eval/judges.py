"""Judges of a user's own: functions that score a model, named in the configuration by `eval.judges`."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from omegaconf import OmegaConf

from llm.config.targets import arguments_of, check_arguments, load_target
from llm.errors import UserError
from llm.utils.format import duration

Scores = dict[str, Any]


def judges(options: Any, taken: Sequence[str] = ()) -> dict[str, Callable[[Any], Scores]]:
    """Return the functions that measure a model for each of `eval.judges`, by name.

    A judge is `{_target_: package.module.function, ...}`; it is called as `function(subject, **rest)` and returns
    {metric: number}, anything that JSON holds. A function returned here takes the subject, see
    `llm.eval.evaluate.Subject`, and gives {"judges": {name: scores}}. taken: names that no judge may have. Raises
    UserError where a `_target_` cannot be imported or called so.
    """
    found = {}
    for name, part in (OmegaConf.to_container(options.judges, resolve=True) or {}).items():
        key = f"eval.judges.{name}"
        if name in taken:
            raise UserError(f"{key}: {name} is measured by Fathom; give your judge another name")
        judge = load_target(part, key)
        check_arguments(judge, part, key, given=("subject",))
        found[name] = partial(_measure, name, judge, arguments_of(part))
    return found


def _measure(name: str, judge: Callable[..., Scores], rest: Mapping[str, Any], subject: Any) -> Scores:
    start = time.perf_counter()
    scores = judge(subject, **rest)
    if not isinstance(scores, Mapping):
        kind = getattr(judge, "__name__", str(judge))
        raise UserError(f"eval.judges.{name}: {kind} returned {scores!r}; a judge returns {{metric: number}}")
    print(f"{name}: {duration(time.perf_counter() - start)}", flush=True)
    return {"judges": {name: dict(scores)}}
