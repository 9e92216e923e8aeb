"""Fathom: train your own ChatGPT from raw text.

For notebooks and scripts: `llm.train`, `llm.evaluate`, `llm.list_runs` and `llm.load` (docs/python.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llm.errors import UserError

if TYPE_CHECKING:
    from llm.api import Score, TrainedStage, evaluate, list_runs, train
    from llm.serving.notebook import Model, load

__all__ = ["Model", "Score", "TrainedStage", "UserError", "evaluate", "list_runs", "load", "train"]
__version__ = "0.1.0"

# Imported when they are asked for: most of `llm` is light, and these need torch or Hydra.
_LAZY = dict.fromkeys(("Score", "TrainedStage", "evaluate", "list_runs", "train"), "llm.api")
_LAZY |= dict.fromkeys(("Model", "load"), "llm.serving.notebook")


def __getattr__(name: str) -> Any:
    """Return a name of `__all__` from the module that has it."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'llm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
