"""The API over workers that follow a script instead of being processes, for tests of everything but the model."""

import pickle

from llm.serving.api.server import build_app, guard_app
from llm.serving.api.service import Service
from llm.serving.pool import Pool, Source
from llm.tokenizer.bpe import Tokenizer

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
FACTS = {"name": "a/b", "summary": "a model", "notes": (), "device": "cpu", "seq_len": 400, "vocab_size": 265}
BODY = {"model": "a/b", "messages": [{"role": "user", "content": "Hi"}]}


class Script:
    """Worker's end of a pool: answers every job with `ids`, all at once, or never (None)."""

    def __init__(self, pool: Pool, worker, ids: list[int] | None):
        self.pool, self.worker, self.ids, self.heard = pool, worker, ids, []

    def write(self, data: bytes) -> None:
        kind, *rest = message = pickle.loads(data[4:])
        self.heard.append(message)
        if kind == "submit":
            self.pool._hear(self.worker, ("accepted", rest[0]))
            if self.ids is not None:
                self.answer(rest[0], self.ids)

    def answer(self, number: int, ids: list[int]) -> None:
        events = [(number, token, False, None, None, None) for token in ids]
        self.pool._hear(self.worker, ("prompt", number, None, 3))
        self.pool._hear(self.worker, ("tokens", [*events, (number, None, False, None, None, "stop")]))


def scripted(ids: list[int] | None = None, n_workers: int = 1, rows: int = 2, queue: int = 1) -> Pool:
    """A pool whose workers follow a script instead of being processes."""
    pool = Pool(Source("a/b"), ["cpu"] * n_workers, rows=rows, queue=queue)
    pool.facts = FACTS
    for worker in pool.workers:
        worker.facts, worker.writer = FACTS, Script(pool, worker, ids)
    return pool


def served(pool: Pool, timeout: float = 600, truncates: bool = False, **options):
    """An application over a pool, with its guard."""
    defaults = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "max_new_tokens": 50}
    service = Service(pool, TOKENIZER, "a/b", defaults, timeout, truncates)
    app = build_app(service, **options)
    guard_app(app, "127.0.0.1", (), options.get("origins", ()))
    return app
