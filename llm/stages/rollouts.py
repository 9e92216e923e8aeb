"""Rollouts: questions in their order, answers drawn from the current network, micro-batches made of them.

A stage of reinforcement learning subclasses `RolloutSteps`, whose `rollout` says what is made of the answers.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm import objectives
from llm.data.balance import Balance, of_rollout
from llm.data.conversations import of_conversations, render
from llm.errors import UserError
from llm.eval.metrics import RewardStatistics
from llm.eval.metrics import numbers as numbers_of
from llm.inference.engine import Completion, Engine
from llm.inference.sampling import SamplingParams
from llm.parallel import collectives
from llm.parallel.strategy import full_model
from llm.stages.rollout_log import RolloutLog
from llm.stages.turns import answer_in_turns, judged, last_answer
from llm.tokenizer.chat_format import render_prompt

# (conversations, completions) -> rewards (N,), or (N, R) for R rewards of each; `weights` (R,), if it has them.
Score = Callable[[Sequence[dict], Sequence[str]], torch.Tensor]
ROUNDING = 1e-6  # by which the reward of a right answer may fall short
NEXT_TRY = 15_485_863  # between the seeds of a step's tries


@dataclass
class Answer:
    """One sampled answer with its prompt. mask: 1 on sampled tokens; logprobs: the engine's, 0 on all others.

    length: tokens behind the prompt, without the one that ended the turn; room: how many there might have been.
    """

    ids: list[int]
    mask: list[int]
    logprobs: list[float]
    is_finished: bool
    length: int
    room: int

    @property
    def n_sampled(self) -> int:
        """Number of sampled tokens, which are trained on."""
        return sum(self.mask)


@dataclass
class Group:
    """Answers to one question of the task, with what they scored, (G,) or (G, R), and what they are rewarded by.

    The reward (G,) is the score less the penalty for answers that are too long. With R scores the penalty is one more
    reward, (G, R + 1), of weight 1 whatever those of the others are.
    """

    question: int
    answers: list[Answer]
    scores: torch.Tensor
    rewards: torch.Tensor


def answer_of(prompt: Sequence[int], sample: Completion, room: int) -> Answer:
    """Return prompt and completion as an answer; the sampled token that ended the turn is one of its tokens."""
    own = [0.0 if not mask or p is None else p for p, mask in zip(sample.logprobs, sample.mask, strict=True)]
    ids, mask = [*prompt, *sample.ids], [0] * len(prompt) + list(sample.mask)
    logprobs = [0.0] * len(prompt) + own
    if sample.stop_id is not None:
        ids.append(sample.stop_id)
        mask.append(1)
        logprobs.append(sample.stop_logprob)
    return Answer(ids, mask, logprobs, sample.finish_reason == "stop", len(sample.ids), room)


class Questions:
    """The order of a task's questions: epochs without an end, each shuffled anew by `seed`.

    With `skip_solved`, a question whose last answers were all right in r epochs in a row is left out for the next r.
    """

    def __init__(self, usable: Sequence[int], seed: int, skip_solved: bool = False, state: dict | None = None):
        self.usable, self.seed, self.skip_solved = list(usable), seed, skip_solved
        self.asked = 0  # places of the order that are behind us
        self.solved: dict[int, list[int]] = {}  # question -> epochs in a row that it was right, the last of them
        self._order: tuple[int, np.ndarray] | None = None
        if state is not None:
            self.asked, self.solved = state["asked"], {q: list(known) for q, known in state.get("solved", {}).items()}

    def take(self, n: int) -> list[int]:
        """Return the next `n` questions. Where a whole epoch is to be left out, nothing is."""
        chosen: list[int] = []
        left_out = 0
        while len(chosen) < n:
            epoch, place = divmod(self.asked, len(self.usable))
            question = self.usable[self.order(epoch)[place]]
            self.asked += 1
            streak, last = self.solved.get(question, (0, 0))
            if streak and epoch <= last + streak and left_out < len(self.usable):
                left_out += 1
            else:
                chosen.append(question)
        return chosen

    def order(self, epoch: int) -> np.ndarray:
        """Return the places of the usable questions in the order of an epoch."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.usable))
        return self._order[1]

    def learn(self, results: Sequence[tuple[int, bool]]) -> None:
        """Take note of questions and whether all their answers were right; call it with those of all processes."""
        if not self.skip_solved:
            return
        epoch = (self.asked - 1) // len(self.usable)
        for question, right in results:
            streak = self.solved.pop(question, [0, 0])[0]
            if right:
                self.solved[question] = [streak + 1, epoch]

    def state_dict(self) -> dict:
        return {"asked": self.asked} | ({"solved": self.solved} if self.solved else {})


class Reference:
    """Frozen copy of the network as it was given, whose log-probabilities go with the micro-batches."""

    def __init__(self, net):
        self.net = copy.deepcopy(net).requires_grad_(False).eval()

    @torch.no_grad()
    def add(self, micro: list[dict], device: torch.device, dtype: torch.dtype) -> None:
        """Add `logprobs_ref` (B, T) to each micro-batch, computed on `device` in `dtype`."""
        self.net.to(device).compute_dtype = dtype
        for one in micro:
            found = objectives.token_logprobs(self.net, one["inputs"].to(device), one["targets"].to(device))
            one["logprobs_ref"] = found.cpu()


def add_old_logprobs(net, micro: list[dict]) -> None:
    """Add `logprobs_old` (B, T), and `values_old` of a network with a scalar head, to each micro-batch.

    They come from the very pass that training makes, so that the first update of a rollout has ratios of exactly 1.
    Memory is used as in training, without a backward pass.
    """
    for one in micro:
        inputs, targets = one["inputs"].to(net.device), one["targets"].to(net.device)
        with torch.enable_grad():
            if net.config.scalar_head:
                found, values = objectives.token_logprobs_and_values(net, inputs, targets)
                one["values_old"] = values.detach().cpu()
            else:
                found = objectives.token_logprobs(net, inputs, targets)
        one["logprobs_old"] = found.detach().cpu()


class RolloutSteps:
    """Step batches made of fresh samples. Never runs ahead: every rollout comes from the weights of its own step.

    Draws depend on the seed, the step, the rank and the try alone. A rollout serves `stage.updates_per_rollout` steps;
    between them its micro-batches are part of the position, because the weights that drew them are gone.
    score: gives the rewards. rehearsal: conversations of which `stage.rehearsal` are trained on in every step. log:
    keeps answers for the report.
    """

    def __init__(
        self,
        engine: Engine,
        task,
        stage,
        rows_per_micro: int,
        seed: int,
        position: dict | None,
        score: Score,
        rehearsal=None,
        log: RolloutLog | None = None,
    ):
        self.engine, self.task, self.stage, self.rehearsal = engine, task, stage, rehearsal
        self.rows_per_micro, self.seed, self.score, self.log = rows_per_micro, seed, score, log
        weights = getattr(score, "weights", None)  # of several scores of each answer
        self.score_weights = weights
        self.reward_weights = None if weights is None else torch.cat((weights, torch.ones(1)))
        position = {"step": 0, "balance": {}} if position is None else position
        self.step = position["step"]
        self.balance = Balance.from_dict(position.get("balance", {"partial": 1}))
        self.held: dict | None = position.get("rollout")
        self.seconds = {"rollout": 0.0, "forward": 0.0}  # of this step: drawing answers, passes of other networks
        self.prompts = self.fitting_prompts()
        order = position.get("questions", {"asked": self.planned(self.step)})
        self.questions = Questions(list(self.prompts), seed, stage.curriculum == "pass_rate", order)

    def fitting_prompts(self) -> dict[int, list[int]]:
        """Return the prompts that leave room for an answer, by question. UserError where they are fewer than a step."""
        limit, prompts = self.engine.net.config.seq_len - 1, {}
        for i in range(len(self.task)):
            prompt = render_prompt(self.engine.tokenizer, self.task[i])
            if len(prompt) < limit:
                prompts[i] = prompt
        if len(prompts) < self.stage.prompts_per_step:
            raise UserError(
                f"stage.prompts_per_step={self.stage.prompts_per_step}: only {len(prompts)} questions of "
                f"{self.task.name} leave room for an answer within model.seq_len={limit + 1}"
            )
        if (too_long := len(self.task) - len(prompts)) and collectives.is_main():
            print(
                f"WARNING: {too_long:,} of {len(self.task):,} questions leave no room for an answer: not asked",
                flush=True,
            )
        return prompts

    def __len__(self) -> int:
        return 10**9

    def planned(self, step: int) -> int:
        """Return how many questions the steps before `step` ask, where none is left out or asked in addition."""
        return -(-step // self.stage.updates_per_rollout) * self.stage.prompts_per_step

    def skip(self, steps: int) -> None:
        """Leave out the questions of so many steps."""
        self.questions.asked += self.planned(self.step + steps) - self.planned(self.step)
        self.step += steps
        self.held = None

    def __iter__(self) -> Iterator[dict]:
        while True:
            self.seconds = dict.fromkeys(self.seconds, 0.0)
            if self.held is None:
                self.held = self.rollout(self.step)
            batch = dict(self.held)
            if self.rehearsal is not None:
                extra, n_extra = self.rehearse(self.step, batch["n_trained"])
                batch |= {"micro": batch["micro"] + extra, "n_tokens": batch["n_tokens"] + n_extra}
            self.step += 1
            if self.step % self.stage.updates_per_rollout == 0:
                self.held = None
            yield batch | {"seconds": self.seconds, "state": self.position()}

    def position(self) -> dict:
        """Return from where these steps go on; what a plain order of questions says by itself is left out."""
        position: dict[str, Any] = {"step": self.step, "balance": self.balance.to_dict()}
        order = self.questions.state_dict()
        if order != {"asked": self.planned(self.step)}:
            position["questions"] = copy.deepcopy(order)
        return position if self.held is None else position | {"rollout": self.held}

    def rollout(self, step: int) -> dict:
        """Return what a rollout drawn at `step` gives to each of its updates: micro, n_trained, n_tokens, metrics."""
        raise NotImplementedError

    @staticmethod
    def share(items: Sequence) -> Sequence:
        """Return the part of a step's items that falls to this rank."""
        return items[collectives.rank() :: collectives.world_size()]

    def ask(self, questions: Sequence[int], step: int, attempt: int = 0) -> list[Group]:
        """Return the answers of the current network to this rank's questions, with their rewards.

        attempt: number of the try within the step, which draws other answers. All processes call it together.
        """
        stage = self.stage
        params = SamplingParams(
            temperature=stage.temperature,
            top_k=stage.top_k,
            max_new_tokens=stage.max_new_tokens,
            seed=(self.seed + 1_009 * collectives.rank()) * 1_000_003 + step + NEXT_TRY * attempt,
            logprobs=0,
        )
        prompts, begin = [self.prompts[i] for i in questions], time.perf_counter()
        engine = Engine(full_model(self.engine.net), self.engine.tokenizer)
        if stage.turns > 1:
            conversations, how = [self.task[i] for i in questions], (params, stage.samples_per_prompt)
            drawn = answer_in_turns(engine, prompts, conversations, *how, self.task.reply, stage.turns)
        else:
            drawn = engine.generate(prompts, params, stage.samples_per_prompt)
        self.seconds["rollout"] += time.perf_counter() - begin
        return self.rewarded(questions, drawn) if questions else []

    def rewarded(self, questions: Sequence[int], drawn: Sequence[Sequence[Completion]]) -> list[Group]:
        """Return the completions of each question with their rewards; all of them are scored in one call."""
        stage, seq_len = self.stage, self.engine.net.config.seq_len
        pairs = [(self.task[i], sample) for i, samples in zip(questions, drawn, strict=True) for sample in samples]
        conversations = [judged(conversation, sample) for conversation, sample in pairs]
        texts = [self.engine.tokenizer.decode(sample.ids[last_answer(sample) :]) for _, sample in pairs]
        scores, groups = self.score(conversations, texts).split(stage.samples_per_prompt), []
        for question, samples, own in zip(questions, drawn, scores, strict=True):
            prompt = self.prompts[question]
            room = min(stage.max_new_tokens, seq_len - len(prompt))
            lengths = torch.tensor([float(len(sample.ids)) for sample in samples])
            penalty = objectives.overlong_penalty(lengths, torch.tensor(room), stage.overlong)
            rewards = own + penalty if own.dim() == 1 else torch.cat((own, penalty.unsqueeze(1)), dim=1)
            groups.append(Group(question, [answer_of(prompt, sample, room) for sample in samples], own, rewards))
        return groups

    def answer_metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return what metrics.csv tells of the answers of all processes, by this rank's groups, at least one.

        The curriculum learns from them: all processes call it together.
        """
        parts = torch.stack([group.scores for group in groups])
        scores = objectives.total_rewards(parts, self.score_weights)
        right = [(one.question, bool(row.all())) for one, row in zip(groups, self.are_right(parts), strict=True)]
        self.questions.learn([one for part in collectives.all_gather_object(right) for one in part])
        answers = [answer for group in groups for answer in group.answers]
        n_sampled, n = sum(answer.n_sampled for answer in answers), len(answers)
        statistics = RewardStatistics()
        statistics.update(scores)
        rewards = numbers_of(statistics)
        names = [] if self.score_weights is None else self.score.names
        sums = [
            n,
            n_sampled,
            sum(answer.length for answer in answers),
            sum(answer.is_finished for answer in answers),
            -sum(map(math.fsum, (answer.logprobs for answer in answers))),
            n_sampled / max(self.seconds["rollout"], 1e-9),
            *(n * parts[..., i].mean().item() for i in range(len(names))),
        ]
        n, n_sampled, length, finished, entropy, speeds, *by_reward = collectives.all_reduce_sum(sums)
        return {
            "reward": rewards["reward"],
            "reward_std": rewards["reward_std"],
            "response_len": length / n,
            "finished": finished / n,
            "truncated": 1 - finished / n,
            "entropy": entropy / max(n_sampled, 1),
            "rollout_tok_per_s": speeds / collectives.world_size(),
            **{f"reward/{name}": total / n for name, total in zip(names, by_reward, strict=True)},
        }

    def totals(self, groups: Sequence[Group]) -> torch.Tensor:
        """Return the rewards (P, G) of groups, the weighted sums of several."""
        return objectives.total_rewards(torch.stack([group.rewards for group in groups]), self.reward_weights)

    def are_right(self, scores: torch.Tensor) -> torch.Tensor:
        """Return which answers (P, G) are right by their scores (P, G) or (P, G, R).

        Among several rewards that of the task alone decides, where it is there: 1 is right. Otherwise an answer is
        right whose weighted sum is at least that of rewards of 1, where weights below 0 add nothing.
        """
        names = getattr(self.score, "names", [])
        if scores.dim() == 3 and "task" in names:
            return scores[..., names.index("task")] >= 1 - ROUNDING
        full = getattr(self.score, "full", 1.0)
        return objectives.total_rewards(scores, self.score_weights) >= full - ROUNDING

    def trained_on(self, answers: Sequence[Answer], weights: Sequence[float]) -> dict:
        """Return micro, n_trained and n_tokens of answers whose tokens have one weight per answer, as `advantages`.

        Answers of weight 0 are left out of the passes, and do not count as trained.
        """
        ids, masks, kept = [a.ids for a in answers], [a.mask for a in answers], [weight != 0 for weight in weights]
        columns = {"advantages": weights, "logprobs_engine": [a.logprobs for a in answers]}
        micro = micro_batches_of(ids, masks, self.rows_per_micro, kept, **columns)
        if self.stage.updates_per_rollout > 1:
            begin = time.perf_counter()
            add_old_logprobs(full_model(self.engine.net), micro)
            self.seconds["forward"] += time.perf_counter() - begin
        self.balance += of_rollout(list(zip(ids, masks, strict=True)), kept, [a.is_finished for a in answers])
        n_trained = sum(answer.n_sampled for answer, is_kept in zip(answers, kept, strict=True) if is_kept)
        return {"micro": micro, "n_trained": at_least_one(n_trained), "n_tokens": passed_tokens(ids, kept)}

    def log_answers(self, step: int, groups: Sequence[Group], advantages: Sequence[float]) -> None:
        """Keep the answers of a step, and an advantage of each, for the report."""
        if self.log is None:
            return
        rows, names = [], getattr(self.score, "names", ["reward"])
        totals = self.totals(groups) if groups else []
        answers = [(i, j, answer) for i, group in enumerate(groups) for j, answer in enumerate(group.answers)]
        for (i, j, answer), advantage in zip(answers, advantages, strict=True):
            scores = groups[i].scores[j].view(-1).tolist()
            row = {"ids": answer.ids, "mask": answer.mask, "n_prompt": len(self.prompts[groups[i].question])}
            row |= {"question": groups[i].question, "rewards": dict(zip(names, scores, strict=True))}
            row |= {"reward": totals[i][j].item(), "advantage": advantage, "length": answer.length}
            rows.append(row | {"finish": "stop" if answer.is_finished else "length"})
        self.log.add(step, rows)

    def rehearse(self, step: int, n_trained: int) -> tuple[list[dict], int]:
        """Micro-batches of the step's finetuning conversations and their number of tokens.

        Their mean loss per trained token counts `stage.rehearsal_weight`, though the step divides by `n_trained`. Both
        numbers of tokens are those of all processes, which call it together.
        """
        ids, factors, balance = conversations_of(self.rehearsal, self.engine, step, self.stage.rehearsal)
        masks = trained_tokens(factors)
        self.balance += balance
        n_rehearsed, n_tokens = counts(ids, masks)
        trained, rehearsed = collectives.all_reduce_sum([n_trained, n_rehearsed])
        weight = self.stage.rehearsal_weight * trained / max(rehearsed, 1)
        weights = [[weight * factor for factor in row] for row in factors]
        return micro_batches_of(ids, masks, self.rows_per_micro, weights=weights), n_tokens


def conversations_of(mixture: Sequence, engine: Engine, step: int, n: int) -> tuple[list, list, Balance]:
    """Return ids and factors of the tokens' losses of this rank's part of the `n` conversations of a step; and balance.

    They follow one another through the mixture, again and again; a factor is above 0 on what the assistant says.
    """
    limit = engine.net.config.seq_len + 1
    rows = [mixture[k % len(mixture)] for k in RolloutSteps.share(range(step * n, (step + 1) * n))]
    rendered = [render(engine.tokenizer, row, limit) for row in rows]
    documents = [one.document for one in rendered]
    ids, factors = [one.ids.tolist() for one in documents], [one.mask.astype(float).tolist() for one in documents]
    return ids, factors, of_conversations(rendered)


def trained_tokens(factors: Sequence[Sequence[float]]) -> list[list[int]]:
    """Return masks that are 1 where factors of losses are above 0."""
    return [[int(factor > 0) for factor in row] for row in factors]


def counts(ids: Sequence[Sequence[int]], masks: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the numbers of trained and of all tokens that rows of `ids` have as targets."""
    return sum(sum(mask[1:]) for mask in masks), sum(len(row) - 1 for row in ids)


def at_least_one(n_trained: float) -> float:
    """Return what this process trains in a step, or for the first one 1 where no process trains anything."""
    (total,) = collectives.all_reduce_sum([n_trained])
    return n_trained if total or not collectives.is_main() else 1


def in_passes(ids: Sequence[Sequence[int]], keep: Sequence[bool] | None) -> list[int]:
    """Return the places of the sequences that passes run over, long ones first; keep: those that have a gradient.

    If none is kept, the shortest one stands for them, so that the step is an ordinary one.
    """
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    return [i for i in order if keep is None or keep[i]] or order[-1:]


def passed_tokens(ids: Sequence[Sequence[int]], keep: Sequence[bool]) -> int:
    """Return the number of tokens that passes over the kept sequences of `ids` have as targets."""
    return sum(len(ids[i]) - 1 for i in in_passes(ids, keep))


def micro_batches_of(
    ids: Sequence[Sequence[int]],
    masks: Sequence[Sequence[int]],
    rows: int,
    keep: Sequence[bool] | None = None,
    **columns: Sequence,
) -> list[dict]:
    """Return micro-batches of `rows` right-padded sequences of similar length: inputs, targets and the columns, (B, T).

    masks: 1 on trained tokens. keep: see `in_passes`, all by default; others are left out. Without any sequence there
    is a row of one token that is not trained. columns: per sequence a number, or one for each of its ids.
    """
    if not ids:
        empty = {"inputs": torch.zeros(1, 1, dtype=torch.long), "targets": torch.full((1, 1), -1)}
        return [empty | {name: torch.zeros(1, 1) for name in columns}]
    order, micro = in_passes(ids, keep), []
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        shape = len(part), len(ids[part[0]]) - 1
        batch = {"inputs": torch.zeros(shape, dtype=torch.long), "targets": torch.full(shape, -1)}
        batch |= {name: torch.zeros(shape) for name in columns}
        for row, i in enumerate(part):
            own, mask, end = torch.tensor(ids[i]), torch.tensor(masks[i]), len(ids[i]) - 1
            batch["inputs"][row, :end] = own[:-1]
            batch["targets"][row, :end] = torch.where(mask[1:] == 1, own[1:], -1)
            for name, values in columns.items():
                is_list = isinstance(values[i], Sequence)
                batch[name][row, : end if is_list else None] = torch.tensor(values[i][1:] if is_list else values[i])
        micro.append(batch)
    return micro
