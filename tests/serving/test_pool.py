"""Pool of workers: what becomes of its places when processes cannot be started, and when a worker tells tokens."""

import asyncio
import pickle
import queue
import sys
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

from scripted_pool import scripted  # noqa: E402

from llm.errors import UserError  # noqa: E402
from llm.inference.request import TokenEvent  # noqa: E402
from llm.serving import pool as pools  # noqa: E402
from llm.serving.pool import Pool, Source  # noqa: E402
from llm.serving.worker import STATS_SECONDS, TAKE_SECONDS, Loop  # noqa: E402


@pytest.fixture
def no_process(monkeypatch):
    """Let no process start; return a list that grows with every process asked for."""
    asked = []

    async def spawn(worker, fd):
        asked.append(worker.index)
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pools, "_spawn", spawn)
    monkeypatch.setattr(pools, "PAUSES", (0.0, 0.0))
    return asked


def test_a_process_that_cannot_be_started_ends_the_start(no_process):
    async def run():
        async with asyncio.timeout(10):
            await Pool(Source("a/b"), ["cpu"], rows=1, queue=1).start()

    with pytest.raises(UserError, match="Cannot allocate memory"):
        asyncio.run(run())


def test_a_process_that_cannot_be_started_again_is_tried_again(no_process, capsys):
    async def run():
        pool = scripted()
        pool._started = [asyncio.get_running_loop().create_future()]
        pool._started[0].set_result({})  # it had been ready
        task = asyncio.create_task(pool._keep(pool.workers[0]))
        async with asyncio.timeout(10):
            while len(no_process) < 3:
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert "Cannot allocate memory" in capsys.readouterr().err


def test_a_worker_is_told_how_many_share_its_device():
    pool = Pool(Source("a/b"), ["cuda:0", "cuda:1", "cuda:0"], rows=1, queue=1)
    assert [pool._load_message(worker)["sharers"] for worker in pool.workers] == [2, 1, 2]


def test_a_worker_goes_on_with_its_rows_between_messages_that_take_long(monkeypatch):
    inbox = queue.SimpleQueue()
    for number in range(3):
        inbox.put(("submit", number, {}))
    loop = Loop(SimpleNamespace(has_work=True), None, inbox)
    monkeypatch.setattr(loop, "_submit", lambda number, job: time.sleep(2 * TAKE_SECONDS))
    loop._take()
    assert inbox.qsize() == 2
    monkeypatch.setattr(loop, "_submit", lambda number, job: None)
    loop._take()
    assert inbox.empty()


def test_an_idle_worker_does_not_wait_with_a_refusal():
    inbox = queue.SimpleQueue()
    inbox.put(("submit", 3, {"params": {"temperature": -1.0}}))
    loop, begun = Loop(SimpleNamespace(has_work=False), Wire(), inbox), time.monotonic()
    loop._take()
    loop._flush()
    assert time.monotonic() - begun < STATS_SECONDS / 2
    assert [message[:2] for message in loop.connection.messages] == [("refused", 3)]


class Wire:
    """Socket of a worker that keeps what is sent."""

    def __init__(self):
        self.messages = []

    def sendall(self, data: bytes) -> None:
        while data:
            end = 4 + int.from_bytes(data[:4], "big")
            self.messages.append(pickle.loads(data[4:end]))
            data = data[end:]


def test_a_worker_tells_first_tokens_and_ends_at_once_and_the_others_together():
    wishes = SimpleNamespace(logit_bias=())
    wire, request = Wire(), SimpleNamespace(id=5, prompt_logprobs=None, cached_tokens=2, error=None, params=wishes)
    request.constraint = None
    loop = Loop(None, wire, queue.SimpleQueue())
    loop._requests, loop._numbers = {1: request}, {5: 1}

    def told(*events: TokenEvent) -> list[tuple]:
        wire.messages = []
        loop._report(list(events))
        loop._flush()
        return wire.messages

    loop._next_frame = time.monotonic() + 600
    first = ("tokens", [(1, 7, False, None, None, None)])
    assert told(TokenEvent(request, 7)) == [("prompt", 1, None, 2), first]
    assert told(TokenEvent(request, 8)) == told(TokenEvent(request, 9)) == []
    loop._next_frame = 0
    assert [event[1] for event in told(TokenEvent(request, 10))[0][1]] == [8, 9, 10]
    loop._next_frame = time.monotonic() + 600
    assert told(TokenEvent(request, 11)) == []
    request.error = "the network gives NaN"
    tokens, failed = told(TokenEvent(request, None, finish_reason="error"))
    assert [event[1] for event in tokens[1]] == [11]
    assert failed == ("failed", 1, "the network gives NaN")
    assert not loop._events and not loop._requests


HEARS = "import socket, sys\ns = socket.socket(fileno=int(sys.argv[1]))\nwhile s.recv(4096): pass\n"


def test_a_signal_while_workers_load_leaves_no_process_behind(monkeypatch):
    processes = []

    async def spawn(worker, fd):
        more = {"pass_fds": [fd], "stdin": asyncio.subprocess.DEVNULL}
        processes.append(await asyncio.create_subprocess_exec(sys.executable, "-c", HEARS, str(fd), **more))
        return processes[-1]

    async def start():
        def interrupt():
            if pool.workers[0].writer is None:
                loop.call_later(0.01, interrupt)
            else:
                raise SystemExit(143)  # as the handler of SIGTERM does

        loop, pool = asyncio.get_running_loop(), Pool(Source("a/b"), ["cpu"], rows=1, queue=1)
        interrupt()
        await pool.start()

    monkeypatch.setattr(pools, "_spawn", spawn)
    with pytest.raises(SystemExit):
        asyncio.run(start())
    assert [process.returncode for process in processes] == [0]
