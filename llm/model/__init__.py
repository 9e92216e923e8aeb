"""The Transformer and what its layers compute."""

from llm.model.config import GPTConfig
from llm.model.gpt import GPT

__all__ = ["GPT", "GPTConfig"]
