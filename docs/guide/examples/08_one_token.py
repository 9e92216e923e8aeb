"""Follow one token from a parquet file to its loss, and one prompt to its reply: [--seed N] [--plot FILE]."""

import argparse
import tempfile

import pandas
import torch

from llm.cli.compose import compose
from llm.data.documents import LocalDocuments, texts
from llm.data.embedded import documents
from llm.data.loader import StepLayout, TextSteps
from llm.inference import Engine, SamplingParams
from llm.inference.inside import look_inside
from llm.model import GPT, GPTConfig
from llm.optim import build_optimizer
from llm.tokenizer import Tokenizer

STEPS, PLACE = 100, 20  # steps of training; the place that is followed


def to_loss(folder: str, seed: int) -> tuple[GPT, Tokenizer]:
    """Write a parquet file, read, tokenise and pack it, compute a loss, train."""
    for name, split, n in (("train.parquet", "train", 3000), ("val.parquet", "test", 50)):
        pandas.DataFrame({"text": list(documents(split, n, seed=1))}).to_parquet(f"{folder}/{name}")
    source = LocalDocuments(folder)
    tokenizer = Tokenizer.train(texts(source), vocab_size=512)
    document = next(texts(source))
    print(f"1. document: {document[:40]!r} ...\n2. tokens: {tokenizer.encode_document(document)[:8].tolist()} ...")
    print(f"bytes per token: {len(document.encode()) / len(tokenizer.encode(document)):.2f}")
    steps = TextSteps(source, tokenizer, StepLayout(seq_len=64, rows_per_micro=16)).steps()
    inputs, targets = next(steps)["micro"][0].values()  # (16, 64) each
    token, goal = (tokenizer.decode([ids[0, PLACE].item()]) for ids in (inputs, targets))
    print(f"3. inputs of a step: {tuple(inputs.shape)}; place {PLACE} of row 0 reads {token!r}, must predict {goal!r}")
    shape = {"n_layer": 4, "n_head": 4, "n_kv_head": 4, "head_dim": 32, "n_embd": 128, "seq_len": 64}
    net = GPT(GPTConfig(**shape, vocab_size=tokenizer.vocab_size)).init_weights(seed)
    optimizer = build_optimizer(net, compose("train", ["optim=muon_2025"]).optim)
    for number in range(STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1.0, 2 * (1 - number / STEPS))
        if number in (0, STEPS):
            losses = net(inputs, targets, reduction="none").detach()  # (16, 64), nats
            for name, loss in (("followed token", losses[0, PLACE]), ("whole first step", losses.mean())):
                print(f"loss of the {name} after {number} steps: {loss:.3f}")
        net(*next(steps)["micro"][0].values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval(), tokenizer


def to_reply(net: GPT, tokenizer: Tokenizer, plot: str | None) -> None:
    """Continue a prompt by the engine, and again by whole passes; draw what each layer expects."""
    prompt = [tokenizer.bos_id, *tokenizer.encode("The pet of")]
    ((sample,),) = Engine(net, tokenizer).generate([prompt], SamplingParams(temperature=0, max_new_tokens=20))
    ids = list(prompt)
    while len(ids) < len(prompt) + len(sample.ids):
        ids.append(net(torch.tensor([ids]))[0, -1].argmax().item())
    print(f"4. reply: {tokenizer.decode(sample.ids)!r}")
    print(f"tokens that differ without the cache: {sum(a != b for a, b in zip(prompt + sample.ids, ids, strict=True))}")
    print(f"tokens fed with the cache: {len(ids) - 1}\ntokens fed without: {sum(range(len(prompt), len(ids)))}")
    if plot:
        from matplotlib import pyplot as plt

        inside, n = look_inside(net, tokenizer, ids), len(ids) - 1
        shares = [inside.lens(layer).softmax(-1)[torch.arange(n), ids[1:]].tolist() for layer in range(5)]
        figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
        image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, origin="lower")
        figure.colorbar(image, label="its probability")
        axes.set_xticks(range(n), [repr(token)[1:-1] for token in inside.tokens[1:]], rotation=60)
        axes.set(ylabel="blocks passed", xlabel="the token that came next")
        figure.savefig(plot, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE", help="draw the picture of the chapter into this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        to_reply(*to_loss(folder, args.seed), args.plot)
