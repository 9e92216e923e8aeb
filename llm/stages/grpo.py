"""Reinforcement learning with verifiable rewards: on-policy REINFORCE with a group baseline.

Per step: draw several answers per question from the current network (calculator included), reward each by its task,
advantage = reward - mean of the question's answers (GRPO of arXiv 2402.03300 without the division by the standard
deviation, the KL term and the ratio clip: with one update per rollout the ratio is 1). The loss is the sum over sampled
tokens of -advantage * log p, divided by the number of sampled tokens of the step. So that what is not rewarded is not
forgotten, the loss of some finetuning conversations can be added (PPO-ptx of InstructGPT, arXiv 2203.02155).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from callbacks.chat_eval import PassAtK
from llm.config.registries import REWARDS
from llm.data.balance import ANSWERS, Balance, Reading, of_rollout
from llm.data.conversations import of_conversations, render
from llm.errors import UserError
from llm.eval.samples import questions
from llm.inference.engine import Completion, Engine
from llm.inference.sampling import SamplingParams
from llm.parallel import collectives
from llm.parallel.launch import processes
from llm.parallel.strategy import full_model
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
from llm.stages.step_module import StepData, StepModule
from llm.tokenizer.chat_format import render_prompt
from tasks import Mixture, build_mixture, build_task

SILENT_STEPS = 5  # so many steps in a row without a signal are told
Rewards = Callable[[Sequence[dict], Sequence[str]], list[float]]


class RolloutSteps:
    """Step batches made of fresh samples. Never runs ahead: every batch comes from the weights of its own step.

    Questions are visited in a permutation per epoch; draws depend on (seed, step) alone, so the position is one number.
    rewards: (conversations, completions) -> a number each; None = the task's own.
    rehearsal: conversations of which `stage.rehearsal` are trained on beside the answers of every step.
    """

    def __init__(
        self,
        engine: Engine,
        task,
        stage,
        rows_per_micro: int,
        seed: int,
        position: dict | None,
        rehearsal=None,
        rewards: Rewards | None = None,
    ):
        self.rewards = rewards
        self.engine, self.task, self.stage, self.rehearsal = engine, task, stage, rehearsal
        self.rows_per_micro, self.seed = rows_per_micro, seed
        self.step = 0 if position is None else position["step"]
        self.signal = SignalWatch(task.name)
        counted = {} if position is None else position.get("balance", {"partial": 1})
        self.balance = Balance.from_dict(counted)
        limit = engine.net.config.seq_len - 1
        self.prompts = {}
        for i in range(len(task)):
            prompt = render_prompt(engine.tokenizer, task[i])
            if len(prompt) < limit:
                self.prompts[i] = prompt
        if len(self.prompts) < stage.prompts_per_step:
            raise UserError(
                f"stage.prompts_per_step={stage.prompts_per_step}: only {len(self.prompts)} questions of {task.name} "
                f"leave room for an answer within model.seq_len={engine.net.config.seq_len}"
            )
        if (too_long := len(task) - len(self.prompts)) and collectives.is_main():
            print(
                f"WARNING: {too_long:,} of {len(task):,} questions leave no room for an answer: not asked", flush=True
            )

    def __len__(self) -> int:
        return 10**9

    def skip(self, steps: int) -> None:
        """Leave out the questions of so many steps."""
        self.step += steps

    def __iter__(self) -> Iterator[dict]:
        while True:
            batch = self.rollout(self.step)
            self.step += 1
            yield batch | {"state": {"step": self.step, "balance": self.balance.to_dict()}}

    def questions_of(self, step: int) -> list[int]:
        """Return this rank's task indices of a step: consecutive ones of an endless sequence of shuffled epochs."""
        usable, n = list(self.prompts), self.stage.prompts_per_step
        chosen = []
        for k in range(step * n, (step + 1) * n):
            epoch, place = divmod(k, len(usable))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(usable))
            chosen.append(usable[order[place]])
        return self.share(chosen)

    @staticmethod
    def share(items: Sequence) -> Sequence:
        """Return the part of a step's items that falls to this rank."""
        return items[collectives.rank() :: collectives.world_size()]

    def rollout(self, step: int) -> dict:
        stage, indices = self.stage, self.questions_of(step)
        params = SamplingParams(
            temperature=stage.temperature,
            top_k=stage.top_k,
            max_new_tokens=stage.max_new_tokens,
            seed=(self.seed + 1_009 * collectives.rank()) * 1_000_003 + step,
        )
        prompts = [self.prompts[i] for i in indices]
        engine = Engine(full_model(self.engine.net), self.engine.tokenizer)
        groups = engine.generate(prompts, params, stage.samples_per_prompt)
        conversations = [self.task[i] for i in indices]
        decode = self.engine.tokenizer.decode
        asked = [c for c, group in zip(conversations, groups, strict=True) for _ in group]
        answers = [decode(sample.ids) for group in groups for sample in group]
        rewards = torch.tensor((self.rewards or self.task.rewards)(asked, answers)).view(len(groups), -1)
        sequences = [sequence(prompt, s) for prompt, group in zip(prompts, groups, strict=True) for s in group]
        micro, n_trained, n_tokens = micro_batches_of(
            sequences, group_advantages(rewards).flatten(), self.rows_per_micro
        )
        samples = [s for group in groups for s in group]
        finished = [s.finish_reason == "stop" for s in samples]
        self.balance += of_rollout(sequences, group_advantages(rewards).flatten().tolist(), finished)
        if self.rehearsal is not None:
            extra, n_extra = self.rehearse(step, n_trained)
            micro, n_tokens = micro + extra, n_tokens + n_extra
        mixed = rewards.std(dim=1) > 0  # only these groups give a gradient
        silent = not collectives.all_reduce_sum([float(mixed.sum())])[0]
        self.signal.count(silent, step, rewards.mean().item())
        metrics = {
            "reward": rewards.mean().item(),
            "response_len": sum(len(s.ids) for s in samples) / len(samples),
            "finished": sum(finished) / len(samples),
            "mixed_groups": mixed.float().mean().item(),
            "no_signal": float(silent),
        }
        return {"micro": micro, "n_trained": n_trained, "n_tokens": n_tokens, "metrics": metrics}

    def rehearse(self, step: int, n_trained: int) -> tuple[list[dict], int]:
        """Micro-batches of the step's finetuning conversations and their number of tokens.

        Their mean loss per trained token counts `stage.rehearsal_weight`, though the step divides by `n_trained`.
        """
        n, limit = self.stage.rehearsal, self.engine.net.config.seq_len + 1
        rows = [self.rehearsal[k % len(self.rehearsal)] for k in self.share(range(step * n, (step + 1) * n))]
        rendered = [render(self.engine.tokenizer, row, limit) for row in rows]
        sequences = [(one.document.ids.tolist(), (one.document.mask > 0).astype(int).tolist()) for one in rendered]
        self.balance += of_conversations(rendered)
        micro, n_rehearsed, n_tokens = micro_batches_of(sequences, torch.ones(len(rows)), self.rows_per_micro)
        for batch in micro:
            batch["weights"] *= self.stage.rehearsal_weight * n_trained / max(n_rehearsed, 1)
        return micro, n_tokens


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Subtract from rewards (questions, samples) the mean of each question's samples."""
    return rewards - rewards.mean(dim=1, keepdim=True)


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


def sequence(prompt: Sequence[int], sample: Completion) -> tuple[list[int], list[int]]:
    """Return (ids, mask) of prompt and completion, mask 1 on sampled tokens; the one that ended it is one of them."""
    ids, mask = [*prompt, *sample.ids], [0] * len(prompt) + list(sample.mask)
    if sample.stop_id is not None:
        ids.append(sample.stop_id)
        mask.append(1)
    return ids, mask


def micro_batches_of(sequences, advantages: torch.Tensor, rows: int) -> tuple[list[dict], int, int]:
    """Return micro-batches of `rows` right-padded sequences of similar length, and all (trained, real) token counts.

    A sequence without advantage has no gradient and is left out of the passes, though not out of the counts; if none
    has any, the shortest one stands for them, so that the step is an ordinary one.
    """
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
    n_trained, n_tokens = sum(sum(mask[1:]) for _, mask in sequences), sum(len(ids) - 1 for ids, _ in sequences)
    order, micro = [i for i in order if advantages[i] != 0] or order[-1:], []
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        length = len(sequences[part[0]][0]) - 1
        inputs = torch.zeros(len(part), length, dtype=torch.long)
        targets = torch.full((len(part), length), -1)
        for row, i in enumerate(part):
            ids, mask = (torch.tensor(x) for x in sequences[i])
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = torch.where(mask[1:] == 1, ids[1:], -1)
        weights = advantages[part].unsqueeze(1).expand_as(targets).contiguous()
        micro.append({"inputs": inputs, "targets": targets, "weights": weights})
    return micro, n_trained, n_tokens


def build(cfg, parent: Path) -> BuiltStage:
    """Build the parent's network, rewarded on the task `stage.task` (or `data.rl`)."""
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
    rewards = None if stage.reward is None else chosen_rewards(stage.reward)
    if rewards is None and (bare := train.unscored()):
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

    def loader(position: dict | None) -> RolloutSteps:
        return RolloutSteps(engine, train, stage, cfg.batch.micro_batch_size, cfg.seed, position, rehearsal, rewards)

    data = StepData(loader)
    reading = Reading(ANSWERS, facts={"questions": len(train)}, parts=[train])
    return BuiltStage(StepModule(net, cfg.optim, stage, context), data, derived, [pass_at_k], reading)


def chosen_rewards(name: str) -> Rewards:
    """Return the reward `stage.reward`, a function of one conversation and its completion, for lists of them.

    Raises UserError for a name that does not exist, and during training for a reward that is not a finite number.
    """
    reward = REWARDS.get(name, "stage.reward")

    def rewards(conversations: Sequence[dict], completions: Sequence[str]) -> list[float]:
        values = [float(reward(c, text)) for c, text in zip(conversations, completions, strict=True)]
        if wrong := [value for value in values if not math.isfinite(value)]:
            raise UserError(f"stage.reward={name}: gave {wrong[0]}; a reward must be a finite number")
        return values

    return rewards


def rehearsal_mixture(cfg, rewarded: str) -> Mixture:
    """Return the mixture of finetuning without the rewarded task: that one is to be learnt from its rewards alone."""
    weights = {name: repeats for name, repeats in dict(cfg.data.mixture.sft).items() if name != rewarded and repeats}
    if not weights:
        raise UserError(f"stage.rehearsal={cfg.stage.rehearsal}: data.mixture.sft names no task besides {rewarded}")
    return build_mixture(cfg.data.tasks, weights, "train", cfg.seed, task_cache(cfg), cfg.data.bad_rows)
