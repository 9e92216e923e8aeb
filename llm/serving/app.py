"""Find the model, then answer once, chat in the terminal or open the browser chat: the work of `serve.py`.

What takes long to import comes when it is needed: in a terminal Ctrl-C is in good hands before that (`CtrlC`).
"""

import socket
import sys

from llm.errors import UserError
from llm.run.stage_folder import find_stage
from llm.serving.interrupts import CtrlC


def serve(cfg) -> None:
    """Chat with the stage that `run` and `stage` name (by default the end of the pipeline), following the config."""
    if cfg.prompt is None and cfg.ui == "cli":
        with CtrlC(patient=sys.stdin.isatty()) as ctrl_c:
            _chat_in_terminal(cfg, ctrl_c)
    elif cfg.prompt is not None:
        _answer_once(cfg)
    else:
        _chat_in_browser(cfg)


def _chat_in_terminal(cfg, ctrl_c: CtrlC) -> None:
    from llm.serving import terminal
    from llm.serving.chat import load_chat_model
    from llm.serving.models import Models

    params, stage_dir = sampling(cfg), find_stage(cfg.paths.runs, cfg.run, cfg.stage)
    terminal.chat(Models(load_chat_model(stage_dir), cfg.paths.runs), params, ctrl_c)


def _answer_once(cfg) -> None:
    from llm.serving import terminal
    from llm.serving.chat import load_chat_model

    params, stage_dir = sampling(cfg), find_stage(cfg.paths.runs, cfg.run, cfg.stage)
    terminal.answer_once(load_chat_model(stage_dir), cfg.prompt, params)


def _chat_in_browser(cfg) -> None:
    from llm.serving.chat import load_chat_model
    from llm.serving.guard import check_names, is_private
    from llm.serving.models import Models

    params, stage_dir = sampling(cfg), find_stage(cfg.paths.runs, cfg.run, cfg.stage)
    port = usable_port(cfg.host, cfg.port)
    browser = _browser_chat()
    check_names(cfg.public_names)
    others = cfg.offer == "all" or (cfg.offer is None and is_private(cfg.host, cfg.public_names))
    models = Models(load_chat_model(stage_dir), cfg.paths.runs if others else None)
    browser.serve(models, params, cfg.host, port, cfg.public_names)


def sampling(cfg):
    """Return the settings of sampling in the configuration, a `SamplingParams`. Raises UserError for wrong ones."""
    from llm.inference.sampling import SamplingParams

    return SamplingParams(
        temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed
    )


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
