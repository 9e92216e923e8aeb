"""llama.cpp itself on an exported file: our ids of a text, and the greedy ids of our engine and of transformers.

`make llama-cpp` installs it, in an environment of its own.
"""

import json

import processes
import pytest
import torch
from conftest import REPO
from test_export import TEXT, export, finish, qwen3

from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.tokenizer.bpe import Tokenizer, checked_pattern
from llm.tokenizer.compression import SAMPLE_TEXTS

PYTHON = REPO / ".venv/llama-cpp/bin/python"
TEXTS = [TEXT, "The baker has 12 apples and ", "naïve café — 東京 😀 1234567"]
NEW = 40

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no llama.cpp: make llama-cpp compiles it in minutes"),
]
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("shape", [{}, {"tied": True, "n_kv_head": 2}], ids=["grouped", "tied"])
def test_greedy_ids_are_those_of_our_engine_and_of_transformers(shape, tmp_path):
    tokenizer = Tokenizer.train(SAMPLE_TEXTS.values(), 400, checked_pattern("qwen2"))
    net = qwen3(tokenizer, **shape)
    finish(tmp_path / "runs/q/sft", net, tokenizer)
    export(tmp_path, "run=q", "to=gguf", f"out={tmp_path}/gguf")
    export(tmp_path, "run=q", "to=hf", f"out={tmp_path}/hf")
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)][:50] for text in TEXTS]
    asked = {"model": str(tmp_path / "gguf/q-sft-fp32.gguf"), "texts": TEXTS, "prompts": prompts, "new": NEW}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    done = processes.run(str(PYTHON), str(REPO / "tests/export/llama_cpp_reader.py"), str(tmp_path / "asked.json"))
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs["ids"] == [tokenizer.encode(text) for text in TEXTS]
    greedy = SamplingParams(temperature=0, max_new_tokens=NEW, use_tools=False, ignore_eos=True)
    ours = [samples[0].ids for samples in Engine(net, tokenizer).generate(prompts, greedy)]
    assert ours == theirs["continued"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    for prompt, continued, logits in zip(prompts, ours, theirs["logits"], strict=True):
        ids = torch.tensor([prompt])
        found = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert found[0, len(prompt) :].tolist() == continued
        with torch.no_grad():
            expected = net(ids)[0, -1, : tokenizer.vocab_size]
        torch.testing.assert_close(torch.tensor(logits)[: tokenizer.vocab_size], expected, rtol=0, atol=2e-4)
