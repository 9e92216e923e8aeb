"""A real server with a tiny model and the real `openai` client, for tests of what clients see."""

import pytest
from processes import HANG
from serving_run import ServerProcess, make_run

openai = pytest.importorskip("openai")

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
    """A server of a model that has learnt a few conversations by heart, with page and API."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root)
    with ServerProcess(root, "temperature=0", "api.log=none") as running:
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
