"""Scores of preferences: how often, and by how much, the better answer gets the higher reward; wins over answers."""

import math
from collections.abc import Callable, Sequence

import torch

from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.objectives import last_values
from llm.parallel import collectives
from llm.tokenizer.chat_format import render_prompt

Rewards = Callable[[torch.nn.Module, dict], torch.Tensor]  # (network, micro-batch) -> a number per sequence (B,)
Z = 1.96  # of a normal distribution: 95 % lie within
RIDGE, NEWTON_STEPS = 0.01, 50  # of the logistic regression that controls for length
FIELDS = ("accuracy", "accuracy_low", "accuracy_high", "margin", "margin_stderr", "n")


def scalar_rewards(net, micro: dict) -> torch.Tensor:
    """Return the rewards (B,) of a network with a scalar head: its numbers at the last tokens."""
    return last_values(net.scalars(micro["inputs"]), micro["last"])


@torch.no_grad()
def preference_scores(net, batches: Sequence[dict], rewards: Rewards) -> dict[str, float]:
    """Return the `FIELDS` of held-out preferences; all processes call it, each with its share of the batches.

    batches: those of `llm.data.preferences`: pairs, or labelled answers, of which each good one is compared with each
    bad one. accuracy: share of comparisons that the better answer wins, ties half, with its 95 % interval (Wilson);
    margin: mean difference of the rewards; n: pairs, or the smaller number of good and of bad answers.
    """
    good, bad, is_paired = [], [], True
    for micro in batches:
        micro = {key: value.to(net.device) for key, value in micro.items()}
        found = rewards(net, micro).float().cpu()
        labels = micro["labels"].cpu() if "labels" in micro else torch.arange(len(found)) % 2 == 0
        is_paired = is_paired and "labels" not in micro
        good += found[labels].tolist()
        bad += found[~labels].tolist()
    every = collectives.all_gather_object((good, bad, is_paired))
    better, worse = (torch.tensor([x for one in every for x in one[side]]).double() for side in (0, 1))
    return compared(better, worse, all(paired for *_, paired in every))


def compared(better: torch.Tensor, worse: torch.Tensor, is_paired: bool) -> dict[str, float]:
    """Return the `FIELDS` of rewards (N,) of better and of worse answers; not paired: of each with each."""
    if not len(better) or not len(worse):
        return {}
    n, left = min(len(better), len(worse)), better if is_paired else better.unsqueeze(1)
    accuracy = ((left > worse).double() + 0.5 * (left == worse).double()).mean().item()
    if is_paired:
        variance = (better - worse).var(correction=0).item() / n
    else:
        variance = better.var(correction=0).item() / len(better) + worse.var(correction=0).item() / len(worse)
    margin = (better.mean() - worse.mean()).item()
    return dict(zip(FIELDS, (accuracy, *interval(accuracy, n), margin, math.sqrt(variance), n), strict=True))


def interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `n` by Wilson's formula, which holds near 0 and 1 too."""
    middle, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)


def free_answers(net, tokenizer, conversations: Sequence[dict], max_new_tokens: int, batch_size: int = 32) -> list[str]:
    """Return greedy answers to the prompts of conversations."""
    engine, texts = Engine(net, tokenizer), []
    params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    for start in range(0, len(conversations), batch_size):
        prompts = [render_prompt(tokenizer, one["messages"]) for one in conversations[start : start + batch_size]]
        texts += [tokenizer.decode(answer[0].ids) for answer in engine.generate(prompts, params)]
    return texts


def wins(now: Sequence[float], before: Sequence[float]) -> list[float]:
    """Return 1 for each pair of scores whose first is the larger one, 0 for the smaller one, and 0.5 for a tie."""
    return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(now, before, strict=True)]


def length_controlled(won: Sequence[float], longer: Sequence[float]) -> tuple[float, float]:
    """Return the win rate, and its standard error, that answers as long as the others would have had.

    won: of each comparison 1, 0 or 0.5; longer: by how much the answer is longer than the other one. Judges like length
    for its own sake, so a logistic regression tells the two apart (length-controlled AlpacaEval, arXiv 2404.04475):

        P(win) = s(theta + phi tanh(longer / std(longer)))        rate = s(theta)

    s is the sigmoid. The term of AlpacaEval for the difficulty of each prompt needs many models and is left out. A
    ridge of `RIDGE` on both numbers keeps them finite where all comparisons are won. The error is that of theta (delta
    method).
    """
    y, x = torch.tensor(won).double(), torch.tensor(longer).double()
    deviation = x.std(correction=0)
    x = torch.tanh(x / deviation) if deviation > 0 else torch.zeros_like(x)
    design, weights = torch.stack([torch.ones_like(x), x], 1), torch.zeros(2).double()
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(design @ weights)
        curvature = design.T @ (design * (p * (1 - p)).unsqueeze(1)) + RIDGE * torch.eye(2)
        weights = weights + torch.linalg.solve(curvature, design.T @ (y - p) - RIDGE * weights)
    rate = torch.sigmoid(weights[0])
    error = rate * (1 - rate) * torch.linalg.inv(curvature)[0, 0].sqrt()
    return rate.item(), error.item()
