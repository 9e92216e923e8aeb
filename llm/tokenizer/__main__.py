"""Compare the compression of tokenizers: `python -m llm.tokenizer runs/demo/tokenizer/model --against gpt2`."""

import sys

from llm.tokenizer.compression import main

sys.exit(main())
