"""The calculator: what it computes, how it writes results, and what it refuses."""

import time

import pytest

from llm.inference.calculator import MAX_EXPRESSION, MAX_RESULT, calculate, explain


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("1+2", "3"),
        (" 12 * (3 + 4) ", "84"),
        ("-3+(-2)", "-5"),
        ("+7", "7"),
        ("12/4", "3"),  # a whole quotient is written as in the training data, without ".0"
        ("7/2", "3.5"),
        ("7//2", "3"),
        ("7%4", "3"),
        (".5*10", "5"),
        ("0.1+0.2", "0.3"),
        ("100/3", "33.33333333"),
        ("1,000*3", "3000"),
        ("1,234,567+1", "1234568"),
        ("'strawberry'.count('r')", "3"),
        ('"a,b".count(",")', "1"),
        ("'aaaa'.count('aa')", "2"),
        ("'über'.count('ü')", "1"),
        ("'ab'.count('a')+'cc'.count('c')", "3"),
        ("999999999*999999999", "999999998000000001"),
    ],
)
def test_results(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "abc",
        "2**3",
        "1/0",
        "1//0",
        "5%0",
        "1,2",
        "1,00",
        "(1+2",
        "1+",
        "1e5",
        "0x10",
        "1_000",
        "True+1",
        "1<2",
        "1if 1 else 2",
        "[1][0]",
        "'a'",
        "'a'+'b'",
        "'a'*3",
        "'a'.upper()",
        "'a'.count('a', 0)",
        "'a'.count(x)",
        "x.count('a')",
        "b'a'.count('a')",
        "f'{1}'.count('1')",
        "'a'.count.__class__",
        "'\\x61'.count('a')",
        "__import__('os').system('true')",
        "().__class__.__bases__",
        "5-\n3",
        "9" * MAX_EXPRESSION,  # a number, but too long to write into a text
        "(" * (MAX_EXPRESSION // 2) + "1",
        "1+" * MAX_EXPRESSION + "1",
    ],
)
def test_refused(expression):
    assert calculate(expression) is None


@pytest.mark.parametrize(
    ("expression", "steps"),
    [
        ("(12+3)*2", ["12 + 3 = 15", "15 * 2 = 30"]),
        ("1,000/8-5%3", ["1000 / 8 = 125", "5 % 3 = 2", "125 - 2 = 123"]),
        ("'tibet'.count('t')", ["'t' stands in 'tibet' 2 times"]),
        ("7", []),
        ("1/0", []),
        ("2**3", []),
    ],
)
def test_the_steps_are_told_inner_ones_first(expression, steps):
    assert explain(expression) == steps
    assert not steps or steps[-1].rpartition(" = ")[2] == calculate(expression) or "times" in steps[-1]


def test_limits_keep_every_call_short():
    """Nesting and products as deep and long as an expression can hold take well under a second; without limits: hours.

    The bound is on the processor time of this thread, which a busy machine does not stretch much.
    """
    deep = "-" * (MAX_EXPRESSION - 1) + "1"
    products = "*".join(["99"] * (MAX_EXPRESSION // 3))
    start = time.thread_time()
    assert calculate(deep) == "-1"
    assert calculate(products) is None
    assert time.thread_time() - start < 30
    longest = "1" * MAX_RESULT
    assert calculate(longest) == longest
    assert calculate(longest + "1") is None
