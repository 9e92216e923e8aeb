"""Model that the routes serve: its workers, tokenizer, name and limits, and how a request becomes jobs."""

import asyncio
import importlib.util
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from llm.serving.api.requests import MAX_LOGPROBS, Sampling, StructuredOutputs
from llm.serving.api.stream import EventStream, unless_gone
from llm.serving.errors import ApiError, bad
from llm.serving.pool import Batch, Job, Pool
from llm.utils.source import pip_install

GREEDY_SHARE = 1e-9  # top_p of a request for 0: the most likely token alone


@dataclass
class Service:
    """Model behind the routes, or an adapter of it.

    defaults: temperature, top_k, top_p and max_new_tokens of requests that say nothing; truncates: such requests have
    what does not fit the context left out. adapter: its name, None for the model itself.
    """

    pool: Pool
    tokenizer: Any
    name: str
    defaults: dict[str, Any]
    timeout: float = 600.0
    truncates: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    adapter: str | None = None

    @property
    def seq_len(self) -> int:
        """Tokens of the model's context."""
        return self.pool.facts["seq_len"]

    def models(self) -> list["Service"]:
        """Return the services of all models that requests may name: this one, then its adapters."""
        names = [facts["name"] for facts in self.pool.facts.get("beside", ())]
        return [self, *(replace(self, name=name, adapter=name) for name in names)]

    def named(self, name: str) -> "Service":
        """Return the service of a model. Raises ApiError for one that is not served."""
        models = {one.name: one for one in self.models()}
        if name not in models:
            there = ", ".join(map(repr, models))
            raise ApiError(
                404, f"the model {name!r} does not exist; there is {there}", param="model", code="model_not_found"
            )
        return models[name]

    def facts(self) -> dict[str, Any]:
        """Return what is known about the model."""
        known = self.pool.facts
        return known if self.adapter is None else next(one for one in known["beside"] if one["name"] == self.adapter)

    def truncation(self, asked: str | None) -> str:
        """Return what becomes of a conversation that does not fit: "auto" or "disabled", as asked for or by default."""
        return asked or ("auto" if self.truncates else "disabled")

    def params(self, body: Sampling, max_tokens: int, **more: Any) -> dict[str, Any]:
        """Return the fields of SamplingParams for a request. Raises ApiError for a token that does not exist."""
        given = {
            "temperature": body.temperature,
            "top_k": body.top_k,
            "top_p": body.top_p if body.top_p != 0 else GREEDY_SHARE,
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "ignore_eos": body.ignore_eos,
            "min_new_tokens": body.min_tokens,
        }
        params = {name: self.defaults[name] for name in ("temperature", "top_k", "top_p")}
        params |= {name: value for name, value in given.items() if value is not None}
        if body.seed is not None:  # else every prompt gets one of its own
            params["seed"] = body.seed & (2**63 - 1)
        params["logit_bias"] = tuple(sorted(self._bias(body.logit_bias or {}).items()))
        return params | {"max_new_tokens": max_tokens, "stop": body.stops(), **more}

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        n = self.pool.facts["vocab_size"]
        for key in given:
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < n):
                raise bad(f"logit_bias: {key[:40]!r} is no id of a token; they go from 0 to {n - 1}", "logit_bias")
        return {int(key): value for key, value in given.items()}

    def submit(
        self, request: Request, prompts: Sequence[Sequence[int]], params: dict[str, Any], n: int, form: Any = None
    ) -> Batch:
        """Give what a request asks for to the workers; see `Pool.submit`. Raises ApiError where it is refused."""
        if form is not None and importlib.util.find_spec("llguidance") is None:
            raise bad(f"structured answers need the package llguidance on the server: {pip_install('structured')}")
        more = {"form": form, "adapter": self.adapter, "timeout": self.timeout}
        request.state.batch = self.pool.submit(prompts, params, n=n, **more)
        return request.state.batch

    def check_logprobs(self, lengths: Sequence[int], n_samples: int, top: int | None, param: str) -> None:
        """Raise ApiError for more log-probabilities than an answer may hold.

        lengths: tokens told for a sample of each prompt, at most; top: likeliest ones beside each token, None where no
        log-probabilities are asked for.
        """
        if top is None:
            return
        n_tokens = n_samples * sum(min(length, self.seq_len) for length in lengths)
        if (n := n_tokens * (1 + top)) > MAX_LOGPROBS:
            raise bad(
                f"an answer may hold {MAX_LOGPROBS:,} log-probabilities, and this one could have {n:,}: ask for fewer "
                f"choices, tokens or {param}",
                param,
            )

    async def whole(self, request: Request, batch: Batch, answer: Callable[[], dict[str, Any]]) -> Response:
        """Wait for an answer as long as the client does, and return it as JSON. Raises ApiError where it fails.

        answer: makes the body once all jobs are done. It runs in a thread: many log-probabilities take seconds, in
        which other answers go on.
        """
        try:
            await unless_gone(request, batch.until_done())
            return await asyncio.to_thread(lambda: JSONResponse(answer()))
        finally:
            self.pool.cancel(batch)

    async def stream(self, batch: Batch, events: AsyncIterator[bytes], **more: Any) -> Response:
        """Return an answer as a stream, once workers have taken the batch. Raises ApiError where one refuses it."""
        try:
            await batch.until_accepted()
        except BaseException:
            self.pool.cancel(batch)
            raise
        return EventStream(events, lambda: self.pool.cancel(batch), lambda: batch.is_over, self.timeout, **more)


def service_of(request: Request) -> Service:
    """Return the service of the application that got a request."""
    return request.app.state.service


def form_of(wanted: StructuredOutputs | None) -> dict[str, Any] | None:
    """Return the form of an answer that structured_outputs asks for; None where it is not given."""
    if wanted is None:
        return None
    if wanted.regex is not None:
        return {"type": "regex", "regex": wanted.regex}
    if wanted.choice is not None:
        return {"type": "choice", "choice": wanted.choice}
    return {"type": "json_schema", "schema": wanted.json_}


def usage_of(jobs: Sequence[Job], n_prompts: int = 1, n_call_tokens: int | None = None) -> dict[str, Any]:
    """Return the tokens that a request used; samples of a prompt share it, so it counts once."""
    per_prompt = len(jobs) // n_prompts
    prompts = jobs[::per_prompt]
    n_prompt, n_done = sum(len(job.prompt) for job in prompts), sum(len(job.ids) for job in jobs)
    usage: dict[str, Any] = {"prompt_tokens": n_prompt, "completion_tokens": n_done, "total_tokens": n_prompt + n_done}
    usage["prompt_tokens_details"] = {"cached_tokens": sum(job.cached for job in prompts)}
    if n_call_tokens is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": n_call_tokens}
    return usage


def new_id(kind: str) -> str:
    """Return a fresh id such as chatcmpl-1f0c..."""
    return f"{kind}-{secrets.token_hex(12)}"


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold: OpenAI writes -9999 for tokens that cannot follow."""
    return max(logprob, -9999.0)
