"""Calls of the client's functions: the form of a forced call, and how a call is found in an answer.

Models trained by Fathom know a calculator, which runs while they answer, but no functions of others. A model is told of
them in its instructions; `tool_choice` "required" or a name makes any model write a valid call.
"""

import json
import secrets
from typing import Any

from llm.serving.api.requests import ChatRequest, NamedTool
from llm.serving.errors import bad, clean


def tool_form(body: ChatRequest) -> dict[str, Any]:
    """Return the form of a call that tool_choice demands: a JSON object with the function's name and arguments.

    Raises ApiError where tool_choice names none of the tools.
    """
    functions = [tool.function for tool in body.tools or ()]
    if isinstance(body.tool_choice, NamedTool):
        wanted = body.tool_choice.function.name
        functions = [one for one in functions if one.name == wanted]
        if not functions:
            raise bad(f"tool_choice names {wanted!r}, which is not among tools", "tool_choice")
    calls = []
    for i, one in enumerate(functions):
        root = ("#" if len(functions) == 1 else f"#/anyOf/{i}") + "/properties/arguments"
        arguments = _moved(one.parameters, root) if one.parameters else {"type": "object"}
        call = {"type": "object", "properties": {"name": {"const": one.name}, "arguments": arguments}}
        calls.append(call | {"required": ["name", "arguments"], "additionalProperties": False})
    return {"type": "json_schema", "schema": calls[0] if len(calls) == 1 else {"anyOf": calls}}


def _moved(schema: Any, root: str) -> Any:
    """Return a JSON schema whose own references (`#/$defs/...`) hold where it stands at `root` of another one."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(item, root) for key, item in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = root + target[1:]
    return moved


class ToolWatch:
    """Watch over an answer's text: it is held back while it may turn out to be a call of a function."""

    def __init__(self, body: ChatRequest):
        self.names = [tool.function.name for tool in body.tools or ()]
        self.calls: list[dict[str, Any]] = []
        self._held, self._is_text = "", False

    def push(self, text: str, is_end: bool) -> str:
        """Add text and return what is certainly no call; `calls` is set at the end where all of it was one."""
        self._held += text
        begin = self._held.lstrip()
        if self._is_text or (begin and not begin.startswith("{")):
            self._is_text = True
        elif not is_end:
            return ""
        elif (call := self._call(begin)) is not None:
            self.calls, self._held = [call], ""
        said, self._held = self._held, ""
        return said

    def _call(self, text: str) -> dict[str, Any] | None:
        """Return the call that a text is, None if it is none: JSON has no NaN and no infinity."""
        try:
            value = json.loads(text)
            if not isinstance(value, dict) or "arguments" not in value or value.get("name") not in self.names:
                return None
            arguments = json.dumps(value["arguments"], ensure_ascii=False, allow_nan=False)
        except (ValueError, RecursionError):
            return None
        if arguments != clean(arguments):  # half a surrogate pair can only be written as an escape
            arguments = json.dumps(value["arguments"])
        function = {"name": value["name"], "arguments": arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
