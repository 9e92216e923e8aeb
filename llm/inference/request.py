"""Requests for text: what is asked, what has been written so far, and the tokens of a step."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from llm.inference.sampling import SamplingParams

_numbers = count()


@dataclass
class Completion:
    """Completion of a prompt. mask: 1 = sampled, 0 = forced by a tool.

    finish_reason: "stop" (the model ended its turn, or wrote a text of `SamplingParams.stop`) or "length"
    (max_new_tokens or the context is used up). stop_id: the sampled token that ended the turn, which is not among the
    ids; None where none did. logprobs: log-probability of each token, where `SamplingParams.logprobs` asks for it; None
    for tokens that a tool wrote while the row was not in the batch. stop_logprob: the number for `stop_id`.
    """

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    stop_id: int | None = None
    logprobs: list[float | None] = field(default_factory=list)
    stop_logprob: float | None = None


class Request:
    """Prompt that an engine continues, with everything written so far.

    id: a number of its own within the process. ids, mask, logprobs, top: the tokens so far, 1 for each sampled and 0
    for each forced one, their log-probabilities and the most likely tokens, as `params.logprobs` asks for (None for
    tokens that a tool wrote while the row was not in the batch).
    finish_reason: None while it goes on, then "stop", "length", "abort" or "error". stop_id: the sampled token that
    ended the turn, stop_logprob its log-probability; stop_text: the text of `params.stop` that did.
    error: why it ended, for "error".
    prompt_logprobs: per token of the prompt (log-probability, most likely tokens), None for the first one.
    cached_tokens: tokens of the prompt that were found in the cache. adapter: name of the one that answers, None for
    the base.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        sample: int = 0,
        constraint: Any = None,
        adapter: str | None = None,
    ):
        self.id, self.adapter = next(_numbers), adapter
        self.prompt, self.params, self.sample, self.constraint = list(prompt), params, sample, constraint
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.logprobs: list[float | None] = []
        self.top: list[list[tuple[int, float]] | None] = []
        self.finish_reason: str | None = None
        self.stop_id: int | None = None
        self.stop_logprob: float | None = None
        self.stop_text: str | None = None
        self.error: str | None = None
        self.prompt_logprobs: list[tuple[float, list[tuple[int, float]]] | None] | None = None
        self.cached_tokens = 0
        self.room = 0  # tokens it may still gain
        self.forced: deque[int] = deque()  # tokens that a tool has written and the model has not yet been fed
        self.call: list[int] | None = None  # tokens of a tool call that is not yet closed
        self.stops: Any = None  # watches for the texts of `params.stop`

    @property
    def is_done(self) -> bool:
        """True once nothing more will be written."""
        return self.finish_reason is not None

    @property
    def tokens(self) -> list[int]:
        """Return prompt and completion."""
        return self.prompt + self.ids

    def finish(self, reason: str) -> None:
        """Note why the request has ended."""
        self.finish_reason = reason

    def completion(self) -> Completion:
        """Return what was written, without the settings and the state."""
        reason = self.finish_reason or "length"
        return Completion(self.ids, self.mask, reason, self.stop_id, self.logprobs, self.stop_logprob)


class TokenEvent(NamedTuple):
    """One token that a request gained, or its end.

    id is None where a request ended without a further token: the model said a token that ends its turn, or it was
    ended by `abort` or an error. forced: written by a tool, not sampled. logprob, top: as `SamplingParams.logprobs`
    asks for. finish_reason: of a request that has ended with this event.
    """

    request: Request
    id: int | None
    forced: bool = False
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    finish_reason: str | None = None

    @property
    def row(self) -> int:
        """Number of the sample: `i * num_samples + j` for sample j of prompt i in `Engine.stream`."""
        return self.request.sample
