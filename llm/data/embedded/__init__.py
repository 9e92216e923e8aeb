"""Seeded generator of pretraining text and task rows, so that every stage runs without a download."""

from llm.data.embedded.rows import rows
from llm.data.embedded.texts import document, documents

__all__ = ["document", "documents", "rows"]
