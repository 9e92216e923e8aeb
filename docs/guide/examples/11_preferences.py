"""Teach a small network that knows two answers to prefer one of them, by four losses: [--seed N] [--plot FILE]."""

import argparse
from copy import deepcopy

import torch

from llm.model import GPT, GPTConfig
from llm.objectives import PREFERENCE_LOSSES, PreferenceSettings
from llm.stages.dpo import PreferenceObjective, Reference
from llm.tokenizer import Tokenizer
from llm.tokenizer.chat_format import render_conversation

TOKENIZER = Tokenizer([bytes([one]) for one in range(256)])
NAMES, OTHERS = ("Ada", "Bob", "Eve", "Ian", "Kim", "Leo", "Mia", "Tom"), ("Ann", "Joe", "Max", "Zoe")
LENGTH, STEPS = 64, 40


def pairs(names: tuple) -> dict:
    """Return a micro-batch of a polite (chosen) and a rude (rejected) answer per name, in turns."""
    ids, targets = torch.zeros(2 * len(names), LENGTH, dtype=torch.long), torch.full((2 * len(names), LENGTH), -1)
    for row, answer in enumerate(answer for name in names for answer in (f"Yes, {name}, please.", f"Go away, {name}.")):
        messages = [{"role": "user", "content": f"{names[row // 2]}: may I come in?"}]
        messages.append({"role": "assistant", "content": answer})
        tokens, mask = (torch.tensor(x) for x in render_conversation(TOKENIZER, {"messages": messages}))
        ids[row, : len(tokens)] = tokens
        targets[row, : len(tokens) - 1] = torch.where(mask[1:] > 0, tokens[1:], -1)
    return {"inputs": ids, "targets": targets, "last": (targets >= 0).int().cumsum(1).argmax(1)}


def train(net: GPT, steps: int, rate: float, loss) -> None:
    """Minimise loss(net) by AdamW, the rate falling to zero."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
        schedule.step()


def logps(net: GPT, micro: dict) -> torch.Tensor:
    """Return the mean log-probability of chosen and of rejected answers, (2,)."""
    with torch.no_grad():
        return -net(micro["inputs"], micro["targets"], reduction="none").sum(1).view(-1, 2).mean(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE", help="draw the picture of the chapter into this file")
    args = parser.parse_args()
    shape = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "head_dim": 32, "n_embd": 64, "seq_len": LENGTH}
    parent = GPT(GPTConfig(**shape, vocab_size=TOKENIZER.vocab_size)).init_weights(args.seed)
    micro, held_out = pairs(NAMES), pairs(OTHERS)
    train(parent, 120, 3e-3, lambda net: net(micro["inputs"], micro["targets"]))
    Reference(parent).add([micro, held_out], parent)
    shown = {"parent": logps(parent, held_out)}
    for name in ("dpo", "ipo", "orpo", "simpo"):
        net, loss = deepcopy(parent), PREFERENCE_LOSSES[name]
        objective = PreferenceObjective(loss, PreferenceSettings(loss.beta))
        print(f"{name}, loss before training: {objective(net, held_out)[0].item() / len(OTHERS):.3f}")
        train(net, STEPS, 3e-4, lambda net, objective=objective: objective(net, micro)[0] / len(NAMES))
        print(f"{name}, accuracy on held-out pairs: {objective(net, held_out)[1]['accuracy'] / len(OTHERS):.2f}")
        shown[name] = logps(net, held_out)
    for name, (chosen, rejected) in shown.items():
        print(f"{name}, log-probability of a chosen answer: {chosen:.1f}")
        print(f"{name}, log-probability of a rejected answer: {rejected:.1f}")
    if args.plot:
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
        for shift, which, colour in ((-0.2, "chosen", "tab:green"), (0.2, "rejected", "tab:red")):
            values = [pair[0 if which == "chosen" else 1].item() for pair in shown.values()]
            axes.bar(
                [place + shift for place in range(len(shown))], values, 0.4, color=colour, label=f"{which} answers"
            )
        axes.set(xticks=range(len(shown)), xticklabels=shown, ylabel="mean log-probability (nats)")
        axes.legend()
        figure.savefig(args.plot, dpi=80)
