"""Ends a process when another one has gone without a word, as a node does that loses power or its network.

The system tells when a process dies, not when its machine does: the others then wait for the time-out of a collective,
half an hour. So every process calls rank 0 every few seconds, is told who has not called for long, and ends if somebody
has not, or if rank 0 does not answer. Its launcher then ends the rest of the node.
"""

import json
import logging
import os
import socket
import socketserver
import sys
import threading
import time

from llm.parallel import collectives
from llm.utils.files import MOST_BYTES, parse_json
from llm.utils.shapes import listing, whole

log = logging.getLogger(__name__)
BEAT_SECONDS = 5.0
SILENT_SECONDS = 45.0
MOST_DIGITS = 20  # of a rank, with the end of its line


class Register(socketserver.ThreadingTCPServer):
    """Server on rank 0 that notes when each process called last. A call is a rank, the answer the silent ranks.

    Others may find the port too, as scanners of a network do: what is no rank is not noted and gets no answer.
    """

    daemon_threads = True

    def __init__(self, host: str, world: int):
        super().__init__((host, 0), Call)
        self.heard = dict.fromkeys(range(1, world), time.monotonic())
        threading.Thread(target=self.serve_forever, name="fathom-register", daemon=True).start()

    def silent(self) -> list[int]:
        """Return the ranks that have not called for `SILENT_SECONDS`."""
        now = time.monotonic()
        return [rank for rank, at in self.heard.items() if now - at > SILENT_SECONDS]

    def handle_error(self, request, client_address) -> None:
        """Say nothing of a call that broke off: who does not call again is silent."""


class Call(socketserver.StreamRequestHandler):
    """A call of one process."""

    def handle(self) -> None:
        said = self.rfile.readline(MOST_DIGITS).strip()
        rank = int(said) if said.isdigit() else None
        if rank in self.server.heard:
            self.server.heard[rank] = time.monotonic()
            self.wfile.write(json.dumps(self.server.silent()).encode())


def start() -> None:
    """Start to watch in a thread. All processes call it together."""
    world, here = collectives.world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    register = Register("127.0.0.1" if here == world else "", world) if collectives.is_main() else None
    port = collectives.broadcast_object(None if register is None else register.server_address[1])
    address = ("127.0.0.1" if here == world else os.environ["MASTER_ADDR"], port)
    problem = None
    try:
        silent_processes(register, address)
    except OSError as error:
        problem = str(error)
    collectives.barrier()
    if problem is not None:
        log.warning("rank 0 cannot be called at %s (%s): a node that vanishes will not be noticed", address, problem)
        return
    threading.Thread(target=watch, args=(register, address), name="fathom-heartbeat", daemon=True).start()


def silent_processes(register: Register | None, address: tuple[str, int]) -> list[int]:
    """Return the ranks that have not called for long, from rank 0's own register or by calling it."""
    if register is not None:
        return register.silent()
    with socket.create_connection(address, timeout=BEAT_SECONDS) as call:
        call.sendall(f"{collectives.rank()}\n".encode())
        answer = parse_json(call.makefile("rb").read(MOST_BYTES), "the answer of rank 0")
    listing(whole())(answer, "the answer of rank 0")
    return answer


def watch(register: Register | None, address: tuple[str, int]) -> None:
    """Call rank 0 every few seconds, and end this process when one of the others is silent."""
    answered = time.monotonic()
    while True:
        time.sleep(BEAT_SECONDS)
        try:
            silent, answered = silent_processes(register, address), time.monotonic()
        except (OSError, ValueError):
            silent = [0] if time.monotonic() - answered > SILENT_SECONDS else []
        if silent:
            who = f"process {', '.join(map(str, silent[:5]))}" + (" and others" if len(silent) > 5 else "")
            print(f"error: nothing heard of {who} for {SILENT_SECONDS:.0f} s", file=sys.stderr, flush=True)
            os._exit(1)
