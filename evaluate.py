"""Scores of a finished stage: `python evaluate.py run=demo stage=sft`; `--help` lists the settings."""

from llm.cli.app import run_app

if __name__ == "__main__":
    run_app("evaluate", "llm.eval.evaluate.run_evaluation")
