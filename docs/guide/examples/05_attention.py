"""Chapter 5, attention: the formula against the kernel, and heads that learn to look back.

A row is a word of 5 to 10 random letters, again and again. To foretell a letter of the second copy, a network must find
where the letter before it stood earlier, and read what came behind.
"""

import argparse
import math

import torch

from llm.inference.inside import Recorder
from llm.model import GPT, GPTConfig
from llm.model.attention import causal_attention

LETTERS, LONGEST, LENGTH, ROWS, STEPS = 24, 10, 32, 32, 300
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--plot", help="write the picture to this file")
args = parser.parse_args()


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Return softmax(scale q k^T) v of one head, each (T, D), where no position sees a later one."""
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return (scale * q @ k.T).masked_fill(later, -torch.inf).softmax(-1) @ v


q, k, v = torch.randn(3, 1, 100, 1, 16, generator=torch.Generator().manual_seed(args.seed))  # (B, T, H, D) each
formula = by_formula(q[0, :, 0], k[0, :, 0], v[0, :, 0], 0.25)
difference = (causal_attention(q, k, v, scale=0.25)[0, :, 0] - formula).abs().max()
print(f"largest difference between kernel and formula: {difference:.5f}")


def rows(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n rows (n, LENGTH), each a random word over and over, and the lengths (n, 1) of the words."""
    letters = torch.randint(LETTERS, (n, LONGEST), generator=generator)
    lengths = torch.randint(LONGEST // 2, LONGEST + 1, (n, 1), generator=generator)
    return letters.gather(1, torch.arange(LENGTH) % lengths), lengths


def trained(layers: int, **switches) -> tuple[GPT, torch.Tensor]:
    """Train a network on fresh rows; return it, and its loss in nats at each position of rows that it has not seen."""
    shape = {"n_layer": layers, "n_head": 2, "n_kv_head": 2, "head_dim": 32, "n_embd": 64}
    net = GPT(GPTConfig(**shape, seq_len=LENGTH, vocab_size=LETTERS, **switches)).init_weights(args.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(STEPS):
        batch, _ = rows(ROWS, generator)
        net(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    test, _ = rows(256, torch.Generator().manual_seed(999 + args.seed))
    return net, net(test[:, :-1], test[:, 1:], reduction="none").mean(0).detach()


(one, at_one), (two, at_two) = trained(layers=1), trained(layers=2)
print(f"a blind guess, nats per letter: {math.log(LETTERS):.2f}")
print(f"repeated letters, one layer: {at_one[LONGEST:].mean():.2f}")
print(f"repeated letters, two layers: {at_two[LONGEST:].mean():.2f}")

row, length = rows(1, torch.Generator().manual_seed(7))
with torch.no_grad():
    two.eval()(row, cache=(recorder := Recorder(two)))  # keeps the shares of every head
place = torch.arange(2 * LONGEST, LENGTH)
last = [shares[place, place - 1].mean().item() for shares in recorder.weights[0]]
behind = [sum(shares[place, place - n * length[0] + 1] for n in (1, 2)).mean().item() for shares in recorder.weights[1]]
print(f"layer 1, best share on the letter before: {max(last):.2f}")
print(f"layer 2, best share on the letters behind earlier copies: {max(behind):.2f}")

if args.plot:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), sharey=True, layout="tight")
    for number, axis in enumerate(axes):
        layer, head = divmod(number, 2)
        axis.imshow(recorder.weights[layer][head], cmap="Blues", vmin=0, vmax=1)
        axis.set(title=f"layer {layer + 1}, head {head + 1}", xlabel="looks at position")
    axes[0].set_ylabel("position")
    figure.savefig(args.plot, dpi=80)
