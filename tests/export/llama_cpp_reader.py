"""Run by the Python of llama-cpp-python: read {"model", "texts", "prompts", "new"} from a file, print results.

Prints JSON: the ids of every text, and for every prompt (ids) its greedy continuation of `new` tokens and the logits
behind the prompt.
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama

FP32 = 0  # of GGML's types, for keys and values in the cache: fp16 is the default

asked = json.loads(Path(sys.argv[1]).read_text())
model = Llama(
    asked["model"], n_ctx=96, n_threads=1, n_gpu_layers=0, logits_all=True, type_k=FP32, type_v=FP32, verbose=False
)
found = {"ids": [model.tokenize(text.encode(), add_bos=False, special=False) for text in asked["texts"]]}
found["continued"], found["logits"] = [], []
for prompt in asked["prompts"]:
    model.reset()
    model.eval(prompt)
    found["logits"].append(np.asarray(model.scores[len(prompt) - 1], dtype=float).tolist())
    ids = list(prompt)
    while len(ids) < len(prompt) + asked["new"]:
        ids.append(int(np.argmax(model.scores[len(ids) - 1])))
        model.eval(ids[-1:])
    found["continued"].append(ids[len(prompt) :])
print(json.dumps(found))
