"""Best of n: rejection finetuning on the student's own answers (RAFT, arXiv 2304.06767).

Per rollout: draw `stage.samples_per_prompt` answers to each of `stage.prompts_per_step` questions from the current
weights, reward them as `llm.stages.grpo` does, keep the best answer to each question, and train on its sampled tokens
by cross-entropy. Of equally good answers the first one drawn is kept, which is a fair draw among them: the shortest
would teach to leave out the working. Where the best one is rewarded with less than `stage.min_reward`, nothing of that
question is trained. The loss is the mean over the tokens of the kept answers of the step; conversations are rehearsed
as in grpo.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from llm.parallel import collectives
from llm.stages.choices import check_overlong
from llm.stages.common import BuiltStage, load_parent
from llm.stages.rollout_stage import AnswerObjective, build_stage, read_task
from llm.stages.rollouts import Group, RolloutSteps


def winner(rewards: Sequence[float], least: float) -> int | None:
    """Return which answer is the best, the first one of equals; None where its reward is below `least`."""
    best = max(range(len(rewards)), key=rewards.__getitem__)
    return best if rewards[best] >= least else None


class BestSteps(RolloutSteps):
    """Steps of which the best answer to each question is trained on."""

    def rollout(self, step: int) -> dict:
        groups = self.ask(self.share(self.questions.take(self.stage.prompts_per_step)), step)
        weights, numbers = self.chosen(groups)
        self.log_answers(step, groups, weights)
        answers = [answer for group in groups for answer in group.answers]
        return self.trained_on(answers, weights) | {"metrics": self.answer_metrics(groups) | numbers}

    def chosen(self, groups: Sequence[Group]) -> tuple[list[float], dict[str, float]]:
        """Return 1 for each kept answer and 0 for all others, and numbers: kept questions, mean reward of the kept."""
        weights, kept = [], []
        for rewards in self.totals(groups).tolist():
            best = winner(rewards, self.stage.min_reward)
            weights += [float(i == best) for i in range(len(rewards))]
            kept += [] if best is None else [rewards[best]]
        total, n, n_groups = collectives.all_reduce_sum([sum(kept), len(kept), len(groups)])
        return weights, {"kept": n / n_groups, "kept_reward": total / max(n, 1)}


class BestObjective(AnswerObjective):
    """Cross-entropy of a micro-batch, of answers times their `advantages`, of rehearsed rows times their `weights`."""

    def __call__(self, net, micro: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs, targets = micro["inputs"], micro["targets"]
        if "advantages" not in micro:
            return net(inputs, targets, reduction="sum", token_weights=micro.get("weights")), {}
        total, losses = net(inputs, targets, reduction="both", token_weights=micro["advantages"])
        old = micro.get("logprobs_old", -losses)
        return total, self.sums(-losses, old, micro["logprobs_engine"], targets >= 0)


def build(cfg, parent: Path) -> BuiltStage:
    """Build the parent's network, trained on its best answers to the task `stage.task` (or `data.rl`)."""
    check_overlong(cfg.stage)
    task = read_task(cfg, parent)
    net, tokenizer = load_parent(parent, cfg)  # after all rows were checked
    return build_stage(cfg, net, tokenizer, task, BestObjective(), BestSteps)
