"""Find the model, then answer once, chat in the terminal or open the browser chat: the work of `serve.py`."""

import socket

from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.run.stage_folder import find_stage
from llm.serving import terminal
from llm.serving.chat import load_chat_model


def serve(cfg) -> None:
    """Chat with the stage that `run` and `stage` name (by default the end of the pipeline), following the config."""
    params = SamplingParams(
        temperature=cfg.temperature, top_k=cfg.top_k, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed
    )
    stage_dir = find_stage(cfg.paths.runs, cfg.run, cfg.stage)
    if cfg.prompt is not None:
        terminal.answer_once(load_chat_model(stage_dir, cfg.verify), cfg.prompt, params)
    elif cfg.ui == "cli":
        terminal.chat(load_chat_model(stage_dir, cfg.verify), params)
    else:
        port = usable_port(cfg.host, cfg.port)
        browser = _browser_chat()
        browser.check_names(cfg.public_names)
        browser.serve(load_chat_model(stage_dir, cfg.verify), params, cfg.host, port, cfg.public_names)


def usable_port(host: str, port: int) -> int:
    """Return the port itself, or a free one for 0. Raises UserError if nothing can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended is no obstacle
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"host={host} port={port}: cannot listen there ({reason}); choose another port, or port=0 for any free one"
        ) from error


def _browser_chat():
    """Import the Gradio module, only when it is wanted: it takes seconds, and is an optional part."""
    try:
        from llm.serving import browser
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("ui=gradio needs the package gradio: pip install -e '.[serve]', or chat with ui=cli") from error
    return browser
