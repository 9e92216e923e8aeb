"""Counts what an engine saves: a cache of keys and values, rows that come and go, and beginnings that are shared.

python docs/guide/examples/14_engine.py [--seed 0] [--plot PATH]
"""

import argparse
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch

from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams, sample
from llm.model.config import GPTConfig
from llm.model.gpt import GPT

ROWS, LENGTHS, PROMPT = 4, (4, 40, 8, 12, 30, 6, 20, 16), 24

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--plot", default="docs/guide/images/14_engine.png")
args = parser.parse_args()
random = torch.Generator().manual_seed(args.seed)

# A network with random weights: it talks nonsense, but it must talk the same nonsense both ways.
net = GPT(GPTConfig(n_layer=2, n_head=2, n_kv_head=2, head_dim=32, n_embd=64, seq_len=256, vocab_size=128))
net.init_weights(args.seed).eval()
for parameter in net.parameters():
    parameter.data.normal_(std=0.15, generator=random)
tokenizer = SimpleNamespace(has_tools=False, stop_ids=set())  # these answers end by their length alone
prompts = torch.randint(128, (len(LENGTHS), PROMPT), generator=random)
prompts[:, :20] = prompts[0, :20]  # all begin alike, as conversations with one system prompt do


def plain(prompt: list[int], n: int) -> tuple[list[int], int]:
    """Return n greedy tokens by whole passes over everything so far, and the tokens that went through the network."""
    ids, computed = list(prompt), 0
    for _ in range(n):
        with torch.inference_mode():
            ids.append(net(torch.tensor([ids]))[0, -1].argmax().item())
        computed += len(ids) - 1
    return ids[len(prompt) :], computed


engine = Engine(net, tokenizer, max_rows=ROWS, frozen=True)
requests = [
    engine.submit(prompt, SamplingParams(temperature=0, max_new_tokens=n))
    for prompt, n in zip(prompts.tolist(), LENGTHS, strict=True)
]
steps, seen = 0, {}
while engine.has_work:
    for event in engine.step():
        seen.setdefault(requests.index(event.request), []).append(steps)
    steps += 1

found = [plain(prompt, n) for prompt, n in zip(prompts.tolist(), LENGTHS, strict=True)]
same = sum(ids == list(request.ids) for (ids, _), request in zip(found, requests, strict=True))
print(f"answers equal to plain passes: {same}")
print(f"tokens computed without a cache: {sum(computed for _, computed in found)}")
print(f"tokens computed with a cache: {len(LENGTHS) * (PROMPT - 1) + sum(LENGTHS)}")
print(f"steps one answer after the other: {len(LENGTHS) + sum(LENGTHS)}")
print(f"steps of the engine with {ROWS} rows: {steps}")
print(f"prompts whose beginning was read before: {engine.stats()['prefix_hits']}")

logits = torch.tensor([2.0, 1.0, 0.0]).expand(20_000, 3)
draws = torch.rand(20_000, generator=random, dtype=torch.float64)
for temperature in (0.5, 1.0, 2.0):
    ids = sample(logits, SamplingParams(temperature=temperature), draws)
    print(f"temperature {temperature}, share of the likeliest token: {(ids == 0).float().mean():.3f}")

for number, at in seen.items():
    plt.barh(number, at[-1] - at[0] + 1, left=at[0], color=plt.cm.tab10(number))
plt.gca().set(
    xlim=(0, steps),
    xlabel="step of the engine",
    ylabel="request",
    title=f"{ROWS} rows: a new request joins when one ends",
)
plt.gcf().set_size_inches(7, 3.2)
plt.tight_layout()
plt.savefig(args.plot, dpi=90)
