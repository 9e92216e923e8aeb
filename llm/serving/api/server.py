"""Application with all routes, and the server that runs it: start, drain, end."""

import asyncio
import contextlib
import gc
import hmac
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterable

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llm.errors import UserError
from llm.serving import errors
from llm.serving.api import chat, completions, nanochat, responses, status
from llm.serving.api.document import describe
from llm.serving.api.service import Service
from llm.serving.api.watch import Metrics, Watch
from llm.serving.guard import Guard
from llm.serving.pool import Pool
from llm.utils.environment import return_memory

ROUTERS = (chat.router, completions.router, responses.router, nanochat.router, status.router)
KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection: else one would ask just as it is closed
RETURN_SECONDS = 10.0  # between two times that memory is given back
END_SECONDS = 2  # for what is still being sent when the server ends
MAX_HEAD = 1 << 16  # bytes of a request before its body: the address and the headers


def build_app(service: Service, key: str | None = None, origins: Iterable[str] = (), log: str = "none") -> FastAPI:
    """Return the application.

    key: bearer key of requests; origins: of pages elsewhere that may send requests; log: see `Watch`. Raises UserError
    for a key that `check_key` refuses.
    """
    app = FastAPI(title="Fathom", description=__doc__, version="1", docs_url=None, redoc_url=None)
    app.state.service, app.state.metrics = service, Metrics(service.pool)
    errors.install(app)
    guarded = APIRouter(dependencies=[Depends(_key_check(key))])
    for router in ROUTERS:
        guarded.include_router(router)
    app.include_router(guarded)
    app.include_router(status.open_router)
    describe(app, [one.name for one in service.models()], key is not None)
    app.add_middleware(Watch, service=service, metrics=app.state.metrics, log=log)
    app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    return app


def guard_app(
    app: FastAPI, host: str, public_names: Iterable[str], origins: Iterable[str], pages: Iterable[str] = ()
) -> None:
    """Put the guard before an application whose routes and middleware are complete. pages: see `Guard`."""
    app.add_middleware(Guard, host=host, public_names=public_names, origins=origins, pages=tuple(pages))


def check_key(key: str | None) -> None:
    """Raise UserError for a key that every client would have, or that none could send; None asks for no key."""
    if key is not None and not key.strip():
        raise UserError("api.access_key is blank: give it (or FATHOM_API_KEY) a secret, or unset it to ask for no key")
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise UserError(
            "api.access_key (or FATHOM_API_KEY) begins or ends with blanks or a line break, or has signs beyond ASCII: "
            "no client could send it as Authorization: Bearer KEY; give it letters, digits and signs of ASCII"
        )


def _key_check(key: str | None) -> Callable:
    check_key(key)

    async def check(request: Request) -> None:
        """Raise ApiError for a request without the key."""
        if key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode()):
            raise errors.ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


class _Server(uvicorn.Server):
    """Server that says when it answers, and leaves signals to `run`."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]):
        super().__init__(config)
        self.on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_start()

    def capture_signals(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class _Protocol(HttpToolsProtocol):
    """Connection that ends where a request has more than `MAX_HEAD` bytes before, between or behind its body.

    httptools keeps headers in memory without a limit.
    """

    unread = 0  # bytes since the last ones of a body, or the end of the last request

    def data_received(self, data: bytes) -> None:
        self.unread += len(data)
        super().data_received(data)  # calls the two below
        if self.unread > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response(f"the address and headers of a request may have {MAX_HEAD:,} bytes")

    def on_body(self, body: bytes) -> None:
        self.unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.unread = 0
        super().on_message_complete()


async def run(
    app: FastAPI, pools: list[Pool], bound: socket.socket, drain_seconds: float, on_start: Callable[[], None]
) -> None:
    """Serve until SIGTERM (after the answers under way) or Ctrl-C (at once); call `on_start` once it answers."""
    config = uvicorn.Config(app, http=_Protocol, log_config=None, access_log=False, server_header=False, ws="none")
    config.timeout_graceful_shutdown, config.timeout_keep_alive = END_SECONDS, KEEP_ALIVE_SECONDS
    server, loop, draining = _Server(config, on_start), asyncio.get_running_loop(), set()
    tidying = loop.create_task(_return_memory())

    def drain() -> None:
        if not draining:
            draining.add(loop.create_task(_drain(pools, server, drain_seconds)))

    def end() -> None:
        server.should_exit = True
        for pool in pools:
            pool.fail_all()

    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    loop.add_signal_handler(signal.SIGTERM, drain)
    loop.add_signal_handler(signal.SIGINT, end)
    try:
        await server.serve(sockets=[bound])
    finally:
        for task in (tidying, *draining):
            task.cancel()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(name)
        logging.getLogger("uvicorn.error").removeFilter(_is_no_cancellation)


async def _return_memory() -> None:
    """Give freed memory back to the system from time to time, until cancelled.

    Python looks for circles of garbage once objects have grown by a quarter, which is megabytes here. Those that are
    there at the start stay: they are left out, so that a search takes milliseconds.
    """
    gc.collect()
    gc.freeze()
    while True:
        gc.collect()
        return_memory()
        await asyncio.sleep(RETURN_SECONDS)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Return False for the traceback of a stream that the ending server has cut off: an open page holds one."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


async def _drain(pools: list[Pool], server: uvicorn.Server, seconds: float) -> None:
    """Refuse new requests, wait for those under way at most `seconds`, and let the server end."""
    end = time.monotonic() + seconds
    for pool in pools:
        pool.is_draining = True
    while any(pool.outstanding for pool in pools) and time.monotonic() < end:
        await asyncio.sleep(0.05)
    for pool in pools:
        pool.fail_all()
    server.should_exit = True
