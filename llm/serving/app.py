"""Find the model, then answer once, chat in the terminal or serve it over HTTP: the work of `serve.py`."""

from typing import Any

from llm.errors import UserError
from llm.inference.sampling import SamplingParams
from llm.run.stage_folder import find_stage
from llm.serving import terminal
from llm.serving.chat import HF, load_chat_model

SERVER_PACKAGES = ("gradio", "fastapi", "starlette", "uvicorn", "prometheus_client")


def serve(cfg: Any) -> None:
    """Chat with the stage that `run` and `stage` name (by default the end of the pipeline), following the config."""
    params = SamplingParams(
        temperature=cfg.temperature, top_k=cfg.top_k, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed
    )
    model = _model_name(cfg)
    if cfg.prompt is not None:
        terminal.answer_once(load_chat_model(model), cfg.prompt, params)
    elif cfg.ui == "cli":
        terminal.chat(load_chat_model(model), params)
    else:
        _http(cfg.ui).serve(cfg, model, params)


def _model_name(cfg: Any) -> str:
    """Return the folder of the stage to serve, or hf:<name>. Raises UserError for names that do not go together."""
    if cfg.model is None:
        return str(find_stage(cfg.paths.runs, cfg.run, cfg.stage))
    if not str(cfg.model).startswith(HF):
        raise UserError(f"model={cfg.model}: write hf:<folder> or hf:<owner>/<name>; runs are served by run=")
    for key in ("run", "stage"):
        if cfg[key] is not None:
            raise UserError(f"model={cfg.model} {key}={cfg[key]}: give either a model or a run")
    return str(cfg.model)


def _http(ui: str) -> Any:
    """Import the server, only when it is wanted: it takes seconds, and its packages are an optional part."""
    try:
        if ui == "gradio":
            from llm.serving import browser  # noqa: F401  so that a missing package is told before a model is loaded
        from llm.serving import http
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in SERVER_PACKAGES:
            raise
        raise UserError(
            f"ui={ui} needs the package {error.name}: pip install -e '.[serve]', or chat with ui=cli"
        ) from error
    return http
