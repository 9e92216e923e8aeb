"""Compare the compression of tokenizers: `python -m llm.tokenizer runs/demo/tokenizer/model --against gpt2`."""

from llm.tokenizer.compression import main
from llm.utils.streams import run_and_exit

run_and_exit(main)
