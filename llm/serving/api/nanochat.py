"""Route /chat/completions in nanochat's form: a stream of `{"token": text, "gpu": number}`, then `{"done": true}`."""

from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from llm.serving.api.conversation import prompt_of, turns
from llm.serving.api.requests import MAX_CHARS, MAX_MESSAGES, Body, Sampling, Tokens, WholeBody
from llm.serving.api.service import service_of
from llm.serving.api.stream import event
from llm.serving.api.text import AnswerText
from llm.serving.pool import Batch

router = APIRouter()


class NanochatMessage(Body):
    """Message of a conversation."""

    role: Literal["user", "assistant"]
    content: Annotated[str, Field(min_length=1, max_length=MAX_CHARS)]


class NanochatRequest(WholeBody):
    """Body of /chat/completions."""

    messages: Annotated[list[NanochatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    max_tokens: Tokens | None = None
    top_k: Annotated[int, Field(ge=0, le=200)] | None = None


@router.post("/chat/completions")
async def create(body: NanochatRequest, request: Request) -> Response:
    """Answer a conversation, as a stream; the oldest messages are left out where they do not fit."""
    service = service_of(request)
    limit = body.max_tokens or service.defaults["max_new_tokens"]
    prompt = await prompt_of(service, turns(body.messages), limit, "auto")
    asked = Sampling(model=service.name, temperature=body.temperature, top_k=body.top_k)
    batch = service.submit(request, [prompt], service.params(asked, limit), 1)
    return await service.stream(batch, _events(service.tokenizer, batch))


async def _events(tokenizer, batch: Batch) -> AsyncIterator[bytes]:
    """Yield the text of an answer as it grows, and the end; calculator calls do not show."""
    text, worker = AnswerText(tokenizer), batch.jobs[0].worker
    async for _, events in batch.news_of():
        if delta := text.push(events).text:
            yield event({"token": delta, "gpu": worker.index})
    if rest := text.finish().text:
        yield event({"token": rest, "gpu": worker.index})
    yield event({"done": True})
