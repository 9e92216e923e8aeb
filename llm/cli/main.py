"""The commands: called by train.py, evaluate.py, serve.py and llm.export, and installed as fathom-train and so on."""

from typing import NoReturn

from llm.cli.app import run_app


def train() -> NoReturn:
    """Train one stage, or several as a sweep, with the settings in `sys.argv`; exits with the status of `run_app`."""
    run_app("train", "llm.stages.run_stage.run_stage")


def evaluate() -> NoReturn:
    """Score a finished stage or a model with the settings in `sys.argv`; exits with the status of `run_app`."""
    run_app("evaluate", "llm.eval.evaluate.run_evaluation")


def serve() -> NoReturn:
    """Chat with a finished stage by the settings in `sys.argv`; exits with the status of `run_app`."""
    run_app("serve", "llm.serving.app.serve")


def export() -> NoReturn:
    """Write a finished stage for other programs by the settings in `sys.argv`; exits with the status of `run_app`."""
    run_app("export", "llm.export.run_export.run_export")
