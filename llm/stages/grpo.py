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
from collections.abc import Sequence
from pathlib import Path

import torch

from callbacks.chat_eval import PassAtK
from callbacks.step_times import StepTimes
from llm import objectives
from llm.data.balance import ANSWERS, Reading, of_rollout
from llm.errors import UserError
from llm.eval.samples import questions
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.parallel import collectives
from llm.parallel.launch import processes
from llm.parallel.strategy import full_model
from llm.run.stage_folder import RunDir
from llm.stages.common import (
    BuiltStage,
    eval_tasks,
    finetuning_scales,
    learning_rates,
    load_parent,
    model_facts,
    step_context,
    task_cache,
)
from llm.stages.micro_batch import resolve_rows
from llm.stages.rollout_log import RolloutLog
from llm.stages.rollouts import (
    RIGHT,
    Group,
    Reference,
    RolloutSteps,
    add_old_logprobs,
    counts,
    micro_batches_of,
)
from llm.stages.step_module import StepData, StepModule
from tasks import Mixture, Task, build_mixture, build_task
from tasks.rewards import Rewards, build_rewards

SILENT_STEPS = 5  # so many steps in a row without a signal are told
TRIES = 3  # of stage.filter_equal=resample: further draws for groups without a signal


class GroupSteps(RolloutSteps):
    """Steps whose answers are compared within their question.

    reference: the parent's network, if the loss has a KL term. log: keeps answers for the report.
    """

    def __init__(self, *args, reference: Reference | None = None, log: RolloutLog | None = None, **more):
        super().__init__(*args, **more)
        self.log = log
        self.reference, self.signal = reference, SignalWatch(self.task.name)
        self.loss = objectives.POLICY_LOSSES[self.stage.loss]
        self.reward_weights = getattr(self.score, "weights", None)  # of several rewards of each answer

    def rollout(self, step: int) -> dict:
        asked = self.ask(self.share(self.questions.take(self.stage.prompts_per_step)), step)
        asked, kept = self.filtered(asked, step)
        advantages = self.advantages(kept)
        if self.log is not None:
            self.log.add(step, self.log_rows(kept, advantages))
        answers = [answer for group in kept for answer in group.answers]
        ids, masks = [a.ids for a in answers], [a.mask for a in answers]
        n_sampled, n_tokens = counts(ids, masks)
        trained = [bool(advantage) or self.reference is not None for advantage in advantages]
        columns = {"advantages": advantages, "logprobs_engine": [a.logprobs for a in answers]}
        micro = micro_batches_of(ids, masks, self.rows_per_micro, trained, **columns)
        self.add_logprobs(micro)
        self.balance += of_rollout(list(zip(ids, masks, strict=True)), trained, [a.is_finished for a in answers])
        return {
            "micro": micro,
            "n_trained": max(self.loss.units(n_sampled, len(answers), self.stage.max_new_tokens), 1),
            "n_tokens": n_tokens,
            "metrics": self.metrics(asked, step),
        }

    def filtered(self, asked: list[Group], step: int) -> tuple[list[Group], list[Group]]:
        """Return all groups asked for, and those that are trained on: `stage.filter_equal`."""
        how = self.stage.filter_equal
        new = asked
        for attempt in range(1, TRIES + 1 if how == "resample" else 1):
            (missing,) = collectives.all_reduce_sum([sum(not has_signal(group) for group in new)])
            if not missing:
                break
            new = self.ask(self.share(self.questions.take(int(missing))), step, attempt)
            asked = asked + new
        return asked, asked if how is None else [group for group in asked if has_signal(group)]

    def advantages(self, groups: list[Group]) -> list[float]:
        """Return one advantage per answer; gdpo compares with the answers of all processes."""
        every = collectives.all_gather_object([group.rewards for group in groups])
        rewards = [one for part in every for one in part]
        if not rewards:
            return []
        found = objectives.group_advantages(self.stage.advantage, torch.stack(rewards), self.reward_weights)
        first = sum(len(part) for part in every[: collectives.rank()])
        return found[first : first + len(groups)].flatten().tolist()

    def log_rows(self, groups: list[Group], advantages: list[float]) -> list[dict]:
        """Return what `RolloutLog` keeps of each answer."""
        rows, names = [], getattr(self.score, "names", ["reward"])
        totals = [objectives.total_rewards(group.rewards[None], self.reward_weights)[0] for group in groups]
        answers = [(i, j, answer) for i, group in enumerate(groups) for j, answer in enumerate(group.answers)]
        for (i, j, answer), advantage in zip(answers, advantages, strict=True):
            scores = groups[i].scores[j].view(-1).tolist()
            row = {"ids": answer.ids, "mask": answer.mask, "n_prompt": len(self.prompts[groups[i].question])}
            row |= {"question": groups[i].question, "rewards": dict(zip(names, scores, strict=True))}
            row |= {"reward": totals[i][j].item(), "advantage": advantage, "length": answer.length}
            rows.append(row | {"finish": "stop" if answer.is_finished else "length"})
        return rows

    def add_logprobs(self, micro: list[dict]) -> None:
        """Add what the loss needs of other networks: the parent, and this one before its updates."""
        begin, net = time.perf_counter(), self.engine.net
        if self.reference is not None:
            self.reference.add(micro, net.device, net.compute_dtype)
        if self.stage.updates_per_rollout > 1:
            add_old_logprobs(full_model(net), micro)
        self.seconds["forward"] += time.perf_counter() - begin

    def metrics(self, groups: list[Group], step: int) -> dict[str, float]:
        """Return the numbers of a step's answers, and let the curriculum and the watch see them."""
        mixed = [has_signal(group) for group in groups]
        silent = not collectives.all_reduce_sum([float(sum(mixed))])[0]
        parts = torch.stack([group.scores for group in groups])
        scores = objectives.total_rewards(parts, self.reward_weights)
        reward = scores.mean().item()
        self.signal.count(silent, step, reward)
        right = [(group.question, bool((row >= RIGHT).all())) for group, row in zip(groups, scores, strict=True)]
        self.questions.learn([one for part in collectives.all_gather_object(right) for one in part])
        shares = {"mixed_groups": sum(mixed) / len(mixed), "no_signal": float(silent)}
        if self.reward_weights is not None:
            shares |= {f"reward/{name}": parts[..., i].mean().item() for i, name in enumerate(self.score.names)}
        return {"reward": reward} | self.answer_metrics(groups) | shares


def has_signal(group: Group) -> bool:
    """Return whether the answers of a group were rewarded differently: only then do they give a gradient."""
    return bool((group.rewards != group.rewards[:1]).any())


class PolicyObjective:
    """Loss of a micro-batch of answers, by `stage.loss`, `stage.correction` and `stage.kl`; see `llm.objectives`.

    Rehearsed conversations, which have no advantages, count by their weighted cross-entropy. The numbers of its
    `summary` are means over the answers' tokens that went through the network.
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

    @staticmethod
    def sums(logprobs, old, engine, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return sums over the tokens (B, T): the gap of engine and trainer, and the weights of the answers now."""
        gap = objectives.log_ratio(old, engine, mask).abs()
        weights = objectives.log_ratio(logprobs, engine, mask).exp() * mask
        return {
            "tokens": mask.sum(),
            "logprob_gap": gap.sum(),
            "logprob_gap_max": gap.max(),
            "weights": weights.sum(),
            "squares": weights.square().sum(),
        }

    @staticmethod
    def summary(sums: dict[str, float], n_trained: float) -> dict[str, float]:
        """Return the numbers of a step: means over its tokens, the largest gap, and the effective sample size."""
        tokens = sums.pop("tokens")
        ess = objectives.effective_share(sums.pop("weights"), sums.pop("squares"), tokens)
        shares = {name: value if name.endswith("_max") else value / max(tokens, 1) for name, value in sums.items()}
        return shares | {"ess": ess}


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
    check_choices(cfg.stage)
    stage, name = cfg.stage, cfg.stage.task or cfg.data.rl
    if name is None:
        raise UserError(
            f"data.rl=null: name the task to be rewarded for, stage.task=<one of {', '.join(cfg.data.tasks)}>"
        )
    if name not in cfg.data.tasks:
        raise UserError(f"stage.task={name}: not among data.tasks ({', '.join(cfg.data.tasks)})")
    spec, cache = cfg.data.tasks[name], task_cache(cfg)
    train, test = (build_task(name, spec, split, cache, cfg.data.bad_rows) for split in ("train", "test"))
    if train.kind != "generative":
        raise UserError(f"stage.task={name}: a task of kind {train.kind} gives no reward; choose a generative one")
    if stage.turns > 1 and type(train).reply is Task.reply:
        raise UserError(f"stage.turns={stage.turns}: task {name} never replies; give it `reply`, or set stage.turns=1")
    score = score_of(train, stage)
    if "task" in score.names and (bare := train.unscored()):
        raise UserError(
            f"stage.task={name}: {bare:,} of {len(train):,} training rows have nothing to be scored by, such as "
            f"keywords: give data.tasks.{name}.train rows that do, or a stage.reward"
        )
    rehearsal = rehearsal_mixture(cfg, name) if stage.rehearsal else None
    chat_tasks = eval_tasks(cfg)
    net, tokenizer = load_parent(parent, cfg)  # after all rows were checked
    total = cfg.max_steps or max(1, int(stage.epochs * len(train)) // stage.prompts_per_step)
    engine = Engine(net, tokenizer)
    world = processes(cfg)
    for key in ("prompts_per_step", *(["rehearsal"] if stage.rehearsal else [])):
        if stage[key] < world:
            raise UserError(f"stage.{key}={stage[key]}: fewer than the {world} devices; raise it or train on fewer")
    cfg.batch.micro_batch_size = resolve_rows(
        cfg, net.config, stage.prompts_per_step * stage.samples_per_prompt // world
    )
    scales = finetuning_scales(cfg, None)
    context = step_context(cfg, tokenizer, total, eval_tasks=chat_tasks, prompts=questions(test), **scales)
    tokens_per_step = stage.prompts_per_step * stage.samples_per_prompt * cfg.model.seq_len  # at most
    micro = -(-stage.prompts_per_step * stage.samples_per_prompt // (cfg.batch.micro_batch_size * world))
    derived = model_facts(net.config, cfg, total, tokens_per_step, micro) | learning_rates(net, cfg, **scales)
    derived |= {"questions": len(train), "samples_per_step": stage.prompts_per_step * stage.samples_per_prompt}
    params = SamplingParams(stage.temperature, stage.top_k, max_new_tokens=stage.max_new_tokens, seed=cfg.seed)
    pass_at_k = PassAtK(
        stage.eval_every, test, stage.eval_samples, stage.eval_examples, params, batch_size=stage.prompts_per_step
    )

    reference, log = Reference(net) if stage.kl else None, None
    if stage.keep_rollouts and collectives.is_main():
        log = RolloutLog(RunDir(cfg.paths.runs, cfg.run).stage_dir(stage.name), stage.keep_rollouts, tokenizer)

    def loader(position: dict | None) -> RolloutSteps:
        where = engine, train, stage, cfg.batch.micro_batch_size, cfg.seed, position
        return GroupSteps(*where, score, rehearsal, reference=reference, log=log)

    module = StepModule(net, cfg.optim, stage, context, PolicyObjective(stage))
    reading = Reading(ANSWERS, facts={"questions": len(train)}, parts=[train])
    return BuiltStage(module, StepData(loader), derived, [pass_at_k, StepTimes()], reading)


def check_choices(stage) -> None:
    """Raise UserError for settings of the loss that contradict each other."""
    loss = objectives.POLICY_LOSSES[stage.loss]
    bounds = [name for name in ("clip_low", "clip_high") if stage[name] is not None]
    if bounds and not loss.has_bounds:
        raise UserError(f"stage.{bounds[0]}={stage[bounds[0]]}: stage.loss={stage.loss} clips nothing; set it to null")
    if stage.updates_per_rollout > 1 and not loss.has_ratio:
        raise UserError(
            f"stage.updates_per_rollout={stage.updates_per_rollout}: stage.loss={stage.loss} takes answers to be the "
            "current weights'; choose a loss with a ratio, such as grpo, or 1 update"
        )
    if stage.correction != "none" and stage.loss == "ipo_rl":
        raise UserError(f"stage.correction={stage.correction}: stage.loss=ipo_rl corrects by itself; set it to none")
    if stage.overlong >= stage.max_new_tokens:
        raise UserError(
            f"stage.overlong={stage.overlong}: must be smaller than stage.max_new_tokens={stage.max_new_tokens}"
        )


class RewardScore:
    """Scores of completions as tensors: (N,) by one reward, (N, R) by several, with their `weights` (R,).

    names: of the rewards, whose means metrics.csv tells where there are several.
    """

    def __init__(self, rewards: Rewards):
        self.rewards, self.names = rewards, rewards.names
        self.weights = torch.tensor(rewards.weights) if len(self.names) > 1 else None

    def __call__(self, conversations: Sequence[dict], completions: Sequence[str]) -> torch.Tensor:
        scores = torch.tensor(self.rewards(conversations, completions))
        return scores if self.weights is not None else scores[:, 0] * self.rewards.weights[0]


def score_of(task, stage) -> RewardScore:
    """Return the function that scores completions: `stage.reward` or `stage.rewards`, by default the task's own."""
    if stage.reward is not None and stage.rewards:
        raise UserError(f"stage.reward={stage.reward}: stage.rewards names rewards too; give one of the two")
    key = "stage.rewards" if stage.rewards else "stage.reward"
    weights = stage.rewards or {stage.reward or "task": 1.0}
    return RewardScore(build_rewards(task, weights, stage.reward_options or {}, key))


def rehearsal_mixture(cfg, rewarded: str) -> Mixture:
    """Return the mixture of finetuning without the rewarded task: that one is to be learnt from its rewards alone."""
    weights = {name: repeats for name, repeats in dict(cfg.data.mixture.sft).items() if name != rewarded and repeats}
    if not weights:
        raise UserError(f"stage.rehearsal={cfg.stage.rehearsal}: data.mixture.sft names no task besides {rewarded}")
    return build_mixture(cfg.data.tasks, weights, "train", cfg.seed, task_cache(cfg), cfg.data.bad_rows)
