"""Render a conversation with its loss mask, and finetune with the mask and without: [--seed N] [--plot FILE]."""

import argparse
from collections.abc import Iterator

import torch

from llm.cli.compose import compose
from llm.data.embedded import documents
from llm.data.loader import ConversationSteps, StepLayout
from llm.model import GPT, GPTConfig
from llm.optim import build_optimizer
from llm.stages.finetune import mixtures
from llm.tokenizer import Tokenizer
from llm.tokenizer.chat_format import render_conversation

STEPS, EVERY, LAYOUT = 120, 20, StepLayout(seq_len=160, rows_per_micro=12)


def batches(mixture, tokenizer: Tokenizer, train_on: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield inputs and targets (12, 160) of packed conversations; targets that are not trained are -1."""
    for step in ConversationSteps(mixture, tokenizer, LAYOUT, train_on=train_on).steps():
        yield step["micro"][0]["inputs"], step["micro"][0]["targets"]


def losses(net: GPT, answers: torch.Tensor, everything: tuple) -> tuple[float, float]:
    """Return the mean loss of held-out tokens that the assistant says, and of all others."""
    with torch.no_grad():
        found = net(*everything, reduction="none")
    others = (everything[1] >= 0) & (answers < 0)
    return found[answers >= 0].mean().item(), found[others].mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE", help="draw the picture of the chapter into this file")
    args = parser.parse_args()
    tokenizer = Tokenizer.train(documents("train", 2000, seed=1), vocab_size=512)
    train, held_out = mixtures(compose("train", ["experiment=tiny", "stage=sft", "data.size=2000"]))
    question = {"role": "user", "content": "What colour is the sky?"}
    ids, mask = render_conversation(tokenizer, {"messages": [question, {"role": "assistant", "content": "Blue."}]})
    marked = [(tokenizer.decode([one]), is_on) for one, is_on in zip(ids, mask, strict=True)]
    print(" ".join(f"[{text}]" if is_on else text for text, is_on in marked))
    print(f"tokens of the conversation: {len(ids)}")
    print(f"tokens of it that are trained: {sum(mask)}")
    targets = next(batches(train, tokenizer, "assistant"))[1]
    print(f"trained share of a step of the mixture: {(targets >= 0).float().mean():.2f}")
    answers = next(batches(held_out, tokenizer, "assistant"))[1]
    everything = next(batches(held_out, tokenizer, "all"))
    shape = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "head_dim": 64, "n_embd": 128, "seq_len": 160}
    curves: dict[str, list[tuple[float, float]]] = {}
    for train_on in ("assistant", "all"):
        net = GPT(GPTConfig(**shape, vocab_size=tokenizer.vocab_size)).init_weights(args.seed)
        optimizer = build_optimizer(net, compose("train", ["optim=muon_2025"]).optim)
        curves[train_on] = [losses(net, answers, everything)]
        for number, batch in zip(range(1, STEPS + 1), batches(train, tokenizer, train_on), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * min(1.0, 2 * (1 - number / STEPS) + 0.02)
            net(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number % EVERY == 0:
                curves[train_on].append(losses(net, answers, everything))
        print(f"train_on={train_on}, loss of answers: {curves[train_on][-1][0]:.3f}")
        print(f"train_on={train_on}, loss of everything else: {curves[train_on][-1][1]:.3f}")
    if args.plot:
        from matplotlib import pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        left.imshow(targets >= 0, aspect="auto", cmap="Greens", vmax=1.6, interpolation="nearest")
        left.set(xlabel="place", ylabel="row of a step", title="green: trained")
        for (name, values), colour in zip(curves.items(), ("C2", "C0"), strict=True):
            for which, (style, label) in enumerate((("-", "answers"), (":", "everything else"))):
                points = [value[which] for value in values]
                right.plot(range(0, STEPS + 1, EVERY), points, colour + style, label=f"{name}: {label}")
        right.set(xlabel="step", ylabel="held-out loss (nats per token)")
        right.legend()
        figure.savefig(args.plot, dpi=80)
