"""Writing a Python function from its signature and docstring, scored by running the row's tests."""

import ast
import re
import warnings
from collections.abc import Sequence
from typing import ClassVar

from llm.errors import UserError
from tasks.base import Task, dialogue
from tasks.execution import Program, run_programs
from tasks.files import need

FENCE = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def extract_code(completion: str) -> str:
    """Return the first fenced code block of a completion, or all of it where there is none."""
    match = FENCE.search(completion)
    return match.group(1) if match else completion


def program(row: dict, completion: str) -> Program:
    """Return the program that decides: the prompt's imports, the written function, and the row's tests.

    A completion that only continues the prompt (no `def` of the wanted name) is put after the prompt. Tests may use
    what the prompt defines before the wanted function.
    """
    code = extract_code(completion)
    if not re.search(rf"\bdef\s+{re.escape(row['entry_point'])}\b", code):
        code = row["prompt"] + code
    imports = [line for line in row["prompt"].splitlines() if line.startswith(("import ", "from "))]
    return Program("\n".join([*imports, "", code]), row["entry_point"], row["test"], setup=with_body(row["prompt"]))


def with_body(prompt: str) -> str:
    """Return a prompt as a program of its own: one that ends with a signature, without docstring, gets a body."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of an invalid escape, for one
            ast.parse(prompt)
    except SyntaxError:
        return f"{prompt.rstrip()}\n    pass\n"
    return prompt


def defined_names(code: str, where: str) -> set[str]:
    """Return the names that a program defines at its top. Raises UserError, beginning with `where`, if it is none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of an invalid escape, for one
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{where} is no Python program ({error})") from None
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return functions | {target.id for target in targets if isinstance(target, ast.Name)}


class HumanEval(Task):
    """Rows `{task_id, prompt, entry_point, canonical_solution, test}`; right means that all tests pass in time."""

    kind = "generative"
    judges_slowly = True
    generated: ClassVar[dict[str, str]] = {"embedded": "programs"}
    sizes: ClassVar[dict[str, int]] = {"train": 600, "test": 80}  # there are fewer different tiny programs

    @classmethod
    def check_row(cls, row: dict, where: str) -> None:
        """Raise UserError for a row not in the HumanEval format, or whose solution or test cannot be run.

        Solutions are compiled here, not run: a run takes a tenth of a second (`check_reference` does it).
        """
        need(row, where, prompt=str, entry_point=str, canonical_solution=str, test=str)
        solved = row["prompt"] + row["canonical_solution"]
        for key, code, wanted in (("canonical_solution", solved, row["entry_point"]), ("test", row["test"], "check")):
            if wanted not in defined_names(code, f"{where}: {key!r}"):
                raise UserError(f"{where}: {key!r} defines no function {wanted!r}, so no answer could pass")

    def conversation(self, row: dict, index: int) -> dict:
        answer = f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```"
        facts = {key: row[key] for key in ("prompt", "entry_point", "test")}
        return {"messages": dialogue(row["prompt"], answer), **facts}

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return self.verdicts([conversation], [completion]) == ["pass"]

    def verdicts(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[str]:
        programs = [program(c, text) for c, text in zip(conversations, completions, strict=True)]
        return [result.verdict for result in run_programs(programs)]
