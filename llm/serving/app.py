"""Find the model, then answer once, chat in the terminal or serve it over HTTP: the work of `serve.py`.

What takes long to import comes when it is needed: in a terminal Ctrl-C is in good hands before that (`CtrlC`).
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from llm.errors import UserError
from llm.run.stage_folder import HF, find_stage
from llm.serving.interrupts import CtrlC
from llm.utils.source import pip_install

PANEL = "llm.panel.serve"  # on a floor above: named, not imported
SERVER_PACKAGES = ("gradio", "fastapi", "starlette", "uvicorn", "httptools", "prometheus_client")


def serve(cfg: Any) -> None:
    """Chat with the stage that `run` and `stage` name (by default the end of the pipeline), following the config."""
    if cfg.prompt is None and cfg.ui == "cli":
        with CtrlC(patient=sys.stdin.isatty()) as ctrl_c:
            _chat_in_terminal(cfg, ctrl_c)
    elif cfg.prompt is not None:
        _answer_once(cfg)
    elif cfg.ui == "panel":
        _imported(cfg.ui, lambda: import_module(PANEL)).serve(cfg)
    else:
        params, model = sampling(cfg), model_name(cfg)
        _http(cfg.ui).serve(cfg, model, params)


def _chat_in_terminal(cfg: Any, ctrl_c: CtrlC) -> None:
    from llm.serving import terminal
    from llm.serving.adapters import chosen_adapters
    from llm.serving.chat import load_chat_model
    from llm.serving.models import Models

    params, model = sampling(cfg), model_name(cfg)
    adapters = chosen_adapters(cfg.adapters, cfg.paths.runs, model, verify=cfg.verify)
    first = load_chat_model(model, None, cfg.compute, cfg.verify, adapters, cfg.weights)
    models = Models(first, cfg.paths.runs, cfg.verify, cfg.compute, cfg.weights)
    terminal.chat(models, params, ctrl_c)


def _answer_once(cfg: Any) -> None:
    from llm.serving import terminal
    from llm.serving.chat import load_chat_model

    params, model = sampling(cfg), model_name(cfg)
    if cfg.adapters:
        raise UserError("adapters with prompt=: one model answers; leave adapters out, and name its run= and stage=")
    first = load_chat_model(model, compute=cfg.compute, verify=cfg.verify, weights=cfg.weights)
    terminal.answer_once(first, cfg.prompt, params)


def sampling(cfg: Any) -> Any:
    """Return the settings of sampling in the configuration, a `SamplingParams`. Raises UserError for wrong ones."""
    from llm.inference.sampling import SamplingParams

    return SamplingParams(
        temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed
    )


def model_name(cfg: Any) -> str:
    """Return the folder of the stage to serve, or hf:<name>. Raises UserError for names that do not go together."""
    if cfg.model is None:
        return str(find_stage(cfg.paths.runs, cfg.run, cfg.stage))
    if not str(cfg.model).startswith(HF):
        raise UserError(f"model={cfg.model}: write hf:<folder> or hf:<owner>/<name>; runs are served by run=")
    for key in ("run", "stage"):
        if getattr(cfg, key) is not None:
            raise UserError(f"model={cfg.model} {key}={getattr(cfg, key)}: give either a model or a run")
    return str(cfg.model)


def _http(ui: str) -> Any:
    """Import the server, only when it is wanted: it takes seconds, and its packages are an optional part."""

    def imported() -> Any:
        if ui == "gradio":
            from llm.serving import browser  # noqa: F401  so that a missing package is told before a model is loaded
        from llm.serving import http

        return http

    return _imported(ui, imported)


def _imported(ui: str, importing: Callable[[], Any]) -> Any:
    """Return what a function imports. Raises UserError where a package of the server is missing."""
    try:
        return importing()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in SERVER_PACKAGES:
            raise
        raise UserError(
            f"ui={ui} needs the package {error.name}: {pip_install('serve')}, or chat with ui=cli"
        ) from error
