"""The API around the model: queue, limits, key, timeouts, cancels, drain, log and metrics, with scripted workers."""

import asyncio
import gc
import json
import logging
import signal
import threading
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("fastapi")

from scripted_pool import BODY, scripted, served  # noqa: E402

from llm.serving.api.chat import ChatAnswer  # noqa: E402
from llm.serving.api.completions import _mean_logprob  # noqa: E402
from llm.serving.api.conversation import instructions_of, turns  # noqa: E402
from llm.serving.api.requests import ChatRequest, Tool  # noqa: E402
from llm.serving.api.server import MAX_HEAD, run  # noqa: E402
from llm.serving.api.service import usage_of  # noqa: E402
from llm.serving.api.text import AnswerText  # noqa: E402
from llm.serving.errors import unavailable  # noqa: E402
from llm.serving.http import listen  # noqa: E402
from llm.serving.pool import SLACK, Event  # noqa: E402
from llm.tokenizer.bpe import Tokenizer  # noqa: E402

WIDE, XEN = Tokenizer([*(bytes([b]) for b in range(256)), b"xEN"]), 256  # with a token over the edge of a stop text


def requests(app, *steps):
    """Answers to requests (method, path, options), sent one after the other."""

    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:1") as client:
            return [await client.request(method, path, **options) for method, path, options in steps]

    return asyncio.run(run())


def chat(**change):
    return ("POST", "/v1/chat/completions", {"json": BODY | change})


def test_a_full_queue_answers_429_with_a_time():
    async def run():
        pool = scripted(None)
        transport = httpx.ASGITransport(served(pool))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1") as client:
            waiting = [asyncio.create_task(client.post("/v1/chat/completions", json=BODY)) for _ in range(3)]
            while pool.outstanding < 3:
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/chat/completions", json=BODY)
            script = pool.workers[0].writer
            for message in list(script.heard):
                script.answer(message[1], [*b"ok"])
            return refused, await asyncio.gather(*waiting), await client.post("/v1/models")

    refused, answered, _ = asyncio.run(run())
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["type"] == "rate_limit_error" and refused.json()["error"]["code"] == "queue_full"
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answered] == ["ok"] * 3


def test_a_large_request_is_taken_where_nothing_else_runs():
    (answer,) = requests(served(scripted([*b"ok"])), chat(n=20))
    assert len(answer.json()["choices"]) == 20


def test_a_large_answer_is_made_beside_the_loop(monkeypatch):
    threads, make = [], ChatAnswer.whole

    def noted(self):
        threads.append(threading.current_thread())
        return make(self)

    monkeypatch.setattr(ChatAnswer, "whole", noted)
    (answer,) = requests(served(scripted([*b"ok"])), chat(logprobs=True, top_logprobs=3, n=3, max_tokens=9))
    assert answer.status_code == 200 and threads[0] is not threading.main_thread()


def test_draining_answers_503_with_a_time_and_says_so():
    pool = scripted([*b"ok"])
    pool.is_draining = True
    refused, health = requests(served(pool), chat(), ("GET", "/health", {}))
    assert refused.status_code == health.status_code == 503 and refused.headers["retry-after"]
    assert health.json()["status"] == "draining" and health.headers["retry-after"]


def test_without_a_ready_worker_503():
    pool = scripted([*b"ok"])
    pool.workers[0].facts = None
    refused, health = requests(served(pool), chat(), ("GET", "/health", {}))
    assert refused.status_code == health.status_code == 503 and health.json()["status"] == "starting"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_fails_and_is_cancelled(stream):
    pool = scripted(None)
    (answer,) = requests(served(pool, timeout=0.05), chat(stream=stream))
    error = json.loads(answer.text.rstrip().rpartition("\n\n")[2].removeprefix("data: "))
    assert error["error"]["code"] == "timeout" and answer.status_code == (200 if stream else 504)
    assert pool.outstanding == 0 and pool.workers[0].writer.heard[-1][0] == "abort"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(stream):
    async def run():
        pool = scripted(None)
        app, sent = served(pool), []
        body = json.dumps(BODY | {"stream": stream}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            while not pool.outstanding:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        scope |= {"query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1", "raw_path": b""}
        await app(scope, receive, send)
        return pool

    pool = asyncio.run(run())
    assert pool.outstanding == 0 and [message[0] for message in pool.workers[0].writer.heard] == ["submit", "abort"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_that_dies_fails_its_requests(stream):
    async def run():
        pool = scripted(None)
        transport = httpx.ASGITransport(served(pool))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1") as client:
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=BODY | {"stream": stream}))
            while not pool.outstanding:
                await asyncio.sleep(0.01)
            if stream:
                pool._hear(pool.workers[0], ("tokens", [(0, ord("x"), False, None, None, None)]))
            for job in pool.workers[0].jobs.values():
                job.fail(unavailable("the worker of this request ended; try again", 1))
            return await asking

    answer = asyncio.run(run())
    if stream:
        assert '"content":"x"' in answer.text and '"code": "unavailable"' in answer.text.split("\n\n")[-2]
    else:
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


def test_a_key_is_asked_for():
    app = served(scripted([*b"ok"]), key="secret")
    right, wrong = {"authorization": "Bearer secret"}, {"authorization": "Bearer sécret".encode()}
    steps = [("GET", path, {"headers": h}) for path in ("/v1/models", "/stats", "/metrics") for h in ({}, wrong, right)]
    codes = [answer.status_code for answer in requests(app, *steps, ("GET", "/health", {}))]
    assert codes == [401, 401, 200] * 3 + [200]
    (refused,) = requests(app, chat())
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"


def test_pages_elsewhere_may_ask_where_they_are_named():
    asked = {"headers": {"origin": "https://chat.example.org"}}
    (refused,) = requests(served(scripted()), ("GET", "/v1/models", asked))
    assert refused.status_code == 403 and refused.json()["error"]["type"] == "permission_error"
    (answer,) = requests(served(scripted(), origins=["https://chat.example.org"]), ("GET", "/v1/models", asked))
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://chat.example.org"
    preflight = {"headers": asked["headers"] | {"access-control-request-method": "POST"}}
    app = served(scripted(), origins=["https://chat.example.org"], key="secret")
    (answer,) = requests(app, ("OPTIONS", "/v1/chat/completions", preflight))
    assert answer.status_code == 200 and "POST" in answer.headers["access-control-allow-methods"]


def test_settings_reach_the_engine():
    pool = scripted([*b"ok"])
    own = {"seed": -1, "stop": ["a", ""], "logit_bias": {"5": 1}, "top_p": 0, "min_tokens": 2, "logprobs": True}
    requests(served(pool), chat(), chat(**own, top_logprobs=4, max_completion_tokens=9, max_tokens=5))
    plain, full = (message[2]["params"] for message in pool.workers[0].writer.heard)
    defaults = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "max_new_tokens": 50, "use_tools": True}
    assert plain == plain | defaults
    assert full["seed"] == 2**63 - 1 and full["stop"] == ("a",) and full["logit_bias"] == ((5, 1),)
    assert 0 < full["top_p"] < 1e-6 and full["logprobs"] == 4 and full["max_new_tokens"] == 9


def test_equal_prompts_of_a_request_are_drawn_apart_unless_a_seed_was_given():
    pool = scripted([*b"ok"])
    body = {"model": "a/b", "prompt": ["Once", "Once"], "n": 2}
    requests(served(pool), *(("POST", "/v1/completions", {"json": body | more}) for more in ({}, {"seed": 7})))
    drawn = [(message[2]["params"]["seed"], message[2]["sample"]) for message in pool.workers[0].writer.heard]
    assert len(set(drawn[:4])) == 4 and drawn[4:] == [(7, 0), (7, 1)] * 2


def test_a_network_without_numbers_is_an_error_of_the_server():
    pool = scripted(None)
    worker = pool.workers[0]
    worker.writer.answer = lambda number, ids: pool._hear(worker, ("failed", number, "the network gives NaN"))
    worker.writer.ids = []
    (answer,) = requests(served(pool), chat())
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"


def pieces_of(ids, stops, at_once) -> tuple[str, list[int]]:
    """Text and ids of the tokens that an answer of `ids` tells, whole or token by token."""
    events = [Event(token, False, -0.5, [], None) for token in ids]
    events[-1] = events[-1]._replace(finish_reason="stop")
    answer = AnswerText(WIDE, stops)
    parts = [answer.push_to_end(some)[0] for some in ([events] if at_once else [[event] for event in events])]
    return "".join(part.text for part in parts), [one.id for part in parts for one in part.tokens]


@pytest.mark.parametrize("at_once", [True, False])
def test_the_tokens_of_an_answer_are_those_of_its_text(at_once):
    assert pieces_of([*b"abEND"], ["END"], at_once) == ("ab", [*b"ab"])
    assert pieces_of([*b"b", XEN, *b"D"], ["END"], at_once) == ("bx", [*b"b", XEN]), "it holds the end of the text"
    assert pieces_of([*b"b", XEN], ["EN"], at_once) == ("bx", [*b"b", XEN])
    assert pieces_of([*"é!".encode(), *b"E"], ["E"], at_once) == ("é!", [*"é!".encode()])
    assert pieces_of([*b"END"], ["END"], at_once) == ("", [])
    assert pieces_of([*b"abEN"], ["END"], at_once) == ("abEN", [*b"abEN"])


def test_tokens_of_calls_are_counted_apart():
    """Counts the marks of a call and its result, and what stands between them; not the text around."""
    marks = [WIDE.special_id(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end")]
    ids = [*b"It is ", marks[0], *b"12*3", marks[1], marks[2], *b"36", marks[3], *b"36."]
    events = [Event(token, False, None, None, None) for token in ids]
    answer = AnswerText(WIDE)
    delta, reason = answer.push_to_end([*events, Event(None, False, None, None, "length")])
    assert (delta.text, delta.call, reason) == ("It is 36.", "12*3 = 36\n", "length")
    assert answer.n_call_tokens == 4 + 4 + 2


def test_an_answer_that_a_stop_text_cuts_has_stopped():
    """Says so also where the engine's last token was the last that it might be."""
    events = [Event(token, False, None, None, None) for token in b"abEND"]
    events[-1] = events[-1]._replace(finish_reason="length")
    assert AnswerText(WIDE, ["END"]).push_to_end(events)[1] == "stop"
    assert AnswerText(WIDE).push_to_end(events)[1] == "length"


def test_places_in_the_text_count_its_characters():
    ids = [*"é!x".encode()]
    events = [Event(token, False, -0.5, [], None) for token in ids]
    pool = scripted(ids)
    worker = pool.workers[0]

    def answer(number, _):
        pool._hear(worker, ("prompt", number, None, 3))
        pool._hear(worker, ("tokens", [*((number, *one) for one in events), (number, None, False, None, None, "stop")]))

    worker.writer.answer = answer
    body = {"model": "a/b", "prompt": "Once", "logprobs": 0}
    (told,) = requests(served(pool), ("POST", "/v1/completions", {"json": body}))
    assert told.json()["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1, 2]


def test_a_response_tells_the_settings_that_were_used():
    app = served(scripted([*b"ok"]))
    asked = {"model": "a/b", "input": "Hi"}
    own, given = requests(
        app, ("POST", "/v1/responses", {"json": asked}), ("POST", "/v1/responses", {"json": asked | {"top_p": 0}})
    )
    assert own.json()["top_p"] == 0.9 and own.json()["temperature"] == 0.5 and given.json()["top_p"] == 0


def test_tokens_that_a_tool_wrote_do_not_count_for_the_best():
    events = [Event(1, False, -1.0, [], None), Event(2, True, -9.0, [], None), Event(None, False, None, None, "stop")]
    assert _mean_logprob(events) == -1.0 and _mean_logprob(events[1:]) == float("-inf")


def test_a_prompt_counts_once_whatever_the_number_of_its_samples():
    """Takes two prompts with two answers each; what later samples find in the cache is not told."""
    of_jobs = ((3, 2, 1), (3, 4, 3), (5, 1, 4), (5, 1, 5))
    jobs = [SimpleNamespace(prompt=[0] * p, ids=[0] * n, cached=cached) for p, n, cached in of_jobs]
    used = usage_of(jobs, n_prompts=2)
    assert (used["prompt_tokens"], used["completion_tokens"], used["total_tokens"]) == (8, 8, 16)
    assert used["prompt_tokens_details"] == {"cached_tokens": 1 + 4}


def test_requests_with_one_beginning_go_to_one_worker_unless_it_is_busy():
    async def run():
        pool = scripted(None, n_workers=2, rows=100)
        params, same, other = {}, list(range(50)), list(range(1, 51))
        homes = [pool.submit([same], params).jobs[0].worker.index for _ in range(SLACK + 1)]
        assert set(homes) == {0} and pool.submit([other], params).jobs[0].worker.index == 1
        pool.submit([same], params)
        assert pool.submit([same], params).jobs[0].worker.index == 1  # the first has too much more to do
        pool.workers[1].facts = None
        assert pool.submit([other], params).jobs[0].worker.index == 0

    asyncio.run(run())


def test_the_log_tells_what_happened_but_not_what_was_said(caplog):
    with caplog.at_level(logging.INFO, "fathom.requests"):
        requests(served(scripted([*b"secret"]), log="requests"), chat(), chat(temperature=9), chat(stream=True))
        told = [json.loads(record.getMessage()) for record in caplog.records]
        assert [one["status"] for one in told] == [200, 400, 200] and "secret" not in caplog.text
        assert told[0]["path"] == "/v1/chat/completions" and told[0]["generated_tokens"] == 6
        assert told[0]["ends"] == ["stop"] and told[0]["cached_tokens"] == 3 and told[0]["seconds"] >= 0
        caplog.clear()
        requests(served(scripted([*b"secret"]), log="text"), chat())
        assert json.loads(caplog.records[0].getMessage())["answers"] == ["secret"]
        caplog.clear()
        requests(served(scripted([*b"secret"]), log="none"), chat())
        assert not caplog.records


def test_metrics_count_requests_and_tokens():
    pool = scripted([*b"four"])
    pool.workers[0].stats = {"rows": 1, "waiting": 2}
    *_, metrics, stats = requests(
        served(pool), chat(), chat(), chat(n=0), ("GET", "/metrics", {}), ("GET", "/stats", {})
    )
    assert metrics.headers["content-type"].startswith("text/plain")
    for line in (
        'fathom_requests_total{path="/v1/chat/completions",status="200"} 2.0',
        'fathom_requests_total{path="/v1/chat/completions",status="400"} 1.0',
        "fathom_generated_tokens_total 8.0",
        "fathom_first_token_seconds_count 2.0",
        'fathom_worker_engine_waiting{worker="0"} 2.0',
        'fathom_worker_ready{worker="0"} 1.0',
    ):
        assert line in metrics.text
    assert stats.json()["workers"][0]["engine"] == {"rows": 1, "waiting": 2} and stats.json()["total_workers"] == 1


def test_nanochats_form_of_a_stream():
    app = served(scripted([*"Grüße".encode()]))
    good = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5, "top_k": 5, "max_tokens": 9}
    (answer,) = requests(app, ("POST", "/chat/completions", {"json": good}))
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.strip().split("\n\n")]
    assert events[-1] == {"done": True} and "".join(one["token"] for one in events[:-1]) == "Grüße"
    assert all(one["gpu"] == 0 for one in events[:-1])
    long = [{"role": role, "content": "x" * 100} for role in ("user", "assistant") * 9][:-1]
    wrong = [
        {"messages": []},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": "x" * 8001}]},
        {"messages": [{"role": "user", "content": "x" * 8000}] * 5},
        good | {"temperature": 2.1},
        good | {"top_k": 201},
        good | {"max_tokens": 4097},
    ]
    answers = requests(app, *(("POST", "/chat/completions", {"json": body}) for body in ({"messages": long}, *wrong)))
    assert [answer.status_code for answer in answers] == [200, *[400] * len(wrong)]


@pytest.mark.parametrize("streams", [False, True])
def test_a_stop_text_before_min_tokens_does_not_cut_the_answer(streams):
    change = {"stop": "stop", "min_tokens": 8, "stream": streams}
    for path, own in (("/v1/chat/completions", BODY), ("/v1/completions", {"model": "a/b", "prompt": "x"})):
        (answer,) = requests(served(scripted([*b"a stop b stop"])), ("POST", path, {"json": own | change}))
        told = [answer.text] if not streams else [one for one in answer.text.split("data: ") if one.startswith("{")]
        choices = [choice for one in told for choice in json.loads(one)["choices"]]
        texts = [
            (one.get("delta") or one.get("message") or {"content": one.get("text")}).get("content") for one in choices
        ]
        assert "".join(text or "" for text in texts) == "a stop b " and choices[-1]["finish_reason"] == "stop"


def test_functions_are_told_in_their_own_letters():
    """Keep what a model was trained on: an escape of six signs is none of its letters."""
    function = {"name": "weather", "description": "Größe", "parameters": {"properties": {"城市": {"type": "string"}}}}
    told = instructions_of([Tool(type="function", function=function)])
    assert all(word in told for word in ("weather", "Größe", "城市")) and "\\u" not in told
    call = {"id": "1", "type": "function", "function": {"name": "天気", "arguments": "{}"}}
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages = ChatRequest(model="m", messages=[*asked, {"role": "user", "content": "!"}]).messages
    assert turns(messages)[1]["content"] == '{"name": "天気", "arguments": {}}'


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ('{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ('{"ä": "\\u00e4"}', '{"ä": "ä"}'),
        ('{"a": NaN}', None),
        ('{"a": 1e999}', None),
    ],
)
def test_arguments_of_a_call_are_json_whatever_the_model_writes(said, arguments):
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = f'{{"name": "f", "arguments": {said}}}'
    (answer,) = requests(served(scripted([*text.encode()])), chat(tools=tools))
    message = answer.json()["choices"][0]["message"]
    if arguments is None:
        assert message["content"] == text and "tool_calls" not in message
    else:
        assert [call["function"]["arguments"] for call in message["tool_calls"]] == [arguments]


def test_the_end_of_a_stream_is_one_write():
    async def run():
        app, sent = served(scripted([*b"ok"])), []
        body = {"model": "a/b", "prompt": "Hi", "stream": True, "stream_options": {"include_usage": True}}
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            return messages.pop() if messages else await asyncio.sleep(60)

        async def send(message):
            sent.append(message)

        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        scope |= {"query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1", "raw_path": b""}
        await app(scope, receive, send)
        return sent

    start, *bodies = asyncio.run(run())
    assert start["status"] == 200 and [message["more_body"] for message in bodies] == [False]
    *chunks, usage, done = bodies[0]["body"].decode().split("\n\n")[:-1]
    assert len(chunks) == 1 and '"usage":{"prompt_tokens":' in usage and done == "data: [DONE]"


HOST = b" HTTP/1.1\r\nHost: 127.0.0.1"


@pytest.mark.parametrize(
    ("begin", "more", "end"),
    [
        (b"GET /health" + HOST + b"\r\nX-Long: ", b"x", b""),
        (b"GET /health?", b"x", HOST),
        (b"GET /health" + HOST, b"\r\nX-Many: x", b""),
        (b"GET /health" + HOST + b"\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ", b"x", b""),
    ],
    ids=["one header", "address", "many headers", "trailer"],
)
def test_a_request_without_end_is_refused_before_it_fills_memory(begin, more, end):
    end += b"\r\n\r\n"
    short = begin + more * ((MAX_HEAD - len(begin + end)) // len(more)) + end
    endless = (begin + more * MAX_HEAD)[: MAX_HEAD + 1]

    async def answers():
        started = asyncio.Event()
        with listen("127.0.0.1", 0) as bound:
            server = asyncio.create_task(run(served(scripted([])), [], bound, 0, started.set))
            await started.wait()
            try:
                port = bound.getsockname()[1]
                return await _answer(port, short, first_line=True), await _answer(port, endless, first_line=False)
            finally:
                signal.raise_signal(signal.SIGINT)
                await server
                gc.unfreeze()

    taken, refused = asyncio.run(answers())
    assert taken == b"HTTP/1.1 200 OK\r\n"
    assert b"HTTP/1.1 400 " in refused and f"{MAX_HEAD:,} bytes".encode() in refused


async def _answer(port: int, data: bytes, first_line: bool) -> bytes:
    """Send `data` and return the first line that the server says, or all until it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.readuntil(b"\r\n") if first_line else reader.read(), 60)
    finally:
        writer.close()
