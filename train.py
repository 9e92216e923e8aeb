"""One phase of training: `python train.py stage=pretrain model=d4`; `python train.py --help` lists the settings."""

from llm.cli import run_app

if __name__ == "__main__":
    run_app("train", "llm.trainer.run_stage")
