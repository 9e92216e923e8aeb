"""Answers of the API as types: what /openapi.json says of them. The routes make plain dicts, which tests compare.

A stream is described by its events, as is the custom in OpenAPI 3.1, which has no words for text/event-stream.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from llm.serving.api.requests import ToolCall
from llm.serving.api.responses import TextOptions


class Answer(BaseModel):
    """Part of an answer: it holds these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class Error(Answer):
    """Reason of a refusal or failure. param: the field that it is about; code: a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """Refusal of a request, or its failure."""

    error: Error


class Event(Answer):
    """Event of a stream. data: JSON, or [DONE] behind the last one; event: its name, "message" where it has none."""

    data: str
    event: str = "message"


# ---------------------------------------------------------------------------------------------------------------------
# /v1/chat/completions and /v1/completions


class PromptDetails(Answer):
    """Details of a prompt. cached_tokens: whose keys were in the cache of a worker."""

    cached_tokens: int


class OutputDetails(Answer):
    """Details of an answer. reasoning_tokens: of calculator calls and their results."""

    reasoning_tokens: int


class CompletionUsage(Answer):
    """Tokens that a request used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatUsage(CompletionUsage):
    """Tokens that a chat used."""

    completion_tokens_details: OutputDetails


class NamedToken(Answer):
    """Token as text and bytes, with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(NamedToken):
    """Token of an answer, with the likeliest ones at its place."""

    top_logprobs: list[NamedToken]


class ChatLogprobs(Answer):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatToken]
    refusal: None


class ChatMessage(Answer):
    """Answer to a conversation. reasoning_content: what was calculated, as in `12*3 = 36`, where anything was."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []
    reasoning_content: str = ""


class ChatChoice(Answer):
    """Answer among those that a request asked for."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Answer):
    """Answer of /v1/chat/completions without stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage


class TextLogprobs(Answer):
    """Log-probabilities of a text's tokens, and the place in the text where each begins; null for the first token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answer):
    """Text among those that a request asked for."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Answer):
    """Answer of /v1/completions without stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: CompletionUsage


# ---------------------------------------------------------------------------------------------------------------------
# /v1/responses


class OutputText(Answer):
    """Text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(Answer):
    """Message of the model."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class ReasoningText(Answer):
    """Text of what was calculated."""

    type: Literal["reasoning_text"]
    text: str


class Reasoning(Answer):
    """Calculations behind an answer, as in `12*3 = 36`."""

    id: str
    type: Literal["reasoning"]
    summary: list[Any]
    content: list[ReasoningText]


class ResponseUsage(Answer):
    """Tokens that a request used."""

    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(Answer):
    """Reason why an answer ends early."""

    reason: Literal["max_output_tokens"]


class ReasoningOptions(Answer):
    """Options of models that think; ours has none."""

    effort: None
    summary: None


class ResponseObject(Answer):
    """Answer of /v1/responses without stream."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputMessage | Reasoning]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ReasoningOptions
    store: Literal[False]
    temperature: float
    text: TextOptions
    tool_choice: Literal["none", "auto"]
    tools: list[Any]
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage
    user: str | None
    metadata: dict[str, str]


# ---------------------------------------------------------------------------------------------------------------------
# Models, health, numbers


class Model(Answer):
    """Model that is served. context_window: tokens that a prompt and its answer may have together.

    parent: of an adapter, the model whose weights it is computed beside.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_window: int
    description: str
    parent: str = ""


class ModelList(Answer):
    """Models that are served."""

    object: Literal["list"]
    data: list[Model]


class Health(Answer):
    """State of the server: the number of its workers, and of those that answer."""

    status: Literal["ok", "draining", "starting"]
    ready: bool
    num_gpus: int
    available_workers: int


class WorkerStats(Answer):
    """State of a worker: the requests that it has, and what its engine counts."""

    gpu_id: int
    device: str
    ready: bool
    restarts: int
    requests: int
    engine: dict[str, Any]


class Stats(Answer):
    """State of all workers."""

    total_workers: int
    available_workers: int
    busy_workers: int
    requests: int
    workers: list[WorkerStats]
