"""Chat with a trained model: `python serve.py run=demo`; `python serve.py --help` lists the settings."""

from llm.cli.app import run_app

if __name__ == "__main__":
    run_app("serve", "llm.serving.app.serve")
