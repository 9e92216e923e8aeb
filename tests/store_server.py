"""S3 server on 127.0.0.1, the environment by which s3fs finds it, and a proxy that breaks its connections."""

import os
import socket
import socketserver
import threading
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from hub_server import InThread

BUCKET = "bucket"


@contextmanager
def s3_server():
    """Yield a client of boto3 on a server that has one empty bucket, `BUCKET`; s3:// leads there meanwhile."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        yield client
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        server.stop()


def put_folder(client, folder, prefix):
    """Copy the files of a folder to s3://bucket/<prefix>/; return that address."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")
    return f"s3://{BUCKET}/{prefix}"


class Breaking(InThread, socketserver.ThreadingTCPServer):
    """Proxy before the server at `url`. The next `cuts` connections end after `after` bytes of what the server sends.

    A connection that is not cut lasts as long as its ends want.
    """

    daemon_threads = True

    def __init__(self, url, cuts, after):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.to, self.cuts, self.after = urlsplit(url), cuts, after
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # a client that went away


class _Connection(socketserver.BaseRequestHandler):
    def handle(self):
        sent = 0
        with socket.create_connection((self.server.to.hostname, self.server.to.port)) as behind:
            threading.Thread(target=self.ask, args=(behind,), daemon=True).start()
            while data := behind.recv(1 << 16):
                if self.server.cuts > 0 and sent + len(data) > self.server.after:
                    self.server.cuts -= 1
                    self.request.sendall(data[: self.server.after - sent])
                    self.request.shutdown(socket.SHUT_RDWR)
                    return
                self.request.sendall(data)
                sent += len(data)

    def ask(self, behind):
        with suppress(OSError):
            while data := self.request.recv(1 << 16):
                behind.sendall(data)
            behind.shutdown(socket.SHUT_WR)
