"""A network of bytes, a task of five questions and small settings for the stages that train on sampled answers."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import compose

from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.run.stage_folder import write_manifest
from llm.tokenizer.bpe import Tokenizer

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])


def settings(name="grpo", **changes) -> SimpleNamespace:
    """Settings of a stage of rollouts, its defaults in small."""
    stage = dict(compose("train", "experiment=tiny", f"stage={name}").stage)
    small = {"prompts_per_step": 2, "samples_per_prompt": 3, "max_new_tokens": 6, "top_k": 0}
    return SimpleNamespace(**(stage | small | changes))


def model(seed=0, scalar_head=False) -> GPT:
    """A network of bytes that is not at its start: every token has its own probability, and value if it has a head."""
    config = GPTConfig(2, 2, 2, 8, 16, seq_len=24, vocab_size=TOKENIZER.vocab_size, scalar_head=scalar_head)
    network = GPT(config).init_weights(seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return network


def kill(runs: Path, stage: str, steps: Sequence[int]) -> None:
    """Copy the run `straight` to `killed`, whose stage has neither a result nor the checkpoints of `steps`."""
    shutil.copytree(runs / "straight", runs / "killed")
    folder = runs / "killed" / stage
    shutil.rmtree(folder / "model")
    for step in steps:
        (folder / "checkpoints" / f"step_{step:06}.ckpt").unlink(missing_ok=True)
    write_manifest(folder, json.loads((folder / "run.json").read_text()) | {"status": "running"})


class Task:
    """Five numbered questions."""

    name, kind = "questions", "generative"

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "x"}]}


def by_length(conversations, completions) -> torch.Tensor:
    return torch.tensor([float(len(text)) for text in completions])


def same(a: dict, b: dict) -> bool:
    """Return whether two batches train the same numbers."""
    pairs = zip(a["micro"], b["micro"], strict=True)
    micro = all(m.keys() == n.keys() and all(torch.equal(m[k], n[k]) for k in m) for m, n in pairs)
    return micro and all(a[k] == b[k] for k in ("n_trained", "n_tokens"))
