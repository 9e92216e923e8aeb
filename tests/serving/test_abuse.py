"""Abuse: whatever the fields of a request hold, the answer has a proper status and OpenAI's form."""

import asyncio
import json

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from scripted_pool import BODY, scripted, served  # noqa: E402

APP = served(scripted([*b"ok"], rows=1000, queue=1000))
SCHEMAS = APP.openapi()["components"]["schemas"]
ROUTES = {
    "/v1/chat/completions": ("ChatRequest", BODY),
    "/v1/completions": ("CompletionRequest", {"model": "a/b", "prompt": "Hi"}),
    "/v1/responses": ("ResponseRequest", {"model": "a/b", "input": "Hi"}),
    "/chat/completions": ("NanochatRequest", {"messages": BODY["messages"]}),
}
TEXTS = st.text(max_size=20) | st.sampled_from(
    ["user", "text", "json_object", "json_schema", "function", "a/b", "auto"]
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXTS
KEYS = (
    st.sampled_from(["type", "role", "content", "text", "name", "function", "json_schema", "schema", "regex"]) | TEXTS
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


def test_the_document_names_every_field():
    for name, body in ROUTES.values():
        assert set(body) <= set(SCHEMAS[name]["properties"]) and SCHEMAS[name]["additionalProperties"] is False


@pytest.mark.parametrize("path", ROUTES)
def test_no_value_of_a_field_breaks_the_server(path):
    name, good = ROUTES[path]
    fields = st.sampled_from(sorted(SCHEMAS[name]["properties"])) | TEXTS

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(fields, VALUES, min_size=1, max_size=3))
    def check(change):
        answer = asyncio.run(send(path, good | change))
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["message"] and error["type"] == "invalid_request_error"

    check()


async def send(path, body):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(APP), base_url="http://127.0.0.1:1") as client:
        content = json.dumps(body)  # NaN and half surrogate pairs as a careless client writes them
        return await client.post(path, content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize("stream", [False, True])
@given(events=st.lists(st.integers(0, 264), max_size=30))
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_answer_of_a_model_breaks_the_server(stream, events):
    """Any tokens may come: special ones in any order, bytes that are no text."""
    app = served(scripted(events))

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:1") as client:
            return [
                await client.post(path, json=good | {"stream": stream}) for path, (_, good) in list(ROUTES.items())[:3]
            ]

    for answer in asyncio.run(run()):
        assert answer.status_code == 200 and answer.content.decode()
