"""Text generation with a key/value cache."""

from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams

__all__ = ["Engine", "SamplingParams"]
