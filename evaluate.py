"""Scores of a finished stage: `python evaluate.py run=demo stage=sft`; `--help` lists the settings."""

from llm.cli import run_app

if __name__ == "__main__":
    run_app("evaluate", "llm.evaluate_stage.run_evaluation")
