"""Chapter 6, training: read what a run has written, and show that micro-batches change nothing.

Needs the run guide-training: the command stands in the chapter.
"""

import argparse
import math

import torch

from llm.model import GPT, GPTConfig
from llm.run.stage_folder import RunDir, read_metrics
from llm.utils.files import read_json

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--runs", default="runs", help="folder of the runs")
parser.add_argument("--plot", help="write the picture to this file")
args = parser.parse_args()

# 1. The run. A row of metrics.csv is a step; a measurement that was not made then is missing.
run = RunDir(args.runs, "guide-training")
rows = read_metrics(run.stage_dir("pretrain"))
facts = read_json(run.stage_dir("pretrain") / "run.json")["derived"]
losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
rates = {row["step"]: row["lr"] for row in rows if "lr" in row}
scores = {row["step"]: row["bpb"] for row in rows if "bpb" in row}
print(f"logarithm of the vocabulary: {math.log(facts['vocab_size']):.2f}")
print(f"loss of the first step: {losses[min(losses)]:.2f}")
print(f"loss of the last step: {losses[max(losses)]:.2f}")
print(f"bits per byte before: {scores[min(scores)]:.2f}")
print(f"bits per byte after: {scores[max(scores)]:.2f}")
print(f"learning rate at three quarters, as a share: {rates[max(rates) * 3 // 4]:.2f}")

# 2. One batch of 8 rows, of which the first rows have few targets; -1 means "not trained".
config = GPTConfig(n_layer=2, n_head=2, n_kv_head=2, head_dim=16, n_embd=32, seq_len=32, vocab_size=64)
ids = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(0))
inputs, targets = ids[:, :-1], ids[:, 1:].clone()
targets[:4, 4:] = -1


def gradient(micro_batches: int, by_token: bool) -> torch.Tensor:
    """Return the gradient of the head: losses are summed and divided by all tokens, or averaged per micro-batch."""
    net = GPT(config).init_weights(0)
    for x, y in zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
        if by_token:
            loss = net(x, y, reduction="sum") / (targets >= 0).sum()
        else:
            loss = net(x, y, reduction="mean") / micro_batches
        loss.backward()  # gradients add up
    return net.lm_head.weight.grad


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the length of a - b as a share of the length of b."""
    return ((a - b).norm() / b.norm()).item()


whole = gradient(1, by_token=True)
print(f"4 micro-batches, divided by all tokens, differ by: {difference(gradient(4, True), whole):.4f}")
print(f"4 micro-batches, mean of means, differ by: {difference(gradient(4, False), whole):.4f}")

if args.plot:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="tight")
    left.plot(list(losses), list(losses.values()), label="training loss, nats per token")
    left.plot(list(scores), list(scores.values()), marker="o", label="held-out text, bits per byte")
    left.set(xlabel="step", ylim=(0, None))
    left.legend()
    right.plot(list(rates), list(rates.values()))
    right.set(xlabel="step", ylabel="learning rate, as a share")
    figure.savefig(args.plot, dpi=80)
