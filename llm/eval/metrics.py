"""Metrics of language models as torchmetrics: for evaluations here, and for code of your own.

    metric = BitsPerByte(tokenizer.token_bytes())
    for inputs, targets in batches:
        metric.update(net(inputs, targets, reduction="none"), targets)
    metric.compute()

Every process adds what it has measured itself, and `compute` joins the processes. States are sums in fp64, so results
hang neither on the number of processes nor on the size of batches.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric


class BitsPerByte(Metric):
    """Summed nats / (ln 2 x summed bytes), a loss that is comparable across vocabularies; nan without bytes.

    token_bytes: (V,) bytes per token, specials 0: targets without bytes count on neither side.
    """

    full_state_update = False
    higher_is_better = False
    nats: torch.Tensor
    bytes: torch.Tensor

    def __init__(self, token_bytes: np.ndarray | torch.Tensor, **kwargs: Any):
        super().__init__(**kwargs)
        self.register_buffer("token_bytes", torch.as_tensor(token_bytes), persistent=False)
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: torch.Tensor, targets: torch.Tensor) -> None:
        """Add the losses (B, T) in nats of targets (B, T), -1 = ignored."""
        nats, targets = nats.to(self.device), targets.to(self.device)
        n_bytes = self.token_bytes[targets.clamp(min=0)] * (targets >= 0)
        self.nats += torch.where(n_bytes > 0, nats, 0.0).sum()
        self.bytes += n_bytes.sum().long()

    def compute(self) -> torch.Tensor:
        """Return bits per byte, ()."""
        return self.nats / (math.log(2) * self.bytes.double())


class TaskAccuracy(Metric):
    """Accuracy on a task's items with its standard error, and both centred: 0 = guessing, 1 = all right.

    baseline: accuracy of guessing. The standard error of right and wrong answers is sqrt(p (1 - p) / n).
    """

    full_state_update = False
    higher_is_better = True
    sums: torch.Tensor

    def __init__(self, baseline: float = 0.0, **kwargs: Any):
        super().__init__(**kwargs)
        self.baseline = baseline
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, shares: Sequence[float] | torch.Tensor) -> None:
        """Add items: True or False of each, or the share of its answers that are right."""
        shares = torch.as_tensor(shares, dtype=torch.float64, device=self.device)
        self.sums += torch.stack([torch.ones_like(shares).sum(), shares.sum(), shares.square().sum()])

    def compute(self) -> dict[str, torch.Tensor]:
        """Return {"accuracy", "n", "stderr", "centered", "centered_stderr"}, () each; nan without items."""
        n, total, squares = self.sums
        accuracy, room = total / n, 1 - self.baseline
        stderr = ((squares / n - accuracy.square()).clamp(min=0) / n).sqrt()
        centered = (accuracy - self.baseline) / room
        values = {"accuracy": accuracy, "n": n.long(), "stderr": stderr}
        return values | {"centered": centered, "centered_stderr": stderr / room}


class PassAtK(Metric):
    """Chance that at least one of k answers is right, mean over items: {"pass@k": ()} for each of `ks`."""

    full_state_update = False
    higher_is_better = True
    sums: torch.Tensor
    items: torch.Tensor

    def __init__(self, ks: Sequence[int], **kwargs: Any):
        super().__init__(**kwargs)
        self.ks = sorted(set(ks))
        self.add_state("sums", torch.zeros(len(self.ks), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("items", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, n: int, correct: Sequence[int]) -> None:
        """Add items with n answers each, of which so many are right. Raises ValueError for a k above n."""
        chances = [[pass_at_k(n, c, k) for k in self.ks] for c in correct]
        self.sums += torch.tensor(chances, dtype=torch.float64, device=self.device).view(-1, len(self.ks)).sum(0)
        self.items += len(correct)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return {"pass@k": ()}; nan without items."""
        return {f"pass@{k}": mean for k, mean in zip(self.ks, self.sums / self.items, strict=True)}


class Core(Metric):
    """The CORE metric: mean over tasks of centred accuracies, {"core", "core_stderr", "core/<task>"}, () each.

    baselines: accuracy of guessing by task. tasks: a `TaskAccuracy` for each.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, baselines: Mapping[str, float], **kwargs: Any):
        super().__init__(**kwargs)
        self.names = list(baselines)
        self.tasks = torch.nn.ModuleList(TaskAccuracy(baseline, **kwargs) for baseline in baselines.values())

    def task(self, name: str) -> TaskAccuracy:
        """Return the accuracy of one task."""
        return self.tasks[self.names.index(name)]

    def update(self, name: str, right: Sequence[bool] | torch.Tensor) -> None:
        """Add examples of a task, right or wrong."""
        self.task(name).update(right)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return the mean of the tasks, its standard error with independent errors, and the tasks; nan without any."""
        found = [task.compute() for task in self.tasks]
        centered = torch.stack([one["centered"] for one in found])
        stderr = torch.stack([one["centered_stderr"] for one in found]).square().sum().sqrt() / len(found)
        by_task = {f"core/{name}": value for name, value in zip(self.names, centered, strict=True)}
        return {"core": centered.mean(), "core_stderr": stderr} | by_task

    def reset(self) -> None:
        """Forget all examples."""
        super().reset()
        for task in self.tasks:
            task.reset()


class RewardStatistics(Metric):
    """Mean, standard deviation and extremes of rewards, and the share of groups whose answers are rewarded alike.

    Such groups teach nothing to methods that compare answers to one question.
    """

    full_state_update = False
    sums: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("lowest", torch.tensor(math.inf, dtype=torch.float64), dist_reduce_fx="min")
        self.add_state("highest", torch.tensor(-math.inf, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, rewards: torch.Tensor) -> None:
        """Add the rewards (P, G) of G answers to each of P questions."""
        rewards = rewards.to(self.device, torch.float64)
        ones, alike = torch.ones_like(rewards), rewards.amax(1) == rewards.amin(1)
        counts = (ones.sum(), rewards.sum(), rewards.square().sum(), ones[:, 0].sum(), alike.double().sum())
        self.sums += torch.stack(counts)
        self.lowest = torch.minimum(self.lowest, rewards.min())
        self.highest = torch.maximum(self.highest, rewards.max())

    def compute(self) -> dict[str, torch.Tensor]:
        """Return {"reward", "reward_std", "reward_min", "reward_max", "reward_alike"}, () each."""
        n, total, squares, groups, alike = self.sums
        mean = total / n
        spread = (squares / n - mean.square()).clamp(min=0).sqrt()
        values = {"reward": mean, "reward_std": spread, "reward_min": self.lowest, "reward_max": self.highest}
        return values | {"reward_alike": alike / groups}


def pass_at_k(n: int, n_correct: int, k: int) -> float:
    """Return the chance that at least one of k samples, drawn from n of which `n_correct` are right, is right.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374).
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= {n} samples")
    return 1.0 - math.comb(n - n_correct, k) / math.comb(n, k)


def numbers(metric: Metric) -> dict[str, float]:
    """Return what a metric of several values has measured, of all processes, as Python's numbers."""
    return {name: value.item() for name, value in metric.compute().items()}
