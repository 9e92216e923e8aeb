"""Calculator for the expressions that a model writes between python markers.

The text comes from a model, so it is untrusted. It passes a lexical gate and a length limit, then a walk over the
parsed expression that knows six operators and one string method. Python itself evaluates nothing. No signal or timer is
needed, because an expression within the limits cannot take long (there is no power operator).
"""

import ast
import math
import operator
import re
from collections.abc import Callable

MAX_EXPRESSION = 256  # characters
MAX_RESULT = 32  # characters

_STRING = re.compile(r"'[^'\\\n]*'|\"[^\"\\\n]*\"")
_ARITHMETIC = re.compile(r"[0-9+\-*/%.() ]*")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%"}
FAILURES = (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError)  # of a text that is no expression


def calculate(expression: str) -> str | None:
    """Return the value of an arithmetic expression or of `"text".count("x")`, written as training data writes results.

    Knows numbers (also 1,000), + - * / // %, parentheses, signs and `.count()` of one string literal in another. Whole
    results have no decimal point. Returns None for everything else, including division by zero and input that is too
    long.
    """
    try:
        return _format(_value(_parsed(expression)))
    except FAILURES:
        return None


def explain(expression: str) -> list[str]:
    """Return the steps by which `calculate` gets its result, as in ["12 + 3 = 15", "15 * 2 = 30"]; [] without one."""
    steps: list[str] = []
    try:
        result = _format(_value(_parsed(expression), steps.append))
    except FAILURES:
        return []
    return [] if result is None else steps


def _parsed(expression: str) -> ast.expr:
    """Return an expression as a tree. Raises one of `FAILURES` for what the calculator does not take."""
    if len(expression) > MAX_EXPRESSION:
        raise ValueError("too long")
    strings = _STRING.findall(expression)
    bare = _STRING.sub("", expression).replace(".count()", "0" if strings else "!")
    if not _ARITHMETIC.fullmatch(_THOUSANDS.sub("", bare)):
        raise ValueError("signs that are not part of the calculator's language")
    source = expression if strings else _THOUSANDS.sub("", expression)
    return ast.parse(source.strip(), mode="eval").body


def _value(node: ast.expr, tell: Callable[[str], None] | None = None) -> int | float:
    """Return the value of a node of the calculator's language; raise ValueError for any other node.

    tell: called with every step in words, inner ones first.
    """
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand, tell))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left, tell), _value(right, tell)
            found = _OPERATORS[type(op)](a, b)
            if tell is not None:
                a, b, shown = (_format(number) or f"{number:.6g}" for number in (a, b, found))
                tell(f"{a} {_SIGNS[type(op)]} {b} = {shown}")
            return found
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            if tell is not None:
                tell(f"{part!r} stands in {text!r} {text.count(part)} times")
            return text.count(part)
    raise ValueError(f"{type(node).__name__} is not part of the calculator's language")


def _format(value: int | float) -> str | None:
    """Return the shortest usual form: 3 for 3.0, 0.3 for 0.1 + 0.2; None if it is longer than MAX_RESULT.

    Ten significant digits hide binary rounding.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        rounded = float(f"{value:.10g}")
        value = int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    text = str(value)
    return text if len(text) <= MAX_RESULT else None
