"""Show what AdamW and Muon make of one gradient, then train the same small model with three optimizers.

Run it in the project folder: python docs/guide/examples/07_optimizers.py [--seed N] [--plot FILE]
"""

import argparse

import torch

import llm
from llm.optim.muon_adamw import orthogonalize
from llm.optim.optimizer import GroupOptimizer

COMMON = ["experiment=tiny", "data.size=2000", "data.val_size=100", "batch.tokens_per_step=2048"]
COMMON += ["batch.micro_batch_size=16", "save_every=120", "log_every=20"]
PRETRAIN = ["stage=pretrain", "max_steps=120", "stage.eval_every=20", "stage.eval_tokens=8192", "stage.sample_every=0"]
OPTIMIZERS = {
    "AdamW": ["optim=adamw", "optim.lr=0.03"],
    "Muon of 2025": ["optim=muon_2025"],
    "Muon of 2026": ["optim=muon_adamw"],
}


def one_gradient() -> None:
    """Print the first step of both optimizers for a gradient that points nearly in one direction."""
    gradient = torch.tensor([[5.0, 5.0], [5.0, 4.8]])
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = gradient.clone()
    GroupOptimizer([{"kind": "adamw", "params": [weight], "lr": 1.0, "betas": (0.8, 0.95), "eps": 1e-10}]).step()
    shown = {"gradient": gradient, "AdamW": -weight.detach()}
    shown |= {name: orthogonalize(gradient[None], 5, name)[0] for name in ("newton_schulz", "polar_express")}
    for name, step in shown.items():
        large, small = torch.linalg.svdvals(step).tolist()
        print(f"{name}: {[[round(x, 2) for x in row] for row in step.tolist()]}")
        print(f"{name}, larger singular value: {large:.3f}")
        print(f"{name}, smaller singular value: {small:.3f}")


def curves(seed: int) -> dict[str, tuple[list[int], list[float]]]:
    """Train one model with every optimizer; return the steps and the bits per byte of its evaluations."""
    llm.train([*COMMON, "stage=tokenizer", "run=guide-optimizers"])
    found = {}
    for name, settings in OPTIMIZERS.items():
        run = f"run=guide-optimizers-{name.replace(' ', '-').lower()}-{seed}"
        own = ["init_from=guide-optimizers/tokenizer", run, f"seed={seed}", *settings]
        bpb = llm.train([*COMMON, *PRETRAIN, *own]).metrics()["bpb"].dropna()
        found[name] = (list(bpb.index), list(bpb))
    for name, (_, bpb) in found.items():
        print(f"bits per byte with {name}: {bpb[-1]:.3f}")
    return found


def plot(path: str, found: dict) -> None:
    """Draw what five iterations make of singular values, and the curves of the trainings."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    before = torch.logspace(-4, -0.01, 200)
    matrices = torch.diag_embed(torch.stack([before, (1 - before**2).sqrt()], dim=-1))  # norm 1
    for method in ("newton_schulz", "polar_express"):
        left.semilogx(before, orthogonalize(matrices, 5, method)[:, 0, 0], label=method)
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(xlabel="singular value before", ylabel="after five iterations")
    for name, (steps, bpb) in found.items():
        right.plot(steps, bpb, label=name)
    right.set(xlabel="step", ylabel="bits per byte of held-out text")
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE", help="draw the picture of the chapter into this file")
    args = parser.parse_args()
    one_gradient()
    found = curves(args.seed)
    if args.plot:
        plot(args.plot, found)
