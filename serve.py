"""Chat with a trained model: `python serve.py run=demo`; `python serve.py --help` lists the settings."""

from llm.cli.main import serve

if __name__ == "__main__":
    serve()
