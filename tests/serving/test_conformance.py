"""Conformance of /v1/models and /v1/chat/completions: the real `openai` client against a real server."""

import asyncio
import json
import re
import shutil

import httpx
import pytest
from openai_server import APPLES, ME, MODEL, SUM, WEATHER, ask, chunks_of, openai, streamed, user
from processes import HANG, run

pytest_plugins = ["openai_server"]  # its fixtures


# ---------------------------------------------------------------------------------------------------------------------
# Models


def test_models_are_listed(client):
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "fathom") and model.created > 0


def test_a_model_is_described(client):
    assert client.models.retrieve(MODEL).id == MODEL


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4o")
    assert error.value.code == "model_not_found"


# ---------------------------------------------------------------------------------------------------------------------
# Chat: whole answers


def test_an_answer_has_openais_form(client):
    answer = ask(client, "Who are you?")
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == MODEL
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert choice.message.content == ME and choice.message.tool_calls is None and choice.logprobs is None
    usage = answer.usage
    assert usage.completion_tokens == len(ME) and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_ids_differ(client):
    assert ask(client, "Who are you?").id != ask(client, "Who are you?").id


def test_content_may_be_parts(client):
    parts = [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == ME


def test_the_history_counts(client):
    messages = [*user("Greet me."), {"role": "assistant", "content": "Grüße! 你好 😀"}, *user("Again.")]
    answer = client.chat.completions.create(model=MODEL, messages=messages)
    assert answer.choices[0].message.content == "Привет 👋"


def test_an_answer_of_ours_may_be_sent_back_as_it_is(client):
    first = ask(client, "Greet me.").choices[0].message
    answer = client.chat.completions.create(model=MODEL, messages=[*user("Greet me."), first, *user("Again.")])
    assert answer.choices[0].message.content == "Привет 👋"


def test_system_and_developer_messages_are_read(client):
    lengths = []
    for head in ([], [{"role": "system", "content": "Be brief."}], [{"role": "developer", "content": "Be brief."}]):
        answer = client.chat.completions.create(model=MODEL, messages=[*head, *user("Who are you?")], max_tokens=1)
        lengths.append(answer.usage.prompt_tokens)
    assert lengths[1] == lengths[2] == lengths[0] + len("Be brief.\n\n")


def test_neighbouring_messages_of_a_role_are_joined(client):
    answer = client.chat.completions.create(model=MODEL, messages=[*user("a"), *user("b")], max_tokens=1)
    assert answer.usage.prompt_tokens == len("a\n\nb") + 4


def test_calculator_calls_are_reasoning_content(client):
    message = ask(client, APPLES).choices[0].message
    assert message.content == SUM and message.reasoning_content == "12+7 = 19\n"


def test_max_tokens_ends_an_answer(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, "Sing.", **{name: 7})
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 7
        assert answer.choices[0].message.content == "la la l"


def test_stop_texts_are_cut_off(client):
    for stop in ("model", ["zzz", "model", "Ask"]):
        choice = ask(client, "Who are you?", stop=stop).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("I am Fathom, a small language ", "stop")


def test_n_samples_differ_and_are_numbered(client):
    answer = ask(client, "Sing.", n=3, temperature=2.0, max_tokens=20, seed=1, extra_body={"top_k": 0})
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_a_seed_repeats_an_answer(client):
    def draw(seed):
        return ask(client, "Who are you?", temperature=2.0, max_tokens=30, seed=seed, extra_body={"top_k": 0})

    texts = [draw(seed).choices[0].message.content for seed in (5, 5, 6, -5)]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_without_a_seed_answers_differ(client):
    texts = {ask(client, "Who are you?", temperature=2.0, max_tokens=40).choices[0].message.content for _ in range(3)}
    assert len(texts) > 1


def test_top_p_zero_is_greedy(client):
    assert ask(client, "Who are you?", temperature=1.0, top_p=0).choices[0].message.content == ME


def test_logit_bias_forbids_and_forces(client):
    answer = ask(client, "Who are you?", logit_bias={str(ord("I")): -100}, max_tokens=1)
    assert answer.choices[0].message.content != "I"
    answer = ask(client, "Who are you?", logit_bias={str(ord("z")): 100}, max_tokens=3)
    assert answer.choices[0].message.content == "zzz"


def test_penalties_change_an_answer(client):
    plain = ask(client, "Sing.", max_tokens=40).choices[0].message.content
    for more in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0, "temperature": 1.0, "seed": 1}):
        assert ask(client, "Sing.", max_tokens=40, **more).choices[0].message.content != plain


def test_own_sampling_fields_go_into_extra_body(client):
    own = {"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 2, "ignore_eos": False}
    assert ask(client, "Who are you?", temperature=2.0, extra_body=own).choices[0].message.content == ME


def test_logprobs_of_an_answer(client):
    answer = ask(client, "Who are you?", logprobs=True, top_logprobs=3, max_tokens=4)
    content = answer.choices[0].logprobs.content
    assert [one.token for one in content] == list("I am") and [one.bytes for one in content] == [[b] for b in b"I am"]
    for one in content:
        assert one.logprob <= 0 and len(one.top_logprobs) == 3
        assert one.top_logprobs[0].token == one.token and one.top_logprobs[0].logprob == one.logprob  # greedy


def test_logprobs_without_alternatives(client):
    content = ask(client, "Who are you?", logprobs=True, max_tokens=4).choices[0].logprobs.content
    assert len(content) == 4 and all(one.top_logprobs == [] for one in content)


def test_hints_are_accepted(client):
    hints = {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "store": False, "parallel_tool_calls": True}
    assert ask(client, "Who are you?", **hints, modalities=["text"]).choices[0].message.content == ME


def test_null_is_as_good_as_nothing(client):
    nulls = dict.fromkeys(("stop", "seed", "n", "tools", "response_format", "logit_bias", "max_tokens", "top_p"))
    assert ask(client, "Who are you?", **nulls).choices[0].message.content == ME


def test_a_conversation_that_is_too_long_is_refused_or_cut(client):
    long = [*user("x" * 700), {"role": "assistant", "content": "ok"}, *user("Who are you?")]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=[*long[:2], *long])
    assert error.value.code == "context_length_exceeded" and error.value.param == "messages"
    cut = client.chat.completions.create(model=MODEL, messages=long, extra_body={"truncation": "auto"})
    assert cut.choices[0].message.content == ME


# ---------------------------------------------------------------------------------------------------------------------
# Chat: streams


def test_a_stream_begins_with_the_role_and_ends_with_a_reason(client):
    chunks = chunks_of(client, "Who are you?")
    assert all(chunk.object == "chat.completion.chunk" and len(chunk.choices) == 1 for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert chunks[-1].choices[0].delta.content is None
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1 and streamed(chunks) == ME


def test_streamed_characters_are_whole(client):
    chunks = chunks_of(client, "Greet me.")
    assert streamed(chunks) == "Grüße! 你好 😀" and not any("\ufffd" in streamed([chunk]) for chunk in chunks)


def test_usage_comes_last_where_it_is_asked_for(client):
    chunks = chunks_of(client, "Who are you?", stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(ME)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_no_usage_unless_it_is_asked_for(client):
    assert all(chunk.usage is None and chunk.choices for chunk in chunks_of(client, "Who are you?"))


def test_stop_texts_never_show_in_a_stream(client):
    chunks = chunks_of(client, "Who are you?", stop=["model"])
    assert streamed(chunks) == "I am Fathom, a small language " and chunks[-1].choices[0].finish_reason == "stop"


def test_reasoning_is_streamed_apart(client):
    chunks = chunks_of(client, APPLES)
    reasoning = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert streamed(chunks) == SUM and reasoning == "12+7 = 19\n"


def test_samples_are_streamed_side_by_side(client):
    more = {"n": 2, "temperature": 2.0, "max_tokens": 20, "seed": 1, "extra_body": {"top_k": 0}}
    chunks = chunks_of(client, "Sing.", **more)
    whole = ask(client, "Sing.", **more)
    for index in range(2):
        assert streamed(chunks, index) == whole.choices[index].message.content
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices[0].index == index]
        assert reasons[-1] == "length" and not any(reasons[:-1])


def test_logprobs_are_streamed(client):
    chunks = chunks_of(client, "Who are you?", logprobs=True, top_logprobs=2)
    tokens = [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    assert "".join(one.token for one in tokens) == ME and all(len(one.top_logprobs) == 2 for one in tokens)


def test_the_clients_own_stream_helper(client):
    with client.chat.completions.stream(model=MODEL, messages=user("Who are you?")) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == ME


def test_a_stream_is_server_sent_events(server):
    body = {"model": MODEL, "messages": user("Who are you?"), "stream": True}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=HANG)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert re.fullmatch(r"(data: \{.*\}\n\n)+data: \[DONE\]\n\n", answer.text)


def test_several_streams_of_the_async_client(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=HANG) as client:
            streams = [await ask(client, question, stream=True) for question in ("Who are you?", "Greet me.")]
            return [[chunk async for chunk in stream] for stream in streams]

    assert [streamed(chunks) for chunks in asyncio.run(run())] == [ME, "Grüße! 你好 😀"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(server):
    """The command of the documentation: an answer, and a stream by the side."""
    url, head = f"{server.url}/v1/chat/completions", ("-H", "Content-Type: application/json")
    body = {"model": MODEL, "messages": user("Greet me.")}
    whole = json.loads(run("curl", "-sS", url, *head, "-d", json.dumps(body)).stdout)
    assert whole["choices"][0]["message"]["content"] == "Grüße! 你好 😀"
    lines = run("curl", "-sSN", url, *head, "-d", json.dumps(body | {"stream": True})).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: {") for line in lines[:-2])


# ---------------------------------------------------------------------------------------------------------------------
# Tools and forms


def arguments_of(call) -> dict:
    arguments = json.loads(call.function.arguments)
    assert call.type == "function" and call.id.startswith("call_") and call.function.name == "weather"
    assert set(arguments) == {"city", "days"} and isinstance(arguments["days"], int)
    return arguments


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_can_be_demanded(client, choice):
    answer = ask(client, "Sing.", tools=[WEATHER], tool_choice=choice, temperature=1.5, seed=1, max_tokens=120)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
    arguments_of(message.tool_calls[0])


def test_calls_are_streamed_as_name_and_arguments(client):
    chunks = chunks_of(
        client, "Sing.", tools=[WEATHER], tool_choice="required", temperature=1.5, seed=1, max_tokens=120
    )
    parts = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or ()]
    assert parts[0].function.name == "weather" and parts[0].id.startswith("call_") and streamed(chunks) == ""
    assert set(json.loads("".join(part.function.arguments or "" for part in parts))) == {"city", "days"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_model_may_ignore_tools(client):
    choice = ask(client, "Who are you?", tools=[WEATHER], max_tokens=10).choices[0]
    assert choice.finish_reason in ("stop", "length") and choice.message.tool_calls is None


def test_tools_may_be_switched_off(client):
    assert ask(client, "Who are you?", tools=[WEATHER], tool_choice="none").choices[0].message.content == ME


def test_the_result_of_a_tool_is_read(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    messages = [
        *user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5).usage.prompt_tokens > 60


def test_json_object(client):
    answer = ask(client, "Sing.", response_format={"type": "json_object"}, temperature=1.5, max_tokens=60)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)
    assert answer.choices[0].finish_reason == "stop"


def test_json_schema(client):
    form = {"name": "weather", "strict": True, "schema": WEATHER["function"]["parameters"]}
    answer = ask(
        client,
        "Sing.",
        response_format={"type": "json_schema", "json_schema": form},
        temperature=1.5,
        n=4,
        max_tokens=80,
    )
    for choice in answer.choices:
        assert set(json.loads(choice.message.content)) == {"city", "days"}


def test_the_clients_own_parsing_of_schemas(client):
    from pydantic import BaseModel

    class Sum(BaseModel):
        left: int
        right: int

    answer = client.chat.completions.parse(model=MODEL, messages=user("1+2"), response_format=Sum, max_tokens=60)
    assert isinstance(answer.choices[0].message.parsed, Sum)


def test_regex_and_choice(client):
    answer = ask(client, "Sing.", extra_body={"structured_outputs": {"regex": r"[a-z]+@[a-z]+\.org"}}, max_tokens=40)
    assert re.fullmatch(r"[a-z]+@[a-z]+\.org", answer.choices[0].message.content)
    answer = ask(client, "Sing.", extra_body={"structured_outputs": {"choice": ["yes", "no (never)"]}})
    assert answer.choices[0].message.content in ("yes", "no (never)")


def test_a_form_that_is_none_is_refused(client):
    for form in ({"regex": "("}, {"json": {"type": "nonsense"}}, {"regex": "a", "choice": ["b"]}, {}):
        with pytest.raises(openai.BadRequestError):
            ask(client, "Sing.", extra_body={"structured_outputs": form})
    assert ask(client, "Who are you?").choices[0].message.content == ME
