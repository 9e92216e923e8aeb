"""Conformance: the real `openai` client, and raw HTTP, against one real server with a tiny model."""

import json
import os
import re
import signal

import httpx
import openai
import processes
import pytest
from processes import HANG
from serving_run import ServerProcess, make_run

APPLES = "Ava has 12 apples. She buys 7 more. How many?"
SUM = "Ava has 12 + 7 = 19 apples.\n#### 19"
ME = "I am Fathom, a small language model. Ask me **anything**!"
MODEL = "tiny/sft"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of a model that has learnt a few conversations by heart."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root)
    with ServerProcess(root, "ui=api", "temperature=0", "api.log=none") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=HANG) as one:
        yield one


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def ask(client, question: str, **more):
    return client.chat.completions.create(model=MODEL, messages=user(question), **more)


def chunks_of(client, question: str, **more) -> list:
    return list(ask(client, question, stream=True, **more))


def streamed(chunks, index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


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
    assert choice.text.startswith("Hello") and found.tokens[:6] == ["<|bos|>", *"Hello"]
    assert found.token_logprobs[0] is None and all(one <= 0 for one in found.token_logprobs[1:])
    assert found.top_logprobs[0] is None and found.text_offset[:3] == [0, 7, 8]
    for own, likely in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert own <= max(likely.values())


def test_a_prompt_alone_can_be_scored(client):
    choice = complete(client, "Hello", max_tokens=0, echo=True, logprobs=0).choices[0]
    assert choice.text == "Hello" and len(choice.logprobs.token_logprobs) == 6


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
# Errors


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
        None,
    ),
    ({"response_format": {"type": "xml"}}, 400, "invalid_value", "response_format"),
    ({"response_format": {"type": "json_schema"}}, 400, None, "response_format.json_schema.json_schema"),
]


@pytest.mark.parametrize(("change", "status", "code", "param"), REFUSED)
def test_what_is_wrong_is_refused_in_openais_form(server, change, status, code, param):
    body = {"model": MODEL, "messages": user("Who are you?")} | change
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=HANG)
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
        {"prompt": "x" * 768},
        {"prompt": ["a"] * 100, "n": 2},
        {"best_of": 1, "n": 2},
        {"best_of": 2, "stream": True},
        {"max_tokens": 0},
        {"suffix": "x"},
        {"logprobs": True},
        {"messages": []},
    ],
)
def test_wrong_completions_are_refused(server, change):
    body = {"model": MODEL, "prompt": "x"} | change
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=HANG)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_request_is_refused(server, body):
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_half_a_surrogate_pair_does_no_harm(server):
    body = json.dumps({"model": MODEL, "messages": user("\ud800"), "max_tokens": 9}).encode()
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    body = json.dumps({"model": "\ud800", "messages": user("x"), "\ud800": 1}).encode()
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400


def test_unknown_paths_and_methods_have_openais_form(server):
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"]
    answer = httpx.get(f"{server.url}/v1/chat/completions")
    assert answer.status_code == 405 and answer.json()["error"]["message"]


def test_a_body_that_is_too_large_is_refused(server):
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=b" " * (2 << 20))
    assert answer.status_code == 413 and answer.json()["error"]["message"]


def test_the_server_survives_all_of_it(server, client):
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    assert ask(client, "Who are you?").choices[0].message.content == ME


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


@pytest.mark.parametrize(
    "change",
    [{"store": True}, {"previous_response_id": "resp_1"}, {"tools": [{"type": "web_search"}]}, {"input": []}, {"x": 1}],
)
def test_what_responses_cannot_do_is_refused(server, change):
    answer = httpx.post(f"{server.url}/v1/responses", json={"model": MODEL, "input": "x"} | change, timeout=HANG)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


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
    workers = processes.children_of(server.process.pid)
    stream = ask(client, "Sing.", stream=True, max_tokens=600)
    chunks = [next(stream)]
    server.process.send_signal(signal.SIGTERM)
    processes.wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    with pytest.raises(openai.InternalServerError) as error:
        ask(client, "Who are you?")
    assert error.value.status_code == 503 and error.value.response.headers["retry-after"]
    chunks += stream
    assert streamed(chunks) == ("la " * 200)[:600] and chunks[-1].choices[0].finish_reason == "length"
    assert server.process.wait(timeout=HANG) == 0
    assert not any(processes.is_alive(pid) for pid in workers)
