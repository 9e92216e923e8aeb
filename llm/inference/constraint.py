"""Answers of a given form: a JSON object, a JSON schema, a regular expression, one of some texts (package llguidance).

A `Constraint` says which tokens may come next in one row. Near the end of the row's room it also sees to it that the
form is completed: it takes a short way out once little more room is left than that needs.
"""

import json
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from llm.errors import UserError

MARGINS = (2, 64)  # tokens of room that are left when the way out is taken: at least, and at most an eighth of it
LONGEST_WAY = 512  # tokens; a form that takes more is not completed in time
WAY_SECONDS = 0.5  # of this thread alone, for a look for the way out: one that takes more is the last for its form
OBJECT = {"type": "object"}
COMPACT = {"whitespace_flexible": False}  # a model that has learnt nothing would write spaces for ever
# What ends a form of JSON soonest comes first. Inside a string, where both braces are letters, that is its end.
AROUND_STRINGS = ("}", "]", ",", '"', "0", ":", "null", "true", "false", "{", "[")
IN_STRINGS = ('"', "0")

CLASSES = {"d": "[0-9]", "w": "[0-9A-Za-z_]", "s": r"[ \t\n\r\f\v]"}

COMPILED = 16  # forms that are kept compiled: samples of one request have the same, and so have many requests

_tokenizers: dict[int, Any] = {}
_compiled: OrderedDict[tuple[int, str], Any] = OrderedDict()  # matchers by tokenizer and form, the latest used last
_without_way: set[tuple[int, str]] = set()  # those of them whose way out is not looked for: that takes too long


class Constraint:
    """Form that one row must have; the engine asks `allowed`, and reports each token by `accept`.

    form: {"type": "json_object"}, {"type": "json_schema", "schema"}, {"type": "regex", "regex"} or {"type": "choice",
    "choice": texts}. room: tokens that the row may gain. Raises UserError for a form that is none.
    """

    def __init__(self, tokenizer: Any, form: Mapping[str, Any], room: int):
        self._key = id(tokenizer), json.dumps(form)
        self._matcher, self._lengths = _matcher(tokenizer, form, self._key), _for_llguidance(tokenizer)[1]
        self._vocab_size, self._ends = tokenizer.vocab_size, sorted(tokenizer.stop_ids)
        self._around, self._inside = (
            [ids[0] for text in texts if len(ids := tokenizer.encode(text)) == 1]
            for texts in (AROUND_STRINGS if form["type"].startswith("json") else (), IN_STRINGS)
        )
        self._braces = [tokenizer.encode(brace)[0] for brace in "{}"]
        self._room, self._margin = room, max(MARGINS[0], min(MARGINS[1], room // 8))
        self._look_at = room  # room with which the way out is looked for next
        self._way: list[int] | None = None  # the rest of it, once it is taken

    @property
    def is_done(self) -> bool:
        """Return True once nothing can follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, as booleans (V,). Raises UserError where the form is too complex."""
        mask = self._mask(self._matcher)
        self._check()
        if self._way is None and self._room <= self._look_at and self._key not in _without_way:
            until = time.thread_time() + WAY_SECONDS
            way = self._way_out(mask, until)
            spare = self._room - len(way) - self._margin
            self._way = way if way and spare <= 0 else None
            self._look_at = self._room - max(1, spare // 8)  # a token rarely makes the way out much longer
            if time.thread_time() >= until and self._key in _compiled:
                _without_way.add(self._key)
        if self._way:
            mask[:] = False
            mask[self._way[0]] = True
        return torch.from_numpy(mask)

    def accept(self, token: int) -> None:
        """Note the token that the row has gained. Raises UserError where the form is too complex to go on."""
        self._room -= 1
        if self._way:
            self._way.pop(0)
        if token not in self._ends:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        """Raise UserError where the matcher has given up: it would let the text end anywhere."""
        if self._matcher.is_error():
            raise UserError(_first_line(self._matcher.get_error()))

    def _mask(self, matcher: Any) -> np.ndarray:
        """Return the tokens that may come next, booleans (V,); the ends of a turn where the form is complete."""
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        mask[self._ends] = matcher.is_accepting()
        return mask

    def _way_out(self, mask: np.ndarray, until: float) -> list[int]:
        """Return the tokens of a short way to a complete form; [] where none is found.

        None that has no place in the row's room, and none that is not found until `until`, by time.thread_time.
        """
        matcher, way, before = self._matcher.deep_copy(), [], mask
        while len(way) <= min(LONGEST_WAY, self._room) and time.thread_time() < until and not matcher.is_error():
            if mask[self._ends].any() or matcher.is_stopped():
                return [*way, self._ends[0]]
            if not mask.any():
                return []
            way.append(self._next(mask, before, way))
            matcher.consume_token(way[-1])
            before, mask = mask, self._mask(matcher)
        return []

    def _next(self, mask: np.ndarray, before: np.ndarray, way: list[int]) -> int:
        """Return the token that goes on with a way out where `mask` is allowed, and `before` was one token earlier.

        Beside JSON's own signs, a token that has just become possible leads out of a repetition, as @ in [a-z]+@, and
        one that is not yet on the way leads on sooner than one that is.
        """
        for token in self._inside if mask[self._braces].all() else self._around:
            if mask[token]:
                return token
        allowed = np.flatnonzero(new if (new := mask & ~before).any() else mask)
        used = np.bincount(way, minlength=self._vocab_size)[allowed]
        return int(allowed[np.lexsort((self._lengths[allowed], used))[0]])


def _matcher(tokenizer: Any, form: Mapping[str, Any], key: tuple[int, str]) -> Any:
    """Return a matcher at the beginning of a form, compiled where none is kept. Raises UserError as `Constraint`."""
    import llguidance

    matcher = _compiled.pop(key, None)
    if matcher is None:
        matcher = llguidance.LLMatcher(_for_llguidance(tokenizer)[0], _grammar(form), log_level=0)
        if problem := matcher.get_error():
            raise UserError(f"the form of the answer ({form['type']}) cannot be used: {_first_line(problem)}")
    _compiled[key] = matcher
    if len(_compiled) > COMPILED:
        _without_way.discard(_compiled.popitem(last=False)[0])
    return matcher.deep_copy()


def _grammar(form: Mapping[str, Any]) -> str:
    """Return a form as a grammar of llguidance. Raises UserError for a kind of form that does not exist."""
    from llguidance import LLMatcher

    match form["type"]:
        case "json_object":
            return LLMatcher.grammar_from_json_schema(OBJECT, overrides=COMPACT)
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(json.dumps(form["schema"]), overrides=COMPACT)
        case "regex":
            return LLMatcher.grammar_from_regex(_ascii_classes(form["regex"]))
        case "choice":
            return LLMatcher.grammar_from_regex("|".join(_escaped(text) for text in form["choice"]))
    raise UserError(f"an answer of the form {form['type']!r} is not known")


def _ascii_classes(regex: str) -> str:
    """Return a regular expression whose \\d, \\w and \\s stand for ASCII signs, and not for those of every script."""
    return re.sub(r"\\(.)", lambda found: CLASSES.get(found[1], found[0]), regex, flags=re.DOTALL)


def _escaped(text: str) -> str:
    """Return a regular expression for a text, in a group of its own. Signs without a meaning may not be escaped."""
    return "(" + re.sub(r"[\\.+*?()|\[\]{}^$#&~-]", lambda sign: "\\" + sign[0], text) + ")"


def _for_llguidance(tokenizer: Any) -> tuple[Any, np.ndarray]:
    """Return llguidance's own form of a tokenizer and the bytes of every token, int (V,); made once for each."""
    import llguidance

    if id(tokenizer) not in _tokenizers:
        vocabulary = _Vocabulary(tokenizer)
        wrapper = llguidance.TokenizerWrapper(vocabulary)
        lengths = np.array([len(token) for token in vocabulary.tokens])
        lengths[[i for i in vocabulary.special_token_ids if i < len(lengths)]] = 0
        # The tokenizer is kept too: another one must not get its number.
        _tokenizers[id(tokenizer)] = tokenizer, llguidance.LLTokenizer(wrapper, n_vocab=len(lengths)), lengths
    return _tokenizers[id(tokenizer)][1:]


class _Vocabulary:
    """Tokenizer as llguidance wants it: the bytes of every token, the special ones, and the ids of a text."""

    def __init__(self, tokenizer: Any):
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300]
