"""`transformers serve` over exported folders: its API gives the greedy text of our engine, for a prompt and for a chat.

It takes classes of transformers alone: a folder with a program of its own, as of `arch=modern`, it does not load.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import start
from test_export import export, finish, qwen3

from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer, checked_pattern
from llm.tokenizer.chat_format import render_prompt
from llm.tokenizer.compression import SAMPLE_TEXTS

pytest.importorskip("transformers.cli")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.slow

PROGRAM = Path(sys.executable).with_name("transformers")
CHAT = [{"role": "user", "content": "What is 3 + 4?"}]
TEXT = "The baker has 12 apples and "
NEW = 24


def network(arch: str, tokenizer: Tokenizer):
    if arch == "qwen3":
        return qwen3(tokenizer)
    shape = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "head_dim": 16, "n_embd": 32, "seq_len": 96}
    net = GPT(GPTConfig(arch=arch, vocab_size=tokenizer.vocab_size, **shape)).init_weights(0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return net


@pytest.mark.parametrize("arch", ["classic", "qwen3"])
def test_its_api_gives_the_greedy_text_of_our_engine(arch, tmp_path):
    tokenizer = Tokenizer.train(SAMPLE_TEXTS.values(), 400, checked_pattern("qwen2"))
    net = network(arch, tokenizer)
    finish(tmp_path / "runs/q/sft", net, tokenizer)
    export(tmp_path, "run=q", f"out={tmp_path}/hf")
    words = ["serve", str(tmp_path / "hf"), "--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    server = start(str(PROGRAM), *words, "--log-level", "info", env={"HF_HUB_OFFLINE": "1"}, stderr=subprocess.STDOUT)
    said, url = "", None
    while not url and (line := server.stdout.readline()):
        said += line
        url = re.search(r"running on (http://\S+)", line)
    assert url, said
    client = openai.OpenAI(base_url=f"{url[1]}/v1", api_key="none")
    asked = {"model": str(tmp_path / "hf"), "temperature": 0, "max_tokens": NEW}
    greedy = SamplingParams(temperature=0, max_new_tokens=NEW, use_tools=False)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(TEXT)], render_prompt(tokenizer, CHAT)]
    text, chat = (tokenizer.decode(samples[0].ids) for samples in Engine(net, tokenizer).generate(prompts, greedy))
    assert len(set(text)) > 5 and len(set(chat)) > 5
    assert client.chat.completions.create(messages=CHAT, **asked).choices[0].message.content == chat
    shown = re.sub(r"<\|\w+\|>", "", text)  # special tokens are left out of a completion
    assert client.completions.create(prompt=f"<|bos|>{TEXT}", **asked).choices[0].text == shown
