"""Tiny Python functions in the HumanEval row format: a signature with a docstring, a solution and its checks."""

import operator
import random
from collections.abc import Callable

from llm.data.embedded.splits import split_of

# name, parameter, docstring, returned expression, function of (argument, n) it computes, arguments to check
FAMILIES: tuple[tuple[str, str, str, str, Callable, tuple], ...] = (
    ("add_{n}", "x", "Return x plus {n}.", "x + {n}", operator.add, (0, 7, -3)),
    ("take_{n}", "x", "Return x minus {n}.", "x - {n}", operator.sub, (0, 50, 9)),
    ("times_{n}", "x", "Return x times {n}.", "x * {n}", operator.mul, (0, 1, 8)),
    ("over_{n}", "x", "Return True if x is greater than {n}.", "x > {n}", operator.gt, (0, 40, 99)),
    ("rest_{n}", "x", "Return the rest of x divided by {n}.", "x % {n}", operator.mod, (5, 31, 100)),
    ("repeat_{n}", "s", "Return the text s repeated {n} times.", "s * {n}", operator.mul, ("", "a", "bo")),
    ("first_{n}", "s", "Return the first {n} letters of s.", "s[:{n}]", lambda s, n: s[:n], ("", "kite", "ab" * 60)),
    (
        "after_{n}",
        "s",
        "Return s without its first {n} letters.",
        "s[{n}:]",
        lambda s, n: s[n:],
        ("", "kite", "ab" * 60),
    ),
)


def program_row(split: str, rng: random.Random) -> dict:
    """Return a HumanEval-style row that belongs to `split` (decided by the function's name)."""
    while True:
        name, argument, purpose, expression, compute, inputs = rng.choice(FAMILIES)
        n = rng.randint(2, 99)
        name = name.format(n=n)
        if split_of("program/" + name) == split:
            break
    checks = "".join(f"    assert candidate({x!r}) == {compute(x, n)!r}\n" for x in inputs)
    return {
        "task_id": f"embedded/{name}",
        "prompt": f'def {name}({argument}):\n    """{purpose.format(n=n)}"""\n',
        "entry_point": name,
        "canonical_solution": f"    return {expression.format(n=n)}\n",
        "test": f"def check(candidate):\n{checks}",
    }
