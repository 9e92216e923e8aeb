"""The embedded world: a seeded generator of pretraining text and task rows, so every stage runs without a download."""

from llm.data.embedded.documents import document, documents
from llm.data.embedded.rows import rows

__all__ = ["document", "documents", "rows"]
