"""The embedded world: a seeded generator of pretraining text and task rows, so every stage runs without a download."""

from llm.data.embedded.rows import rows
from llm.data.embedded.texts import document, documents

__all__ = ["document", "documents", "rows"]
