"""Calculator for the expressions that a model writes between python markers.

The text comes from a model, so it is untrusted. It passes a lexical gate and a length limit, then a walk over the
parsed expression that knows six operators and one string method. Python itself evaluates nothing. No signal or timer is
needed, because an expression within the limits cannot take long (there is no power operator).
"""

import ast
import math
import operator
import re

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


def calculate(expression: str) -> str | None:
    """Return the value of an arithmetic expression or of `"text".count("x")`, written as training data writes results.

    Knows numbers (also 1,000), + - * / // %, parentheses, signs and `.count()` of one string literal in another. Whole
    results have no decimal point. Returns None for everything else, including division by zero and input that is too
    long.
    """
    if len(expression) > MAX_EXPRESSION:
        return None
    try:
        strings = _STRING.findall(expression)
        bare = _STRING.sub("", expression).replace(".count()", "0" if strings else "!")
        if not _ARITHMETIC.fullmatch(_THOUSANDS.sub("", bare)):
            return None
        source = expression if strings else _THOUSANDS.sub("", expression)
        return _format(_value(ast.parse(source.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None


def _value(node: ast.expr) -> int | float:
    """Return the value of a node of the calculator's language; raise ValueError for any other node."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
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
