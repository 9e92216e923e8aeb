"""One phase of training: `python train.py stage=pretrain model=d4`; `python train.py --help` lists the settings."""

from llm.cli.app import run_app

if __name__ == "__main__":
    run_app("train", "llm.stages.run_stage.run_stage")
