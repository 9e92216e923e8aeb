"""Trains one small network by one process and by two, and compares the weights, the state and the losses.

python docs/guide/examples/13_processes.py [--seed 0] [--plot PATH]
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from llm.cli.overrides import compose
from llm.model.gpt import GPT
from llm.optim.build import build_optimizer
from llm.optim.optimizer import GroupOptimizer
from llm.parallel.muon_zero2 import ShardedOptimizer
from llm.scaling.rules import model_config

STEPS, ROWS, SEQ, VOCAB = 10, 6, 64, 256


def train(rank: int, world: int, seed: int, folder: str) -> None:
    """Train on this process's rows of every step; save the weights, the losses and the bytes of optimizer state."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet{world}", rank=rank, world_size=world)
    cfg = compose("train", ["model=d2", f"model.seq_len={SEQ}", "optim.eps=1e-4"])  # a larger eps: see the chapter
    net = GPT(model_config(cfg.model, cfg.arch, VOCAB)).init_weights(seed).double()
    net.compute_dtype = torch.float64  # so that rounding stays small
    optimizer = build_optimizer(net, cfg.optim, optimizer=ShardedOptimizer if world > 1 else GroupOptimizer)
    data, losses, means = torch.Generator().manual_seed(seed), [], []
    for _ in range(STEPS):
        ids = torch.randint(20, (ROWS, SEQ + 1), generator=data)
        ids[:, 1::2] = ids[:, :-1:2]  # every second token repeats the one before: something to learn
        targets = ids[:, 1:].clone()
        for row in range(ROWS):
            targets[row, 10 * (row + 1) :] = -1  # rows have 10, 20, ... 60 trained tokens
        mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        nats = net(ids[mine, :-1], targets[mine], reduction="sum")
        (nats / (targets >= 0).sum()).backward()  # divided by the tokens of ALL processes; gradients are added up
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        numbers = torch.tensor([nats.item(), (nats / (targets[mine] >= 0).sum()).item() / world])
        if world > 1:
            dist.all_reduce(numbers)
        losses.append(numbers[0].item() / (targets >= 0).sum().item())
        means.append(numbers[1].item())
    state = sum(t.numel() * t.element_size() for one in optimizer.state.values() for t in one.values())
    result = {"weights": net.state_dict(), "losses": losses, "means": means, "state": state}
    torch.save(result, Path(folder) / f"{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", default="docs/guide/images/13_processes.png")
    args = parser.parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    with tempfile.TemporaryDirectory() as folder:
        train(0, 1, args.seed, folder)
        mp.spawn(train, (2, args.seed, folder), nprocs=2)
        for world in (1, 2):
            found = [torch.load(Path(folder) / f"{world}_{rank}.pt") for rank in range(world)]
            if world == 1:
                alone = found[0]
            gap = max((found[0]["weights"][n] - w).abs().max().item() for n, w in alone["weights"].items())
            share = max(one["state"] for one in found) / alone["state"]
            print(f"processes {world}, last loss: {found[0]['losses'][-1]:.4f}")
            print(f"processes {world}, mean of the processes' means: {found[0]['means'][-1]:.4f}")
            print(f"processes {world}, largest difference of a weight, in millionths: {1e6 * gap:.3f}")
            print(f"processes {world}, share of the optimizer state: {share:.3f}")
            left.plot(found[0]["losses"], ["-", "--"][world - 1], lw=5 - 2 * world, label=f"by {world}")
            right.bar(str(world), share)
    left.set(title="loss of each step", xlabel="step")
    left.legend()
    right.set(title="optimizer state that one process holds", xlabel="processes")
    figure.tight_layout()
    figure.savefig(args.plot, dpi=90)
