"""Answers that take time: events as they come, or JSON at the end; both end with the connection that asked."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response

from llm.serving.errors import ApiError

DONE = b"data: [DONE]\n\n"
GRACE_SECONDS = 30.0  # for a slow reader, beyond the time that an answer may take
T = TypeVar("T")


def event(data: Any, name: str | None = None) -> bytes:
    """Return an event of a stream: JSON behind `data:`, behind a line `event:` where it has a name."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class EventStream(Response):
    """Stream of server-sent events. `end` is called once it is over, also where the client has gone.

    is_over: tells whether all events that are left are there already, so that one write takes them. seconds: that the
    stream may last at most, whatever the client does. failed: makes an event of an error.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        end: Callable[[], None],
        is_over: Callable[[], bool],
        seconds: float,
        failed: Callable[[ApiError], bytes] = ApiError.event,
    ):
        super().__init__()
        del self.headers["content-length"]
        self.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.events, self.end, self.is_over, self.failed = events, end, is_over, failed
        self.seconds = seconds + GRACE_SECONDS

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events until they end or the client goes."""
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            async with asyncio.timeout(self.seconds):
                await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            pass
        finally:
            for task in (sending, gone):
                task.cancel()
            outcome, _ = await asyncio.gather(sending, gone, return_exceptions=True)
            self.end()
        if isinstance(outcome, Exception):  # a mistake of ours: it belongs into the server's log
            raise outcome

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        held = b""
        try:
            async for data in self.events:
                held += data
                if not self.is_over():
                    await send({"type": "http.response.body", "body": held, "more_body": True})
                    held = b""
        except ApiError as error:
            held += self.failed(error)
        await send({"type": "http.response.body", "body": held, "more_body": False})


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """Wait for an answer, but only as long as the client does. Raises ApiError where it has gone."""
    working = asyncio.ensure_future(answer)
    gone = asyncio.create_task(_until_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has gone", code="cancelled")
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _until_gone(receive: Any) -> None:
    """Wait until the connection ends."""
    while (await receive())["type"] != "http.disconnect":
        pass
