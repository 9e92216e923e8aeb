"""Reward models in stages that sample answers: as a reward, and as the judge of `stage.judge`."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from callbacks.preference_eval import WinRate
from llm.errors import UserError
from llm.eval.reward_model import RewardModel, data_answers
from llm.eval.task_scores import spread
from llm.stages.common import load_further
from llm.tokenizer.chat_format import render_prompt
from tasks import Task
from tasks.rewards import Reward

REFERENCES = 256  # conversations whose answers say where 0 and 1 of a normalised reward are


class RewardModelReward(Reward):
    """`reward_model`: the number that a trained reward model gives an answer; no bounds.

    model: <run>, <run>/<stage> or a folder of stage=reward. normalise: subtract the mean reward of the answers that the
    training data has, better and worse ones, and divide by their standard deviation. So a weight beside other rewards
    does not depend on the model. The network stays as it is.
    """

    range = (float("-inf"), float("inf"))

    def __init__(self, task: Task, model: str, normalise: bool = True):
        super().__init__(task)
        if not isinstance(model, str) or not model:
            raise UserError(f"model={model}: name a reward model, <run>/reward or a folder")
        if not isinstance(normalise, bool):
            raise UserError(f"normalise={normalise}: must be true or false")
        self.model, self.normalise = model, normalise
        self.scale: tuple[float, float] | None = None  # mean and standard deviation of the data's answers

    def attach(self, cfg, net, tokenizer) -> None:
        """Load the network. Raises UserError for a model without scalar head, or one that does not fit the trained."""
        self.score = load_reward_model(cfg, net, tokenizer, REWARD_MODEL_KEY, self.model)

    def __call__(self, conversations: Sequence[dict], completions: Sequence[str]) -> list[float]:
        """Return the reward of each completion."""
        found = self.score(conversations, completions)
        if not self.normalise:
            return found
        if self.scale is None:  # from data and frozen weights alone, so that a resumed training finds it again
            self.scale = self.reference_scale()
        mean, deviation = self.scale
        return [(reward - mean) / deviation for reward in found]

    def reference_scale(self) -> tuple[float, float]:
        """Return mean and standard deviation of the rewards of the data's answers (`data_answers`)."""
        conversations = [self.task[i] for i in spread(len(self.task), REFERENCES)]
        rewards = torch.tensor(self.score.scores(data_answers(conversations))).double()
        return rewards.mean().item(), max(rewards.std(correction=0).item(), 1e-6)


REWARD_MODEL_KEY = "stage.reward_options.reward_model.model"


def win_rates(cfg, net, tokenizer, rows: Iterable[tuple], parent: Path | None) -> list[WinRate]:
    """Return the callback that compares free answers to held-out prompts with those of `parent`; none without rows.

    rows: (source, conversation) pairs. At most `stage.eval_examples` of them are taken, evenly spread: with a judge,
    `stage.judge`, all whose prompts leave room for an answer, and without one those of a rule.
    """
    stage, judge = cfg.stage, None
    if not (most := stage.get("eval_examples")):
        return []
    if stage.judge is not None:
        judge = load_reward_model(cfg, net, tokenizer, "stage.judge", stage.judge)
    found = [
        (source, conversation)
        for source, conversation in rows
        if (judge is not None or "rule" in conversation)
        and len(render_prompt(tokenizer, conversation)) < cfg.model.seq_len
    ]
    judged = [found[i] for i in spread(len(found), most)]
    return [WinRate(stage.eval_every, judged, parent, stage.max_new_tokens, judge)] if judged else []


def load_reward_model(cfg, net, tokenizer, key: str, value: str) -> RewardModel:
    """Return the reward model that `key`=`value` names, beside the network that is trained.

    Raises UserError for a model without a trained scalar head, another tokenizer, or a context that is too short.
    """
    judge, folder = load_further(cfg, key, value, "reward model", net, tokenizer)
    if not judge.config.scalar_head:
        raise UserError(
            f"{key}={value}: {folder} is no reward model; train one with stage=reward, or name <run>/reward"
        )
    if not judge.scalar_head.weight.any():
        raise UserError(f"{key}={value}: {folder} gives every answer the reward 0; train it with stage=reward")
    return RewardModel(judge, tokenizer, net, cfg.batch.micro_batch_size)
