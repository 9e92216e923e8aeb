"""Trains a table of probabilities by rewards alone, with the project's advantages and losses. No network is needed.

python docs/guide/examples/12_rl.py [--seed 0] [--plot PATH]
"""

import argparse

import matplotlib.pyplot as plt
import torch

from llm import objectives

QUESTIONS, CHOICES, ANSWERS, STEPS, RATE = 200, 20, 16, 60, 4.0


def start(seed: int) -> torch.Tensor:
    """Return logits (QUESTIONS, CHOICES). Choice 0 is right; some questions are nearly known, many are hard."""
    logits = torch.randn(QUESTIONS, CHOICES, generator=torch.Generator().manual_seed(seed))
    logits[:, 0] += torch.linspace(-2.5, 3.5, QUESTIONS)
    return logits


def pass_at(logits: torch.Tensor, k: int) -> float:
    """Return the chance that one of k drawn answers is right, as the mean over the questions."""
    return (1 - (1 - logits.softmax(1)[:, 0]) ** k).mean().item()


def train(seed: int, advantage: str, loss: str = "reinforce", rollouts: int = STEPS, updates: int = 1):
    """Return the logits, (pass@1, share of questions with a signal) of each rollout, the largest ratio of the last."""
    logits, draw, seen = start(seed), torch.Generator().manual_seed(seed), []
    for _ in range(rollouts):
        drawn = torch.multinomial(logits.softmax(1), ANSWERS, replacement=True, generator=draw)  # the rollout
        rewards = (drawn == 0).float()  # 1 for the right answer, 0 for all others
        advantages = objectives.group_advantages(advantage, rewards)  # (QUESTIONS, ANSWERS)
        seen.append((pass_at(logits, 1), (advantages != 0).any(1).float().mean().item()))
        mask, old = torch.ones_like(drawn, dtype=torch.bool), logits.log_softmax(1).gather(1, drawn)
        for _ in range(updates):
            logits.requires_grad_()
            logprobs = logits.log_softmax(1).gather(1, drawn)
            losses, _, _ = objectives.POLICY_LOSSES[loss](logprobs, old, advantages, mask)
            (gradient,) = torch.autograd.grad(losses.mean(1).sum(), logits)
            logits = logits.detach() - RATE * gradient
    ratio = (logits.log_softmax(1).gather(1, drawn) - old).exp().max().item()
    return logits, seen, ratio


parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--plot", default="docs/guide/images/12_rl.png")
args = parser.parse_args()

first, (left, right) = start(args.seed), plt.subplots(1, 2, figsize=(9, 3.2))[1]
print(f"before, pass@1: {pass_at(first, 1):.3f}\nbefore, pass@16: {pass_at(first, 16):.3f}")
for rule in ("centred", "max_rl"):
    logits, seen, _ = train(args.seed, rule)
    print(f"{rule}, signal in the first rollout: {seen[0][1]:.3f}\n{rule}, signal in the last: {seen[-1][1]:.3f}")
    print(f"{rule}, pass@1: {pass_at(logits, 1):.3f}\n{rule}, pass@16: {pass_at(logits, 16):.3f}")
    left.plot([one[0] for one in seen], label=rule)
    right.plot([one[1] for one in seen], label=rule)
for loss in ("reinforce", "dapo"):
    print(f"{loss}, largest ratio after 20 updates: {train(args.seed, 'centred', loss, 1, 20)[2]:.2f}")

rewards, values, mask = torch.zeros(1, 37), torch.zeros(1, 37), torch.ones(1, 37, dtype=torch.bool)
rewards[0, -1] = 1.0  # an answer of 37 tokens, rewarded at its end
for lam in (1.0, 0.95):
    advantages, _ = objectives.gae(rewards, values, mask, lam=lam)
    print(f"lam {lam}, advantage of the first token: {advantages[0, 0]:.3f}")

left.set(title="pass@1", xlabel="rollout", ylim=(0, 1))
right.set(title="share of questions with a signal", xlabel="rollout", ylim=(0, 1))
left.legend()
plt.tight_layout()
plt.savefig(args.plot, dpi=90)
