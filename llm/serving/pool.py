"""Workers of the server: started, watched and started again; requests go to the one that has least to do.

All of it runs in the server's event loop. A worker's process (llm.serving.worker) tells what its engine did; a `Job`
keeps that until whoever asked takes it. A worker that dies is replaced after a pause; its jobs fail with an `ApiError`.
"""

import asyncio
import itertools
import os
import secrets
import socket
import sys
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from llm.errors import UserError
from llm.serving import frames
from llm.serving.errors import ApiError, bad, too_busy, too_slow, unavailable
from llm.utils.source import python_path

PREFIX_TOKENS = 32  # requests that begin with the same tokens go to one worker, which has their keys in its cache
PREFIXES = 4_096  # that are remembered
SLACK = 4  # a worker may have this many rows more than the least loaded one and still be chosen for a prefix
PAUSES = (1.0, 30.0)  # seconds before a worker that died is started again: at first, and at most
HEALTHY_SECONDS = 60.0  # a worker that lived this long begins again with the shortest pause
POLL_SECONDS = 0.05  # between two looks whether the answers of a pool that ends are done
SHUTTING_DOWN = "the server is shutting down"
END_SECONDS = 5.0  # a worker that has lost its socket ends by itself in this time


@dataclass(frozen=True)
class Source:
    """Source of a worker's model: a stage folder or hf:<name>, its number format, and whose code it may import.

    verify: compare every file of the model with its checksum. adapters: (name, folder) of those beside the model.
    weights: see `load_chat_model`.
    """

    model: str
    compute: str = "auto"
    plugins: tuple[str, ...] = ()
    trust: tuple[str, ...] = ()
    verify: bool = True
    adapters: tuple[tuple[str, str], ...] = ()
    weights: str | None = None


class Event(NamedTuple):
    """Token that a job gained; `id` is None where it ended without one. top: the likeliest (id, logprob) pairs."""

    id: int | None
    forced: bool
    logprob: float | None
    top: list[tuple[int, float]] | None
    finish_reason: str | None


class Job:
    """One row of generation. times: `begun`, `first` and `last` token, in seconds of time.monotonic.

    cached: tokens of the prompt that came from the worker's cache.
    """

    def __init__(self, number: int, worker: "Worker", prompt: Sequence[int], news: asyncio.Event):
        self.number, self.worker, self.prompt = number, worker, prompt
        self.events: deque[Event] = deque()
        self.prompt_logprobs: list | None = None
        self.cached, self.ids = 0, []  # ids: of the answer so far
        self.finish_reason: str | None = None
        self.error: ApiError | None = None
        self.is_accepted = False
        self.begun, self.first, self.last = time.monotonic(), None, None
        self._news = news

    @property
    def is_done(self) -> bool:
        """Return True once nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def has_news(self) -> bool:
        """Return True if `take` has something to return or to raise."""
        return bool(self.events) or self.error is not None

    def accept(self) -> None:
        """Note that the worker has taken the job."""
        self.is_accepted = True
        self._news.set()

    def add(self, event: Event) -> None:
        """Keep a token that the worker reports, or the end."""
        self.last = time.monotonic()
        self.first = self.first or self.last
        if event.id is not None:
            self.ids.append(event.id)
        self.events.append(event)
        self.finish_reason = event.finish_reason
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """End the job with an error, unless it has ended."""
        if not self.is_done:
            self.error = error
            self._news.set()

    def take(self) -> list[Event]:
        """Return the events since the last call. Raises the job's error once those before it are taken."""
        if not self.events and self.error is not None:
            raise self.error
        events = list(self.events)
        self.events.clear()
        return events


class Batch:
    """Jobs of one request, prompt by prompt, and who waits for them until `deadline` (seconds of time.monotonic)."""

    def __init__(self, deadline: float):
        self.jobs: list[Job] = []
        self.deadline, self.news = deadline, asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Return True once all jobs have ended and all that they gained was taken."""
        return all(job.is_done and not job.has_news for job in self.jobs)

    async def until_accepted(self) -> None:
        """Wait until workers have taken all jobs. Raises ApiError where one refuses or dies, or time is over."""
        while not all(job.is_accepted or job.is_done for job in self.jobs):
            await self._wait()
        for job in self.jobs:
            if job.error is not None:
                raise job.error

    async def until_done(self) -> None:
        """Wait for the end of all jobs. Raises ApiError where one fails or time is over."""
        while not all(job.is_done for job in self.jobs):
            await self._wait()
            for job in self.jobs:
                if job.error is not None:
                    raise job.error

    async def news_of(self) -> AsyncIterator[tuple[int, list[Event]]]:
        """Yield (index of the job, its new events) until all have ended; what came in between comes together."""
        left = list(range(len(self.jobs)))
        while left:
            while not any(self.jobs[index].has_news for index in left):
                await self._wait()
            for index in left:
                if self.jobs[index].has_news:
                    yield index, self.jobs[index].take()
            left = [index for index in left if not self.jobs[index].is_done or self.jobs[index].has_news]

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                await self.news.wait()
        except TimeoutError:
            raise too_slow() from None
        self.news.clear()


@dataclass
class Worker:
    """A place for a worker process: the present process, its jobs, and how often it was started again."""

    index: int
    device: str
    process: asyncio.subprocess.Process | None = None
    writer: asyncio.StreamWriter | None = None
    jobs: dict[int, Job] = field(default_factory=dict)
    facts: dict[str, Any] | None = None  # of the loaded model; None while the process is not ready
    stats: dict[str, Any] = field(default_factory=dict)
    restarts: int = 0

    @property
    def is_ready(self) -> bool:
        """Return True while the process can take jobs."""
        return self.facts is not None

    def send(self, message: tuple) -> None:
        """Send a message; it waits in memory while the worker is busy."""
        self.send_packed(frames.pack(message))

    def send_packed(self, data: bytes) -> None:
        """Send a message that `frames.pack` has made."""
        if self.writer is not None:
            self.writer.write(data)


class Pool:
    """Workers with the same model.

    rows: sequences that a worker decodes together; queue: further ones that may wait. threads: of a worker's torch.
    """

    def __init__(self, source: Source, devices: Sequence[str], *, rows: int, queue: int, threads: int | None = None):
        self.source, self.rows, self.queue, self.threads = source, rows, queue, threads
        self.workers = [Worker(index, device) for index, device in enumerate(devices)]
        self.is_draining = self.is_retired = False
        self.facts: dict[str, Any] = {}  # about the model that every worker has loaded
        self.seconds = 1.0  # a job takes, lately
        self._numbers = itertools.count()
        self._homes: OrderedDict[tuple, Worker] = OrderedDict()
        self._tasks: list[asyncio.Task] = []
        self._started: list[asyncio.Future] = []

    @property
    def outstanding(self) -> int:
        """Number of jobs that have not ended."""
        return sum(len(worker.jobs) for worker in self.workers)

    async def start(self) -> None:
        """Start the workers and wait until they are ready. Raises UserError where the model cannot be loaded."""
        loop = asyncio.get_running_loop()
        self._started = [loop.create_future() for _ in self.workers]
        self._tasks = [asyncio.create_task(self._keep(worker)) for worker in self.workers]
        try:
            self.facts = (await asyncio.gather(*self._started))[0]
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End the workers, and jobs that have not ended with an error."""
        self.is_draining = True
        for task in self._tasks:
            if not task.cancelling():  # a second time would not wait for the end of its process
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def retire(self) -> None:
        """Take no more jobs, wait for the end of those under way, and end the workers."""
        self.is_draining = self.is_retired = True
        while self.outstanding:
            await asyncio.sleep(POLL_SECONDS)
        await self.close()

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        given: dict[str, Any],
        *,
        n: int = 1,
        form: dict[str, Any] | None = None,
        adapter: str | None = None,
        timeout: float = 600.0,
    ) -> Batch:
        """Give n samples of each prompt to workers. given: fields of SamplingParams; form: of a structured answer.

        Without a seed in `given` one is drawn for each prompt, so equal prompts have different samples.
        adapter: name of the one that answers, None for the model itself. timeout: seconds until whoever waits gets an
        error. Raises ApiError where the queue is full, no worker is there, or the form cannot be sent.
        """
        if self.is_draining:
            raise unavailable("the model has made room for another" if self.is_retired else SHUTTING_DOWN, 5)
        capacity = len(self.workers) * self.rows + self.queue
        if self.outstanding and self.outstanding + n * len(prompts) > capacity:
            raise too_busy(self._wait_seconds())
        batch = Batch(time.monotonic() + timeout)
        try:
            for prompt in prompts:
                worker = self._choose(prompt, adapter)
                params = {"seed": secrets.randbits(63)} | given
                for sample in range(n):
                    job = Job(next(self._numbers), worker, prompt, batch.news)
                    told = {"prompt": prompt, "params": params, "sample": sample, "form": form, "adapter": adapter}
                    data = frames.pack(("submit", job.number, told))  # before the job takes a place: it may fail
                    worker.jobs[job.number] = job
                    batch.jobs.append(job)
                    worker.send_packed(data)
        except BaseException as error:
            self.cancel(batch)
            if isinstance(error, RecursionError):
                raise bad("the form of the answer is nested too deeply") from None
            raise
        return batch

    def cancel(self, batch: Batch) -> None:
        """End jobs that nobody waits for; those that have ended are left alone."""
        for job in batch.jobs:
            if job.worker.jobs.pop(job.number, None) is not None:
                job.worker.send(("abort", job.number))
                job.fail(ApiError(499, "the request was cancelled", code="cancelled"))

    def fail_all(self) -> None:
        """Take no more jobs and end all there are with an error: the server ends."""
        self.is_draining = True
        for worker in self.workers:
            for job in list(worker.jobs.values()):
                worker.send(("abort", job.number))
                job.fail(unavailable(SHUTTING_DOWN, 5))
            worker.jobs.clear()

    def _choose(self, prompt: Sequence[int], adapter: str | None) -> Worker:
        """Return the worker for a prompt: one that knows its beginning, unless another has much less to do."""
        ready = [worker for worker in self.workers if worker.is_ready]
        if not ready:
            raise unavailable("the model is being loaded again", 5)
        least = min(ready, key=lambda worker: len(worker.jobs))
        prefix = (adapter, *prompt[:PREFIX_TOKENS])
        home = self._homes.pop(prefix, least)
        if not home.is_ready or len(home.jobs) > len(least.jobs) + SLACK:
            home = least
        self._homes[prefix] = home
        if len(self._homes) > PREFIXES:
            self._homes.popitem(last=False)
        return home

    def _wait_seconds(self) -> int:
        """Return the seconds after which a place should be free."""
        waiting = self.outstanding / (len(self.workers) * self.rows)
        return max(1, min(60, round(self.seconds * waiting)))

    # -----------------------------------------------------------------------------------------------------------------
    # Processes

    async def _keep(self, worker: Worker) -> None:
        """Keep a process running in a worker's place, until this task is cancelled."""
        started, pause = self._started[worker.index], PAUSES[0]
        while True:
            begun = time.monotonic()
            try:
                failure = await self._live(worker, started)
            except Exception as error:  # such as a system that has no memory or no process left
                failure = f"{type(error).__name__}: {error}"
            if not started.done():  # the first start: whoever waits for it gets the reason
                started.set_exception(UserError(failure or f"worker {worker.index} ended while it loaded the model"))
                return
            print(f"worker {worker.index} ended ({failure or 'unexpectedly'}); starting it again", file=sys.stderr)
            if time.monotonic() - begun > HEALTHY_SECONDS:
                pause = PAUSES[0]
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSES[1])
            worker.restarts += 1

    async def _live(self, worker: Worker, started: asyncio.Future) -> str | None:
        """Run one process until it ends; return what it said about its end."""
        ours, theirs = socket.socketpair()
        failure = None
        try:
            with theirs:
                worker.process = await _spawn(worker, theirs.fileno())
            reader, worker.writer = await asyncio.open_connection(sock=ours)
            worker.send(("load", self._load_message(worker)))
            while (message := await frames.read(reader)) is not None:
                if message[0] == "failed":
                    failure = message[1]
                elif message[0] == "ready":
                    worker.facts = message[1]
                    if not started.done():
                        started.set_result(worker.facts)
                else:
                    self._hear(worker, message)
            return failure
        finally:
            ours.close()
            worker.facts, writer, worker.writer = None, worker.writer, None
            if writer is not None:
                writer.close()
            jobs, worker.jobs = list(worker.jobs.values()), {}
            for job in jobs:
                job.fail(unavailable("the worker of this request ended; try again", round(PAUSES[0])))
            if worker.process is not None:
                await asyncio.shield(_end(worker.process))

    def _load_message(self, worker: Worker) -> dict[str, Any]:
        sharers = sum(other.device == worker.device for other in self.workers)  # of the device's memory
        told = {"device": worker.device, "rows": self.rows, "threads": self.threads, "sharers": sharers}
        known = self.facts.get("fingerprints")  # None at the start, and for models of others
        return asdict(self.source) | told | {"known": known}

    def _hear(self, worker: Worker, message: tuple) -> None:
        """Give what a worker says to the jobs that it is about."""
        kind, *rest = message
        if kind == "tokens":
            for number, *event in rest[0]:
                if (job := worker.jobs.get(number)) is not None:
                    job.add(Event._make(event))
                    if job.is_done:
                        del worker.jobs[number]
                        self.seconds += 0.05 * (job.last - job.begun - self.seconds)
        elif kind == "stats":
            worker.stats = rest[0]
        elif (job := worker.jobs.get(rest[0])) is not None:
            if kind == "accepted":
                job.accept()
            elif kind == "refused":
                del worker.jobs[job.number]
                job.fail(bad(rest[1]))
            elif kind == "failed":
                del worker.jobs[job.number]
                job.fail(ApiError(500, rest[1], code="model_failed"))
            else:  # prompt
                _, job.prompt_logprobs, job.cached = rest


async def _spawn(worker: Worker, fd: int) -> asyncio.subprocess.Process:
    """Start the process of a worker, which inherits the socket `fd`."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "llm.serving.worker", str(fd)),
        pass_fds=[fd],
        stdin=asyncio.subprocess.DEVNULL,
        env=os.environ | python_path(),
    )


async def _end(process: asyncio.subprocess.Process) -> None:
    """Wait for the end of a process that has lost its socket; kill one that takes too long."""
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), END_SECONDS)
    if process.returncode is None:
        process.kill()
        await process.wait()
