"""Worker process of the server: one model on one device, one engine, one loop.

`python -m llm.serving.worker FD` speaks over the socket FD with the server (llm.serving.pool). To the worker:
("load", source), ("submit", id, job), ("abort", id). From the worker: ("ready", facts) or ("failed", text), then
("accepted", id), ("refused", id, text), ("tokens", [event, ...]), ("prompt", id, logprobs, cached), ("stats", dict).
An event is (id, token or None, forced, logprob, top, finish_reason). The process ends when the socket does.

The first token of a request is told at once, and so is its end; the others of `FRAME_SECONDS` are told together. Each
message wakes the server, which on a CPU takes one of the cores that the next step computes with.
"""

import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.serving import frames
from llm.utils.environment import return_memory

STATS_SECONDS = 1.0  # between reports of the engine's state, and between two times that memory is given back
FRAME_SECONDS = 0.04  # between two reports of tokens that are neither the first of a request nor the last
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
    gc.collect()
    gc.freeze()  # looking for garbage among all that was imported would stop every row for a tenth of a second
    connection.sendall(frames.pack(("ready", facts)))
    Loop(engine, connection, inbox).run()


def _read_forever(connection: socket.socket, inbox: queue.SimpleQueue) -> None:
    """Hand on what the server says; once it has gone, end the process, whatever the model is at."""
    while (message := frames.receive(connection)) is not None:
        inbox.put(message)
    os._exit(0)


def load(source: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load the model that `source` describes (llm.serving.pool.Source); return its engine and facts about it.

    Raises UserError where it is not the one that the server began with, by the fingerprints `known`.
    """
    import torch

    from llm.config.plugins import load_plugins
    from llm.config.trust import trust
    from llm.inference.engine import Engine
    from llm.inference.sampling import SamplingParams
    from llm.run.content import fingerprints, other_part
    from llm.serving.chat import is_hf, load_chat_model

    folder = Path(source["model"]) / "model"
    if source["known"] and (part := other_part(folder, source["known"])) is not None:
        raise UserError(
            f"{folder} holds {part} than the server began with, which alone is served until the server is restarted"
        )
    trust([*source["trust"], *source["plugins"]])
    load_plugins(source["plugins"])
    if source["threads"]:
        torch.set_num_threads(source["threads"])
    given = source["model"], source["device"], source["compute"], source["verify"]
    model = load_chat_model(*given, adapters=dict(source["adapters"]), weights=source["weights"])
    engine = Engine(
        *(model.engine.net, model.engine.tokenizer),
        max_rows=source["rows"],
        sharers=source["sharers"],
        frozen=True,
        adapters=model.engine.adapters,
    )
    facts = {"device": str(engine.net.device), **_told(model), "beside": [_told(one) for one in model.beside]}
    facts["fingerprints"] = source["known"] or (None if is_hf(source["model"]) else fingerprints(folder))
    engine.generate([[engine.tokenizer.bos_id]], SamplingParams(max_new_tokens=2))  # or the first answer would be slow
    return engine, facts | {"seq_len": engine.net.config.seq_len, "vocab_size": engine.net.config.vocab_size}


def _told(model: Any) -> dict[str, Any]:
    """Return what is said about a chat model."""
    return {"name": model.name, "summary": model.summary, "notes": model.notes, "examples": model.examples}


class Loop:
    """Loop of a worker: take what came in, let the engine do a step, send what came out."""

    def __init__(self, engine: Any, connection: socket.socket, inbox: queue.SimpleQueue):
        self.engine, self.connection, self.inbox = engine, connection, inbox
        self._requests: dict[int, Any] = {}  # the engine's requests by the server's number
        self._numbers: dict[Any, int] = {}  # the server's number by the engine's id
        self._events: dict[int, list[tuple]] = {}  # not told yet, by the server's number; of those that have begun
        self._out: list[bytes] = []  # messages to be sent
        self._next_frame = self._next_stats = self._next_return = 0.0

    def run(self) -> None:
        """Work until the process is ended. An error inside the engine ends it: the server starts another worker."""
        while True:
            self._take()
            self._flush()
            self._report(self.engine.step())
            if time.monotonic() >= self._next_stats:
                self._next_stats = time.monotonic() + STATS_SECONDS
                self._send(("stats", self.engine.stats()))
            self._flush()
            if not self.engine.has_work and time.monotonic() >= self._next_return:
                self._next_return = time.monotonic() + STATS_SECONDS
                return_memory()

    def _send(self, message: tuple) -> None:
        self._out.append(frames.pack(message))

    def _flush(self) -> None:
        """Give all messages to the socket at once."""
        if self._out:
            data, self._out = b"".join(self._out), []
            try:
                self.connection.sendall(data)
            except OSError:
                os._exit(0)  # the server has gone

    def _take(self) -> None:
        """Carry out messages that wait, in `TAKE_SECONDS`, for rows under way wait too; without work, wait for one."""
        spent = 0.0
        while spent < TAKE_SECONDS:
            try:
                idle = not (self.engine.has_work or self._out)  # a refusal is sent before there is more to do
                message = self.inbox.get(block=idle, timeout=STATS_SECONDS)
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
                adapter=job["adapter"],
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
            self._events.pop(number, None)
        return request

    def _report(self, events: list[Any]) -> None:
        """Send what the engine's events let be told now, and keep the others.

        Before the first event of a request goes what was found out about its prompt, behind the last one its error.
        """
        told, failed = [], []
        for event in events:
            request = event.request
            number = self._numbers.get(request.id)
            if number is None:  # aborted meanwhile
                continue
            if is_first := number not in self._events:
                self._events[number] = []
                self._send(("prompt", number, request.prompt_logprobs, request.cached_tokens))
            if request.error is None:
                self._events[number].append((number, *event[1:]))
            else:
                has_wishes = request.constraint is not None or request.params.logit_bias
                failed.append(("refused" if has_wishes else "failed", number, request.error))
            if is_first or event.finish_reason is not None:
                told += self._taken(number)
            if event.finish_reason is not None:
                self._forget(number)
        if time.monotonic() >= self._next_frame:
            self._next_frame = time.monotonic() + FRAME_SECONDS
            for number in self._events:
                told += self._taken(number)
        if told:
            self._send(("tokens", told))
        for message in failed:
            self._send(message)

    def _taken(self, number: int) -> list[tuple]:
        """Return the events of a request that have not been told, which now are."""
        events, self._events[number] = self._events[number], []
        return events


if __name__ == "__main__":
    main(int(sys.argv[1]))
