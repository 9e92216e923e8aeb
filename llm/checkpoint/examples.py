"""Example questions of a chat model, `model/examples.json`: what the chat page offers to begin with."""

from collections.abc import Sequence
from pathlib import Path

from llm.run.content import list_file
from llm.run.formats import EXAMPLES, read_form
from llm.utils.files import write_json

EXAMPLES_FILE = "examples.json"


def save_examples(folder: Path, questions: Sequence[str]) -> None:
    """Write the questions into a finished model/ folder, and into its manifest.json."""
    write_json(folder / EXAMPLES_FILE, {"questions": list(questions)})
    list_file(folder, EXAMPLES_FILE)


def load_examples(folder: Path) -> list[str]:
    """Return the questions of a model/ folder; none of an older one. Raises UserError for a wrong file."""
    return (read_form(folder / EXAMPLES_FILE, EXAMPLES) or {"questions": []})["questions"]
