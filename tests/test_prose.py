"""The prose of the code: every docstring begins with a verb or names the thing, and stands on its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FILES = sorted(
    path.relative_to(REPO) for name in ("llm", "callbacks", "tasks", "bench") for path in REPO.glob(f"{name}/**/*.py")
)
# Paths whose prose is not yet checked; the list is to be emptied.
PENDING: tuple[str, ...] = ()
# A docstring that begins with one of these is half a sentence: the other half is the name, or a neighbour.
HALF = (
    "What|Which|Who|Whose|Whether|How|Where|When|Why|That|Those|These|This|It|Its|They|Their|Of|As|In|By|With|Without|For|"
    "From|On|Onto|To|Than|At|Up|If|Like|One of|Same|The same|Also|Likewise|And|Or|But|So|Just"
)
BEGINS_HALF = re.compile(rf"(?:{HALF})\b", re.IGNORECASE)
# Words that point to a neighbour. "the same dtype" names a thing and is fine, "the same for lists" is not.
POINTS_AWAY = re.compile(
    r"\bthe same(?=[.,;:)]|$| (?:as|for|in|with|by|through|of|on|to|at|where|when|if|is|are|and|or|but|without)\b)"
    r"|\b(?:as|see|described|form|rules?) above\b|\bas below\b|\blikewise\b|\bhere too\b|\bditto\b",
    re.IGNORECASE,
)


def problem_of(doc: str) -> str | None:
    """Return what is wrong with a docstring (cleaned of its indentation), None if nothing is."""
    text = " ".join(doc.split())
    if not text:
        return "is empty"
    if begins := BEGINS_HALF.match(text):
        return f"begins with {begins[0]!r}, neither a verb nor a name"
    if not re.match(r"[A-Z`]|torch\.", text):
        return f"begins with {text.split()[0]!r}, not with a word in upper case or a `name`"
    if points := POINTS_AWAY.search(text):
        return f"says {points[0]!r}, which points to a neighbour"
    if len(text) > 20 and text[-1] not in ".:)`" and "\n    " not in doc:
        return "does not end with a full stop"
    return None


def documented(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield (name, node) of a module and of all classes and functions in it."""
    yield "module", tree
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node


def is_face(tree: ast.Module, node: ast.AST) -> bool:
    """Return True for a class or function of a module that others may call, and for the module itself."""
    return node is tree or (node in tree.body and not node.name.startswith("_"))


def problems_in(source: str) -> list[str]:
    """Return "line: problem" for each docstring of a source that is wrong or missing."""
    tree, found = ast.parse(source), []
    for name, node in documented(tree):
        doc = ast.get_docstring(node)
        if doc is None:
            problem = "has no docstring" if is_face(tree, node) and source.strip() else None
        else:
            problem = problem_of(doc)
        if problem:
            found.append(f"{getattr(node, 'lineno', 1)}: {name} {problem}")
    return found


@pytest.mark.parametrize(
    "path", [path for path in FILES if not path.as_posix().startswith(PENDING)], ids=lambda path: path.as_posix()
)
def test_docstrings_stand_on_their_own(path):
    assert problems_in((REPO / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("doc", "problem"),
    [
        ("Return the rows of a file.", None),
        ("Rows of a file, in order.", None),
        ("Cast to the same dtype as a tensor's.", None),
        ("What a rank reads.", "begins with 'What'"),
        ("The same for a stack.", "begins with 'The same'"),
        ("Of one matrix: its norm.", "begins with 'Of'"),
        ("Whether it fits.", "begins with 'Whether'"),
        ("x / scale in `dtype`.", "not with a word"),
        ("Run the stack; the same for lists.", "points to a neighbour"),
        ("Check a conversation of the form above.", "points to a neighbour"),
        ("Return the rows of a file, in their order", "full stop"),
    ],
)
def test_the_check_finds_each_kind_of_bad_prose(doc, problem):
    found = problem_of(doc)
    assert (found is None) if problem is None else (problem in found)


def test_the_check_finds_a_missing_docstring():
    assert problems_in('"""A module."""\n\n\ndef face():\n    pass\n\n\ndef _inside():\n    pass\n') == [
        "4: face has no docstring"
    ]
