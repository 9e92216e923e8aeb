"""The document at /openapi.json says how every route answers, and the routes answer so; what `api.truncation` does."""

import asyncio

import httpx
import pytest

pytest.importorskip("fastapi")

from scripted_pool import BODY, TOKENIZER, scripted, served  # noqa: E402

from llm.serving.api import answers  # noqa: E402
from llm.serving.api.document import ROUTES  # noqa: E402
from llm.tokenizer.chat_format import render_prompt  # noqa: E402

ASKED = {
    "/v1/chat/completions": BODY | {"logprobs": False, "n": 2},
    "/v1/completions": {"model": "a/b", "prompt": "Hi", "echo": True},
    "/v1/responses": {"model": "a/b", "input": "Hi", "text": {"format": {"type": "text"}}, "metadata": {"a": "b"}},
    "/chat/completions": {"messages": BODY["messages"]},
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather. " * 20}}


def ask(app, path: str, body: dict | None = None) -> httpx.Response:
    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:1") as client:
            return await client.request("POST" if body else "GET", path.replace("{name}", "a/b"), json=body)

    return asyncio.run(run())


def test_every_route_is_described_with_its_refusals():
    document = served(scripted(), key="secret").openapi()
    assert set(document["paths"]) == set(ROUTES)
    for path, operations in document["paths"].items():
        (operation,) = operations.values()
        told = operation["responses"]
        assert "422" not in told and {"200", "403", "413"} <= set(told)
        assert ("401" in told) == ("security" in operation) == (path != "/health")
        for status in {"429", "503"} & set(told):
            assert told[status]["headers"]["Retry-After"]["required"]
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == ["a/b"]
    assert "401" not in str(served(scripted()).openapi())


@pytest.mark.parametrize("path", ROUTES)
def test_routes_answer_as_described(path):
    app, body = served(scripted([*b"ok"])), ASKED.get(path)
    answer, route = ask(app, path, body), ROUTES[path]
    content = app.openapi()["paths"][path]["post" if body else "get"]["responses"]["200"]["content"]
    assert answer.status_code == 200 and answer.headers["content-type"].partition(";")[0] in content
    if route.answer is not None:
        route.answer.model_validate_json(answer.content, strict=True)
    if body:
        refused = ask(app, path, body | {"temperature": 9})
        answers.ErrorAnswer.model_validate_json(refused.content, strict=True)


@pytest.mark.parametrize("truncates", [False, True])
def test_what_does_not_fit_is_refused_or_left_out(truncates):
    """Functions go that fill more than half of the context; those that fill less of it stay."""
    pool = scripted([*b"ok"])
    app, heard = served(pool, truncates=truncates), pool.workers[0].writer.heard
    small = {"type": "function", "function": {"name": "clock"}}
    assert ask(app, "/v1/chat/completions", BODY | {"tools": [small]}).status_code == 200
    assert TOKENIZER.decode(heard[0][2]["prompt"]).count("clock") == 1
    answer = ask(app, "/v1/chat/completions", BODY | {"tools": [WEATHER]})
    if truncates:
        assert answer.status_code == 200 and heard[-1][2]["prompt"] == render_prompt(TOKENIZER, BODY["messages"])
        refused = ask(app, "/v1/chat/completions", BODY | {"tools": [WEATHER], "truncation": "disabled"})
    else:
        refused = answer
    assert refused.status_code == 400 and "api.truncation=auto" in refused.json()["error"]["message"]
    assert ask(app, "/v1/responses", ASKED["/v1/responses"]).json()["truncation"] == (
        "auto" if truncates else "disabled"
    )
