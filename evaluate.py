"""Scores of a finished stage: `python evaluate.py run=demo stage=sft`; `--help` lists the settings."""

from llm.cli.main import evaluate

if __name__ == "__main__":
    evaluate()
