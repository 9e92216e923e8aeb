"""Python that a model writes within its answer: run in the sandbox, its output given back as text."""

from tasks.execution import Limits, Program, run_program

LIMITS = Limits(seconds=5.0, memory_mb=256, processes=0)
MOST_CHARACTERS = 500  # of an output; the rest is cut off

# Runs the snippet as a notebook does: the value of an expression at its end is printed too.
_RUNNER = """
import ast, sys

def run():
    tree, scope = ast.parse({source!r}), {{"__name__": "__main__"}}
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "snippet", "exec"), scope)
    value = None if last is None else eval(compile(ast.Expression(last.value), "snippet", "eval"), scope)
    if value is not None:
        print(value)
    sys.stdout.flush()
"""


def run_snippet(source: str) -> str:
    """Return the output of a piece of Python, or `error: ...` in one line where it fails, stripped and cut.

    It runs in the sandbox of `tasks.execution`, within seconds; nothing that it does can raise here.
    """
    program = Program(_RUNNER.format(source=source), "run", "def check(candidate):\n    candidate()\n")
    result = run_program(program, LIMITS, head=True)
    text = result.stdout.strip() if result.ok else f"error: {result.detail or result.verdict}"
    return text[:MOST_CHARACTERS]
