"""Python of a model, run as a notebook does: what is printed, the last value, errors in one line."""

import pytest

from tasks.snippets import MOST_CHARACTERS, run_snippet


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("sum(range(10))", "45"),
        ("x = 3\nprint('x is', x)\nx * 2", "x is 3\n6"),
        ("print(1)", "1"),
        ("y = 1", ""),
        ("1 / 0", "error: ZeroDivisionError: division by zero"),
        ("'z' * 10_000", "z" * MOST_CHARACTERS),
        ("for i in range(10_000): print(i)", "\n".join(map(str, range(200)))[:MOST_CHARACTERS]),
    ],
)
def test_output_and_last_value_come_back(source, output):
    assert run_snippet(source) == output


def test_what_cannot_be_parsed_is_an_error_in_one_line():
    text = run_snippet("def f(:")
    assert text.startswith("error: SyntaxError") and "\n" not in text
