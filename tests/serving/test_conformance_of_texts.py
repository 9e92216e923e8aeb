"""Conformance of /v1/completions and /v1/responses, and what clients see of workers that die and of the end."""

import json
import os
import signal

import httpx
import processes
import pytest
from openai_server import APPLES, ME, MODEL, SUM, WEATHER, ask, openai, streamed, user
from processes import HANG

pytest_plugins = ["openai_server"]  # its fixtures


# ---------------------------------------------------------------------------------------------------------------------
# Completions


def complete(client, prompt, **more):
    return client.completions.create(model=MODEL, prompt=prompt, **more)


def test_a_completion_has_openais_form(client):
    answer = complete(client, "la la la", max_tokens=6)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert len(answer.choices[0].text) == 6 and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6 and answer.usage.prompt_tokens == 9


def test_sixteen_tokens_by_default(client):
    assert complete(client, "la la la").usage.completion_tokens <= 16


def test_prompts_may_be_ids_and_several(client):
    ids = [265 - 9, *b"la la"]
    single = complete(client, ids, max_tokens=4).choices[0].text
    assert [c.text for c in complete(client, [ids, ids], max_tokens=4).choices] == [single, single]
    several = complete(client, ["la la", "x"], max_tokens=4, n=2)
    assert [c.index for c in several.choices] == [0, 1, 2, 3] and several.choices[0].text == single


def test_echo_and_logprobs_score_a_prompt(client):
    choice = complete(client, "Hello", max_tokens=1, echo=True, logprobs=1, temperature=0).choices[0]
    found = choice.logprobs
    assert choice.text.startswith("Hello") and found.tokens[:5] == list("Hello")
    assert found.text_offset[:3] == [0, 1, 2] and all(one <= 0 for one in found.token_logprobs)
    for own, likely in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert own <= max(likely.values())


def test_the_token_that_begins_a_text_is_added_and_shown_only_where_it_was_given(client):
    def scores(prompt):
        found = complete(client, prompt, max_tokens=0, echo=True, logprobs=0).choices[0].logprobs
        return found.tokens, found.token_logprobs

    (tokens, plain), (_, ids) = scores("Hello"), scores([*b"Hello"])
    with_bos, given = scores([256, *b"Hello"])
    assert tokens == list("Hello") and with_bos == ["<|bos|>", *"Hello"]
    assert plain == ids == given[1:] and given[0] is None


def test_a_prompt_alone_can_be_scored(client):
    choice = complete(client, "Hello", max_tokens=0, echo=True, logprobs=0).choices[0]
    assert choice.text == "Hello" and len(choice.logprobs.token_logprobs) == 5


def test_scores_do_not_depend_on_company(client):
    alone = complete(client, "Hello", max_tokens=1, echo=True, logprobs=1).choices[0].logprobs.token_logprobs
    together = complete(client, ["Hello", "x" * 100], max_tokens=1, echo=True, logprobs=1).choices[0].logprobs
    assert together.token_logprobs[1:6] == pytest.approx(alone[1:6], abs=0.1)


def test_the_best_of_several_comes_back(client):
    more = {"temperature": 2.0, "max_tokens": 8, "seed": 3, "extra_body": {"top_k": 0}}
    best = complete(client, "la la", best_of=6, n=1, logprobs=0, **more)
    every = complete(client, "la la", n=6, logprobs=0, **more)
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in every.choices]
    assert best.choices[0].text == every.choices[means.index(max(means))].text and len(best.choices) == 1


def test_completions_are_streamed(client):
    chunks = list(complete(client, "la la la", max_tokens=30, stream=True, stream_options={"include_usage": True}))
    whole = complete(client, "la la la", max_tokens=30)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_a_streamed_completion_echoes_first(client):
    chunks = list(complete(client, "la la", max_tokens=4, stream=True, echo=True))
    assert "".join(c.choices[0].text for c in chunks).startswith("la la")
    assert chunks[0].choices[0].text.startswith("la la")


# ---------------------------------------------------------------------------------------------------------------------
# Responses


def respond(client, given, **more):
    return client.responses.create(model=MODEL, input=given, **more)


def test_a_response_has_openais_form(client):
    answer = respond(client, "Who are you?")
    assert answer.object == "response" and answer.id.startswith("resp") and answer.status == "completed"
    assert answer.output_text == ME and answer.output[0].role == "assistant" and answer.output[0].type == "message"
    assert answer.usage.output_tokens == len(ME) and answer.usage.total_tokens > len(ME) and answer.store is False


def test_input_may_be_messages(client):
    messages = [
        *user("Greet me."),
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Grüße! 你好 😀"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Again."}]},
    ]
    assert respond(client, messages).output_text == "Привет 👋"


def test_instructions_come_first(client):
    lengths = [
        respond(client, "Hi", instructions=text, max_output_tokens=1).usage.input_tokens for text in (None, "Go")
    ]
    assert lengths[1] == lengths[0] + len("Go\n\n")


def test_an_answer_may_be_incomplete(client):
    answer = respond(client, "Sing.", max_output_tokens=6)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output_text == "la la "


def test_reasoning_is_an_item(client):
    answer = respond(client, APPLES)
    assert answer.output_text == SUM and answer.output[1].type == "reasoning"
    assert answer.output[1].content[0].text == "12+7 = 19\n"
    again = respond(client, [*user("Greet me."), *respond(client, "Greet me.").output, *user("Again.")])
    assert again.output_text == "Привет 👋"
    sent_back = respond(client, [*user(APPLES), *answer.output, *user("Who are you?")])
    plain = respond(client, [*user(APPLES), *answer.output[:1], *user("Who are you?")])
    assert sent_back.output_text == plain.output_text


def test_a_response_has_a_form(client):
    form = {"type": "json_schema", "name": "w", "schema": WEATHER["function"]["parameters"]}
    answer = respond(client, "Sing.", text={"format": form}, temperature=1.5, max_output_tokens=80)
    assert set(json.loads(answer.output_text)) == {"city", "days"} and answer.text.format.name == "w"


def test_a_response_is_streamed_as_events(client):
    events = list(respond(client, APPLES, stream=True))
    assert [one.sequence_number for one in events] == list(range(len(events)))
    kinds = [one.type for one in events]
    assert kinds[:4] == [
        *("response.created", "response.in_progress"),
        *("response.output_item.added", "response.content_part.added"),
    ]
    assert kinds[-1] == "response.completed" and kinds.count("response.output_item.done") == 2
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    assert text == SUM == events[-1].response.output_text and events[-1].response.usage.output_tokens


def test_the_clients_own_stream_of_responses(client):
    with client.responses.stream(model=MODEL, input="Who are you?") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == ME


# ---------------------------------------------------------------------------------------------------------------------
# The page beside the API


def test_routes_that_do_not_exist_have_openais_form_beside_the_page_too(server, client):
    with pytest.raises(openai.NotFoundError, match="Not Found") as refused:
        client.embeddings.create(model=MODEL, input="x")
    assert refused.value.type == "invalid_request_error"
    assert httpx.head(f"{server.url}/health").status_code == 200
    assert httpx.get(server.url).status_code == 200


def test_the_page_asks_the_same_workers(server):
    gradio_client = pytest.importorskip("gradio_client")
    visitor = gradio_client.Client(server.url, verbose=False)
    try:
        visitor.predict("Greet me.", api_name="/ask")
        shown = visitor.predict(0.0, 50, 1.0, 40, "", "", api_name="/answer")
        assert "Grüße! 你好 😀" in str(shown)
    finally:
        visitor.close()
    assert httpx.get(server.url).headers["content-security-policy"].startswith("default-src 'self'")
    assert httpx.get(f"{server.url}/stats").json()["requests"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Workers and the end: these tests change the server, so they come last


def test_a_worker_that_is_killed_is_replaced(server, client):
    def workers():
        return [pid for pid in processes.children_of(server.process.pid) if pid not in seen]

    seen: list[int] = []
    (worker,) = workers()
    stream = ask(client, "Sing.", stream=True, max_tokens=700)
    next(stream)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="worker"):
        for _ in stream:
            pass
    processes.wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    seen.append(worker)
    assert len(workers()) == 1 and ask(client, "Who are you?").choices[0].message.content == ME
    assert httpx.get(f"{server.url}/stats").json()["workers"][0]["restarts"] == 1


def test_answers_under_way_are_finished_on_sigterm(server, client):
    (worker,) = workers = processes.children_of(server.process.pid)
    stream = ask(client, "Sing.", stream=True, max_tokens=600)
    chunks = [next(stream)]
    os.kill(worker, signal.SIGSTOP)  # else the answer may end before anybody looks
    server.process.send_signal(signal.SIGTERM)
    processes.wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    with pytest.raises(openai.InternalServerError) as error:
        ask(client, "Who are you?")
    assert error.value.status_code == 503 and error.value.response.headers["retry-after"]
    os.kill(worker, signal.SIGCONT)
    chunks += stream
    assert streamed(chunks) == ("la " * 200)[:600] and chunks[-1].choices[0].finish_reason == "length"
    assert server.process.wait(timeout=HANG) == 0
    assert not any(processes.is_alive(pid) for pid in workers)
