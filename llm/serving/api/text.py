"""Text of an answer as it grows: whole characters, cut before a stop text, calculator calls apart from the answer.

A text is held back while it may be the beginning of a stop text (`llm.inference.text`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm.inference.text import TextStream
from llm.serving.chat import part_switches
from llm.serving.pool import Event


class TokenInfo(NamedTuple):
    """Token of the answer's text. top: the likeliest (id, logprob) pairs at its place."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass
class Delta:
    """Growth of an answer. text: of the answer; call: calculator calls, as in `12*3 = 36`; tokens: of `text`."""

    text: str = ""
    call: str = ""
    tokens: list[TokenInfo] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.call or self.tokens)


class AnswerText:
    """Fold of a row's events into deltas; special tokens have no text.

    min_tokens: a stop text that is complete before so many tokens does not end the answer, as in the engine.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), min_tokens: int = 0):
        self.n_call_tokens, self._n_tokens, self._min_tokens = 0, 0, min_tokens
        self._special, self._marks = tokenizer.special_ids, part_switches(tokenizer)
        self._text, self._calls = TextStream(tokenizer, stops, keep_stop=False), TextStream(tokenizer)
        self._kind, self._line_open = "text", False
        self._sent, self._read = 0, 0  # characters of text returned; and where the last token ended
        self._waiting: list[tuple[int, int, TokenInfo]] = []  # tokens not returned: (begin, end) in characters

    @property
    def is_cut(self) -> bool:
        """True once a stop text was found: nothing behind it counts."""
        return self._text.is_cut

    def push(self, events: Iterable[Event]) -> Delta:
        """Add events and return what they let be said."""
        text, call = "", ""
        for event in events:
            self._n_tokens += event.id is not None
            if event.id in self._marks:
                call += self._switch(self._marks[event.id])
                self.n_call_tokens += 1
            elif event.id is None or event.id in self._special:
                continue
            elif self._kind != "text":
                call += self._calls.push(event.id)
                self.n_call_tokens += 1
            elif not self.is_cut:
                text += self._said(self._text.push(event.id, self._n_tokens >= self._min_tokens))
                info = TokenInfo(event.id, event.logprob, event.top or [])
                begin, self._read = self._read, self._sent + self._text.n_waiting
                self._waiting.append((begin, self._read, info))
        return Delta(text, call, self._certain())

    def push_to_end(self, events: Sequence[Event]) -> tuple[Delta, str | None]:
        """Add events; return the growth of the text, with what waits at its end, and why it ended, None if not yet."""
        delta = self.push(events)
        if not events or events[-1].finish_reason is None:
            return delta, None
        rest = self.finish()
        whole = Delta(delta.text + rest.text, delta.call + rest.call, delta.tokens + rest.tokens)
        return whole, "stop" if self.is_cut else events[-1].finish_reason

    def finish(self) -> Delta:
        """Return what still waits: bytes that never became a character stand as U+FFFD."""
        return Delta(self._said(self._text.flush()), self._calls.flush(), self._certain())

    def _said(self, text: str) -> str:
        self._sent += len(text)
        return text

    def _certain(self) -> list[TokenInfo]:
        """Return the tokens whose text has been returned; once a stop text was found, those that begin before it."""
        if self.is_cut:
            found, self._waiting = [one for one in self._waiting if one[0] < self._sent], []
        else:
            n = sum(end <= self._sent for _, end, _ in self._waiting)
            found, self._waiting = self._waiting[:n], self._waiting[n:]
        return [info for _, _, info in found]

    def _switch(self, kind: str) -> str:
        """Begin another kind of text; return what separates calls from their results and from each other."""
        before, self._kind = self._kind, kind
        if kind == "python_output":
            self._line_open = True
            return " = "
        if kind == "python":
            end, self._line_open = "\n" if self._line_open else "", True
            return end
        if before == "python_output":
            self._line_open = False
            return "\n"
        return ""


def token_text(tokenizer: Any, token: int) -> str:
    """Return a token as text; one that is no whole characters as `bytes:\\xe4\\xbd`, as OpenAI writes it."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
