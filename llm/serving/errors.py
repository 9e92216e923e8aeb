"""Errors of the API in OpenAI's JSON form: `{"error": {"message", "type", "param", "code"}}`."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

FORM = re.compile(r"str$|[A-Z]|\w+\[")  # of a value that may have several, as in content.list[TextPart].0: no name
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "server_error"}


class ApiError(Exception):
    """Refusal of a request, or its failure. headers: further headers of the answer, such as Retry-After in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": clean(self.message), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), self.status, self.headers)

    def event(self) -> bytes:
        """Return the error as an event of a stream that has begun."""
        return b"data: " + json.dumps(self.body()).encode() + b"\n\n"


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the refusal (400) of a value that a request may not have."""
    return ApiError(400, message, param=param, code=code)


def too_busy(seconds: int) -> ApiError:
    """Return the refusal (429) of a request that finds the queue full."""
    return ApiError(
        429,
        f"the queue of this server is full; try again in {seconds} s",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def unavailable(message: str, seconds: int) -> ApiError:
    """Return the refusal (503) of a request while the server drains or a worker starts again."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(seconds)})


def too_slow() -> ApiError:
    """Return the failure (504) of a request that took too long; asking again would take as long."""
    return ApiError(504, "the answer took too long", code="timeout", headers={"x-should-retry": "false"})


def clean(text: str) -> str:
    """Return text that UTF-8 can hold: a client may have sent half a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def install(app: FastAPI) -> None:
    """Let every refusal of `app` have OpenAI's form, also those of FastAPI itself."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


def _of_validation(error: RequestValidationError) -> ApiError:
    """Return the refusal that names the first wrong field."""
    first = _first(error.errors())
    place = [clean(str(part)) for part in first["loc"] if part != "body"]
    last = place.pop() if first["type"] == "extra_forbidden" else None  # a name, whatever it looks like
    place = [part for part in place if not FORM.match(part)] + ([] if last is None else [last])
    param = ".".join(place)[:200] or None
    message = clean(str(first["msg"])).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {param}"
        return bad(message, param, "unknown_parameter")
    if first["type"] == "missing":
        return bad(f"you must provide the parameter {param}" if param else "the body is missing", param)
    if first["type"] == "json_invalid" or (first["type"] == "model_attributes_type" and not place):
        return bad("the body of a request must be a JSON object, sent with Content-Type: application/json")
    return bad(f"{param}: {message}" if param else message, param, "invalid_value")


def _first(found: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the first error; of a value that may be a text or a list, the one of the form that was read furthest."""
    place = found[0]["loc"][:-1]
    if found[0]["loc"][-1] != "str":
        return found[0]
    forms = [one for one in found if one["loc"][: len(place)] == place]
    if isinstance(found[0]["input"], list):
        forms = forms[1:] or forms
    return max(forms, key=lambda one: len(one["loc"]))
