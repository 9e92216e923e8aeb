"""Text of growing completions: whole characters only, and the texts that end one."""

import codecs
from collections.abc import Sequence
from typing import Any


class StopTexts:
    """Detector of the texts that end a completion. It looks at bytes, because a text may begin within a token."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self.tokenizer, self.texts = tokenizer, [text.encode() for text in texts if text]
        self._tail, self._keep = b"", max(map(len, self.texts), default=1) - 1

    def push(self, token: int) -> str | None:
        """Add a token to the text and return the stop text that is complete with it, the one that begins first."""
        new = self.tokenizer.decode_bytes([token])
        text, n_new = self._tail + new, len(new)
        self._tail = text[max(0, len(text) - self._keep) :]
        found = [(place, stop) for stop in self.texts if (place := _find(text, stop, len(text) - n_new)) >= 0]
        return min(found)[1].decode() if found else None


class TextStream:
    """Text of tokens as they come. Bytes of an unfinished character wait for the rest of it.

    stop, keep_stop: as in `SamplingParams`. Where a stop text is not kept, text that may be the beginning of one waits
    until the next tokens decide.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), keep_stop: bool = True):
        self.tokenizer = tokenizer
        self._stops = [] if keep_stop else [text for text in stop if text]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held, self._ended = "", False

    @property
    def is_cut(self) -> bool:
        """True once a stop text has ended the text."""
        return self._ended

    @property
    def n_waiting(self) -> int:
        """Number of characters that may be the beginning of a stop text."""
        return len(self._held)

    def push(self, token: int, may_end: bool = True) -> str:
        """Return the text that is certain with this token and was not before.

        may_end: whether a stop text that is complete with this token ends the text; else that one is ordinary text.
        """
        return self._certain(self._decoder.decode(self.tokenizer.decode_bytes([token])), may_end)

    def flush(self) -> str:
        """Return what still waits, at the end of a completion; bytes without their rest become U+FFFD."""
        rest = self._certain(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return rest

    def _certain(self, text: str, may_end: bool = True) -> str:
        if self._ended:
            return ""
        n_held, text = len(self._held), self._held + text
        found = [_find(text, stop, n_held) for stop in self._stops] if may_end else []
        if found := [place for place in found if place >= 0]:
            self._ended, self._held = True, ""
            return text[: min(found)]
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        held = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _find(text: str | bytes, stop: str | bytes, n_known: int) -> int:
    """Return where a stop text begins that is complete only behind the first `n_known` places; -1 for none."""
    return text.find(stop, max(0, n_known - len(stop) + 1))
