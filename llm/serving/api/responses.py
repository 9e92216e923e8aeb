"""Route /v1/responses: text in, text out, with the events of OpenAI's streams. Nothing is stored between requests.

A request is read as one to /v1/chat/completions, so that bounds and forms are those of a chat. What the calculator did
is an item of kind `reasoning` behind the answer.
"""

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, ValidationError
from starlette.responses import Response

from llm.serving.api.chat import Choice, answer_form
from llm.serving.api.conversation import prompt_of, turns
from llm.serving.api.requests import (
    MAX_MESSAGES,
    TRUNCATIONS,
    Body,
    ChatRequest,
    Hint,
    JsonObjectFormat,
    JsonSchema,
    No,
    Share,
    TextFormat,
    Tokens,
    WholeBody,
)
from llm.serving.api.service import Service, new_id, service_of, usage_of
from llm.serving.api.stream import event
from llm.serving.errors import ApiError, bad
from llm.serving.pool import Batch

router = APIRouter()


class InputText(Body):
    """Part of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Hint = None
    logprobs: Hint = None


class InputMessage(Body):
    """Message of the input, or an earlier answer."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText]
    id: str | None = None
    status: Hint = None


class InputReasoning(Body):
    """Calculations of an earlier answer, sent back by clients that append a response's output; they are not read."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Hint = None
    content: Hint = None
    encrypted_content: Hint = None
    status: Hint = None


class SchemaFormat(JsonSchema):
    """Answer that follows a JSON schema."""

    type: Literal["json_schema"]


class TextOptions(Body):
    """Options of the answer's text."""

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class StreamOptions(Body):
    """Options of a stream."""

    include_obfuscation: Hint = None


class ResponseRequest(WholeBody):
    """Body of /v1/responses."""

    model: str
    input: str | Annotated[list[InputMessage | InputReasoning], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    truncation: TRUNCATIONS | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = None
    tools: Annotated[list, Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    include: Annotated[list, Field(max_length=0)] | None = None
    background: No | None = None
    store: No | None = None
    previous_response_id: None = None
    parallel_tool_calls: Hint = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    safety_identifier: Hint = None
    prompt_cache_key: Hint = None

    def chat(self) -> ChatRequest:
        """Return the request to /v1/chat/completions that asks for the answer."""
        head = [{"role": "system", "content": self.instructions}] if self.instructions else []
        given = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        messages = [
            {"role": one.role, "content": _joined(one.content)} for one in given if isinstance(one, InputMessage)
        ]
        if not messages:
            raise bad("input holds no message", "input", "invalid_value")
        wanted = self.text.format if self.text else None
        form: dict[str, Any] | None = None if wanted is None else {"type": wanted.type}
        if isinstance(wanted, SchemaFormat):
            form["json_schema"] = {"name": wanted.name, "schema": wanted.schema_}
        return ChatRequest(
            model=self.model,
            messages=[*head, *messages],
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            truncation=self.truncation,
            response_format=form,
        )


def _joined(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


@router.post("/v1/responses")
async def create(body: ResponseRequest, request: Request) -> Response:
    """Answer an input."""
    service = service_of(request).named(body.model)
    try:
        chat = body.chat()
    except ValidationError as error:  # with the instructions, there is a message too many
        raise bad(f"input: {error.errors()[0]['msg']}", "input", "invalid_value") from error
    form = answer_form(chat)
    limit = chat.max_completion_tokens or service.defaults["max_new_tokens"]
    prompt = await prompt_of(service, turns(chat.messages), limit, chat.truncation)
    params = service.params(chat, limit, use_tools=form is None)
    batch = service.submit(request, [prompt], params, 1, form)
    answer = ResponseAnswer(service, batch, body, Choice(service, chat, offers_tools=False), params)
    if body.stream:
        return await service.stream(batch, answer.events(), failed=answer.failed)
    return await service.whole(request, batch, answer.whole)


class ResponseAnswer:
    """Answer to a request, as one JSON object or as events."""

    def __init__(self, service: Service, batch: Batch, body: ResponseRequest, choice: Choice, params: dict[str, Any]):
        self.service, self.batch, self.body, self.choice, self.params = service, batch, body, choice, params
        self.id, self.message_id, self.created = new_id("resp"), new_id("msg"), int(time.time())
        self.text, self.calls, self.n_events = "", "", 0

    def whole(self) -> dict[str, Any]:
        """Return the body of the response."""
        delta = self.choice.push(self.batch.jobs[0].take())
        self.text, self.calls = delta.text, delta.call
        return self._response(self._status)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress"))
        place = {"item_id": self.message_id, "output_index": 0, "content_index": 0}
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._event("response.content_part.added", **place, part=self._part())
        async for _, events in self.batch.news_of():
            delta = self.choice.push(events)
            self.text, self.calls = self.text + delta.text, self.calls + delta.call
            if delta.text:
                yield self._event("response.output_text.delta", **place, delta=delta.text, logprobs=[])
        yield self._event("response.output_text.done", **place, text=self.text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=self._part())
        for index, item in enumerate(self._output(self._status)):
            if index:
                yield self._event("response.output_item.added", output_index=index, item=item)
            yield self._event("response.output_item.done", output_index=index, item=item)
        yield self._event(f"response.{self._status}", response=self._response(self._status))

    def failed(self, error: ApiError) -> bytes:
        """Return the event of an error in a stream that has begun."""
        told = error.body()["error"]
        return self._event("error", code=told["code"], message=told["message"], param=told["param"])

    def _event(self, kind: str, **more: Any) -> bytes:
        self.n_events += 1
        return event({"type": kind, "sequence_number": self.n_events - 1, **more}, kind)

    @property
    def _status(self) -> str:
        return "incomplete" if self.choice.finish_reason == "length" else "completed"

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def _message(self, status: str, content: list) -> dict[str, Any]:
        return {"id": self.message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _output(self, status: str) -> list[dict[str, Any]]:
        """Return the items of the answer: its text, and what the calculator did."""
        items = [self._message(status, [self._part()])]
        if self.calls:
            content = [{"type": "reasoning_text", "text": self.calls}]
            items.append({"id": f"rs{self.message_id[3:]}", "type": "reasoning", "summary": [], "content": content})
        return items

    def _response(self, status: str) -> dict[str, Any]:
        """Return the response at a moment; its output and usage are there once it has ended."""
        body, is_over = self.body, status != "in_progress"
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.service.name,
            "output": self._output(status) if is_over else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self.params["temperature"],
            "text": {"format": self._format()},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_p": self.params["top_p"] if body.top_p is None else body.top_p,
            "truncation": self.service.truncation(body.truncation),
            "usage": self._usage() if is_over else None,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def _format(self) -> dict[str, Any]:
        wanted = self.body.text.format if self.body.text else None
        return wanted.model_dump(by_alias=True, exclude_none=True) if wanted else {"type": "text"}

    def _usage(self) -> dict[str, Any]:
        used = usage_of(self.batch.jobs)
        return {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": used["prompt_tokens_details"],
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self.choice.text.n_call_tokens},
            "total_tokens": used["total_tokens"],
        }
