"""Chat format: conversations to token ids with a loss mask.

A conversation is ``{"messages": [{"role", "content"}, ...]}``: an optional system message, then user and assistant in
turn. Content is a string or a list of parts ``{"type": "text" | "python" | "python_output", "text": str}``, the last
two types in assistant messages only. An assistant message with ``"train": False`` is read, but not trained.

    <|bos|> <|user_start|> question <|user_end|> <|assistant_start|> answer <|assistant_end|> <|user_start|> ...
    inside an answer: <|python_start|> expression <|python_end|> <|output_start|> result <|output_end|>

Text is always encoded with ``Tokenizer.encode``, which knows no special tokens, so a user cannot type a turn boundary.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llm.errors import UserError

if TYPE_CHECKING:
    from llm.tokenizer.bpe import Tokenizer

PART_MARKS = {
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}
PART_TYPES = ("text", *PART_MARKS)
# A call or a result inside its marks; the last one may have been cut off.
_MARKED = re.compile(
    "|".join(rf"{re.escape(a)}(?P<{kind}>.*?)(?:{re.escape(b)}|\Z)" for kind, (a, b) in PART_MARKS.items()), re.DOTALL
)


GREEN, RED, RESET = "\033[32m", "\033[31m", "\033[0m"


def validate_conversation(conversation: Any, where: str = "", complete: bool = True) -> None:
    """Raise UserError unless a conversation follows the chat format; `where` (file and row) leads the message.

    complete: require an assistant turn at the end, as training does; a prompt has none.
    """
    prefix = f"{where}: " if where else ""
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{prefix}expected {{"messages": [at least one message]}}, got {_short(conversation)}')
    first = 0
    for i, message in enumerate(messages):
        is_object = type(message) is dict or isinstance(message, Mapping)  # the first is quick, and nearly always so
        role = message.get("role") if is_object else None
        if i == 0 and role == "system":
            first = 1
        else:
            expected = "user" if (i - first) % 2 == 0 else "assistant"
            if role != expected:
                raise UserError(
                    f"{prefix}message {i + 1} has role {_short(role)}, expected {expected!r}: "
                    "roles alternate user, assistant, ... after an optional leading system message"
                )
        if type(message.get("content")) is not str:
            _validate_content(message.get("content"), role, f"{prefix}message {i + 1} ({role})")
        if "train" in message and not _is_weight(message["train"]):
            raise UserError(
                f"{prefix}message {i + 1} ({role}): train must be true, false or a number between 0 and 1, got "
                f"{_short(message['train'])}"
            )
    if len(messages) == first:
        raise UserError(f"{prefix}the conversation has a system message only; add a user message")
    if complete and messages[-1]["role"] != "assistant":
        raise UserError(f"{prefix}the conversation ends with a user message; add the assistant's answer or drop it")


def content_text(content: str | Sequence[Mapping[str, str]]) -> str:
    """Return the content as one string; calculator calls and results stand inside their special-token marks."""
    if isinstance(content, str):
        return content
    pieces = []
    for part in content:
        start, end = PART_MARKS.get(part["type"], ("", ""))
        pieces.append(f"{start}{part['text']}{end}")
    return "".join(pieces)


def split_calls(content: str | Sequence[Mapping[str, str]]) -> list[tuple[bool, str]]:
    """Return the pieces of an answer to be shown: (False, its text) and (True, `12*3 = 36`), a call with its result.

    content: a string with marks, as `content_text` and tokenizers write it, or parts.
    """
    pieces: list[tuple[bool, str]] = []
    before = ""
    for part in message_parts(content) if isinstance(content, str) else content:
        kind, text = part["type"], part["text"]
        if kind == "python_output" and before == "python":
            pieces[-1] = True, f"{pieces[-1][1]} = {text}"
        else:
            pieces.append((kind != "text", text))
        before = kind
    return pieces


def readable(content: str | Sequence[Mapping[str, str]]) -> str:
    """Return an answer for people: its text, and calls of the calculator, as in `That is ⟨python: 12*3 = 36⟩36.`"""
    return "".join(f"⟨python: {text}⟩" if is_call else text for is_call, text in split_calls(content))


def message_parts(text: str) -> list[dict[str, str]]:
    """Return the parts of a text with marks: the reverse of `content_text`."""
    parts, end = [], 0
    for match in _MARKED.finditer(text):
        parts.append({"type": "text", "text": text[end : match.start()]})
        parts.append({"type": match.lastgroup, "text": match[match.lastgroup]})
        end = match.end()
    parts.append({"type": "text", "text": text[end:]})
    return [part for part in parts if part["type"] != "text" or part["text"]]


def render_conversation(
    tok: "Tokenizer", conversation: Mapping[str, Any], max_tokens: int | None = None, train_all: bool = False
) -> tuple[list[int], list[float]]:
    """Return token ids and loss mask, both cut to `max_tokens`. Raises UserError for a malformed conversation.

    The mask is 1 on everything the assistant has to produce: its text, its calculator calls with both marks, and the
    end of its turn. It is 0 on bos, user turns, the start of the assistant's turn and calculator output, all of which
    are 1 with `train_all`. An answer with "train": False is 0 in both cases, one with "train": 0.5 has 0.5 for 1.
    """
    validate_conversation(conversation, complete=False)
    rest = int(train_all)  # the mask of what the assistant need not produce
    ids, mask = [tok.bos_id], [rest]

    def add(new_ids: list[int], trained: float) -> None:
        ids.extend(new_ids)
        mask.extend([trained] * len(new_ids))

    for role, content, trained in _turns(conversation["messages"]):
        if role == "user":
            text = tok.encode(content_text(content))
            add([tok.special_id("<|user_start|>"), *text, tok.special_id("<|user_end|>")], rest)
            continue
        add([tok.special_id("<|assistant_start|>")], rest * trained)
        for kind, text in _merged_parts(content):
            part_ids = tok.encode(text)
            if kind in PART_MARKS:
                start, end = PART_MARKS[kind]
                part_ids = [tok.special_id(start), *part_ids, tok.special_id(end)]
            add(part_ids, (rest if kind == "python_output" else 1) * trained)
        add([tok.special_id("<|assistant_end|>")], 1 * trained)
    return ids[:max_tokens], mask[:max_tokens]


def render_prompt(tok: "Tokenizer", conversation: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the ids of a conversation (or its messages) up to where the assistant answers the last user message."""
    messages = list(conversation["messages"] if isinstance(conversation, Mapping) else conversation)
    if messages and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant":
        messages.pop()
    if hasattr(tok, "chat_prompt"):  # models of transformers bring their own chat format
        return tok.chat_prompt(messages)
    ids, _ = render_conversation(tok, {"messages": messages})
    return [*ids, tok.special_id("<|assistant_start|>")]


def visualize(tok: "Tokenizer", ids: Sequence[int], mask: Sequence[int]) -> str:
    """Return the tokens separated by `|`, green if they are trained and red if not (ANSI colours)."""
    if len(ids) != len(mask):
        raise ValueError(f"{len(ids)} ids but {len(mask)} mask values")
    return "|".join(
        f"{GREEN if trained else RED}{tok.decode([token])}{RESET}" for token, trained in zip(ids, mask, strict=True)
    )


def _validate_content(content: Any, role: str, where: str) -> None:
    """Raise UserError unless content is a string or a list of parts; calculator parts belong to the assistant only."""
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise UserError(f"{where}: content must be a string or a list of parts, got {_short(content)}")
    allowed = PART_TYPES if role == "assistant" else ("text",)
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in allowed or not isinstance(part.get("text"), str):
            raise UserError(f'{where}: a part is {{"type": {" | ".join(allowed)}, "text": string}}, got {_short(part)}')


def _is_weight(value: Any) -> bool:
    """Return whether a message may have this value of `train`: a truth, or a factor between 0 and 1 on its loss."""
    return isinstance(value, bool) or (isinstance(value, float) and 0 < value < 1)


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any, float]]:
    """Return (role, content, trained) of user and assistant turns; a system message leads the first user text."""
    turns = [(m["role"], m["content"], m.get("train", True)) for m in messages]
    if messages[0]["role"] != "system":
        return turns
    merged = f"{content_text(messages[0]['content'])}\n\n{content_text(messages[1]['content'])}"
    return [("user", merged, True), *turns[2:]]


def _merged_parts(content: str | Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Return (type, text) of each part; neighbouring texts are joined, so that ids do not depend on cuts."""
    if isinstance(content, str):
        return [("text", content)]
    merged: list[tuple[str, str]] = []
    for part in content:
        kind, text = part["type"], part["text"]
        if kind == "text" and merged and merged[-1][0] == "text":
            text = merged.pop()[1] + text
        merged.append((kind, text))
    return merged


def _short(value: Any) -> str:
    """Return the repr of a value, cut for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
