"""The page mounted in an application as the server does it, in a thread of the test."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr
import uvicorn
from fastapi import FastAPI

from llm.serving import browser
from llm.serving.api.server import guard_app
from llm.serving.http import listen


@contextmanager
def page_server(demo: gr.Blocks) -> Iterator[int]:
    """Serve a page behind its guard on a free port, which is given to the test."""
    app = FastAPI()
    browser.mount(app, demo)
    guard_app(app, "127.0.0.1", (), ())
    with listen("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
