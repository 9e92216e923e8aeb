"""Write a finished stage for other programs: `python -m llm.export run=demo to=hf`; `--help` lists the settings."""

from llm.cli.main import export

if __name__ == "__main__":
    export()
