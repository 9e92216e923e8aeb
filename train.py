"""One phase of training: `python train.py stage=pretrain model=d4`; `python train.py --help` lists the settings."""

from llm.cli.main import train

if __name__ == "__main__":
    train()
