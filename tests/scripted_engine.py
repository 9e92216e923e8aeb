"""An engine that says what it was told, for tests of the chats."""

from types import SimpleNamespace

from llm.inference.engine import TokenEvent
from llm.serving.chat import ChatModel
from llm.tokenizer.bpe import Tokenizer

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


class ScriptedEngine:
    """Streams given token ids and records the prompt, and whether the stream was closed."""

    def __init__(self, ids: list[int], seq_len: int = 400, finish_reason: str = "stop"):
        self.ids, self.finish_reason, self.closed = ids, finish_reason, False
        self.tokenizer, self.net = TOKENIZER, SimpleNamespace(config=SimpleNamespace(seq_len=seq_len))

    def stream(self, prompts, params, adapter=None):
        (self.prompt,), self.params = prompts, params
        return self

    def __enter__(self):
        self.finish_reasons = [None]
        return self

    def __exit__(self, *exc):
        self.closed = True

    def __iter__(self):
        for token in self.ids:
            yield [TokenEvent(0, token, False)]
        self.finish_reasons = [self.finish_reason]


def scripted_model(text: str, name: str = "a/b", **engine) -> ChatModel:
    """A model to chat with that gives the same answer to everything."""
    return ChatModel(ScriptedEngine(TOKENIZER.encode(text), **engine), name, "says one thing")
