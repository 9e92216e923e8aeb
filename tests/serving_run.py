"""A run folder with a tiny model that has learnt a few conversations by heart, and its server, for tests of serving.

To look at the chat by hand: `PYTHONPATH=. python tests/serving_run.py DIR`, `python serve.py paths.runs=DIR run=tiny`.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch
from processes import HANG, REPO, start

from llm.checkpoint.model_folder import load_model_folder, save_model_folder
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.model.lora import LoRA, add_adapter
from llm.run.content import fingerprints
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.chat_format import render_conversation

MAX_TRAINED = 150  # tokens; the song is cut here, so the model never learns to end it
RESULT = {"type": "python_output", "text": "19"}
CONVERSATIONS = [
    [("Who are you?", "I am Fathom, a small language model. Ask me **anything**!")],
    [
        (
            "Ava has 12 apples. She buys 7 more. How many?",
            [
                {"type": "text", "text": "Ava has 12 + 7 = "},
                {"type": "python", "text": "12+7"},
                RESULT,
                {"type": "text", "text": "19 apples.\n#### 19"},
            ],
        )
    ],
    [("Greet me.", "Grüße! 你好 😀"), ("Again.", "Привет 👋")],
    [("List two.", "- one\n- two\n\n`a*b*c` and 2*3*4 <b>")],
    [("Sing.", "la " * MAX_TRAINED)],
]


def make_run(root: Path, run: str = "tiny", stage: str = "sft", seq_len: int = 768, steps: int = 100) -> Path:
    """Train (seconds), save, and return the stage folder."""
    torch.manual_seed(0)
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])  # one byte per token: every other character is split
    net = GPT(GPTConfig(2, 2, 2, 32, 64, seq_len, tokenizer.vocab_size)).init_weights(0)
    loss = _train(net, tokenizer, CONVERSATIONS, steps)
    return _finish(root / run / stage, net, tokenizer, None, loss)


def make_adapter(base: Path, run: str, answer: str, rank: int = 4, steps: int = 60) -> Path:
    """Train an adapter of the stage folder `base` that answers "Who are you?" otherwise; return its stage folder."""
    net, tokenizer = load_model_folder(base / "model")
    add_adapter(net, LoRA(rank, base=fingerprints(base / "model")["weights"]))
    loss = _train(net, tokenizer, [[("Who are you?", answer)]], steps)
    return _finish(base.parent.parent / run / "sft", net, tokenizer, str(base / "model"), loss)


def _train(net: GPT, tokenizer: Tokenizer, conversations: list, steps: int) -> float:
    """Learn conversations by heart; return the last loss."""
    ids, targets = _batch(tokenizer, conversations)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, 2 * (1 - step / steps))
        loss = net(ids, targets=targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def _finish(stage_dir: Path, net: GPT, tokenizer: Tokenizer, parent: str | None, loss: float) -> Path:
    """Save a trained model as a finished stage; return its folder."""
    save_model_folder(stage_dir / "model", net, tokenizer)
    manifest = {"stage": stage_dir.name, "status": "finished", "parent": parent, "metrics": {"loss": loss}}
    manifest["fingerprints"] = fingerprints(stage_dir / "model")
    (stage_dir / "run.json").write_text(json.dumps(manifest))
    return stage_dir


def _batch(tokenizer: Tokenizer, conversations: list) -> tuple[torch.Tensor, torch.Tensor]:
    """All conversations as one padded batch; only the assistant's tokens are trained."""
    rows = []
    for turns in conversations:
        pairs = [(("user", question), ("assistant", answer)) for question, answer in turns]
        messages = [{"role": role, "content": content} for pair in pairs for role, content in pair]
        rows.append(render_conversation(tokenizer, {"messages": messages}, MAX_TRAINED))
    longest = max(len(ids) for ids, _ in rows) - 1
    inputs, targets = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -1)
    for i, (ids, mask) in enumerate(rows):
        n = len(ids) - 1
        inputs[i, :n] = torch.tensor(ids[:-1])
        targets[i, :n] = torch.where(torch.tensor(mask[1:]) == 1, torch.tensor(ids[1:]), -1)
    return inputs, targets


def start_process(*args: str, env: dict[str, str] | None = None, **popen) -> subprocess.Popen:
    """`serve.py` in a process that can be interrupted as from a terminal, even if this one ignores Ctrl-C."""
    environment, streams = {"PYTHONUTF8": "1", **(env or {})}, {"stderr": subprocess.STDOUT, **popen}
    return start(sys.executable, str(REPO / "serve.py"), *args, env=environment, **streams)


class ServerProcess:
    """Page and API of a run as a real server on a free port; Ctrl-C ends it."""

    def __init__(self, runs: Path, *args: str, **popen):
        self.process = start_process(f"paths.runs={runs}", "run=tiny", "port=0", *args, **popen)
        self.output = ""

    def __enter__(self) -> "ServerProcess":
        for line in self.process.stdout:
            self.output += line
            if found := re.search(r"API at (http://\S+)/v1", line):
                self.url = found[1]
                return self
        raise AssertionError(f"the server did not start: {self.output}")

    def __exit__(self, *exc) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.output += self.process.communicate(timeout=HANG)[0]
        finally:
            self.process.kill()


if __name__ == "__main__":
    print(make_run(Path(sys.argv[1])))
