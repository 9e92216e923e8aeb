"""Writing a Python function from its signature and docstring, scored by running the row's tests."""

import re

from tasks.base import Task, dialogue
from tasks.execution import run_program
from tasks.files import need

FENCE = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
TIMEOUT = 5.0  # seconds for one program


def extract_code(completion: str) -> str:
    """The first fenced code block of a completion, or all of it where there is none."""
    match = FENCE.search(completion)
    return match.group(1) if match else completion


def assemble(row: dict, completion: str) -> str:
    """The program that decides: the prompt's imports, the written function, the row's tests and their call.

    A completion that only continues the prompt (no `def` of the wanted name) is put after the prompt.
    """
    code = extract_code(completion)
    if not re.search(rf"\bdef\s+{re.escape(row['entry_point'])}\b", code):
        code = row["prompt"] + code
    imports = [line for line in row["prompt"].splitlines() if line.startswith(("import ", "from "))]
    return "\n".join([*imports, "", code, "", row["test"], "", f"check({row['entry_point']})", ""])


def check_row(row: dict, where: str) -> None:
    """Raise `UserError` for a row that is not in the HumanEval format."""
    need(row, where, prompt=str, entry_point=str, canonical_solution=str, test=str)


class HumanEval(Task):
    """Rows `{task_id, prompt, entry_point, canonical_solution, test}`; right means that all tests pass in time."""

    kind = "generative"

    def conversation(self, row: dict, index: int) -> dict:
        answer = f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```"
        facts = {key: row[key] for key in ("prompt", "entry_point", "test")}
        return {"messages": dialogue(row["prompt"], answer), **facts}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return run_program(assemble(conversation, completion), timeout=TIMEOUT).ok
