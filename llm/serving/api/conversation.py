"""Messages of the API as a conversation of the model's chat format, and as the ids of a prompt.

Neighbouring messages of one role are joined, because turns alternate in the chat format. What a tool returned is read
like a message of the user.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llm.errors import UserError
from llm.serving.api.requests import MAX_CHARS, MAX_TOTAL_CHARS, Message, Tool
from llm.serving.chat import fit_prompt
from llm.serving.errors import bad
from llm.tokenizer.chat_format import render_prompt

BREAK = "\n\n"  # between joined messages
SHORT = 1_000  # characters that are tokenized within 3 ms, whatever they are
T = TypeVar("T")


def turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages as alternating turns behind at most one system message.

    Raises ApiError for texts that are too long, and where no message of a user or tool is the last.
    """
    total, found = 0, []
    for place, message in enumerate(messages):
        text = _text(message)
        total += len(text)
        if len(text) > MAX_CHARS or total > MAX_TOTAL_CHARS:
            raise bad(
                f"a message may have {MAX_CHARS:,} characters, and all of them {MAX_TOTAL_CHARS:,}",
                f"messages.{place}.content",
                "string_above_max_length",
            )
        _join(found, _role(message, found), text)
    first = next((turn["role"] for turn in found if turn["role"] != "system"), None)
    if first != "user" or found[-1]["role"] != "user":
        raise bad("messages must begin, after instructions, and end with a message of the user (or a tool)", "messages")
    return found


async def aside(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """Return function(*arguments), which reads a text of `size` characters or ids; a long one in a thread.

    32,000 letters in one word take a tenth of a second, in which the event loop answers others. A short text takes less
    time than to wait for the thread.
    """
    if size > SHORT:
        return await asyncio.to_thread(function, *arguments)
    return function(*arguments)


async def prompt_of(
    service: Any, found: Sequence[dict[str, str]], max_tokens: int, truncation: str | None, instructions: str = ""
) -> list[int]:
    """Return `chat_prompt` of a conversation, made in a thread where it is long."""
    size = len(instructions) + sum(len(turn["content"]) for turn in found)
    truncate = service.truncation(truncation) == "auto"
    arguments = service.tokenizer, found, service.seq_len, max_tokens, truncate, instructions
    return await aside(size, chat_prompt, *arguments)


def chat_prompt(
    tokenizer: Any,
    found: Sequence[dict[str, str]],
    seq_len: int,
    max_tokens: int,
    truncate: bool,
    instructions: str = "",
) -> list[int]:
    """Return the ids of a prompt that leaves room for an answer.

    instructions: end the system message. truncate: leave out instructions that fill more than half of the context, and
    the oldest turns where they do not fit (`fit_prompt`). Raises ApiError where they do not fit.
    """
    if instructions and not (truncate and len(tokenizer.encode(instructions)) > seq_len // 2):
        found = _instructed(found, instructions)
    try:
        if truncate:
            return fit_prompt(tokenizer, found, seq_len, max_tokens)[0]
        prompt = render_prompt(tokenizer, found)
    except UserError as error:
        raise bad(str(error), "messages") from error
    check_room(len(prompt), seq_len, "messages")
    return prompt


def check_room(n_prompt: int, seq_len: int, param: str, n_needed: int = 1) -> None:
    """Raise ApiError where a prompt leaves no room for `n_needed` tokens in the context."""
    if n_prompt + n_needed > seq_len:
        raise bad(
            f"this model's context has {seq_len:,} tokens, and the prompt has {n_prompt:,}: shorten it"
            + (', or set truncation="auto" (the server: api.truncation=auto) for less' if param == "messages" else ""),
            param,
            "context_length_exceeded",
        )


def instructions_of(tools: Sequence[Tool]) -> str:
    """Return the text that tells a model which functions it may call, and how."""
    lines = [
        _json({"name": one.name, "description": one.description or "", "parameters": one.parameters or {}})
        for one in (tool.function for tool in tools)
    ]
    return (
        'You may call a function. To do so, answer with nothing but {"name": NAME, "arguments": {...}}. Functions:\n'
        + "\n".join(lines)
    )


def _instructed(found: Sequence[dict[str, str]], instructions: str) -> list[dict[str, str]]:
    """Return turns whose system message ends with instructions."""
    has_system = found[0]["role"] == "system"
    text = found[0]["content"] + BREAK + instructions if has_system else instructions
    return [{"role": "system", "content": text}, *found[has_system:]]


def _role(message: Message, found: Sequence[dict[str, str]]) -> str:
    """Return the role of a message in the chat format: instructions behind the first turn are the user's words."""
    if message.role in ("system", "developer"):
        return "system" if not found or found[-1]["role"] == "system" else "user"
    return "user" if message.role == "tool" else message.role


def _join(found: list[dict[str, str]], role: str, text: str) -> None:
    """Append a turn, or its text to the last one if that has the same role."""
    if found and found[-1]["role"] == role:
        found[-1]["content"] += BREAK + text
    else:
        found.append({"role": role, "content": text})


def _text(message: Message) -> str:
    """Return the text of a message; calls of tools as the model was told to write them."""
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or ())
    if message.role == "tool":
        return f"Result of {message.name or message.tool_call_id}: {text}"
    calls = getattr(message, "tool_calls", None) or ()
    pieces = [text] if text else []
    for call in calls:
        pieces.append(f'{{"name": {_json(call.function.name)}, "arguments": {call.function.arguments}}}')
    return "\n".join(pieces)


def _json(value: Any) -> str:
    """Return a value as JSON whose letters are those that the model was trained on, and not \\u escapes."""
    return json.dumps(value, ensure_ascii=False)
