"""Chapter 2, mathematics: logarithms, gradients, and descent on a table that says which byte follows which."""

import argparse
import math

import torch
import torch.nn.functional as F

from llm.data.embedded import documents
from llm.model.cross_entropy import linear_cross_entropy

STEPS = 200
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--plot", help="write the picture to this file")
args = parser.parse_args()

# 1. Softmax and cross-entropy of three scores, as in the chapter.
scores, right = torch.tensor([2.0, 0.0, 1.0]), 2
shares = scores.softmax(0)
print(f"probability of the right token: {shares[right]:.3f}")
print(f"loss in nats: {-shares[right].log():.3f}")

# 2. The gradient that the code computes, against the slope measured by moving one number a little.
generator = torch.Generator().manual_seed(args.seed)
hidden = torch.randn(5, 8, generator=generator, dtype=torch.float64)
weight = torch.randn(11, 8, generator=generator, dtype=torch.float64)
targets = torch.randint(11, (5,), generator=generator)


def loss_of(hidden: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy of a linear head, by PyTorch."""
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


ours = hidden.float().requires_grad_()
linear_cross_entropy(ours, weight.float(), targets, softcap=None).backward()
moved = torch.zeros(5, 8, dtype=torch.float64)
moved[0, 0] = 1e-5
slope = (loss_of(hidden + moved) - loss_of(hidden - moved)).item() / 2e-5
print(f"measured slope minus gradient of the code: {abs(slope - ours.grad[0, 0].item()):.4f}")

# 3. Counts of neighbouring bytes in the text of the generated world.
text = torch.tensor(list("\n".join(documents("train", 1000, seed=1)).encode()))
counts = torch.zeros(256, 256).index_put((text[:-1], text[1:]), torch.tensor(1.0), accumulate=True)
total = counts.sum()


def bits(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Return the mean surprise of the text in bits per byte; log_probabilities: (256, 256) in nats, a row per byte."""
    return -(counts * log_probabilities).sum() / total / math.log(2)


single = (counts.sum(0) / total).clamp(1e-12).log().expand(256, 256)
pairs = (counts / counts.sum(1, keepdim=True).clamp(1)).clamp(1e-12).log()
print(f"bits per byte, every byte alike: {bits(torch.full((256, 256), 1 / 256).log()):.3f}")
print(f"bits per byte, counting single bytes: {bits(single):.3f}")
print(f"bits per byte, counting pairs: {bits(pairs):.3f}")

# 4. The same table by gradient descent: no counting, only "which way is downhill?".
table = torch.zeros(256, 256, requires_grad=True)
optimizer, curve = torch.optim.Adam([table], lr=0.3), []
for _ in range(STEPS):
    loss = bits(table.log_softmax(1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    curve.append(loss.item())
print(f"bits per byte, by {STEPS} steps of descent: {curve[-1]:.3f}")

if args.plot:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2), layout="tight")
    axis.plot(curve, label="gradient descent")
    axis.axhline(bits(single), color="gray", linestyle="--", label="counting single bytes")
    axis.axhline(bits(pairs), color="black", linestyle=":", label="counting pairs")
    axis.set(xlabel="step", ylabel="bits per byte")
    axis.legend()
    figure.savefig(args.plot, dpi=80)
