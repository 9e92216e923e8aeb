"""A Hugging Face hub of data sets, and of one model, on 127.0.0.1 that fails where it is told to; datasets can read it.

`python tests/hub_server.py <folder> [bytes per second]` serves the files of a folder as fathom/test until it is ended.
"""

import base64
import hashlib
import json
import select
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from processes import HANG, die_with_parent

REPO, COMMIT = "fathom/test", "0123456789abcdef0123456789abcdef01234567"
PAGE = 3  # files in one answer of the listing


class InThread:
    """Mixin of a server that serves in a thread while a `with` block runs."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Hub(InThread, ThreadingHTTPServer):
    """`files` of the data set `REPO` by name; `sets`: those of others; `web`: files at plain paths; `gated`: data sets
    whose files are refused. `made`, `received`: repositories and files of models that were pushed, answered with
    `push_status`. `faults`: (part of a path, what happens), each used once: 500, (429, seconds),
    ("cut", bytes), ("stall", None): nothing more comes until the client gives up, ("wait", function that returns when
    the rest may come) or "garble"."""

    daemon_threads = True
    ignores_ranges = False

    def __init__(self, files, revisions=("main",), port=0, speed=None):
        super().__init__(("127.0.0.1", port), Handler)
        self.files, self.revisions, self.faults, self.requests = files, {*revisions, COMMIT}, [], []
        self.sets, self.web, self.gated = {}, {}, set()
        self.made, self.received, self.large, self.push_status = [], {}, {}, 200  # of models that were pushed
        self.speed, self.open, self.most_open, self.mutex = speed, 0, 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, path):
        with self.mutex:
            for fault in self.faults:
                if fault[0] in path:
                    self.faults.remove(fault)
                    return fault[1]
        return None

    def files_of(self, repo):
        return self.files if repo == REPO else self.sets.get(repo)

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

    def do_POST(self):
        body, path = self.rfile.read(int(self.headers["Content-Length"])), urlsplit(self.path).path
        if not path.startswith(("/api/datasets/", "/datasets/")):
            answer = self.pushed(path, body)
            return self.answer(404 if answer is None else self.server.push_status, json.dumps(answer or {}).encode())
        asked = parse_qs(body.decode())["paths"]
        repo, _, _ = self.parts()
        self.answer(200, json.dumps([e for e in entries(self.server.files_of(repo)) if e["path"] in asked]).encode())

    def pushed(self, path, body):
        """The answer to a step of pushing a model: large files go through LFS, others in the commit itself."""
        hub = self.server
        if path == "/api/repos/create":
            asked = json.loads(body)
            hub.made.append(asked)
            return {"url": f"{hub.url}/{asked.get('organization')}/{asked['name']}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith((".safetensors", ".gguf")) else "regular" for name in names}
            return {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
        if path.endswith("/info/lfs/objects/batch"):
            upload = [one | {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}} for one in found(body)]
            return {"transfer": "basic", "objects": upload}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.received[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.received[value["path"]] = hub.large[value["oid"]]
            return {"commitUrl": f"{hub.url}/x/y/commit/{COMMIT}", "commitOid": COMMIT}
        return None

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = hashlib.sha256(body).hexdigest()
        self.server.large[oid] = body
        self.answer(200 if self.path == f"/lfs/{oid}" else 400, b"")

    def parts(self):
        """(owner/name, revision, path inside) of an address, whose revision and path may hold quoted slashes."""
        path = urlsplit(self.path).path.removeprefix("/api").removeprefix("/datasets").removeprefix("/models")
        owner, name, _, revision, *inside = [*map(unquote, path.removeprefix("/").split("/")), "", "", ""]
        return f"{owner}/{name}", revision, "/".join(inside).strip("/")

    def do_GET(self):
        hub, url = self.server, urlsplit(self.path)
        path = unquote(url.path)
        start, stop = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
        start, self.stop = int(start), int(stop) + 1 if stop else None
        if self.server.ignores_ranges:
            start, self.stop = 0, None
        if self.command == "GET":
            hub.requests.append((path, start))
        fault = hub.fault(path)
        if isinstance(fault, int):
            return self.answer(fault, b"{}")
        if isinstance(fault, tuple) and fault[0] == 429:
            return self.answer(429, b"{}", {"Retry-After": str(fault[1])})
        if path in hub.web:
            return self.content(hub.web[path], start, fault)
        repo, revision, inside = self.parts()
        files = hub.files_of(repo)
        if not path.startswith(("/datasets/", "/api/datasets/", "/api/models/", f"/{REPO}/")):
            return self.answer(404, b"{}")
        if files is None:
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision and revision not in hub.revisions:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if not path.startswith("/api/"):
            if repo in hub.gated:
                return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            if inside not in files:
                return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            listed = entry(inside, files[inside])
            etag = listed["lfs"]["oid"] if "lfs" in listed else listed["oid"]
            return self.content(files[inside], start, fault, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        if "/tree/" in path:
            query = parse_qs(url.query)
            begin, deep = int(query.get("cursor", ["0"])[0]), query.get("recursive", ["False"])[0].lower() == "true"
            found = [e for e in entries(files) if is_below(e["path"], inside, deep)]
            link = f"{hub.url}{url.path}?cursor={begin + PAGE}&recursive={deep}"
            more = {"Link": f'<{link}>; rel="next"'} if begin + PAGE < len(found) else {}
            return self.answer(200, json.dumps(found[begin : begin + PAGE]).encode(), more)
        names = [{"rfilename": name} for name in files] if path.startswith("/api/models/") else []
        return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": names}).encode())

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def content(self, data, start, fault, headers=None):
        hub, body, is_part = self.server, data[start : self.stop], bool(start or self.stop)
        self.send_response(206 if is_part else 200)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        if is_part:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
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
                while select.select([self.connection], [], [])[0] and self.connection.recv(1):
                    continue  # until the client closes the connection
                self.close_connection = True
                return
            if kind == "wait":
                self.wfile.write(body[:1])
                value()
                body = body[1:]
            size = max(1, (hub.speed or len(body)) // 10)
            for i in range(0, len(body), size):
                self.wfile.write(body[i : i + size])
                if hub.speed:
                    time.sleep(0.1)
        finally:
            with hub.mutex:
                hub.open -= 1


def point_to(hub, patch, folder, patience=HANG):
    """Make the libraries of this process take `hub` for the real one, with their caches in `folder`.

    patience: seconds without an answer until a request is tried again.
    """
    import huggingface_hub.constants as constants
    from datasets import config

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    for name, value in {
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_DOWNLOAD_TIMEOUT": patience,
        "DOWNLOAD_CHUNK_SIZE": 100,
    }.items():
        patch.setattr(constants, name, value)
    patch.setattr(config, "HF_ENDPOINT", hub.url)
    patch.setattr("llm.data.download.FIRST_WAIT", 0.01)
    patch.setattr("llm.data.download.READ_SECONDS", float(patience))


def found(body):
    """The objects that a request for LFS uploads names."""
    return [{"oid": one["oid"], "size": one["size"]} for one in json.loads(body)["objects"]]


def entries(files):
    """Return what a listing of all folders holds: files and folders in name order."""
    folders = {"/".join(name.split("/")[:i]) for name in files for i in range(1, name.count("/") + 1)}
    found = [entry(name, content) for name, content in files.items()]
    found += [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders]
    return sorted(found, key=lambda e: e["path"])


def is_below(path, folder, deep):
    """Return whether a listing of `folder` names `path`."""
    rest = path.removeprefix(f"{folder}/") if folder else path
    return (not folder or rest != path) and (deep or "/" not in rest)


def entry(name, content):
    """A file as the hub lists it: parquet files are large files, others lie in git."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    large = {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 132}}
    return {"type": "file", "path": name, "size": len(content), "oid": blob} | (
        large if name.endswith(".parquet") else {}
    )


if __name__ == "__main__":
    folder, speed = Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else None
    die_with_parent()
    paths = [path for path in folder.rglob("*") if path.is_file()]
    with Hub({p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}, speed=speed) as hub:
        print(hub.url, flush=True)
        threading.Event().wait()
