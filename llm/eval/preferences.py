"""Scores of preferences: how often, and by how much, the better answer gets the higher reward; wins by a rule."""

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


def free_scores(net, tokenizer, rows: Sequence[tuple], max_new_tokens: int, batch_size: int = 32) -> list[float]:
    """Return the scores, by their rules, of greedy answers to the prompts of `rows`, (source, row) each."""
    engine, scores = Engine(net, tokenizer), []
    params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        answers = engine.generate([render_prompt(tokenizer, row["messages"]) for _, row in part], params)
        texts = [tokenizer.decode(answer[0].ids) for answer in answers]
        scores += [source.score(row, text) for (source, row), text in zip(part, texts, strict=True)]
    return scores
