"""Text of an answer as it grows: whole characters, cut before a stop text, calculator calls apart from the answer."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm.serving.pool import Event
from llm.tokenizer.chat_format import PART_MARKS


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
    """Fold of a row's events into deltas.

    Bytes of an unfinished character wait for the rest of it, and text that may begin a stop text for what follows.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.is_cut = False  # a stop text was found, and nothing behind it counts
        self.n_call_tokens = 0
        self._special = tokenizer.special_ids
        self._marks = _marks(tokenizer)
        self._kind, self._line_open = "text", False
        self._decoders = {kind: _decoder() for kind in ("text", "call")}
        self._held, self._sent, self._ends = "", 0, []  # text not sent yet; characters sent; (end, TokenInfo) not sent

    def push(self, events: Iterable[Event]) -> Delta:
        """Add events and return what they let be said."""
        call = ""
        for event in events:
            if event.id is None or self.is_cut:
                continue
            if event.id in self._marks:
                call += self._switch(self._marks[event.id])
                self.n_call_tokens += 1
            elif event.id in self._special:
                continue
            elif self._kind == "text":
                self._held += self._decoders["text"].decode(self.tokenizer.decode_bytes([event.id]))
                info = TokenInfo(event.id, event.logprob, event.top or [])
                self._ends.append((self._sent + len(self._held), info))
                self._cut()
            else:
                call += self._decoders["call"].decode(self.tokenizer.decode_bytes([event.id]))
                self.n_call_tokens += 1
        return self._release(len(self._held) if self.is_cut else len(self._held) - self._n_waiting(), call)

    def finish(self) -> Delta:
        """Return what still waits: bytes that never became a character stand as U+FFFD."""
        if not self.is_cut:
            self._held += self._decoders["text"].decode(b"", final=True)
            self._cut()
        return self._release(len(self._held), self._decoders["call"].decode(b"", final=True))

    def _switch(self, kind: str) -> str:
        """Begin another kind of text; return what separates calls from their results and from each other."""
        before, self._kind = self._kind, kind
        self._held += self._decoders["text"].decode(b"", final=True)
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

    def _cut(self) -> None:
        """Cut the text where the first stop text begins."""
        places = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if places:
            self._held, self.is_cut = self._held[: min(places)], True
            end = self._sent + len(self._held)
            self._ends = [one for one in self._ends if one[0] <= end]

    def _n_waiting(self) -> int:
        """Return the number of last characters that may begin a stop text."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self.stops):
                return n
        return 0

    def _release(self, n: int, call: str) -> Delta:
        """Return the first n held characters, and the tokens that end in them."""
        text, self._held = self._held[:n], self._held[n:]
        self._sent += n
        sent = [info for end, info in self._ends if end <= self._sent]
        self._ends = self._ends[len(sent) :]
        return Delta(text, call, sent)


def token_text(tokenizer: Any, token: int) -> str:
    """Return a token as text; one that is no whole characters as `bytes:\\xe4\\xbd`, as OpenAI writes it."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _marks(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens around calculator calls and results, with the kind of what follows."""
    if not tokenizer.has_tools:
        return {}
    marks = {}
    for kind, (start, end) in PART_MARKS.items():
        marks[tokenizer.special_id(start)], marks[tokenizer.special_id(end)] = kind, "text"
    return marks


def _decoder() -> Any:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")
