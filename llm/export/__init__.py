"""Finished stages for other programs: `python -m llm.export run=demo to=hf`, or to=gguf for llama.cpp."""
