"""The guard before the browser chat: names in Host and Origin, routes, sizes, headers; and the server behind it."""

import asyncio
import http.client
import re

import pytest

pytest.importorskip("gradio")

from processes import HANG  # noqa: E402
from serving_run import make_run  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402

from llm.errors import UserError  # noqa: E402
from llm.inference.sampling import SamplingParams  # noqa: E402
from llm.serving.chat import load_chat_model  # noqa: E402
from llm.serving.guard import MAX_BODY, MAX_UPLOAD, OPEN_ROUTES, Guard, check_names, check_origins, is_private  # noqa: E402
from llm.serving.models import Models  # noqa: E402

PORT = 7860


def answer(
    headers: dict[str, str], host="127.0.0.1", public_names=(), path="/", body=b"", kind="http", pages=()
) -> dict:
    """Answer of a guarded server that greets: {"status", "headers", "body"}; parts of 1000 bytes make up the body."""
    parts = [body[i : i + 1000] for i in range(0, len(body), 1000)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    sent = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    async def greet(scope, receive, send):
        await PlainTextResponse(f"hello {len((await receive())['body'])}")(scope, receive, send)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "method": "POST", "path": path, "headers": raw, "query_string": b""}
    asyncio.run(Guard(greet, host, public_names, pages=pages)(scope, receive, send))
    if kind != "http":
        return {"type": sent[0]["type"]}
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return {"status": sent[0]["status"], "headers": found, "body": sent[1]["body"].decode()}


OWN = [
    {"Host": "localhost:7860"},
    {"Host": "LOCALHOST.:7860"},
    {"Host": "127.0.0.1:7860"},
    {"Host": "127.8.0.1"},
    {"Host": "[::1]:7860"},
    {"Host": "127.0.0.1:7860", "Origin": "http://127.0.0.1:7860"},
    {"Host": "127.0.0.1:9000", "Origin": "http://localhost:9000"},  # through a tunnel of ssh
]
FOREIGN = [
    {"Host": "evil.example"},
    {"Host": "evil.example:7860"},
    {"Host": "localhost.evil.example"},
    {"Host": "127.0.0.1.evil.example:7860"},
    {"Host": "192.168.0.7:7860"},
    {"Host": "localhost@evil.example"},
    {"Host": "[::1"},
    {"Host": ""},
    {},
    {"Host": "127.0.0.1:7860", "Origin": "http://evil.example"},
    {"Host": "127.0.0.1:7860", "Origin": "https://127.0.0.1.evil.example:7860"},
    {"Host": "127.0.0.1:7860", "Origin": "http://localhost:3000"},  # another server of this computer
    {"Host": "127.0.0.1:7860", "Origin": "null"},
]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_loopback_server_knows_the_names_of_this_computer_only(host):
    for headers in OWN:
        assert answer(headers, host)["status"] == 200, headers
    for headers in FOREIGN:
        refused = answer(headers, host)
        assert refused["status"] == 403 and "public_names" in refused["body"], headers


def test_public_names_are_known_too():
    names = ["chat.example.org", "Other.Example"]
    proxied = {"Host": "127.0.0.1:7860", "Origin": "https://chat.example.org"}
    for headers in (*OWN, {"Host": "chat.example.org"}, {"Host": "other.example:81"}, proxied):
        assert answer(headers, public_names=names)["status"] == 200, headers
    for headers in FOREIGN:
        assert answer(headers, public_names=names)["status"] == 403, headers
        assert answer(headers, "0.0.0.0", names)["status"] == 403, headers
    assert answer({"Host": "0.0.0.0:7860"}, "0.0.0.0", names)["status"] == 200


def test_a_server_for_the_network_goes_by_any_name_unless_names_are_given():
    assert answer({"Host": "my-computer.lan:7860"}, "0.0.0.0")["status"] == 200


def test_public_names_are_names():
    check_names(["chat.example.org", "Chat"])
    for wrong in ("https://chat.example.org", "chat.example.org:443", "chat.example.org/chat", "", "a b@c"):
        with pytest.raises(UserError, match="public_names: "):
            check_names(["good.example", wrong])


def test_origins_are_as_browsers_send_them():
    check_origins(["https://chat.example.org", "http://127.0.0.1:3000", "http://[::1]:8080", "*", "null"])
    for wrong in (
        *("chat.example.org", "https://chat.example.org/", "https://Chat.example.org", "https://chat.example.org:443"),
        *("https://a.org/chat", "", "://", "http://[x", "https://*.example.org:x", "HTTPS://a.org"),
        "https://bücher.example",  # browsers send its form in ASCII
    ):
        with pytest.raises(UserError, match="api.origins: "):
            check_origins(["https://good.example", wrong])


def test_a_server_is_private_where_nobody_else_reaches_it():
    assert is_private("127.0.0.1", []) and is_private("localhost", []) and is_private("::1", ())
    assert not is_private("0.0.0.0", []) and not is_private("127.0.0.1", ["chat.example.org"])


def test_only_the_routes_of_the_chat_are_open():
    own = OWN[0]
    for path in (*OPEN_ROUTES, "/assets/index.js", "/gradio_api/queue/join/", "/gradio_api/call/ask/1"):
        assert answer(own, path=path)["status"] == 200
    for path in (
        *("/gradio_api/upload", "/gradio_api/upload/", "/upload", "/gradio_api/upload_progress", "/docs", "/assets"),
        *("/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/proxy=http://evil.example", "/monitoring"),
        *("/gradio_api/component_server", "/gradio_api/stream/x", "/gradio_api/vibe-edit", "/login", "/redoc"),
    ):
        assert answer(own, path=path)["status"] == 404
    assert answer(own, kind="websocket") == {"type": "websocket.close"}


def test_a_body_has_a_limit_and_arrives_whole():
    assert answer(OWN[0], body=b"x" * MAX_BODY)["body"] == f"hello {MAX_BODY}"
    assert answer(OWN[0], body=b"x" * (MAX_BODY + 1))["status"] == 413


@pytest.mark.filterwarnings("ignore")  # from inside gradio
def test_the_server_of_the_chat_is_guarded(tmp_path):
    from page_server import page_server

    from llm.serving import browser

    demo = browser.build(Models(load_chat_model(make_run(tmp_path, steps=1))), SamplingParams())

    def ask(method: str, path: str, body=None, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
        try:
            connection.request(method, path, body, headers)
            found = connection.getresponse()
            return found.status, found.headers, found.read()
        finally:
            connection.close()

    with page_server(demo) as port:
        status, headers, page = ask("GET", "/")
        assert status == 200 and "default-src 'self'" in headers["Content-Security-Policy"]
        script = re.search(rb'src="\./(assets/[^"]+\.js)"', page)[1].decode()
        assert ask("GET", f"/{script}")[0] == 200
        assert ask("GET", "/", Host="evil.example")[0] == 403
        assert ask("POST", "/gradio_api/queue/join", b"{}", Origin="http://evil.example")[0] == 403
        boundary = {"Content-Type": "multipart/form-data; boundary=x"}
        file = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
        assert ask("POST", "/gradio_api/upload", file, **boundary)[0] == 404
        assert ask("POST", "/gradio_api/queue/join", b" " * (MAX_BODY + 1))[0] == 413


def test_files_are_taken_below_a_further_page_only_and_come_in_parts():
    own, upload = {"Host": "127.0.0.1"}, "/panel/gradio_api/upload"
    body = b"x" * (MAX_BODY + 5000)
    sent = answer(own | {"Content-Length": str(len(body))}, path=upload, body=body, pages=["/panel"])
    assert (sent["status"], sent["body"]) == (200, "hello 1000"), "the application reads the parts by itself"
    assert "Content-Security-Policy" in {name.title(): 1 for name in sent["headers"]}
    assert answer(own, path=upload, body=body, pages=["/panel"])["status"] == 411
    too_long = own | {"Content-Length": str(MAX_UPLOAD + 1)}
    assert answer(too_long, path=upload, pages=["/panel"])["status"] == 413
    for path in ("/gradio_api/upload", upload + "/", "/other" + upload):
        assert answer(own | {"Content-Length": "1"}, path=path, pages=["/panel"])["status"] == 404, path
    evil = {"Host": "127.0.0.1", "Origin": "http://evil.example", "Content-Length": "1"}
    assert answer(evil, path=upload, pages=["/panel"])["status"] == 403
