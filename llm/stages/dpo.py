"""Preferences without a reward model: DPO, IPO, ORPO, KTO and SimPO, by `stage.loss`.

Formulas and sources stand in `llm.objectives`. DPO, IPO and KTO compare the network with a frozen copy of the parent,
which gives its log-probabilities while the batches are made; ORPO and SimPO keep no copy. A step is
`stage.pairs_per_step` rows; its loss is the mean over pairs, of KTO over answers.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch

from llm.objectives import (
    PREFERENCE_LOSSES,
    Answers,
    PreferenceLoss,
    PreferenceSettings,
    kl_k2,
    masked_mean,
    token_logprobs,
)
from llm.parallel import collectives
from llm.parallel.strategy import full_model
from llm.stages.choices import check_kto
from llm.stages.common import BuiltStage, eval_tasks, load_parent
from llm.stages.preferences import build_stage, read_sources, usable_rows


def answers_of(net, micro: dict) -> tuple[Answers, torch.Tensor, torch.Tensor]:
    """Return the answers of a micro-batch, the log-probabilities of their tokens (B, T), and where these are (B, T)."""
    logprobs, mask = token_logprobs(net, micro["inputs"], micro["targets"]), micro["targets"] >= 0
    return Answers.of(logprobs, mask, micro.get("logprobs_ref")), logprobs, mask


class PreferenceObjective:
    """Loss of a micro-batch of pairs, or for kto of labelled answers, and sums for metrics.csv.

    accuracy: share of pairs, or of kto's answers, on the right side; margin: difference of the rewards that the loss
    implies; logp_chosen and logp_rejected: of whole answers; kl: from the parent, per token of the data's answers
    (k2), where there is a reference.
    """

    def __init__(self, loss: PreferenceLoss, settings: PreferenceSettings):
        self.loss, self.settings = loss, settings

    def __call__(self, net, micro: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        answers, logprobs, mask = answers_of(net, micro)
        if "last" not in micro:  # nothing but padding, see pad_micro_batches
            return logprobs.sum(), {}
        loss, settings = self.loss, self.settings
        with torch.no_grad():
            rewards = loss.rewards(answers, settings.beta)
        if loss.is_paired:
            chosen, rejected = answers[0::2], answers[1::2]
            losses, margins = loss.loss(chosen, rejected, settings), rewards[0::2] - rewards[1::2]
            sums = {
                "accuracy": (margins > 0).sum() + 0.5 * (margins == 0).sum(),
                "margin": margins.sum(),
                "logp_chosen": chosen.logps.detach().sum(),
                "logp_rejected": rejected.logps.detach().sum(),
            }
        else:
            labels, baseline = micro["labels"], micro["baseline"]
            losses = loss.loss(answers, labels, baseline, settings)
            side = torch.where(labels, 1.0, -1.0) * (rewards - settings.beta * baseline)
            sums = {
                "accuracy": (side > 0).sum() + 0.5 * (side == 0).sum(),
                "margin": side.sum(),
                "baseline": baseline * len(labels),
            }
        if loss.has_reference:
            kl = masked_mean(kl_k2(logprobs.detach(), micro["logprobs_ref"], mask), mask).sum()
            sums["kl"] = kl / 2 if loss.is_paired else kl
        return losses.sum(), sums


class Reference:
    """A frozen copy of the parent's network, which says how likely answers are; it moves to the device at first use."""

    def __init__(self, net):
        self.net = deepcopy(net).requires_grad_(False)

    @torch.no_grad()
    def add(self, batches: list[dict], like) -> None:
        """Put `logprobs_ref` (B, T) into micro-batches, which move to the device of the network `like`."""
        self.net.to(like.device)
        self.net.compute_dtype = like.compute_dtype
        for micro in batches:
            micro.update({key: value.to(like.device) for key, value in micro.items()})
            micro["logprobs_ref"] = token_logprobs(self.net, micro["inputs"], micro["targets"])

    @torch.no_grad()
    def kl_of(self, batches: list[dict], net) -> float:
        """Return the mean over answers, of all processes, of l - l_ref, at least 0."""
        self.add(batches, net)
        ratios = [answers_of(net, micro)[0].ratio.sum().item() for micro in batches]
        total, count = collectives.all_reduce_sum([sum(ratios), sum(len(micro["last"]) for micro in batches)])
        return max(0.0, total / count)


def preparation(loss: PreferenceLoss, reference: Reference, net) -> Callable:
    """Return the function that completes the micro-batches of a step: with the reference's numbers, and kto's baseline.

    The baseline is measured on answers to other questions, with the weights of the step.
    """

    def prepare(micro: list[dict], mismatched: Callable[[], list[dict]]) -> None:
        reference.add(micro, net)
        if not loss.is_paired:
            baseline = torch.tensor(reference.kl_of(mismatched(), full_model(net)), device=net.device)
            for one in micro:
                one["baseline"] = baseline

    return prepare


def settings_of(stage) -> PreferenceSettings:
    """Return the numbers of the loss `stage.loss`; stage.beta=null is the published one."""
    beta = PREFERENCE_LOSSES[stage.loss].beta if stage.beta is None else stage.beta
    return PreferenceSettings(
        beta,
        stage.label_smoothing,
        stage.gamma,
        stage.odds_weight,
        stage.desirable_weight,
        stage.undesirable_weight,
    )


def build(cfg, parent: Path) -> BuiltStage:
    """Build the parent's network with the loss `stage.loss` on the sources `stage.preferences`."""
    loss, settings = PREFERENCE_LOSSES[cfg.stage.loss], settings_of(cfg.stage)
    check_kto(cfg)
    sources, chat_tasks = read_sources(cfg), eval_tasks(cfg)  # all rows are checked before weights are loaded
    net, tokenizer = load_parent(parent, cfg)
    rows = usable_rows(cfg, tokenizer, sources, labelled=not loss.is_paired)
    more = {}
    if loss.has_reference:
        reference = Reference(net)
        more = {"prepare": preparation(loss, reference, net), "prepare_held_out": reference.add}

    def rewards(net, micro: dict) -> torch.Tensor:
        return loss.rewards(answers_of(net, micro)[0], settings.beta)

    objective = PreferenceObjective(loss, settings)
    return build_stage(
        cfg,
        net,
        tokenizer,
        rows,
        objective,
        rewards,
        labelled=not loss.is_paired,
        parent=parent,
        chat_tasks=chat_tasks,
        **more,
    )
