"""Worker process of the server: one model on one device, one engine, one loop.

`python -m llm.serving.worker FD` speaks over the socket FD with the server (llm.serving.pool). To the worker:
("load", source), ("submit", id, job), ("abort", id). From the worker: ("ready", facts) or ("failed", text), then
("accepted", id), ("refused", id, text), ("tokens", [event, ...]), ("prompt", id, logprobs, cached), ("stats", dict).
An event is (id, token or None, forced, logprob, top, finish_reason). The process ends when the socket does.
"""

import os
import queue
import signal
import socket
import sys
import threading
import time
from typing import Any

from llm.errors import UserError
from llm.serving import frames
from llm.utils.environment import return_memory

STATS_SECONDS = 1.0  # between reports of the engine's state, and between two times that memory is given back
TAKE_SECONDS = 0.05  # for messages between two steps: to compile the form of an answer takes long


def main(fd: int) -> None:
    """Serve the other end of the socket until it closes."""
    for name in (signal.SIGINT, signal.SIGTERM):  # the server ends its workers, after the answers under way
        signal.signal(name, signal.SIG_IGN)
    connection = socket.socket(fileno=fd)
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_read_forever, args=(connection, inbox), daemon=True).start()
    _, source = inbox.get()
    try:
        engine, facts = load(source)
    except UserError as error:
        connection.sendall(frames.pack(("failed", str(error))))
        return
    connection.sendall(frames.pack(("ready", facts)))
    Loop(engine, connection, inbox).run()


def _read_forever(connection: socket.socket, inbox: queue.SimpleQueue) -> None:
    """Hand on what the server says; once it has gone, end the process, whatever the model is at."""
    while (message := frames.receive(connection)) is not None:
        inbox.put(message)
    os._exit(0)


def load(source: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load the model that `source` describes (llm.serving.pool.Source); return its engine and facts about it."""
    import torch

    from llm.config.plugins import load_plugins
    from llm.config.trust import trust
    from llm.inference.engine import Engine
    from llm.inference.sampling import SamplingParams
    from llm.serving.chat import load_chat_model

    trust([*source["trust"], *source["plugins"]])
    load_plugins(source["plugins"])
    if source["threads"]:
        torch.set_num_threads(source["threads"])
    model = load_chat_model(source["model"], source["device"], source["compute"], source["verify"])
    engine = Engine(
        *(model.engine.net, model.engine.tokenizer), max_rows=source["rows"], sharers=source["sharers"], frozen=True
    )
    facts = {"device": str(engine.net.device), "examples": model.examples}
    facts |= {"name": model.name, "summary": model.summary, "notes": model.notes}
    engine.generate([[engine.tokenizer.bos_id]], SamplingParams(max_new_tokens=2))  # or the first answer would be slow
    return engine, facts | {"seq_len": engine.net.config.seq_len, "vocab_size": engine.net.config.vocab_size}


class Loop:
    """Loop of a worker: take what came in, let the engine do a step, send what came out."""

    def __init__(self, engine: Any, connection: socket.socket, inbox: queue.SimpleQueue):
        self.engine, self.connection, self.inbox = engine, connection, inbox
        self._requests: dict[int, Any] = {}  # the engine's requests by the server's number
        self._numbers: dict[Any, int] = {}  # the server's number by the engine's id
        self._told: set[int] = set()  # numbers of requests whose prompt has been reported
        self._next_stats = self._next_return = 0.0

    def run(self) -> None:
        """Work until the process is ended. An error inside the engine ends it: the server starts another worker."""
        while True:
            self._take()
            if events := self.engine.step():
                self._send(("tokens", self._report(events)))
            if time.monotonic() >= self._next_stats:
                self._next_stats = time.monotonic() + STATS_SECONDS
                self._send(("stats", self.engine.stats()))
            if not self.engine.has_work and time.monotonic() >= self._next_return:
                self._next_return = time.monotonic() + STATS_SECONDS
                return_memory()

    def _send(self, message: tuple) -> None:
        try:
            self.connection.sendall(frames.pack(message))
        except OSError:
            os._exit(0)  # the server has gone

    def _take(self) -> None:
        """Carry out messages that wait, in `TAKE_SECONDS`, for rows under way wait too; without work, wait for one."""
        spent = 0.0
        while spent < TAKE_SECONDS:
            try:
                message = self.inbox.get(block=not self.engine.has_work, timeout=STATS_SECONDS)
            except queue.Empty:
                return
            begun = time.monotonic()
            if message[0] == "submit":
                self._submit(*message[1:])
            elif message[0] == "abort" and (request := self._forget(message[1])) is not None:
                self.engine.abort(request)
            spent += time.monotonic() - begun

    def _submit(self, number: int, job: dict[str, Any]) -> None:
        from llm.inference.sampling import SamplingParams

        try:
            params = SamplingParams(**job["params"])
            request = self.engine.submit(
                job["prompt"],
                params,
                sample=job["sample"],
                constraint=self._constraint(job["form"], params, len(job["prompt"])),
            )
        except (UserError, ValueError) as error:
            self._send(("refused", number, str(error)))
            return
        self._requests[number], self._numbers[request.id] = request, number
        self._send(("accepted", number))

    def _constraint(self, form: dict[str, Any] | None, params: Any, n_prompt: int) -> Any:
        """Return the constraint of a structured answer, None for a free one."""
        if form is None:
            return None
        from llm.inference.constraint import Constraint

        room = min(params.max_new_tokens, self.engine.net.config.seq_len - n_prompt)
        return Constraint(self.engine.tokenizer, form, room)

    def _forget(self, number: int) -> Any:
        """Forget a request; return it, None if it has ended."""
        request = self._requests.pop(number, None)
        if request is not None:
            del self._numbers[request.id]
            self._told.discard(number)
        return request

    def _report(self, events: list[Any]) -> list[tuple]:
        """Return the engine's events as (number, token or None, forced, logprob, top, finish_reason).

        Reports first what was found out about a prompt, once a request has its first event.
        """
        told: list[tuple] = []
        for event in events:
            request = event.request
            number = self._numbers.get(request.id)
            if number is None:  # aborted meanwhile
                continue
            if number not in self._told:
                self._told.add(number)
                self._send(("prompt", number, request.prompt_logprobs, request.cached_tokens))
            if request.error is not None:
                self._send(("refused", number, request.error))
            else:
                told.append((number, *event[1:]))
            if event.finish_reason is not None:
                self._forget(number)
        return told


if __name__ == "__main__":
    main(int(sys.argv[1]))
