"""The server of the panel, `python serve.py ui=panel`: alone, or beside chat and API where run or model is given."""

import asyncio
import base64
import binascii
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from llm.errors import UserError
from llm.panel.page import PATH, mount
from llm.panel.state import Panel
from llm.serving.api.server import check_key, guard_app, run
from llm.serving.app import model_name, sampling
from llm.serving.guard import API, API_FOLDERS, API_ROUTES, check_names, is_private
from llm.serving.http import Beside, address_of, listen
from llm.serving.http import serve as serve_model

UPLOAD = f"{PATH}{API}/upload"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def serve(cfg: Any) -> None:
    """Serve the panel until SIGTERM or Ctrl-C. Raises UserError where others could reach a server without a key."""
    check_access(cfg)
    panel = Panel.of(cfg)
    if panel.chat:
        beside = Beside(PATH, lambda app: add(app, panel, cfg.api.access_key))
        serve_model(cfg, model_name(cfg), sampling(cfg), beside)
        return
    with listen(cfg.host, cfg.port) as bound:
        port = bound.getsockname()[1]
        lines = [f"panel over {panel.runs}", "chat and API are beside it with run=<run>"]
        lines.append(f"panel at {address_of(cfg.host, port)}{PATH}   (Ctrl-C ends the server, not the trainings)")
        app = build_app(panel, cfg)
        asyncio.run(run(app, [], bound, cfg.api.drain, lambda: print("\n".join(lines), flush=True)))
    print("\nserver ended", flush=True)


def check_access(cfg: Any) -> None:
    """Raise UserError for a wrong key or name, and where not only this computer is served and there is no key."""
    check_names(cfg.public_names)
    check_key(cfg.api.access_key)
    if cfg.api.access_key is None and not is_private(cfg.host, cfg.public_names):
        raise UserError(
            f"ui=panel host={cfg.host}: others could start trainings here; give api.access_key (or FATHOM_API_KEY) a "
            "secret, which the browser asks for, or use host=127.0.0.1"
        )


def build_app(panel: Panel, cfg: Any) -> FastAPI:
    """Return the application of a panel without chat and API; `/` leads to it."""
    app = FastAPI(title="Fathom", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    def first() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/")

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)

    add(app, panel, cfg.api.access_key)
    guard_app(app, cfg.host, cfg.public_names, cfg.api.origins, [PATH])
    return app


def add(app: FastAPI, panel: Panel, key: str | None) -> None:
    """Mount a panel, and ask for a key before every page, this one and others, where there is one."""
    mount(app, panel)
    app.add_middleware(Doorkeeper, key=key, takes_files=not panel.readonly)


class Doorkeeper:
    """ASGI middleware that lets pages be seen with the key only, and no page of another site send anything to them.

    The browser asks for the key, as the password of any name (HTTP Basic, RFC 7617), and sends it by itself from then
    on: also when another site makes it send. Hence the second check, by Origin and Sec-Fetch-Site. The routes of the
    API have a check of their own.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], key: str | None, takes_files: bool):
        self.app, self.key, self.takes_files = app, key, takes_files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, by the application where nothing speaks against it."""
        if scope["type"] == "http" and (refusal := self._problem(scope)) is not None:
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _problem(self, scope: Scope) -> Response | None:
        path, headers = scope["path"], Headers(scope=scope)
        if path in API_ROUTES or path.startswith(API_FOLDERS):
            return None
        if self.key is not None and not hmac.compare_digest(_password(headers), self.key.encode()):
            told = {"WWW-Authenticate": 'Basic realm="Fathom: any name, the key as password", charset="UTF-8"'}
            return PlainTextResponse("the key is missing or wrong\n", 401, told)
        if scope["method"] not in ("GET", "HEAD") and _is_foreign(headers):
            return PlainTextResponse("a page of another site may not send this\n", 403)
        if path == UPLOAD and not self.takes_files:
            return PlainTextResponse("panel.readonly=true: this panel shows, and changes nothing\n", 403)
        return None


def _password(headers: Headers) -> bytes:
    """Return the password that a request brings; b"" for none."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return b""
    try:
        return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def _is_foreign(headers: Headers) -> bool:
    """Say whether a page of another site sends a request, by what its browser says of it."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return True
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
