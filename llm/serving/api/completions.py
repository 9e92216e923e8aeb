"""Route /v1/completions: continuations of texts or ids, with echo, logprobs and best_of, as lm-eval asks for them."""

import time
from codecs import getincrementaldecoder
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from llm.serving.api.conversation import aside, check_room
from llm.serving.api.requests import MAX_CHOICES, MAX_TOTAL_CHARS, CompletionRequest
from llm.serving.api.service import Service, finite, form_of, new_id, service_of, usage_of
from llm.serving.api.stream import DONE, event
from llm.serving.api.text import AnswerText, Delta, token_text
from llm.serving.errors import bad
from llm.serving.pool import Batch, Event, Job

DEFAULT_TOKENS = 16  # OpenAI's own default

router = APIRouter()


@router.post("/v1/completions")
async def create(body: CompletionRequest, request: Request) -> Response:
    """Continue texts."""
    service = service_of(request).named(body.model)
    limit = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    prompts, added = await aside(_size(body.prompt), _prompts, service, body, limit)
    n_samples = body.best_of or body.n or 1
    if len(prompts) * n_samples > MAX_CHOICES:
        raise bad(f"a request may ask for {MAX_CHOICES} completions, over all its prompts", "n")
    told = [limit + len(prompt) * bool(body.echo) for prompt in prompts]
    service.check_logprobs(told, n_samples, body.logprobs, "logprobs")
    form = form_of(body.structured_outputs)
    more: dict[str, Any] = {"use_tools": form is None, "logprobs": body.logprobs}
    if n_samples > (body.n or 1) and body.logprobs is None:
        more["logprobs"] = 0  # by which the best are found
    if body.echo and body.logprobs is not None:
        more["prompt_logprobs"] = body.logprobs
    elif limit == 0:
        more["prompt_logprobs"] = 0  # the engine's way to read a prompt alone
    batch = service.submit(request, prompts, service.params(body, limit, **more), n_samples, form)
    answer = CompletionAnswer(service, batch, body, n_samples, added)
    if body.stream:
        return await service.stream(batch, answer.events())
    return await service.whole(request, batch, answer.whole)


def _size(prompt: str | list) -> int:
    """Return the characters of all prompts, or their ids."""
    return sum(map(len, prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]))


def _prompts(service: Service, body: CompletionRequest, limit: int) -> tuple[list[list[int]], list[int]]:
    """Return the ids of every prompt, and how many of the first ones are ours: the token that begins every text.

    Raises ApiError for ids that do not exist and prompts that do not fit.
    """
    given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    given = [given] if isinstance(given[0], int) else given
    if sum(len(one) for one in given if isinstance(one, str)) > MAX_TOTAL_CHARS:
        raise bad(f"prompts may have {MAX_TOTAL_CHARS:,} characters", "prompt", "string_above_max_length")
    n, tokenizer = service.pool.facts["vocab_size"], service.tokenizer
    begin = tokenizer.encode_prompt("a")[: -len(tokenizer.encode("a"))]  # of every text, [] for some models of others
    prompts, added = [], []
    for one in given:
        if isinstance(one, str):
            ids = tokenizer.encode_prompt(one)
            is_ours = not one.startswith(tokenizer.decode(begin)) if begin else False
        else:
            is_ours = bool(begin) and one[: len(begin)] != begin
            ids = begin + one if is_ours else one
        if wrong := [token for token in ids if not 0 <= token < n]:
            raise bad(f"prompt: {wrong[0]} is no id of a token; they go from 0 to {n - 1}", "prompt")
        check_room(len(ids), service.seq_len, "prompt", min(limit, 1))
        prompts.append(list(ids))
        added.append(len(begin) if is_ours else 0)
    return prompts, added


class CompletionAnswer:
    """Answer to a completion request: choices of all prompts, in the order of the prompts.

    added: tokens before each prompt that are ours, so that an echo does not show them.
    """

    def __init__(self, service: Service, batch: Batch, body: CompletionRequest, n_samples: int, added: Sequence[int]):
        self.service, self.batch, self.body, self.n_samples, self.added = service, batch, body, n_samples, added
        self.texts = [AnswerText(service.tokenizer, body.stops(), body.min_tokens or 0) for _ in batch.jobs]
        self.offsets = [0] * len(batch.jobs)  # characters of text that their tokens have made so far
        self.decoders = [getincrementaldecoder("utf-8")("replace") for _ in batch.jobs]
        self.head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }

    def whole(self) -> dict[str, Any]:
        """Return the body of the response."""
        choices, n = [], self.body.n or 1
        for first in range(0, len(self.batch.jobs), self.n_samples):
            members = range(first, first + self.n_samples)
            events = {index: self.batch.jobs[index].take() for index in members}
            best = sorted(members, key=lambda index: -_mean_logprob(events[index]))[:n] if n < len(members) else members
            for index in best:
                delta, reason = self.texts[index].push_to_end(events[index])
                echo = self._echo(index)
                choices.append(self._choice(len(choices), index, echo, delta, reason))
        return {**self.head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the chunks of a stream, usage where it was asked for, and [DONE]."""
        echoed = set()
        async for index, events in self.batch.news_of():
            echo = self._echo(index) if index not in echoed else None
            echoed.add(index)
            delta, reason = self.texts[index].push_to_end(events)
            if delta or echo or reason:
                yield event(self._tell({**self.head, "choices": [self._choice(index, index, echo, delta, reason)]}))
        if self.body.tells_usage:
            yield event({**self.head, "choices": [], "usage": self._usage()})
        yield DONE

    def _tell(self, chunk: dict[str, Any]) -> dict[str, Any]:
        return {**chunk, "usage": None} if self.body.tells_usage else chunk

    def _usage(self) -> dict[str, Any]:
        return usage_of(self.batch.jobs, n_prompts=len(self.batch.jobs) // self.n_samples)

    def _echo(self, index: int) -> tuple[str, list[tuple[int, float | None, list]]] | None:
        """Return the text of a job's prompt and its tokens with their logprobs, where the request wants them."""
        if not self.body.echo:
            return None
        job: Job = self.batch.jobs[index]
        place, given = index // self.n_samples, self.body.prompt
        if isinstance(given, list) and isinstance(given[0], str):
            given = given[place]
        shown = job.prompt[self.added[place] :]
        text = given if isinstance(given, str) else self.service.tokenizer.decode(shown)
        found = (job.prompt_logprobs or [None] * len(job.prompt))[self.added[place] :]
        return text, [(token, *(one or (None, None))) for token, one in zip(shown, found, strict=True)]

    def _choice(self, place: int, index: int, echo: Any, delta: Delta, reason: str | None) -> dict[str, Any]:
        tokens = list(echo[1]) if echo else []
        tokens += [(one.id, one.logprob, one.top) for one in delta.tokens]
        logprobs = None if self.body.logprobs is None else self._logprobs(index, tokens)
        text = (echo[0] if echo else "") + delta.text
        return {"text": text, "index": place, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, tokens: Sequence[tuple[int, float | None, list | None]]) -> dict[str, Any]:
        """Return tokens with their logprobs, the likeliest in their places and where they begin in the text."""
        told: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        tokenizer = self.service.tokenizer
        for token, logprob, top in tokens:
            text = token_text(tokenizer, token)
            told["tokens"].append(text)
            told["token_logprobs"].append(None if logprob is None else finite(logprob))
            likeliest = None if logprob is None else {token_text(tokenizer, one): finite(value) for one, value in top}
            if likeliest is not None:
                likeliest.setdefault(text, finite(logprob))
            told["top_logprobs"].append(likeliest)
            told["text_offset"].append(self.offsets[index])
            self.offsets[index] += len(self.decoders[index].decode(tokenizer.decode_bytes([token])))
        return told


def _mean_logprob(events: Sequence[Event]) -> float:
    """Return the mean log-probability of the tokens that a row sampled."""
    found = [event.logprob for event in events if event.logprob is not None and not event.forced]
    return sum(found) / len(found) if found else float("-inf")
