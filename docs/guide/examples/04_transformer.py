"""Chapter 4, the Transformer: count its parameters, check its first loss, and read the stream behind every block."""

import argparse
import math

import torch
import torch.nn.functional as F

from llm.data.embedded import documents
from llm.inference.inside import look_inside
from llm.model import GPT, GPTConfig
from llm.model.config import num_params
from llm.tokenizer import Tokenizer

CONTEXT, ROWS = 64, 16
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--plot", help="write the picture to this file")
args = parser.parse_args()

# 1. A network: its shape is a config, its weights are tables and matrices.
texts = list(documents("train", 1500, seed=1))
tokenizer = Tokenizer.train(texts, vocab_size=512)
shape = {"n_layer": 4, "n_head": 2, "n_kv_head": 2, "head_dim": 32, "n_embd": 64}
config = GPTConfig(**shape, seq_len=CONTEXT, vocab_size=tokenizer.vocab_size)
net = GPT(config).init_weights(args.seed)
print(f"parameters counted by formula: {num_params(config)['total']}")
print(f"parameters of the network: {sum(p.numel() for p in net.parameters())}")

# 2. Before training all tokens are equally likely.
stream = torch.tensor([token for text in texts for token in (tokenizer.bos_id, *tokenizer.encode(text))])
generator = torch.Generator().manual_seed(args.seed)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets (ROWS, CONTEXT) from random places of the text; a target is the token behind."""
    starts = torch.randint(len(stream) - CONTEXT - 1, (ROWS, 1), generator=generator)
    pieces = stream[starts + torch.arange(CONTEXT + 1)]
    return pieces[:, :-1], pieces[:, 1:]


print(f"first loss: {net(*batch()).item():.3f}")
print(f"logarithm of the vocabulary: {math.log(tokenizer.vocab_size):.3f}")

# 3. Train it for a few seconds.
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.95))
for step in range(args.steps):
    for group in optimizer.param_groups:
        group["lr"] = 3e-3 * min(1.0, 2 * (1 - step / args.steps))
    net(*batch()).backward()
    optimizer.step()
    optimizer.zero_grad()

# 4. What would the network say if it ended behind block 0, 1, 2, 3 or 4?
losses = torch.zeros(config.n_layer + 1)
held_out = list(documents("test", 40, seed=2))
for text in held_out:
    ids = [tokenizer.bos_id, *tokenizer.encode(text)][:CONTEXT]
    inside, goals = look_inside(net, tokenizer, ids), torch.tensor(ids[1:])
    for layer in range(config.n_layer + 1):
        losses[layer] += F.cross_entropy(inside.lens(layer)[:-1], goals) / len(held_out)
for layer, loss in enumerate(losses):
    print(f"held-out loss behind {layer} blocks: {loss:.2f}")

if args.plot:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2), layout="tight")
    axis.plot(losses, marker="o")
    axis.axhline(math.log(tokenizer.vocab_size), color="gray", linestyle="--", label="all tokens equally likely")
    axis.set(xlabel="blocks passed", ylabel="loss (nats per token)", xticks=range(config.n_layer + 1))
    axis.legend()
    figure.savefig(args.plot, dpi=80)
