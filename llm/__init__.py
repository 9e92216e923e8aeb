"""Fathom: train your own ChatGPT from raw text."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Return `load`, which is imported when it is asked for: it needs torch, and most of `llm` is light."""
    if name == "load":
        return import_module("llm.serving.notebook").load
    raise AttributeError(f"module 'llm' has no attribute {name!r}")
