"""Parts that the stages of reinforcement learning share: their task, its rewards, rehearsal, and the built stage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from callbacks.chat_eval import PassAtK
from callbacks.step_times import StepTimes
from llm import objectives
from llm.config.stages import stage_row
from llm.data.balance import ANSWERS, Reading
from llm.errors import UserError
from llm.eval.samples import questions
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.parallel import collectives
from llm.parallel.launch import processes
from llm.run.stage_folder import RunDir
from llm.stages.choices import check_drawn
from llm.stages.common import (
    BuiltStage,
    eval_tasks,
    finetuning_scales,
    learning_rates,
    model_facts,
    step_context,
    task_cache,
)
from llm.stages.drift import drift_context
from llm.stages.micro_batch import resolve_rows
from llm.stages.plan import check_shares
from llm.stages.reward_model import win_rates
from llm.stages.rollout_log import RolloutLog
from llm.stages.rollouts import RolloutSteps
from llm.stages.step_module import Objective, StepData, StepModule
from llm.stages.turns import draw_in_turns
from tasks import Mixture, Task, build_mixture, build_task
from tasks.registry import all_specs, place, task_class
from tasks.rewards import Rewards, build_rewards

REWARDED = ("generative", "preference")  # kinds of tasks


class RewardScore:
    """Scores of completions as tensors: (N,) by one reward, (N, R) by several, with their `weights` (R,).

    names: of the rewards, whose means metrics.csv tells where there are several. full: score of an answer to which
    every reward gives 1, but for those of weights below 0.
    """

    def __init__(self, rewards: Rewards):
        self.rewards, self.names = rewards, rewards.names
        self.weights = torch.tensor(rewards.weights) if len(self.names) > 1 else None
        self.full = sum(max(weight, 0.0) for weight in rewards.weights)
        self.attach = rewards.attach

    def __call__(self, conversations: Sequence[dict], completions: Sequence[str]) -> torch.Tensor:
        scores = torch.tensor(self.rewards(conversations, completions))
        return scores if self.weights is not None else scores[:, 0] * self.rewards.weights[0]


@dataclass(frozen=True)
class RewardedTask:
    """The task `stage.task` (or `data.rl`): questions to train on and held-out ones, rewards, rehearsal, other tasks.

    A source of preferences may stand for a task: its prompts are the questions.

    score: gives the rewards. rehearsal: conversations trained on beside the answers, None without `stage.rehearsal`.
    eval_tasks: held-out tasks by name that the stage is evaluated on. parent: model folder that it starts from.
    """

    train: Task
    test: Task
    score: RewardScore
    rehearsal: Mixture | None
    eval_tasks: dict[str, Task]
    parent: Path


def read_task(cfg, parent: Path) -> RewardedTask:
    """Read all rows that the stage needs. Raises UserError where they give no reward, or there are none."""
    stage, name = cfg.stage, cfg.stage.task or cfg.data.rl
    check_drawn(cfg)
    if name is None:
        raise UserError(f"data.rl=null: name the task to be rewarded for, stage.task=<one of {rewardable(cfg)}>")
    specs, cache = all_specs(cfg.data), task_cache(cfg)
    if name not in specs:
        raise UserError(f"stage.task={name}: not among data.tasks and data.preferences ({rewardable(cfg)})")
    train, test = (build_task(name, specs[name], split, cache, cfg.data.bad_rows) for split in ("train", "test"))
    if train.kind not in REWARDED:
        raise UserError(
            f"stage.task={name}: a task of kind {train.kind} gives no reward; choose one of {rewardable(cfg)}"
        )
    if stage.turns > 1 and type(train).reply is Task.reply:
        raise UserError(f"stage.turns={stage.turns}: task {name} never replies; give it `reply`, or set stage.turns=1")
    score = score_of(train, stage)
    if "task" in score.names and (bare := train.unscored()):
        raise UserError(
            f"stage.task={name}: {bare:,} of {len(train):,} training rows have nothing to be scored by, such as "
            f"keywords: give {place(name, specs[name])}.train rows that do, or a stage.reward"
        )
    rehearsal = rehearsal_mixture(cfg, name) if stage.rehearsal else None
    return RewardedTask(train, test, score, rehearsal, eval_tasks(cfg), parent)


def rewardable(cfg) -> str:
    """Return the names of tasks whose answers can be rewarded and of sources of preferences, separated by commas."""
    kinds = {name: task_class(spec, place(name, spec)).kind for name, spec in all_specs(cfg.data).items()}
    return ", ".join(name for name, kind in kinds.items() if kind in REWARDED) or "none: describe a generative one"


def build_stage(
    cfg,
    net,
    tokenizer,
    task: RewardedTask,
    objective: Objective,
    steps: Callable[..., RolloutSteps],
    rollouts_per_epoch: float | None = None,
) -> BuiltStage:
    """Build the stage that trains `net` by an objective of sampled answers, and measures pass@k on held-out questions.

    steps: makes the loader from the arguments of `RolloutSteps`. rollouts_per_epoch: where a pass is not one through
    the questions. Raises UserError for a step smaller than the devices.
    """
    stage, world = cfg.stage, processes(cfg)
    answers = stage.prompts_per_step * stage.samples_per_prompt
    per_epoch = len(task.train) / stage.prompts_per_step if rollouts_per_epoch is None else rollouts_per_epoch
    total = cfg.max_steps or max(1, int(stage.epochs * per_epoch * stage.updates_per_rollout))
    check_shares(cfg)
    cfg.batch.micro_batch_size = rows = resolve_rows(cfg, net.config, answers // world)
    scales = finetuning_scales(cfg, None)
    more = drift_context(cfg, tokenizer, task.eval_tasks) | {"prompts": questions(task.test)} | scales
    context = step_context(cfg, tokenizer, total, **more)
    tokens_per_step = answers * cfg.model.seq_len  # at most
    derived = model_facts(net, cfg, total, tokens_per_step, -(-answers // (rows * world)))
    derived |= learning_rates(net, cfg, **scales) | {"questions": len(task.train), "samples_per_step": answers}
    derived["rollouts"] = -(-total // stage.updates_per_rollout)
    task.score.attach(cfg, net, tokenizer)
    engine, log = Engine(net, tokenizer), None
    if stage.keep_rollouts and collectives.is_main():
        log = RolloutLog(RunDir(cfg.paths.runs, cfg.run).stage_dir(stage.name), stage.keep_rollouts, tokenizer)

    def loader(position: dict | None) -> RolloutSteps:
        return steps(engine, task.train, stage, rows, cfg.seed, position, task.score, task.rehearsal, log)

    module = StepModule(net, cfg.optim, stage, context, objective)
    reading = Reading(ANSWERS, facts={"questions": len(task.train)}, parts=[task.train])
    return BuiltStage(
        module, StepData(loader), derived, [*evaluations(cfg, net, tokenizer, task), StepTimes()], reading
    )


def evaluations(cfg, net, tokenizer, task: RewardedTask) -> list:
    """Return the callbacks that measure held-out questions: pass@k, and wins over the parent by rule and judge."""
    stage, found = cfg.stage, []
    if task.test.kind == "generative":
        params = SamplingParams(stage.temperature, stage.top_k, max_new_tokens=stage.max_new_tokens, seed=cfg.seed)
        more = {} if stage.turns == 1 else {"draw": draw_in_turns(task.test.reply, stage.turns)}
        sizes = stage.eval_samples, stage.eval_examples, params, stage.prompts_per_step
        found.append(PassAtK(stage.eval_every, task.test, *sizes, **more))
    rows = ((task.test, conversation) for conversation in task.test)
    return found + win_rates(cfg, net, tokenizer, rows, task.parent)


class AnswerObjective:
    """Base of objectives of sampled answers: what is logged of their tokens that went through the network."""

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


def score_of(task, stage) -> RewardScore:
    """Return the function that scores completions: `stage.reward` or `stage.rewards`, by default the task's own."""
    if stage.reward is not None and stage.rewards:
        raise UserError(f"stage.reward={stage.reward}: stage.rewards names rewards too; give one of the two")
    key = "stage.rewards" if stage.rewards else "stage.reward"
    weights = stage.rewards or {stage.reward or "task": 1.0}
    return RewardScore(build_rewards(task, weights, stage.reward_options or {}, key))


def rehearsal_mixture(cfg, rewarded: str) -> Mixture:
    """Return the mixture of finetuning without the rewarded task: that one is to be learnt from its rewards alone."""
    name = stage_row(cfg.stage.name).mixture_key
    key = f"data.mixture.{name}"
    weights = {task: repeats for task, repeats in cfg.data.mixture[name].items() if task != rewarded and repeats}
    if not weights:
        raise UserError(f"stage.rehearsal={cfg.stage.rehearsal}: {key} names no task besides {rewarded}")
    return build_mixture(cfg.data.tasks, weights, "train", cfg.seed, task_cache(cfg), cfg.data.bad_rows, key)
