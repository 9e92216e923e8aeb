"""The Transformer and the operations of its layers."""

from llm.model.config import GPTConfig
from llm.model.gpt import GPT

__all__ = ["GPT", "GPTConfig"]
