"""Measure with the project's metrics what can be known beforehand: [--seed N] [--plot FILE]."""

import argparse
import math

import numpy as np
import torch

from llm.data.embedded import documents
from llm.eval.metrics import BitsPerByte, PassAtK, TaskAccuracy
from llm.eval.task_scores import chat_core
from llm.tokenizer import Tokenizer

QUESTIONS, ANSWERS, EXAMS, KS = 200, 10, 400, range(1, 11)


def bits_per_byte() -> None:
    """Print loss and bits per byte of guessing, for a vocabulary of bytes and one of 512 tokens."""
    texts = list(documents("test", 200, seed=1))
    learnt = Tokenizer.train(documents("train", 2000, seed=1), vocab_size=512)
    vocabularies = {"bytes": Tokenizer([bytes([one]) for one in range(256)]), "512 tokens": learnt}
    for name, tokenizer in vocabularies.items():
        targets = torch.tensor([token for text in texts for token in tokenizer.encode(text)])
        metric = BitsPerByte(tokenizer.token_bytes())
        metric.update(torch.full(targets.shape, math.log(tokenizer.vocab_size)), targets)
        print(f"guessing {name}, loss per token: {math.log(tokenizer.vocab_size):.3f}")
        print(f"guessing {name}, bits per byte: {metric.compute():.3f}")


def exams(name: str, chances: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Let a model sit an exam per row of chances (EXAMS, QUESTIONS) to be right; print how far scores are off."""
    scores = []
    for right in rng.random(chances.shape) < chances:
        metric = TaskAccuracy()
        metric.update(torch.from_numpy(right))
        scores.append([metric.compute()[name].item() for name in ("accuracy", "stderr")])
    accuracies, errors = np.array(scores).T
    print(f"{name}, standard error that an exam states: {errors.mean():.4f}")
    print(f"{name}, exams within 1.96 of them: {(abs(accuracies - chances.mean()) < 1.96 * errors).mean():.3f}")
    return accuracies


def pass_at_k(chances: np.ndarray, rng: np.random.Generator) -> dict[str, list[float]]:
    """Estimate pass@k from ten answers per question; return the truth and two estimates for every k."""
    counts = rng.binomial(ANSWERS, chances, (50, QUESTIONS))  # right answers, in 50 experiments
    metric = PassAtK(KS)
    metric.update(ANSWERS, counts.flatten().tolist())
    found = {"truth": [(1 - (1 - chances) ** k).mean() for k in KS]}
    found["unbiased, from ten answers"] = [one.item() for one in metric.compute().values()]
    found["plugged in, 1 - (1 - c/n)^k"] = [(1 - (1 - counts / ANSWERS) ** k).mean() for k in KS]
    for name, values in found.items():
        print(f"pass@5, {name}: {values[4]:.3f}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE", help="draw the picture of the chapter into this file")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    bits_per_byte()
    scores = {"choice": {"accuracy": 0.4, "baseline": 0.25}, "problems": {"accuracy": 0.1, "baseline": 0.0}}
    print(f"ChatCORE of 40 % in four choices and 10 % of problems: {chat_core(scores):.3f}")
    chances = rng.beta(0.5, 0.5, (EXAMS, QUESTIONS))  # most questions are easy or hard
    accuracies = exams("other questions each time", chances, rng)
    exams("the same questions each time", chances[:1].repeat(EXAMS, 0), rng)
    curves = pass_at_k(chances[0], rng)
    if args.plot:
        from matplotlib import pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        left.hist(accuracies, bins=np.arange(0.3775, 0.63, 0.01))
        left.set(xlabel=f"accuracy on {QUESTIONS} questions", ylabel=f"exams of {EXAMS}")
        for (name, values), style in zip(curves.items(), ("k-", "C0o", "C1x"), strict=True):
            right.plot(KS, values, style, label=name)
        right.set(xlabel="k", ylabel="pass@k")
        right.legend()
        figure.savefig(args.plot, dpi=80)
