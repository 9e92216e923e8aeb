"""The document at /openapi.json: what FastAPI knows of the requests, and every answer that the routes give.

`ROUTES` says how a route answers. Refusals follow from what stands before all of them: guard, key, checks of bodies,
queue and workers. The names of the model that is served are the only ones that the document lets a request have.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llm.serving.api import answers

REF = "#/components/schemas/{model}"
STREAM, METRICS = "text/event-stream", CONTENT_TYPE_LATEST.partition(";")[0]
REFUSALS = {
    400: "A value that this server does not take",
    401: "The key is missing or wrong",
    403: "The name in Host or Origin is not this server's",
    404: "The model does not exist",
    413: "The body is too large",
    429: "The queue is full",
    503: "The server ends, or its worker starts again",
    504: "The answer took too long",
}
HEADERS = {
    401: ("WWW-Authenticate", "string", "Kind of key: Bearer"),
    429: ("Retry-After", "integer", "Seconds after which there should be a place"),
    503: ("Retry-After", "integer", "Seconds after which the server should answer"),
}
EVERYWHERE = (403, 413)  # by the guard
ASKING = (400, 404, 429, 503, 504)  # by what gives work to the model


class Route(NamedTuple):
    """Answers of a route: the type of its JSON if it has one, other media types, its refusals, whether a key counts."""

    answer: type[BaseModel] | None
    others: tuple[str, ...] = ()
    refusals: tuple[int, ...] = ()
    is_open: bool = False


ROUTES = {
    "/v1/chat/completions": Route(answers.ChatCompletion, (STREAM,), ASKING),
    "/v1/completions": Route(answers.TextCompletion, (STREAM,), ASKING),
    "/v1/responses": Route(answers.ResponseObject, (STREAM,), ASKING),
    "/chat/completions": Route(None, (STREAM,), tuple(set(ASKING) - {404})),
    "/v1/models": Route(answers.ModelList),
    "/v1/models/{name}": Route(answers.Model, refusals=(404,)),
    "/metrics": Route(None, (METRICS,)),
    "/stats": Route(answers.Stats),
    "/health": Route(answers.Health, is_open=True),
}


def describe(app: FastAPI, models: Sequence[str], has_key: bool) -> None:
    """Let an application whose routes are complete describe itself.

    models: names that requests may have; has_key: requests need a key.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, models, has_key)
        return app.openapi_schema

    app.openapi = document


def _document(app: FastAPI, models: Sequence[str], has_key: bool) -> dict[str, Any]:
    """Return FastAPI's document with our answers instead of its own."""
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    kinds = [(route.answer, "validation") for route in ROUTES.values() if route.answer is not None]
    kinds += [(answers.ErrorAnswer, "validation"), (answers.Event, "validation")]
    _, more = models_json_schema(kinds, ref_template=REF)
    schemas = found["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    found["components"]["schemas"] = more["$defs"] | schemas
    for schema in schemas.values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] |= {"enum": list(models)}
    if has_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in found["paths"].items():
        route = ROUTES[path]
        for operation in operations.values():
            operation["responses"] = _responses(route, has_key)
            if has_key and not route.is_open:
                operation["security"] = [{"key": []}]
            for parameter in operation.get("parameters", ()):
                parameter["schema"] |= {"enum": list(models)}  # the only one is the model's name
    return found


def _responses(route: Route, has_key: bool) -> dict[str, Any]:
    """Return the answers of a route, by status."""
    content: dict[str, Any] = {}
    if route.answer is not None:
        content["application/json"] = _schema(route.answer)
    for kind in route.others:
        content[kind] = _schema(answers.Event) if kind == STREAM else {"schema": {"type": "string"}}
    told: dict[str, Any] = {"200": {"description": "Answer", "content": content}}
    needs_key = has_key and not route.is_open
    for status in sorted({*route.refusals, *EVERYWHERE, *((401,) if needs_key else ())}):
        told[str(status)] = _refusal(status, answers.ErrorAnswer)
    if route.answer is answers.Health:
        told["503"] = _refusal(503, answers.Health)
    return told


def _refusal(status: int, answer: type[BaseModel]) -> dict[str, Any]:
    """Return what the document says of a refusal, with the header that goes with its status."""
    told = {"description": REFUSALS[status], "content": {"application/json": _schema(answer)}}
    if status in HEADERS:
        name, kind, text = HEADERS[status]
        told["headers"] = {name: {"description": text, "required": True, "schema": {"type": kind}}}
    return told


def _schema(answer: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": REF.format(model=answer.__name__)}}
