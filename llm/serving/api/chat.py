"""Route /v1/chat/completions: whole answers and streams, calls of tools, structured answers, logprobs."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from llm.serving.api.conversation import instructions_of, prompt_of, turns
from llm.serving.api.requests import ChatRequest
from llm.serving.api.service import Service, finite, form_of, new_id, service_of, usage_of
from llm.serving.api.stream import DONE, event
from llm.serving.api.text import AnswerText, Delta, TokenInfo
from llm.serving.api.tools import ToolWatch, tool_form
from llm.serving.pool import Batch, Event

router = APIRouter()


@router.post("/v1/chat/completions")
async def create(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request).named(body.model)
    form = answer_form(body)
    offers_tools = bool(body.tools) and body.tool_choice != "none"
    found, instructions = turns(body.messages), instructions_of(body.tools) if offers_tools else ""
    limit = body.max_completion_tokens or body.max_tokens or service.defaults["max_new_tokens"]
    prompt = await prompt_of(service, found, limit, body.truncation, instructions)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = service.params(body, limit, use_tools=form is None, logprobs=logprobs)
    service.check_logprobs([limit], body.n or 1, logprobs, "top_logprobs")
    batch = service.submit(request, [prompt], params, body.n or 1, form)
    answer = ChatAnswer(service, batch, body, offers_tools)
    if body.stream:
        return await service.stream(batch, answer.events())
    return await service.whole(request, batch, answer.whole)


def answer_form(body: ChatRequest) -> dict[str, Any] | None:
    """Return the form that an answer must have: a forced call of a tool, response_format or structured_outputs."""
    if body.tools and body.tool_choice not in (None, "none", "auto"):
        return tool_form(body)
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return form_of(body.structured_outputs)
    if wanted.type == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "schema": wanted.json_schema.schema_}


class Choice:
    """Answer of a request among others: its text so far and what it holds back."""

    def __init__(self, service: Service, body: ChatRequest, offers_tools: bool):
        self.text = AnswerText(service.tokenizer, body.stops(), body.min_tokens or 0)
        self.watch = ToolWatch(body) if offers_tools else None
        self.finish_reason: str | None = None

    def push(self, events: Sequence[Event]) -> Delta:
        """Add events and return what they let be said."""
        delta, reason = self.text.push_to_end(events)
        self.finish_reason = reason or self.finish_reason
        if self.watch is None:
            return delta
        delta.text = self.watch.push(delta.text, self.finish_reason is not None)
        if self.watch.calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return delta

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Calls of tools that the answer has turned out to be."""
        return self.watch.calls if self.watch else []


class ChatAnswer:
    """Answer to a chat request, as one JSON object or as chunks."""

    def __init__(self, service: Service, batch: Batch, body: ChatRequest, offers_tools: bool):
        self.service, self.batch, self.body = service, batch, body
        self.choices = [Choice(service, body, offers_tools) for _ in batch.jobs]
        self.head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": service.name}

    def whole(self) -> dict[str, Any]:
        """Return the body of the response."""
        choices = []
        for index, (choice, job) in enumerate(zip(self.choices, self.batch.jobs, strict=True)):
            delta = choice.push(job.take())
            message: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
            if choice.calls:
                message |= {"content": delta.text or None, "tool_calls": choice.calls}
            if delta.call:
                message["reasoning_content"] = delta.call
            choices.append(self._choice(index, "message", message, delta.tokens, choice.finish_reason))
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the chunks of a stream: roles first, then growth, ends, usage where it was asked for, and [DONE]."""
        for index in range(len(self.choices)):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        async for index, events in self.batch.news_of():
            choice = self.choices[index]
            delta = choice.push(events)
            if delta.call:
                yield self._chunk(index, {"reasoning_content": delta.call})
            if delta.text or delta.tokens:
                yield self._chunk(index, {"content": delta.text}, delta.tokens)
            if choice.finish_reason is not None:
                for place, call in enumerate(choice.calls):
                    for part in call_deltas(place, call):
                        yield self._chunk(index, {"tool_calls": [part]})
                yield self._chunk(index, {}, finish_reason=choice.finish_reason)
        if self.body.tells_usage:
            yield event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
        yield DONE

    def _usage(self) -> dict[str, Any]:
        return usage_of(self.batch.jobs, n_call_tokens=sum(choice.text.n_call_tokens for choice in self.choices))

    def _chunk(
        self, index: int, delta: dict[str, Any], tokens: Sequence[TokenInfo] = (), finish_reason: str | None = None
    ) -> bytes:
        choice = self._choice(index, "delta", delta, tokens, finish_reason)
        usage = {"usage": None} if self.body.tells_usage else {}
        return event({**self.head, "object": "chat.completion.chunk", "choices": [choice], **usage})

    def _choice(
        self, index: int, name: str, content: dict[str, Any], tokens: Sequence[TokenInfo], finish_reason: str | None
    ) -> dict[str, Any]:
        told = self.body.logprobs and (tokens or name == "message")
        logprobs = {"content": [self._token(one) for one in tokens], "refusal": None} if told else None
        return {"index": index, name: content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _token(self, info: TokenInfo) -> dict[str, Any]:
        told = self._named(info.id, info.logprob if info.logprob is not None else 0.0)
        top = info.top[: self.body.top_logprobs or 0]
        return told | {"top_logprobs": [self._named(token, logprob) for token, logprob in top]}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.service.tokenizer.decode_bytes([token])
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}


def call_deltas(place: int, call: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a call of a tool as the parts of a stream: its name, then its arguments."""
    named = {**call, "function": {"name": call["function"]["name"], "arguments": ""}}
    return [
        {"index": place, **named},
        {"index": place, "function": {"arguments": call["function"]["arguments"]}},
    ]
