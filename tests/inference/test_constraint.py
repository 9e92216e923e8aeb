"""Constraints: whatever is drawn among the allowed tokens, the text has the form, also where the room is short."""

import json
import random
import re

import pytest

pytest.importorskip("llguidance")
pytest.importorskip("fastapi")

from llm.errors import UserError  # noqa: E402
from llm.inference import constraint  # noqa: E402
from llm.inference.constraint import Constraint  # noqa: E402
from llm.serving.api.requests import ChatRequest  # noqa: E402
from llm.serving.api.tools import tool_form  # noqa: E402
from llm.tokenizer.bpe import Tokenizer  # noqa: E402

TEXT = "the red fox of the hill has 12 apples, and 3 friends. {}[]"
ITEM = {"type": "object", "properties": {"k": {"type": "string", "minLength": 3}, "v": {"enum": ["red", 2, None]}}}
ITEM |= {"required": ["k", "v"], "additionalProperties": False}
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "items": {"type": "array", "items": ITEM}}}
SCHEMA |= {"required": ["name", "items"], "additionalProperties": False}


def is_item(value) -> bool:
    return set(value) == {"k", "v"} and len(value["k"]) >= 3 and value["v"] in ("red", 2, None)


def fits_schema(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"name", "items"} and isinstance(value["name"], str) and all(map(is_item, value["items"]))


SIGNS = ["café", "<yes>", "日本", "€5", r"a.b*(c)[d]{e}^$|\\#&~-x y+?/'\"!%,:;=@_`"]
FORMS = {
    "object": ({"type": "json_object"}, lambda text: isinstance(json.loads(text), dict)),
    "schema": ({"type": "json_schema", "schema": SCHEMA}, fits_schema),
    "mail": (
        {"type": "regex", "regex": r"[a-z]+@[a-z]+\.(com|org)"},
        re.compile(r"[a-z]+@[a-z]+\.(com|org)").fullmatch,
    ),
    "words": ({"type": "regex", "regex": r"(yes|no)( [a-z]+)+\."}, re.compile(r"(yes|no)( [a-z]+)+\.").fullmatch),
    "date": ({"type": "regex", "regex": r"\d{4}-[\d]{2}\\"}, re.compile(r"[0-9]{4}-[0-9]{2}\\").fullmatch),
    "choice": ({"type": "choice", "choice": ["yes", "no (never)*"]}, ("yes", "no (never)*").__contains__),
    "signs": ({"type": "choice", "choice": SIGNS}, SIGNS.__contains__),
}


@pytest.fixture(scope="module")
def tokenizers():
    return Tokenizer([bytes([b]) for b in range(256)]), Tokenizer.train([TEXT * 20], 300)


def drawn(tokenizer, form: dict, room: int, rng: random.Random) -> str:
    """The text of tokens drawn evenly among those that are allowed, as the engine ends it."""
    row, ids = Constraint(tokenizer, form, room), []
    while len(ids) < room:
        token = rng.choice(row.allowed().nonzero().flatten().tolist())
        if token in tokenizer.stop_ids:
            break
        ids.append(token)
        row.accept(token)
        if row.is_done:
            break
    return tokenizer.decode(ids)


@pytest.mark.parametrize("name", FORMS)
def test_any_draw_has_the_form(name, tokenizers):
    form, fits = FORMS[name]
    rng = random.Random(0)
    for tokenizer in tokenizers:
        for room in (60, 60, 90, 200):
            text = drawn(tokenizer, form, room, rng)
            assert fits(text), text


def test_only_the_end_follows_a_complete_form(tokenizers):
    tokenizer = tokenizers[0]
    constraint = Constraint(tokenizer, {"type": "regex", "regex": "ab?"}, 10)
    constraint.accept(ord("a"))
    assert set(constraint.allowed().nonzero().flatten().tolist()) == {ord("b"), *tokenizer.stop_ids}
    assert not constraint.is_done
    constraint.accept(ord("b"))
    assert constraint.is_done


@pytest.mark.parametrize(
    "form", [{"type": "regex", "regex": "("}, {"type": "json_schema", "schema": {"type": "nonsense"}}, {"type": "xml"}]
)
def test_a_form_that_is_none_is_told(form, tokenizers):
    with pytest.raises(UserError, match="form"):
        Constraint(tokenizers[0], form, 10)


def test_a_form_is_compiled_once_and_its_rows_are_apart(tokenizers, monkeypatch):
    tokenizer, made = tokenizers[0], []
    grammar = constraint._grammar
    monkeypatch.setattr(constraint, "_grammar", lambda form: made.append(form) or grammar(form))
    rows = [Constraint(tokenizer, {"type": "choice", "choice": ["ab", "cd"]}, 10) for _ in range(3)]
    for row, letter in zip(rows, b"ac", strict=False):
        row.accept(letter)
    assert [row.allowed().nonzero().flatten().tolist() for row in rows] == [[*b"b"], [*b"d"], [*b"ac"]]
    for i in range(constraint.COMPILED):
        Constraint(tokenizer, {"type": "choice", "choice": [str(i)]}, 10)
    Constraint(tokenizer, {"type": "choice", "choice": ["ab", "cd"]}, 10)
    assert len(made) == constraint.COMPILED + 2 and len(constraint._compiled) <= constraint.COMPILED


def test_a_tokenizer_that_changes_texts_can_have_forms(tokenizers, monkeypatch):
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self: 1 / 0)  # those of others refuse to count a text's bytes
    assert drawn(Tokenizer(tokenizers[0].tokens), FORMS["choice"][0], 40, random.Random(1)) in ("yes", "no (never)*")


def test_a_matcher_that_gives_up_ends_no_answer(tokenizers):
    row = Constraint(tokenizers[0], {"type": "regex", "regex": "ab*"}, 10)
    row.accept(ord("a"))
    with pytest.raises(UserError):
        row.accept(ord("z"))  # as one that meets a form too complex for it
    with pytest.raises(UserError):
        row.allowed()


def test_the_way_out_is_looked_for_where_it_has_room_and_as_long_as_it_pays(tokenizers, monkeypatch):
    form = {"type": "regex", "regex": "a{50}b?"}
    for room, length in ((20, 0), (60, 51)):
        row = Constraint(tokenizers[0], form, room)
        assert len(row._way_out(row._mask(row._matcher), float("inf"))) == length
    monkeypatch.setattr(constraint, "WAY_SECONDS", 0)
    monkeypatch.setattr(constraint, "_without_way", set())
    looks = []
    monkeypatch.setattr(Constraint, "_way_out", lambda self, mask, until: looks.append(until) or [])
    for row in (Constraint(tokenizers[0], form, 60) for _ in range(3)):
        for _ in range(50):
            row.allowed()
            row.accept(ord("a"))
    assert len(looks) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_arguments_of_a_function_may_refer_to_their_own_parts(tokenizers, n):
    point = {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}
    tree = {"$ref": "#/$defs/Tree"}
    parts = {"Point": point, "Tree": {"type": "array", "maxItems": 1, "items": tree}}
    inner = {"at": {"$ref": "#/$defs/Point"}, "tree": tree}
    parameters = {"type": "object", "$defs": parts, "properties": inner, "required": ["at"]}
    tools = [{"type": "function", "function": {"name": f"go{i}", "parameters": parameters}} for i in range(n)]
    body = ChatRequest(model="a", messages=[{"role": "user", "content": "x"}], tools=tools, tool_choice="required")
    for seed in range(4):
        call = json.loads(drawn(tokenizers[1], tool_form(body), 200, random.Random(seed)))
        assert call["name"] in ("go0", "go1")[:n] and isinstance(call["arguments"]["at"]["x"], bool)
