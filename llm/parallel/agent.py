"""PyTorch's elastic agent as `llm.parallel.launch` uses it: one on each node starts the processes there, and watches.

The agents meet in a store that the first node holds (MASTER_ADDR, MASTER_PORT), agree who takes part, and meet again
for a restart. Ours differs from torchrun's where a training needs it: signals are passed on and wait for checkpoints,
a mistake of the user's and a stop that was asked for are not started again, nor a job that gains nothing by it.
"""

import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from llm.parallel.env import STOP_SIGNALS
from llm.parallel.heartbeat import BEAT_SECONDS, SILENT_SECONDS

MEETING = timedelta(minutes=30)  # of all nodes, at the start
LAST_CALL = timedelta(seconds=10)  # for nodes that are late at a restart
ANSWER = timedelta(seconds=30)  # of the store
LEAVE_SECONDS = 60.0  # that the first to finish waits for the other nodes
KILL_SECONDS = 40.0  # after a second signal
jobs: Counter[str] = Counter()  # by title: a sweep may have two of one, which must not meet in one place
STOPPED = tuple(128 + signum for signum in STOP_SIGNALS)  # exit statuses of processes that have saved and ended

logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it tells what we tell in one line


class Agent(LocalElasticAgent):
    """Agent of this node.

    prepare: called before the processes start, each time. newest_step: tells the step of the checkpoint that a restart
    would begin with. folder: where processes leave files `error_*`, their mistakes of the user's.
    """

    def __init__(self, spec, folder: Path, prepare: Callable[[], None], newest_step: Callable[[], int]):
        super().__init__(spec, DefaultLogsSpecs(log_dir=str(folder)), exit_barrier_timeout=LEAVE_SECONDS)
        self.folder, self.prepare, self.newest_step = folder, prepare, newest_step
        self.began_at, self.restarts = newest_step(), 0
        self.received: list[int] = []
        self.passed_on, self.kill_at, self.is_meeting = 0, float("inf"), True

    def hear(self, signum: int, frame) -> None:
        """Note a signal for the processes; raise SystemExit while there are none."""
        self.received.append(signum)
        if len(self.received) > 1:
            self.kill_at = min(self.kill_at, time.monotonic() + KILL_SECONDS)
        if self.is_meeting:
            raise SystemExit(128 + signum)

    def _rendezvous(self, worker_group) -> None:
        self.is_meeting = True
        if self.received:
            raise SystemExit(128 + self.received[0])
        super()._rendezvous(worker_group)
        # All must have come to the first meeting; a later one is content with fewer. No public way leads there.
        object.__setattr__(worker_group.spec.rdzv_handler.settings, "min_nodes", 1)
        self.prepare()
        self.is_meeting = False

    def _monitor_workers(self, worker_group):
        for signum in self.received[self.passed_on :]:
            self.tell(signum)
            self.passed_on += 1
        if time.monotonic() > self.kill_at:
            self.tell(signal.SIGKILL)
        result = super()._monitor_workers(worker_group)
        if result.is_failed() and not self.may_restart(result.failures):
            self._remaining_restarts = 0
        return result

    def tell(self, signum: int) -> None:
        """Send a signal to every process that lives."""
        for handler in self._pcontext.subprocess_handlers.values():
            handler.proc.send_signal(signum)

    def may_restart(self, failures: dict) -> bool:
        """Return whether the job begins again after its processes ended so, and say it; the caller counts restarts."""
        asked_for = self.received or all(failure.exitcode in STOPPED for failure in failures.values())
        if self._remaining_restarts == 0 or asked_for or any(self.folder.glob("error_*")):
            return False
        step, allowed = self.newest_step(), self._worker_group.spec.max_restarts
        if self.restarts and step <= self.began_at:
            print(f"{cause(failures)}, as before, with no checkpoint after step {step}: no restart", file=sys.stderr)
            return False
        self.restarts, self.began_at = self.restarts + 1, step
        print(f"{cause(failures)}: restart {self.restarts} of {allowed} from step {step}", file=sys.stderr, flush=True)
        return True


def first_failure(failures: dict) -> tuple[int, int]:
    """Return (rank, exit code) of the process that ended the others: a killed one rather than one that told why.

    SIGTERM is what the agent sends to the others.
    """
    found = [(rank, failure.exitcode) for rank, failure in failures.items()]
    return min(found, key=lambda pair: (pair[1] == -signal.SIGTERM, pair[1] > 0))


def cause(failures: dict) -> str:
    """Return in words how the process ended that ended the others."""
    rank, code = first_failure(failures)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"process {rank} {how}"


@functools.cache
def meeting_store(address: str, port: int, is_host: bool) -> TCPStore:
    """Return the store where the agents meet. The jobs of a sweep share it: another one could not have its port.

    Waits for the host in steps that signals can interrupt. Raises RendezvousTimeoutError where it does not come.
    """
    end = time.monotonic() + MEETING.total_seconds()
    while not is_host:
        try:
            socket.create_connection((address, port), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > end:
                raise RendezvousTimeoutError(str(error)) from error
            time.sleep(0.5)
    store = TCPStore(address, port, is_master=is_host, wait_for_workers=False, timeout=ANSWER)
    if not is_host:
        probe = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=ANSWER)
        watch_store(probe, f"error: nothing heard of the first node, {address}, for {SILENT_SECONDS:.0f} s")
    return store


def watch_store(probe: TCPStore, line: str) -> None:
    """Ask the store every few seconds in a thread, and end this process with a line when it has not answered for long.

    The agent itself may wait for an answer without end. The processes that it started notice the silence themselves.
    """
    answered = [time.monotonic()]

    def ask():
        with contextlib.suppress(DistError, RuntimeError):  # the store has gone: the agent meets that error too
            while True:
                probe.add("asked", 0)
                answered[0] = time.monotonic()
                time.sleep(BEAT_SECONDS)

    def watch():
        while asking.is_alive():
            if time.monotonic() - answered[0] > SILENT_SECONDS:
                print(line, file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(0.5)

    asking = threading.Thread(target=ask, name="fathom-ask-store", daemon=True)
    asking.start()
    threading.Thread(target=watch, name="fathom-watch-store", daemon=True).start()


@contextlib.contextmanager
def rendezvous(title: str, place: tuple[int, str, int], num_nodes: int) -> Iterator:
    """Yield what lets the agents of `num_nodes` nodes meet for the job `title`.

    place: number of this node, address and port of the first one. The number stands in for this node's address, by
    which the agents are sorted, so that rank 0 is on the first node. Where the others are lost for good: says so in a
    line and raises SystemExit.
    """
    node, address, port = place
    jobs[title] += 1
    title, handler = f"{title}.{jobs[title]}", None
    try:
        store = meeting_store(address, port, node == 0)
        handler = DynamicRendezvousHandler.from_backend(
            run_id=title,
            store=store,
            backend=C10dRendezvousBackend(store, title),
            min_nodes=num_nodes,
            max_nodes=num_nodes,
            local_addr=f"{node:06d}",
            timeout=RendezvousTimeout(join=MEETING, last_call=LAST_CALL, close=ANSWER),
        )
        yield handler
    except RendezvousClosedError:
        leave("another node has ended the job")
    except RendezvousTimeoutError as error:
        leave(f"trainer.num_nodes={num_nodes}: not all nodes came ({error})")
    except (RendezvousError, DistError):
        leave(f"the first node, {address}, does not answer; start again, with another MASTER_ADDR if it is lost")
    finally:
        if handler is not None:
            with contextlib.suppress(RendezvousError, DistError):
                handler.shutdown()


def leave(problem: str) -> NoReturn:
    """Say why this node ends, and end with status 1."""
    print(f"error: {problem}", file=sys.stderr, flush=True)
    raise SystemExit(1) from None
