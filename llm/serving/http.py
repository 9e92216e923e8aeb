"""Server of a model over HTTP: workers, API and page put together, from start to end."""

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI

from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.run.stage_folder import HF
from llm.serving.adapters import chosen_adapters
from llm.serving.api.server import build_app, check_key, guard_app, run
from llm.serving.api.service import Service
from llm.serving.api.watch import log_to_stderr
from llm.serving.chat import ChatModel, is_hf
from llm.serving.guard import check_names, check_origins, is_private
from llm.serving.pool import Pool, Source
from llm.serving.remote import RemoteEngine, RemoteModels
from llm.tokenizer.bpe import Tokenizer

PAGE_ANSWERS = 16  # that the page may have under way; each takes a thread


@dataclass(frozen=True)
class Beside:
    """A page of Gradio beside the chat. path: where it is mounted; mount: puts it, and who may see it, into the app."""

    path: str
    mount: Callable[[FastAPI], None]


def serve(cfg: Any, model: str, params: SamplingParams, beside: Beside | None = None) -> None:
    """Serve API and page until SIGTERM or Ctrl-C. model: a stage folder or hf:<name>. beside: a further page.

    Raises UserError where nothing can listen, key or origins are of no use, or the model cannot be loaded.
    """
    check_names(cfg.public_names)
    check_origins(cfg.api.origins)
    check_key(cfg.api.access_key)
    if cfg.ui == "gradio" and cfg.api.access_key and not is_private(cfg.host, cfg.public_names):
        raise UserError(
            "api.access_key with ui=gradio: the page asks for no key; use ui=api where not only this computer is served"
        )
    with listen(cfg.host, cfg.port) as bound:
        adapters = chosen_adapters(cfg.adapters, cfg.paths.runs, model, _offers_all(cfg), cfg.verify)
        foreign = tuple(cfg.plugins), tuple(cfg.trust)
        source = Source(model, cfg.compute, *foreign, cfg.verify, tuple(adapters.items()), cfg.weights)
        asyncio.run(_serve(cfg, source, params, bound, beside))
    print("\nserver ended", flush=True)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address. Raises UserError where nothing can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended is no obstacle
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"host={host} port={port}: cannot listen there ({reason}); choose another port, or port=0 for any free one"
        ) from error
    return bound


class Pools:
    """Workers of all models that are served: the server's own, and those that the page's visitors have chosen."""

    def __init__(self, cfg: Any, source: Source):
        self.cfg, self.source, self.all = cfg, source, []
        self.devices, self.threads = worker_devices(cfg.workers)

    async def start(self, model: str, devices: Sequence[str] | None = None) -> ChatModel:
        """Start workers for a model, by default one; return the model that answers through them.

        Raises UserError where the model or its tokenizer cannot be loaded.
        """
        is_own, api = model == self.source.model, self.cfg.api
        source = self.source if is_own else replace(self.source, model=model, adapters=())
        pool = Pool(source, devices or self.devices[:1], rows=api.rows, queue=api.queue, threads=self.threads)
        await pool.start()
        self.all.append(pool)
        try:
            tokenizer = await asyncio.to_thread(load_tokenizer, model)
        except BaseException:
            await self._end(pool)
            raise
        engine = RemoteEngine(pool, tokenizer, asyncio.get_running_loop(), api.timeout)
        beside = (_chat_model(engine, one, adapter=one["name"]) for one in pool.facts.get("beside", ()))
        return _chat_model(engine, pool.facts, beside=tuple(beside))

    async def stop(self, model: ChatModel) -> None:
        """End the workers of a model after the answers under way."""
        await self._end(model.engine.pool)

    async def close(self) -> None:
        """End all workers at once."""
        for pool in list(self.all):  # one that is being retired leaves the list meanwhile
            await pool.close()

    async def _end(self, pool: Pool) -> None:
        await pool.retire()
        self.all.remove(pool)


def _chat_model(engine: RemoteEngine, facts: dict[str, Any], **more: Any) -> ChatModel:
    return ChatModel(engine, facts["name"], facts["summary"], facts["notes"], facts["examples"], **more)


def _offers_all(cfg: Any) -> bool:
    """Return whether other finished stages may be chosen too."""
    return cfg.offer == "all" or (cfg.offer is None and is_private(cfg.host, cfg.public_names))


async def _serve(cfg: Any, source: Source, params: SamplingParams, bound: socket.socket, beside: Beside | None) -> None:
    """Start the workers, build the application, serve."""
    pools = Pools(cfg, source)
    try:
        first = await pools.start(source.model, pools.devices)
        defaults = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
        defaults["max_new_tokens"] = params.max_new_tokens
        engine = first.engine
        service = Service(
            engine.pool, engine.tokenizer, first.name, defaults, cfg.api.timeout, truncates=cfg.api.truncation == "auto"
        )
        log_to_stderr()
        app = build_app(service, cfg.api.access_key, cfg.api.origins, cfg.api.log)
        if beside:
            beside.mount(app)
        if cfg.ui == "gradio" or beside:
            from llm.serving import browser

            root, at_once = cfg.paths.runs if _offers_all(cfg) else None, min(cfg.api.rows, PAGE_ANSWERS)
            browser.mount(app, browser.build(RemoteModels(first, root, pools.start, pools.stop, at_once), params))
        guard_app(app, cfg.host, cfg.public_names, cfg.api.origins, [beside.path] if beside else ())
        await run(app, pools.all, bound, cfg.api.drain, lambda: _announce(cfg, first, bound.getsockname()[1], beside))
    finally:
        await pools.close()


def address_of(host: str, port: int) -> str:
    """Return the address of a server, as a browser takes it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _announce(cfg: Any, model: ChatModel, port: int, beside: Beside | None) -> None:
    """Print what is served, and where."""
    address = address_of(cfg.host, port)
    lines = [f"{model.name}: {model.summary}", *model.notes]
    if model.beside:
        lines.append(f"adapters in the same engine, as models: {', '.join(one.name for one in model.beside)}")
    lines.append(f"API at {address}/v1   model: {model.name}")
    if beside:
        lines.append(f"{beside.path.strip('/')} at {address}{beside.path}")
    if cfg.ui == "gradio" or beside:
        lines.append(f"chat at {address}   (Ctrl-C ends the server)")
    print("\n".join(lines), flush=True)


def worker_devices(workers: int | str) -> tuple[list[str], int | None]:
    """Return the device of each worker, and the threads that each may use on a CPU (None: as torch finds)."""
    n_gpus = torch.cuda.device_count()
    n = max(n_gpus, 1) if workers == "auto" else int(workers)
    if n_gpus:
        return [f"cuda:{index % n_gpus}" for index in range(n)], None
    return ["cpu"] * n, max(1, (os.cpu_count() or 1) // n) if n > 1 else None


def load_tokenizer(model: str) -> Any:
    """Return the tokenizer of a stage folder or of hf:<name>, without the weights beside it."""
    if is_hf(model):
        from llm.checkpoint.hf_model import load_hf_tokenizer

        return load_hf_tokenizer(model.removeprefix(HF))
    return Tokenizer.load(Path(model) / "model")
