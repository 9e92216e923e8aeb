"""A Hugging Face hub of one data set, or one model, on 127.0.0.1 that fails where it is told to.

`python tests/hub_server.py <folder> [bytes per second]` serves the files of a folder as fathom/test until it is ended.
"""

import hashlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REPO, COMMIT = "fathom/test", "0123456789abcdef0123456789abcdef01234567"
PAGE = 3  # files in one answer of the listing


class Hub(ThreadingHTTPServer):
    """`files` by name; `faults`: (part of a path, what happens), each used once: 500, (429, seconds), ("cut", bytes),
    ("stall", seconds) or "garble"."""

    daemon_threads = True

    def __init__(self, files, revisions=("main",), port=0, speed=None):
        super().__init__(("127.0.0.1", port), Handler)
        self.files, self.revisions, self.faults, self.requests = files, {*revisions, COMMIT}, [], []
        self.speed, self.open, self.most_open, self.mutex = speed, 0, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def fault(self, path):
        with self.mutex:
            for fault in self.faults:
                if fault[0] in path:
                    self.faults.remove(fault)
                    return fault[1]
        return None

    def downloads(self, name=""):
        """(file, first byte) of every request for a file's content."""
        return [(path, start) for path, start in self.requests if path.startswith("/datasets/") and name in path]

    def handle_error(self, request, client_address):
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, url = self.server, urlsplit(self.path)
        path = unquote(url.path)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        hub.requests.append((path, start))
        fault = hub.fault(path)
        if isinstance(fault, int):
            return self.answer(fault, b"{}")
        if isinstance(fault, tuple) and fault[0] == 429:
            return self.answer(429, b"{}", {"Retry-After": str(fault[1])})
        if path.startswith((f"/datasets/{REPO}/resolve/", f"/{REPO}/resolve/")):
            revision, _, name = path.removeprefix("/datasets").removeprefix(f"/{REPO}/resolve/").partition("/")
            if name not in hub.files:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self.content(hub.files[name], start, fault)
        parts = path.removeprefix("/api/datasets/").removeprefix("/api/models/").split("/")
        if "/".join(parts[:2]) != REPO:
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if len(parts) > 3 and "/".join(parts[3:]) not in hub.revisions:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if "tree" in parts:
            begin = int(parse_qs(url.query).get("cursor", ["0"])[0])
            entries = [entry(name, content) for name, content in sorted(hub.files.items())]
            more = {"Link": f'<{hub.url}{url.path}?cursor={begin + PAGE}>; rel="next"'}
            page = json.dumps(entries[begin : begin + PAGE]).encode()
            return self.answer(200, page, more if begin + PAGE < len(entries) else {})
        names = [{"rfilename": name} for name in hub.files] if path.startswith("/api/models/") else []
        return self.answer(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": names}).encode())

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def content(self, data, start, fault):
        hub, body = self.server, data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        kind, value = fault if isinstance(fault, tuple) else (fault, 0)
        if kind == "garble":
            body = body[:-1] + bytes([body[-1] ^ 1])
        with hub.mutex:
            hub.open += 1
            hub.most_open = max(hub.most_open, hub.open)
        try:
            if kind == "cut":
                self.wfile.write(body[:value])
                self.wfile.flush()
                self.close_connection = True
                return
            if kind == "stall":
                self.wfile.write(body[:1])
                time.sleep(value)
                body = body[1:]
            size = max(1, (hub.speed or len(body)) // 10)
            for i in range(0, len(body), size):
                self.wfile.write(body[i : i + size])
                if hub.speed:
                    time.sleep(0.1)
        finally:
            with hub.mutex:
                hub.open -= 1


def entry(name, content):
    """A file as the hub lists it: parquet files are large files, others lie in git."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    large = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 132}}
    return {"type": "file", "path": name, "size": len(content), "oid": blob} | (
        large if name.endswith(".parquet") else {}
    )


if __name__ == "__main__":
    folder, speed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None
    paths = [path for path in folder.rglob("*") if path.is_file()]
    with Hub({p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}, speed=speed) as hub:
        print(hub.url, flush=True)
        threading.Event().wait()
