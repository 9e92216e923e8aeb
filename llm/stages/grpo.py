"""Reinforcement learning with verifiable rewards: the GRPO family, by two keys.

Per rollout: draw several answers per question from the current network (calculator included), reward each, and compare
the rewards within the question: `stage.advantage`. `stage.loss` says how the advantages weigh the tokens; the formulas
are in `llm.objectives`. The defaults are on-policy REINFORCE with a group baseline: advantage = reward - mean of the
question's answers (GRPO of arXiv 2402.03300 without the division by the standard deviation, the KL term and the ratio
clip: with one update per rollout the ratio is 1), and the loss is the sum over sampled tokens of -advantage * log p,
divided by the number of sampled tokens of the step. So that what is not rewarded is not forgotten, the loss of some
finetuning conversations can be added (PPO-ptx of InstructGPT, arXiv 2203.02155).
"""

import math
import time
from functools import partial
from pathlib import Path

import torch

from llm import objectives
from llm.data.balance import of_rollout
from llm.parallel import collectives
from llm.parallel.strategy import full_model
from llm.stages.choices import check_policy
from llm.stages.common import BuiltStage, load_parent
from llm.stages.rollout_stage import AnswerObjective, build_stage, read_task
from llm.stages.rollouts import (
    Group,
    Reference,
    RolloutSteps,
    add_old_logprobs,
    at_least_one,
    counts,
    micro_batches_of,
    passed_tokens,
)

SILENT_STEPS = 5  # so many steps in a row without a signal are told
TRIES = 3  # of stage.filter_equal=resample: further draws for groups without a signal


class GroupSteps(RolloutSteps):
    """Steps whose answers are compared within their question.

    reference: the parent's network, if the loss has a KL term.
    """

    def __init__(self, *args, reference: Reference | None = None, **more):
        super().__init__(*args, **more)
        self.reference, self.signal = reference, SignalWatch(self.task.name)
        self.loss = objectives.POLICY_LOSSES[self.stage.loss]

    def rollout(self, step: int) -> dict:
        asked = self.ask(self.share(self.questions.take(self.stage.prompts_per_step)), step)
        asked, kept = self.filtered(asked, step)
        advantages = self.advantages(kept)
        self.log_answers(step, kept, advantages)
        answers = [answer for group in kept for answer in group.answers]
        ids, masks = [a.ids for a in answers], [a.mask for a in answers]
        n_sampled, _ = counts(ids, masks)
        trained = [bool(advantage) or self.reference is not None for advantage in advantages]
        columns = {"advantages": advantages, "logprobs_engine": [a.logprobs for a in answers]}
        micro = micro_batches_of(ids, masks, self.rows_per_micro, trained, **columns)
        self.add_logprobs(micro)
        self.balance += of_rollout(list(zip(ids, masks, strict=True)), trained, [a.is_finished for a in answers])
        return {
            "micro": micro,
            "n_trained": at_least_one(self.loss.units(n_sampled, len(answers), self.stage.max_new_tokens)),
            "n_tokens": passed_tokens(ids, trained),
            "metrics": self.metrics(asked, step),
        }

    def filtered(self, asked: list[Group], step: int) -> tuple[list[Group], list[Group]]:
        """Return all groups asked for, and those that are trained on: `stage.filter_equal`."""
        how = self.stage.filter_equal
        new = asked
        for attempt in range(1, TRIES + 1 if how == "resample" else 1):
            (missing,) = collectives.all_reduce_sum([sum(not self.has_signal(group) for group in new)])
            if not missing:
                break
            new = self.ask(self.share(self.questions.take(int(missing))), step, attempt)
            asked = asked + new
        return asked, asked if how is None else [group for group in asked if self.has_signal(group)]

    def has_signal(self, group: Group) -> bool:
        """Return whether the answers of a group were rewarded differently: only then do they give a gradient.

        Their totals count, and for gdpo each of several rewards that has a weight.
        """
        if self.stage.advantage == "gdpo" and self.reward_weights is not None:
            found = group.rewards[:, self.reward_weights != 0]
        else:
            found = self.totals([group])[0]
        return bool((found != found[:1]).any())

    def advantages(self, groups: list[Group]) -> list[float]:
        """Return one advantage per answer; gdpo compares with the answers of all processes."""
        every = collectives.all_gather_object([group.rewards for group in groups])
        rewards = [one for part in every for one in part]
        if not rewards:
            return []
        found = objectives.group_advantages(self.stage.advantage, torch.stack(rewards), self.reward_weights)
        first = sum(len(part) for part in every[: collectives.rank()])
        return found[first : first + len(groups)].flatten().tolist()

    def add_logprobs(self, micro: list[dict]) -> None:
        """Add what the loss needs of other networks: the parent, and this one before its updates."""
        begin, net = time.perf_counter(), self.engine.net
        if self.reference is not None:
            self.reference.add(micro, net.device, net.compute_dtype)
        if self.stage.updates_per_rollout > 1:
            add_old_logprobs(full_model(net), micro)
        self.seconds["forward"] += time.perf_counter() - begin

    def metrics(self, groups: list[Group], step: int) -> dict[str, float]:
        """Return the numbers of a step's answers, and let the watch see them."""
        mixed, n = collectives.all_reduce_sum([sum(self.has_signal(group) for group in groups), len(groups)])
        silent = not mixed
        numbers = self.answer_metrics(groups)
        self.signal.count(silent, step, numbers["reward"])
        return numbers | {"mixed_groups": mixed / n, "no_signal": float(silent)}


class PolicyObjective(AnswerObjective):
    """Loss of a micro-batch of answers, by `stage.loss`, `stage.correction` and `stage.kl`; see `llm.objectives`.

    Rehearsed conversations, which have no advantages, count by their weighted cross-entropy.
    """

    def __init__(self, stage):
        self.loss, self.stage = objectives.POLICY_LOSSES[stage.loss], stage
        self.from_engine = stage.loss == "ipo_rl"  # its ratio is to what the engine drew from
        self.is_plain = stage.loss == "reinforce" and stage.correction == "none" and not stage.kl

    def __call__(self, net, micro: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs, targets, advantages = micro["inputs"], micro["targets"], micro.get("advantages")
        if advantages is None:
            return net(inputs, targets, reduction="sum", token_weights=micro.get("weights")), {}
        mask, engine = targets >= 0, micro["logprobs_engine"]
        if self.is_plain:  # the weights are known beforehand: one pass through the head
            total, losses = net(inputs, targets, reduction="both", token_weights=advantages)
            return total, self.sums(-losses, -losses, engine, mask)
        logprobs = objectives.token_logprobs(net, inputs, targets)
        old = micro.get("logprobs_old", logprobs.detach())
        bounds = self.stage.clip_low, self.stage.clip_high
        losses, low, high = self.loss(logprobs, engine if self.from_engine else old, advantages, mask, *bounds)
        losses = losses * objectives.correction_weights(self.stage.correction, old, engine, mask)
        sums = self.sums(logprobs.detach(), old, engine, mask)
        if self.loss.has_bounds:
            sums |= {"clip_low": low.sum(), "clip_high": high.sum()}
        if self.stage.kl:
            kl = objectives.kl_k3(logprobs, micro["logprobs_ref"], mask)
            losses = losses + self.stage.kl * kl
            sums["kl"] = kl.detach().sum()
        return self.loss.total(losses, mask), sums


class SignalWatch:
    """Tells when steps in a row have had no signal: all answers to each question were rewarded alike."""

    def __init__(self, name: str):
        self.name, self.silent = name, 0

    def count(self, silent: bool, step: int, reward: float) -> None:
        """Count step number `step`, from 0; print a line at the 5th, 10th, 20th, 40th, ... silent one in a row."""
        self.silent = self.silent + 1 if silent else 0
        doublings = self.silent / SILENT_STEPS
        if self.silent and doublings >= 1 and math.log2(doublings).is_integer() and collectives.rank() == 0:
            print(
                f"grpo: no signal in {self.silent} steps in a row, up to step {step + 1}: all answers to each question "
                f"of {self.name} had the same reward (mean {reward:.3f}), so there is nothing to learn from. Choose "
                "questions that are sometimes answered rightly, or raise stage.samples_per_prompt or stage.temperature",
                flush=True,
            )


def build(cfg, parent: Path) -> BuiltStage:
    """Build the parent's network, rewarded on the task `stage.task` (or `data.rl`)."""
    check_policy(cfg.stage)
    task = read_task(cfg, parent)
    net, tokenizer = load_parent(parent, cfg)  # after all rows were checked
    steps = partial(GroupSteps, reference=Reference(net) if cfg.stage.kl else None)
    return build_stage(cfg, net, tokenizer, task, PolicyObjective(cfg.stage), steps)
