"""Guard before the server: whom it answers, the routes that are open, what the page may load.

A page of any site can send requests to a server on this computer, and by a name that its owner points at 127.0.0.1
(DNS rebinding) it could even read the answers. The names in `Host` and `Origin` tell such requests from one's own.
"""

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response

from llm.errors import UserError
from llm.serving.errors import ApiError

MAX_BODY = 1 << 20  # bytes of a request: a message has at most some thousand characters
PORTS = {"http": 80, "https": 443}  # that an origin does not name
MAX_UPLOAD = 1 << 30  # bytes of the files that are sent at once, where files are taken
API = "/gradio_api"
OPEN_ROUTES = {
    *("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json"),
    *(f"{API}/{name}" for name in ("info", "startup-events", "theme.css", "app_id", "login_check")),
    *(f"{API}/{name}" for name in ("queue/join", "queue/data", "cancel", "reset")),
}
OPEN_FOLDERS = ("/assets/", "/static/", "/svelte/", f"{API}/call/", f"{API}/run/", f"{API}/heartbeat/")
UPLOAD_ROUTES = {f"{API}/upload", f"{API}/upload_progress"}  # below a further page only
API_ROUTES = {"/health", "/stats", "/metrics", "/openapi.json", "/chat/completions"}
API_FOLDERS = ("/v1/",)
PAGE_HEADERS = {
    # Gradio's page has scripts and styles in its HTML; everything else comes from the server itself.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware that refuses foreign names, closed routes and large bodies, and adds headers to answers.

    host: address that the server listens on. public_names: further names of the server. Names are checked where the
    address is this computer's own (loopback) or names are given; else any name may be one of the server's. origins:
    of pages on other servers that may ask this one, as in https://chat.example.org; "*" for all. pages: where further
    pages of Gradio are mounted, as in /panel; below each the routes of the one at / are open too, and files are taken.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        host: str,
        public_names: Iterable[str],
        origins: Iterable[str] = (),
        pages: Iterable[str] = (),
    ):
        self.app, self.origins, self.pages = app, frozenset(origins), tuple(pages)
        self.names = {host.lower(), *(name.lower() for name in public_names)}
        self.checks_names = len(self.names) > 1 or _is_loopback(_address(host))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, by the guarded application where nothing speaks against it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self._problem(scope)
        if scope["type"] != "http":  # the chat needs no websocket
            await send({"type": "websocket.close"})
        elif refusal is not None:
            await refusal(scope, receive, send)
        elif self._takes_files(scope):
            await self.app(scope, receive, _with_headers(send))  # as they come; memory may not hold them
        elif (body := await _read(receive)) is None:
            await _refusal(scope, 413, f"a request may have {MAX_BODY:,} bytes")(scope, receive, send)
        else:
            await self.app(scope, _replay(body, receive), _with_headers(send))

    def _takes_files(self, scope: Scope) -> bool:
        return scope["path"] in {page + route for page in self.pages for route in UPLOAD_ROUTES}

    def _problem(self, scope: Scope) -> Response | None:
        """Return the answer to a request that is not served; None for one that is."""
        headers = Headers(scope=scope)
        if self.checks_names and (name := self._foreign_name(headers)) is not None:
            return _refusal(
                scope, 403, f"{name!r} is no name of this server; if it should be one, start it with public_names=[...]"
            )
        path = scope["path"].rstrip("/") or "/"
        page = next((page for page in self.pages if path == page or path.startswith(f"{page}/")), "")
        path = path.removeprefix(page) or "/"
        if page and (path in API_ROUTES or path.startswith(API_FOLDERS)):
            return _refusal(scope, 404, "no such page")
        if self._takes_files(scope):
            return _upload_problem(scope, headers.get("content-length", ""))
        if path not in OPEN_ROUTES | API_ROUTES and not path.startswith(OPEN_FOLDERS + API_FOLDERS):
            return _refusal(scope, 404, "no such page")
        return None

    def _foreign_name(self, headers: Headers) -> str | None:
        """Return the name in Host or Origin that is not the server's; None if all are.

        A page of another port of this computer is another server's, so Origin must name the port that Host does; a
        proxy in front may stand at any port.
        """
        hosts = headers.getlist("host") or [""]
        for host in hosts:
            if not self._is_own(_name_and_port(f"//{host}")[0]):
                return host
        for origin in headers.getlist("origin"):
            if self.origins & {origin, "*"}:
                continue
            name, port = _name_and_port(origin)
            if not self._is_own(name) or (_is_loopback(name) and port != _name_and_port(f"//{hosts[0]}")[1]):
                return origin
        return None

    def _is_own(self, name: str) -> bool:
        return name in self.names or _is_loopback(name)


def check_names(names: Iterable[str]) -> None:
    """Raise UserError for an entry of public_names that is not just a name, such as an address with https://."""
    for name in names:
        if not name or _name_and_port(f"//{name}") != (name.lower(), None):
            raise UserError(
                f"public_names: {name!r} is no name; write it as in an address, public_names=[chat.example.org]"
            )


def check_origins(origins: Iterable[str]) -> None:
    """Raise UserError for an entry of api.origins that no browser sends, such as a name alone or one with a path."""
    for origin in origins:
        scheme, (name, port) = origin.partition("://")[0], _name_and_port(origin)
        sent = f"{scheme.lower()}://{f'[{name}]' if ':' in name else name}"
        sent += f":{port}" if port not in (None, PORTS.get(scheme)) else ""
        if origin not in ("*", "null") and (origin != sent or not name or not origin.isascii()):
            raise UserError(
                f"api.origins: {origin!r} is no origin of a page as browsers send it: scheme and name in small "
                "letters, a port where it is not the usual one, no / behind; as in api.origins=[https://chat.example.org]"
            )


def is_private(host: str, public_names: Iterable[str]) -> bool:
    """Return True where only people at this computer are served: it listens on itself, and has no other name."""
    return _is_loopback(_address(host)) and not list(public_names)


def _name_and_port(address: str) -> tuple[str, int | None]:
    """Return host name, in small letters, and port of an address; ("", None) for what is none."""
    try:
        parts = urlsplit(address)
        return (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return "", None


def _is_loopback(name: str) -> bool:
    """Return True for a name or number that only this computer itself goes by."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _address(host: str) -> str:
    """Return the number that a host name stands for, the name itself if it has none."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return host


def _refusal(scope: Scope, status: int, text: str) -> Response:
    """Return the answer to a request that is refused: in the form of the API's errors on its routes, else as text."""
    if scope["path"].startswith(API_FOLDERS) or scope["path"] in API_ROUTES:
        return ApiError(status, text).response()
    return PlainTextResponse(f"{text}\n", status)


def _upload_problem(scope: Scope, length: str) -> Response | None:
    """Return the answer to an upload that is too long or hides its length, to which the server holds it."""
    if scope["method"] == "GET":
        return None
    if not length.isdecimal():
        return _refusal(scope, 411, "an upload must say its length")
    return _refusal(scope, 413, f"an upload may have {MAX_UPLOAD:,} bytes") if int(length) > MAX_UPLOAD else None


async def _read(receive: Receive) -> bytes | None:
    """Return the body of a request; None if it is longer than MAX_BODY."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, and then what the connection has to say."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return replay


def _with_headers(send: Send) -> Send:
    """Return a `send` that adds PAGE_HEADERS to the answer."""

    async def send_with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(PAGE_HEADERS)
        await send(message)

    return send_with_headers
