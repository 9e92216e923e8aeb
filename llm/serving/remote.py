"""Models of the page: the engine's interface that a chat uses, answered by the workers.

The page runs in threads beside the server's event loop; what it asks for goes through the loop's `Pool`, so that the
page and the API share queue, workers and caches.
"""

import asyncio
import queue
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.run.stage_folder import find_stage
from llm.serving.chat import ChatModel
from llm.serving.errors import ApiError
from llm.serving.models import KEPT, MadeRoom, Models
from llm.serving.pool import Batch, Event, Pool


class RemoteEngine:
    """Engine whose model lives in workers; `stream` may be used from any thread but the loop's."""

    def __init__(self, pool: Pool, tokenizer: Any, loop: asyncio.AbstractEventLoop, timeout: float):
        self.pool, self.tokenizer, self.loop, self.timeout = pool, tokenizer, loop, timeout
        self.net = SimpleNamespace(config=SimpleNamespace(seq_len=pool.facts["seq_len"]))

    def stream(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, adapter: str | None = None
    ) -> "RemoteStream":
        """Return an iterator over what a prompt's answer gains, as `Engine.stream`."""
        (prompt,) = prompts
        return RemoteStream(self, prompt, params, adapter)


class RemoteStream:
    """Answer of one row; `finish_reasons` is [None] until it has ended.

    Raises MadeRoom where the workers are gone for another model's sake, UserError where they refuse or fail.
    """

    def __init__(self, engine: RemoteEngine, prompt: Sequence[int], params: SamplingParams, adapter: str | None = None):
        self.engine, self.adapter, self.finish_reasons = engine, adapter, [None]
        self._news: queue.SimpleQueue = queue.SimpleQueue()
        self._task = asyncio.run_coroutine_threadsafe(self._run(list(prompt), asdict(params)), engine.loop)

    def __enter__(self) -> "RemoteStream":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the answer, if it has not ended."""
        self._task.cancel()

    def __iter__(self) -> Iterator[list[Event]]:
        while (news := self._news.get()) is not None:
            if isinstance(news, Exception):
                raise (MadeRoom if self.engine.pool.is_retired else UserError)(str(news))
            self.finish_reasons = [news[-1].finish_reason]
            if events := [event for event in news if event.id is not None]:
                yield events

    async def _run(self, prompt: list[int], params: dict[str, Any]) -> None:
        """Hand on what the workers report, in the server's event loop."""
        batch: Batch | None = None
        try:
            batch = self.engine.pool.submit([prompt], params, adapter=self.adapter, timeout=self.engine.timeout)
            async for _, events in batch.news_of():
                self._news.put(events)
        except ApiError as error:
            self._news.put(error)
        finally:
            if batch is not None:
                self.engine.pool.cancel(batch)
            self._news.put(None)


class RemoteModels(Models):
    """Models of the page: the first one is the server's own, others get a worker when they are chosen.

    at_once: answers that the page may have under way. start: loads a stage's folder in a worker of its own; stop: ends
    such a worker once its answers are done.
    """

    def __init__(
        self,
        first: ChatModel,
        root: str | None,
        start: Callable[[str], Awaitable[ChatModel]],
        stop: Callable[[ChatModel], Awaitable[None]],
        at_once: int,
    ):
        super().__init__(first, root)
        self.at_once, self._own, self._start, self._stop = at_once, first, start, stop

    def _load(self, name: str) -> ChatModel:
        """Load a model in a worker, for a thread beside the server's loop. Raises UserError where that fails."""
        folder = find_stage(self.root, *name.split("/"))
        return asyncio.run_coroutine_threadsafe(self._start(str(folder)), self._own.engine.loop).result()

    def _surplus(self) -> str | None:
        """Return the name of the model that must make room for one more: one that answers nobody, if there is one.

        The server's own model stays, and does not count.
        """
        others = [name for name in self._loaded if name != self.first]
        if len(others) < KEPT:
            return None
        return min(others, key=lambda name: self._loaded[name].engine.pool.outstanding > 0)

    def _unload(self, model: ChatModel) -> None:
        """End the worker of a model after the answers under way, which may be other visitors'."""
        asyncio.run_coroutine_threadsafe(self._stop(model), self._own.engine.loop)
