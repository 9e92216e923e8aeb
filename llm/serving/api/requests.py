"""Bodies of requests to /v1/chat/completions and /v1/completions: the fields that are honoured, and their bounds.

A field that is not listed is refused. `Hint` fields say nothing about the answer (who asks, how to cache); any value is
fine. The fields at the end of a model are not OpenAI's: clients send them as `extra_body`.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_MESSAGES = 500
MAX_CHARS = 8_000  # of one message, or of the texts to choose from
MAX_TOTAL_CHARS = 32_000  # of all messages, or of all prompts
MAX_TOKENS = 4_096
MAX_CHOICES = 128  # of one request, over all its prompts
MAX_STOPS = 16
MAX_LOGPROBS = 500_000  # of one request: of its tokens and the likeliest ones beside each
MAX_DEPTH = 64  # of lists and objects within each other
TRUNCATIONS = Literal["auto", "disabled"]

Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Stop = str | Annotated[list[str], Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Hint = Any


def _no_number(given: Any) -> Any:
    """Return a value that is no number. Raises ValueError for 0, which Python holds equal to False."""
    if isinstance(given, int | float) and not isinstance(given, bool):
        raise ValueError("must be false")
    return given


No = Annotated[Literal[False], BeforeValidator(_no_number)]


class Body(BaseModel):
    """Part of a request: types are taken literally, and unknown fields refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class WholeBody(Body):
    """Body of a request: it holds nothing that the answer could not repeat, or that takes endless recursion."""

    @model_validator(mode="before")
    @classmethod
    def _is_plain(cls, given: Any) -> Any:
        check_plain(given)
        return given


def check_plain(given: Any) -> None:
    """Raise ValueError for what json.loads reads and JSON or UTF-8 cannot hold, and for values that lie too deep.

    These are NaN, the infinities and half a surrogate pair in a text or a name.
    """
    waiting = [(given, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is no number of JSON")
        if isinstance(value, str) and not _is_unicode(value):
            raise ValueError("a text holds half a surrogate pair, which is no character")
        if isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise ValueError(
                    f"nested too deeply: lists and objects may lie at most {MAX_DEPTH} deep within each other"
                )
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            waiting += [(part, depth + 1) for part in parts]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class TextPart(Body):
    """Part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """Name and arguments (JSON as text) of a call."""

    name: str
    arguments: str


class ToolCall(Body):
    """Call of a tool in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


Content = str | list[TextPart]


class InstructionMessage(Body):
    """Message that says how to answer."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(Body):
    """Question."""

    role: Literal["user"]
    content: Content


class AssistantMessage(Body):
    """Earlier answer. The fields beside content and tool_calls are those of our own answers, sent back by clients."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list, Field(max_length=0)] | None = None


class ToolMessage(Body):
    """Result of a tool's call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[
    InstructionMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class Function(Body):
    """Function that the model may call; parameters: JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Annotated[str, Field(max_length=MAX_CHARS)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """Tool that the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """Name of a function."""

    name: str


class NamedTool(Body):
    """Choice of one tool."""

    type: Literal["function"]
    function: FunctionName


class StreamOptions(Body):
    """Options of a stream. include_usage: a last chunk says how many tokens were used."""

    include_usage: bool | None = None
    include_obfuscation: Hint = None


class JsonSchema(Body):
    """JSON schema of response_format."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextFormat(Body):
    """Answer without a form."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Answer that is a JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """Answer that follows a JSON schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """Form of the answer beyond response_format, one of: a regular expression, one of some texts, a JSON schema."""

    regex: Annotated[str, Field(min_length=1, max_length=MAX_CHARS)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=256)] | None = None
    json_: dict[str, Any] | None = Field(default=None, alias="json")

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        if sum(one is not None for one in (self.regex, self.choice, self.json_)) != 1:
            raise ValueError("structured_outputs takes exactly one of regex, choice, json")
        if sum(map(len, self.choice or ())) > MAX_CHARS:
            raise ValueError(f"structured_outputs.choice has more than {MAX_CHARS} characters")
        return self


class Sampling(WholeBody):
    """Fields that both routes have."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Share | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    logit_bias: dict[str, Bias] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    user: Hint = None

    top_k: Annotated[int, Field(ge=0, le=200)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed where stream is true")
        return self

    @property
    def tells_usage(self) -> bool:
        """True where a stream ends by telling how many tokens were used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def stops(self) -> tuple[str, ...]:
        """Return the stop texts, without empty ones."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)


class ChatRequest(Sampling):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=64)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Hint = None
    modalities: list[Literal["text"]] | None = None
    store: No | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Hint = None
    safety_identifier: Hint = None
    prompt_cache_key: Hint = None

    truncation: TRUNCATIONS | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        forms = [self.structured_outputs, self.response_format if _has_form(self.response_format) else None]
        if all(form is not None for form in forms):
            raise ValueError("response_format and structured_outputs exclude each other")
        return self


def _has_form(form: Any) -> bool:
    return form is not None and form.type != "text"


class CompletionRequest(Sampling):
    """Body of /v1/completions. prompt: a text, the ids of one, or a list of either."""

    prompt: (
        str
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of must be at least n")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ValueError("best_of chooses among whole answers, so it cannot be streamed")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 needs echo=true")
        return self
