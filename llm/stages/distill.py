"""Distillation: the student's next token is to be as likely as a teacher says, token by token.

stage.source=rollouts: on-policy, on answers that the student draws itself, so that it is corrected where it goes
(arXiv 2306.13649). stage.source=data: offline, on what the assistant says in the conversations of data.mixture.sft.
stage.divergence: reverse_kl and forward_kl compare the two distributions over the whole vocabulary at every trained
token; sampled is a policy gradient that knows the sampled tokens alone. The formulas are in `llm.objectives`. The loss
is the mean over trained tokens. The teacher may have another shape, but an equal tokenizer. It stays as it is, and is
run without gradient beside each pass of the student: of its outputs one micro-batch exists at a time.
"""

from functools import partial
from pathlib import Path

import torch

from llm import objectives
from llm.config.stages import stage_row
from llm.data.balance import Reading
from llm.model.gpt import GPT
from llm.stages.choices import check_distillation
from llm.stages.common import BuiltStage, load_further, load_parent, task_cache
from llm.stages.data_check import trained_tasks
from llm.stages.rollout_stage import AnswerObjective, build_stage, read_task
from llm.stages.rollouts import RolloutSteps, at_least_one, conversations_of, counts, micro_batches_of, trained_tokens
from llm.stages.step_module import Objective
from tasks import Mixture, build_mixture


class StudentSteps(RolloutSteps):
    """Steps of answers that the student draws, all of which count alike."""

    def rollout(self, step: int) -> dict:
        groups = self.ask(self.share(self.questions.take(self.stage.prompts_per_step)), step)
        answers = [answer for group in groups for answer in group.answers]
        weights = [1.0] * len(answers)
        self.log_answers(step, groups, weights)
        return self.trained_on(answers, weights) | {"metrics": self.answer_metrics(groups)}


class ConversationSteps(RolloutSteps):
    """Steps of conversations of a mixture, as many as there would be answers; no question is asked."""

    def __init__(self, *args, mixture: Mixture, **more):
        super().__init__(*args, **more)
        self.mixture = mixture

    def rollout(self, step: int) -> dict:
        stage, n = self.stage, self.stage.prompts_per_step * self.stage.samples_per_prompt
        ids, factors, balance = conversations_of(self.mixture, self.engine, step // stage.updates_per_rollout, n)
        masks = trained_tokens(factors)
        self.balance += balance
        n_trained, n_tokens = counts(ids, masks)
        micro = micro_batches_of(ids, masks, self.rows_per_micro, advantages=factors)
        return {"micro": micro, "n_trained": at_least_one(n_trained), "n_tokens": n_tokens, "metrics": {}}


class DistillObjective(AnswerObjective):
    """Loss of a micro-batch: the divergence of the student from `teacher` at its trained tokens, times `advantages`.

    Rehearsed conversations, which have no advantages, count by their weighted cross-entropy.
    """

    def __init__(self, teacher: GPT, divergence: str):
        self.teacher, self.divergence = teacher.requires_grad_(False).eval(), divergence

    def __call__(self, net: GPT, micro: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs, targets = micro["inputs"], micro["targets"]
        mask = targets >= 0
        if "advantages" not in micro or not mask.any():
            return net(inputs, targets, reduction="sum", token_weights=micro.get("weights")), {}
        self.teacher.to(net.device).compute_dtype = net.compute_dtype
        measure = self.sampled if self.divergence == "sampled" else self.whole
        losses, found, logprobs = measure(net, inputs, targets, mask)
        sums = {"tokens": mask.sum(), "divergence": found.detach().sum()}
        if "logprobs_engine" in micro:
            old = micro["logprobs_old"][mask] if "logprobs_old" in micro else logprobs
            sums |= self.sums(logprobs, old, micro["logprobs_engine"][mask], torch.ones_like(targets[mask]).bool())
        return (losses * micro["advantages"][mask]).sum(), sums

    def whole(self, net: GPT, inputs, targets, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return losses, divergences and log-probabilities (N,) of the trained tokens, by the whole distributions."""
        with torch.no_grad():
            theirs = self.teacher.hidden(inputs)[mask]
        chunk = max(1, objectives.CHUNK_ELEMENTS // net.config.vocab_size)

        def head(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows, heads = (hidden[mask], theirs, targets[mask]), (net.logits, self.teacher.logits)
            return objectives.chunked_distillation(*heads, *rows, self.divergence, chunk)

        losses, logprobs = net(inputs, head=head)
        return losses, losses, logprobs

    def sampled(self, net: GPT, inputs, targets, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return losses, l - l_teacher and log-probabilities l (N,) of the trained tokens, by these alone."""
        logprobs = objectives.token_logprobs(net, inputs, targets)
        with torch.no_grad():
            theirs = objectives.token_logprobs(self.teacher, inputs, targets)
        losses, d = objectives.sampled_distillation(logprobs, theirs, mask)
        return losses[mask], d[mask], logprobs.detach()[mask]

    @staticmethod
    def summary(sums: dict[str, float], n_trained: float) -> dict[str, float]:
        """Return the numbers of a step: the mean divergence, and of sampled answers those of `AnswerObjective`."""
        if "logprob_gap" in sums:
            return AnswerObjective.summary(sums, n_trained)
        return {"divergence": sums.get("divergence", 0.0) / max(sums.get("tokens", 0.0), 1)}


def build(cfg, parent: Path) -> BuiltStage:
    """Build the parent's network as the student of `stage.teacher`, measured on `stage.task` (or `data.rl`)."""
    check_distillation(cfg.stage)
    task, mixture = read_task(cfg, parent), conversations(cfg)
    net, tokenizer = load_parent(parent, cfg)  # after all rows were checked
    objective: Objective = DistillObjective(load_teacher(cfg, net, tokenizer), cfg.stage.divergence)
    if mixture is None:
        return build_stage(cfg, net, tokenizer, task, objective, StudentSteps)
    rows = cfg.stage.prompts_per_step * cfg.stage.samples_per_prompt
    steps = partial(ConversationSteps, mixture=mixture)
    built = build_stage(cfg, net, tokenizer, task, objective, steps, len(mixture) / rows)
    del built.derived["questions"]
    built.derived |= {"conversations": len(mixture), "epochs": built.derived["rollouts"] * rows / len(mixture)}
    built.reading = Reading("conversations", facts={"conversations": len(mixture)}, parts=mixture.tasks)
    return built


def conversations(cfg) -> Mixture | None:
    """Return the conversations to learn from, None for answers that the student draws. UserError where none are."""
    if cfg.stage.source == "rollouts":
        return None
    row = stage_row(cfg.stage.name)
    trained_tasks(cfg, row)
    weights, key = dict(cfg.data.mixture[row.mixture_key]), f"data.mixture.{row.mixture_key}"
    return build_mixture(cfg.data.tasks, weights, "train", cfg.seed, task_cache(cfg), cfg.data.bad_rows, key)


def load_teacher(cfg, net: GPT, tokenizer) -> GPT:
    """Return the network of `stage.teacher`. Raises UserError for another tokenizer or a context that is too short."""
    teacher, _ = load_further(cfg, "stage.teacher", cfg.stage.teacher, "teacher", net, tokenizer)
    return teacher
