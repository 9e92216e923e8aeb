"""PPO: answers are compared with what a critic expected, token by token (arXiv 1707.06347).

The critic is a scalar head on the network itself, zero at the start: one pass gives the log-probabilities of tokens and
the values of the states before them. A rollout answers questions, rewards the last sampled token of each answer, takes
`stage.kl` times the KL divergence from the parent (k1) from the reward of every token, and makes advantages by GAE
(arXiv 1506.02438) that are whitened over all sampled tokens of the step. Then it serves `stage.updates_per_rollout`
updates of all its answers: the clipped surrogate plus `stage.value_coef` times the clipped value loss, both as means
over the sampled tokens. Conversations are rehearsed as in `llm.stages.grpo`. The critic ends with its training: model/
has the parent's shape.
"""

import time
from functools import partial
from pathlib import Path

import torch

from llm import objectives
from llm.data.balance import of_rollout
from llm.parallel import collectives
from llm.parallel.strategy import full_model
from llm.stages.choices import check_overlong
from llm.stages.common import BuiltStage, load_parent
from llm.stages.rollout_stage import AnswerObjective, build_stage, read_task
from llm.stages.rollouts import Reference, RolloutSteps, add_old_logprobs, at_least_one, counts, micro_batches_of


class CriticSteps(RolloutSteps):
    """Steps whose answers are compared with the critic's values.

    reference: the parent's network, if there is a KL term.
    """

    def __init__(self, *args, reference: Reference | None = None, **more):
        super().__init__(*args, **more)
        self.reference = reference

    def rollout(self, step: int) -> dict:
        groups = self.ask(self.share(self.questions.take(self.stage.prompts_per_step)), step)
        answers = [answer for group in groups for answer in group.answers]
        rewards = self.totals(groups).flatten().tolist()
        ids, masks = [a.ids for a in answers], [a.mask for a in answers]
        columns = {
            "logprobs_engine": [a.logprobs for a in answers],
            "rewards": [at_the_end(a.mask, reward) for a, reward in zip(answers, rewards, strict=True)],
            "answer": list(range(len(answers))),
        }
        micro = micro_batches_of(ids, masks, self.rows_per_micro, **columns)
        self.add_passes(micro)
        numbers = add_advantages(micro, self.stage)
        self.log_answers(step, groups, answer_means(micro, len(answers)))
        n_sampled, n_tokens = counts(ids, masks)
        self.balance += of_rollout(
            list(zip(ids, masks, strict=True)), [True] * len(ids), [a.is_finished for a in answers]
        )
        metrics = self.answer_metrics(groups) | numbers
        return {"micro": micro, "n_trained": at_least_one(n_sampled), "n_tokens": n_tokens, "metrics": metrics}

    def add_passes(self, micro: list[dict]) -> None:
        """Add what the parent says of the answers, and what this network and its critic say before the updates."""
        begin, net = time.perf_counter(), self.engine.net
        if self.reference is not None:
            self.reference.add(micro, net.device, net.compute_dtype)
        add_old_logprobs(full_model(net), micro)
        self.seconds["forward"] += time.perf_counter() - begin


def at_the_end(mask: list[int], reward: float) -> list[float]:
    """Return rewards of an answer's tokens: `reward` at the last sampled one, where `mask` is 1, and 0 elsewhere."""
    rewards = [0.0] * len(mask)
    rewards[max(i for i, sampled in enumerate(mask) if sampled)] = reward
    return rewards


def add_advantages(micro: list[dict], stage) -> dict[str, float]:
    """Add `advantages` and `returns` (B, T) to the micro-batches of a step; returns numbers to be logged.

    They have logprobs_old, values_old, rewards, and with a KL term logprobs_ref, the last two of which are taken out.
    The advantages are whitened over the sampled tokens of all processes, whose numbers are returned; all of them call
    this together.
    """
    masks = [one["targets"] >= 0 for one in micro]
    kl = []
    for one, mask in zip(micro, masks, strict=True):
        rewards = one.pop("rewards")
        if "logprobs_ref" in one:
            kl.append(objectives.kl_k1(one["logprobs_old"], one.pop("logprobs_ref"), mask))
            rewards = rewards - stage.kl * kl[-1]
        found = objectives.gae(rewards, one["values_old"], mask, stage.gamma, stage.lam)
        one["advantages"], one["returns"] = found

    def sampled(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([tensor[mask] for tensor, mask in zip(tensors, masks, strict=True)])

    errors, returns = (sampled([one[name] for one in micro]) for name in ("advantages", "returns"))
    numbers = critic_numbers(errors, returns)
    if kl:
        total, count = collectives.all_reduce_sum([sampled(kl).sum().item(), float(len(errors))])
        numbers["kl"] = total / max(count, 1.0)
    white = objectives.whiten(errors, torch.ones_like(errors, dtype=torch.bool), add_up=collectives.all_reduce_sum)
    for one, mask, part in zip(micro, masks, white.split([int(mask.sum()) for mask in masks]), strict=True):
        one["advantages"][mask] = part
    return numbers


def critic_numbers(errors: torch.Tensor, returns: torch.Tensor) -> dict[str, float]:
    """Return the mean value of the critic, and the share of the returns' variance that its values explain.

    errors: returns less values (N,) of the sampled tokens of this process; the numbers are those of all of them. The
    share is 1 - var(errors) / var(returns): 1 for a perfect critic, 0 for a constant one or returns that do not vary.
    """
    errors, returns = errors.double(), returns.double()
    sums = [float(len(errors))] + [x.sum().item() for x in (errors, errors.square(), returns, returns.square())]
    n, error, error_squares, gain, gain_squares = collectives.all_reduce_sum(sums)
    n = max(n, 1.0)
    left, variance = error_squares / n - (error / n) ** 2, gain_squares / n - (gain / n) ** 2
    share = 1 - left / variance if variance > 1e-12 else 0.0
    return {"value": (gain - error) / n, "explained_variance": share}


def answer_means(micro: list[dict], n: int) -> list[float]:
    """Return the mean advantage of each of `n` answers, by their numbers `answer`, which are taken out."""
    means = [0.0] * n
    for one in micro:
        found = objectives.masked_mean(one["advantages"], one["targets"] >= 0).tolist()
        for number, mean in zip(one.pop("answer")[:, 0].long().tolist(), found, strict=True):
            means[number] = mean
    return means


class ActorCriticObjective(AnswerObjective):
    """Loss of a micro-batch of answers: PPO's clipped surrogate, and `stage.value_coef` times the clipped value loss.

    Rehearsed conversations, which have no advantages, count by their weighted cross-entropy.
    """

    def __init__(self, stage):
        self.stage = stage

    def __call__(self, net, micro: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs, targets, stage = micro["inputs"], micro["targets"], self.stage
        if "advantages" not in micro:
            loss, values = net(inputs, targets, reduction="sum", token_weights=micro.get("weights"), scalars=True)
            return loss + 0.0 * values.sum(), {}  # processes that train together want a gradient of the head too
        logprobs, values = objectives.token_logprobs_and_values(net, inputs, targets)
        mask, old = targets >= 0, micro["logprobs_old"]
        losses, low, high = objectives.PPO_LOSS(logprobs, old, micro["advantages"], mask, stage.clip, stage.clip)
        errors, cut = objectives.value_loss(values, micro["values_old"], micro["returns"], mask, stage.value_clip)
        sums = self.sums(logprobs.detach(), old, micro["logprobs_engine"], mask)
        sums |= {"clip_low": low.sum(), "clip_high": high.sum(), "value_clip": cut.sum()}
        sums["value_loss"] = errors.detach().sum()
        return objectives.PPO_LOSS.total(losses + stage.value_coef * errors, mask), sums


def build(cfg, parent: Path) -> BuiltStage:
    """Build the parent's network with a critic, rewarded on the task `stage.task` (or `data.rl`)."""
    check_overlong(cfg.stage)
    task = read_task(cfg, parent)
    net, tokenizer = load_parent(parent, cfg, scalar_head=True)  # after all rows were checked
    torch.nn.init.zeros_(net.scalar_head.weight)  # the parent's would be of a reward model
    steps = partial(CriticSteps, reference=Reference(net) if cfg.stage.kl else None)
    return build_stage(cfg, net, tokenizer, task, ActorCriticObjective(cfg.stage), steps)
