"""Refusals: what is wrong with a request is told with the status, the form and the field that OpenAI's API would."""

import asyncio
import json

import httpx
import pytest

pytest.importorskip("fastapi")

from scripted_pool import scripted, served  # noqa: E402

from llm.serving.errors import ApiError  # noqa: E402

MODEL = "a/b"
JSON = {"content-type": "application/json"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def ask(method: str, path: str, **more) -> httpx.Response:
    """The answer of an API whose model always says "ok"."""

    async def run():
        transport = httpx.ASGITransport(served(scripted([*b"ok"])))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1") as client:
            return await client.request(method, path, **more)

    return asyncio.run(run())


def post(path: str, **more) -> httpx.Response:
    return ask("POST", path, **more)


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


REFUSED = [
    ({"model": "gpt-4o"}, 404, "model_not_found", "model"),
    ({"temperature": 2.5}, 400, "invalid_value", "temperature"),
    ({"temperature": "0.5"}, 400, "invalid_value", "temperature"),
    ({"top_p": 1.5}, 400, "invalid_value", "top_p"),
    ({"top_k": 201}, 400, "invalid_value", "top_k"),
    ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": 5000}, 400, "invalid_value", "max_tokens"),
    ({"n": 0}, 400, "invalid_value", "n"),
    ({"n": 129}, 400, "invalid_value", "n"),
    ({"stop": ["a"] * 17}, 400, "invalid_value", None),
    ({"logit_bias": {"265": 1}}, 400, None, "logit_bias"),
    ({"logit_bias": {"x": 1}}, 400, None, "logit_bias"),
    ({"logit_bias": {"1": 101}}, 400, "invalid_value", "logit_bias.1"),
    ({"top_logprobs": 2}, 400, "invalid_value", None),
    ({"logprobs": True, "top_logprobs": 20, "n": 100, "max_tokens": 390}, 400, None, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_value", None),
    ({"tool_choice": "required"}, 400, "invalid_value", None),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, 400, None, "tool_choice"),
    ({"store": True}, 400, "invalid_value", "store"),
    ({"reasoning_effort": "high"}, 400, "unknown_parameter", "reasoning_effort"),
    ({"functions": []}, 400, "unknown_parameter", "functions"),
    ({"modalities": ["audio"]}, 400, "invalid_value", None),
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 501}, 400, "invalid_value", "messages"),
    ({"messages": user("x" * 8001)}, 400, "string_above_max_length", "messages.0.content"),
    ({"messages": user("x" * 8000) * 5}, 400, "string_above_max_length", "messages.4.content"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, None, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, 400, None, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_value", "messages.0"),
    ({"messages": [{"role": "user"}]}, 400, None, "messages.0.user.content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        400,
        "invalid_value",
        "messages.0.user.content.0.type",
    ),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "invalid_value", "messages.0.user.content"),
    ({"Temperature": 1}, 400, "unknown_parameter", "Temperature"),
    ({"structured_outputs": {"choice": ["x" * 100] * 81}}, 400, "invalid_value", "structured_outputs"),
    ({"response_format": {"type": "xml"}}, 400, "invalid_value", "response_format"),
    ({"response_format": {"type": "json_schema"}}, 400, None, "response_format.json_schema.json_schema"),
]


@pytest.mark.parametrize(("change", "status", "code", "param"), REFUSED)
def test_what_is_wrong_is_refused_in_openais_form(change, status, code, param):
    body = {"model": MODEL, "messages": user("Who are you?")} | change
    answer = post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] == "invalid_request_error"
    assert (code is None or error["code"] == code) and (param is None or error["param"] == param)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [265]},
        {"prompt": [-1]},
        {"prompt": "x" * 32001},
        {"prompt": "x" * 400},
        {"prompt": ["a"] * 100, "n": 2},
        {"best_of": 1, "n": 2},
        {"logprobs": 20, "n": 100, "max_tokens": 390},
        {"prompt": ["x" * 200] * 120, "logprobs": 20, "echo": True, "max_tokens": 0},
        {"best_of": 2, "stream": True},
        {"max_tokens": 0},
        {"suffix": "x"},
        {"logprobs": True},
        {"messages": []},
    ],
)
def test_wrong_completions_are_refused(change):
    body = {"model": MODEL, "prompt": "x"} | change
    answer = post("/v1/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_request_is_refused(body):
    answer = post("/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "says"),
    [([], "List should have at least 1 item"), ([{"type": "reasoning", "id": "rs_1"}], "input holds no message")],
)
def test_an_input_without_a_message_is_refused(given, says):
    answer = post("/v1/responses", json={"model": MODEL, "input": given})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "input" and says in error["message"]


def test_a_body_that_is_not_said_to_be_json_is_told_how_to_say_so():
    body = json.dumps({"model": MODEL, "messages": user("Who are you?")}).encode()
    answer = post("/v1/chat/completions", content=body, headers={"content-type": "application/x-www-form-urlencoded"})
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]


def nested(depth: int) -> dict:
    return {"type": "object", "properties": {"x": nested(depth - 1)}} if depth else {}


NOT_PLAIN = [
    ("/v1/chat/completions", {"messages": user("\ud800")}, "surrogate"),
    ("/v1/chat/completions", {"messages": user("x"), "\ud800": 1}, "surrogate"),
    ("/v1/chat/completions", {"messages": user("x"), "metadata": {"a": [float("inf")]}}, "number"),
    ("/v1/chat/completions", {"messages": user("x"), "structured_outputs": {"json": nested(200)}}, "deep"),
    ("/v1/completions", {"prompt": "\ud800", "echo": True}, "surrogate"),
    ("/v1/completions", {"prompt": ["a", "\udc00"]}, "surrogate"),
    ("/v1/responses", {"input": "x", "user": "\ud800"}, "surrogate"),
    ("/v1/responses", {"input": "x", "instructions": "\ud800"}, "surrogate"),
    ("/v1/responses", {"input": "x", "metadata": {"\ud800": "a"}, "stream": True}, "surrogate"),
    ("/v1/responses", {"input": "x", "user": float("nan"), "stream": True}, "number"),
    ("/chat/completions", {"messages": user("\ud800")}, "surrogate"),
]


@pytest.mark.parametrize(("path", "change", "word"), NOT_PLAIN)
def test_what_an_answer_could_not_repeat_is_refused(path, change, word):
    body = ({} if path == "/chat/completions" else {"model": MODEL}) | change
    answer = post(path, content=json.dumps(body).encode(), headers=JSON)
    assert answer.status_code == 400 and word in answer.json()["error"]["message"]


def test_whole_surrogate_pairs_and_schemas_of_some_depth_are_fine():
    body = {"model": MODEL, "messages": user("\ud83d\ude00"), "metadata": nested(25)}
    answer = post("/v1/chat/completions", content=json.dumps(body).encode(), headers=JSON)
    assert answer.status_code == 200


def test_unknown_paths_and_methods_have_openais_form():
    assert ask("GET", "/v1/nothing").json()["error"]["message"]
    answer = ask("GET", "/v1/chat/completions")
    assert answer.status_code == 405 and answer.json()["error"]["message"]


def test_a_body_that_is_too_large_is_refused():
    answer = post("/v1/chat/completions", content=b" " * (2 << 20))
    assert answer.status_code == 413 and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "change",
    [{"store": True}, {"previous_response_id": "resp_1"}, {"tools": [{"type": "web_search"}]}, {"input": []}, {"x": 1}],
)
def test_what_responses_cannot_do_is_refused(change):
    answer = post("/v1/responses", json={"model": MODEL, "input": "x"} | change)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth - 1):
        value = {"not": value}
    return value


@pytest.mark.parametrize(
    "field",
    [
        lambda schema: {"structured_outputs": {"json": schema}},
        lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        lambda schema: {"tools": [{"type": "function", "function": {"name": "x", "parameters": schema}}]},
    ],
)
@pytest.mark.parametrize("depth", [65, 900])
def test_a_schema_that_is_nested_too_deeply_is_refused(field, depth):
    answer = post("/v1/chat/completions", json={"model": MODEL, "messages": user("Hi")} | field(nested(depth)))
    assert answer.status_code == 400 and "nested too deeply" in answer.json()["error"]["message"]


def test_a_form_that_cannot_be_sent_takes_no_place():
    async def run():
        pool = scripted()
        with pytest.raises(ApiError) as refusal:
            pool.submit([[1, 2]], {}, n=2, form=nested(5000))
        assert refusal.value.status == 400 and pool.outstanding == 0

    asyncio.run(run())
