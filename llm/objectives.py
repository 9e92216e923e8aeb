"""Pure tensor functions of post-training: log-probabilities, KL, advantages, corrections, policy and value losses.

Shapes: (B, T) holds one number per token of B right-padded sequences, (P, G) one per answer, G answers to each of P
questions. `mask` (B, T) is true on the tokens that count. All sums are masked ones, and no masked number, not even inf
or NaN, reaches a value or a gradient: it is set to 0 before anything is computed from it. In formulas, l stands for
log-probabilities of the network that is trained, l_old for those that it gave to the answers when they were drawn, r
for exp(l - l_old), A for advantages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOG_RATIO_LIMIT = 20.0  # beyond it exp() leaves what fp32 sums can hold
STD_FLOOR = 1e-4  # added to the standard deviation of a group's rewards


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities and masked sums


def token_logprobs(net, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the fp32 log-probabilities (B, T) of `targets` behind `inputs` (B, T); 0 where targets are -1.

    They are of the whole distribution of `net` at temperature 1, and differentiable. Full logits never exist.
    """
    return -net(inputs, targets, reduction="none")


def token_logprobs_and_values(net, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `token_logprobs` (B, T), and what the scalar head says (B, T) before each of them, from one pass."""
    losses, values = net(inputs, targets, reduction="none", scalars=True)
    return -losses, values


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum over the last axis of `values` (..., T) where `mask` (..., T) is true."""
    return values.masked_fill(~mask, 0.0).sum(-1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over the last axis of `values` (..., T) where `mask` is true; 0 for rows without any."""
    return masked_sum(values, mask) / mask.sum(-1).clamp(min=1)


def log_ratio(logprobs: torch.Tensor, others: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return logprobs - others (B, T) within +-20, and 0 on masked tokens, so that its exponential is finite."""
    return (logprobs - others).masked_fill(~mask, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


# ---------------------------------------------------------------------------------------------------------------------
# KL divergence from a reference


def kl_k1(logprobs: torch.Tensor, logprobs_ref: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return l - l_ref per token (B, T): unbiased, of either sign (Schulman, "Approximating KL divergence", 2020)."""
    return log_ratio(logprobs, logprobs_ref, mask)


def kl_k2(logprobs: torch.Tensor, logprobs_ref: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return (l - l_ref)^2 / 2 per token (B, T): biased, never negative; its gradient is that of the KL divergence."""
    return 0.5 * log_ratio(logprobs, logprobs_ref, mask).square()


def kl_k3(logprobs: torch.Tensor, logprobs_ref: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return exp(d) - d - 1 per token (B, T), d = l_ref - l: unbiased and never negative (arXiv 2402.03300)."""
    d = log_ratio(logprobs_ref, logprobs, mask)
    return d.exp() - d - 1


KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


# ---------------------------------------------------------------------------------------------------------------------
# Rewards and advantages


def overlong_penalty(lengths: torch.Tensor, limits: torch.Tensor, soft: int) -> torch.Tensor:
    """Return what is added to the rewards (N,) of answers of `lengths` (N,) tokens, at most `limits` (N,) each.

    0 up to limit - soft, then falling in a straight line to -1 at the limit (DAPO, arXiv 2503.14476); soft=0: all 0.
    """
    if not soft:
        return torch.zeros(lengths.shape)
    return ((limits - soft - lengths) / soft).clamp(-1.0, 0.0)


def total_rewards(rewards: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the rewards of answers (P, G): as they are, or of (P, G, R) the sum with weights (R,), 1 by default."""
    if rewards.dim() == 2:
        return rewards
    return rewards.sum(-1) if weights is None else (rewards * weights).sum(-1)


def _deviation(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the unbiased standard deviation along `dim`, kept as an axis of 1; 0 for a single value."""
    if values.size(dim) < 2:
        return torch.zeros_like(values.narrow(dim, 0, 1))
    return values.std(dim=dim, keepdim=True)


def _centred(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Subtract the mean along `dim`; equal values become exactly 0, where a rounded mean would leave a trace."""
    differs = values.amax(dim, keepdim=True) > values.amin(dim, keepdim=True)
    return torch.where(differs, values - values.mean(dim=dim, keepdim=True), 0.0)


def advantage_centred(rewards: torch.Tensor) -> torch.Tensor:
    """Subtract from rewards (P, G) the mean of each question's answers (Dr. GRPO, arXiv 2503.20783)."""
    return _centred(rewards, 1)


def advantage_zscore(rewards: torch.Tensor) -> torch.Tensor:
    """Return (R - mean) / (std + 1e-4) within each question of rewards (P, G) (GRPO, arXiv 2402.03300)."""
    return advantage_centred(rewards) / (_deviation(rewards, 1) + STD_FLOOR)


def advantage_rloo(rewards: torch.Tensor) -> torch.Tensor:
    """Subtract from each of rewards (P, G) the mean of the question's other answers (RLOO, arXiv 2402.14740).

    That is G / (G - 1) times the centred advantage; 0 for a group of one, which has no others.
    """
    group = rewards.size(1)
    return advantage_centred(rewards) * (group / (group - 1) if group > 1 else 0.0)


def advantage_max_rl(rewards: torch.Tensor) -> torch.Tensor:
    """Return (R - mean) / mean within each question of rewards (P, G): rare successes count more (arXiv 2602.02710).

    Rewards are from 0 upwards; a question whose mean is not above 0 gets 0.
    """
    mean = rewards.mean(dim=1, keepdim=True)
    centred = advantage_centred(rewards)
    return torch.where(mean > 0, centred / torch.where(mean > 0, mean, 1.0), 0.0)


def advantage_gdpo(rewards: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Normalise several rewards apart, then their sum over the whole step (GDPO, arXiv 2601.05242); returns (P, G).

    rewards: (P, G, R) for R rewards of weights (R,), or (P, G) for one. Each is (R - mean) / (std + 1e-4) within its
    question; their weighted sum loses its mean and is divided by its standard deviation + 1e-4 over all P G answers.
    A question whose answers are rewarded alike gets exactly 0.
    """
    parts = rewards.unsqueeze(-1) if rewards.dim() == 2 else rewards
    parts = _centred(parts, 1) / (_deviation(parts, 1) + STD_FLOOR)
    total = total_rewards(parts, weights).flatten()
    advantages = (_centred(total, 0) / (_deviation(total, 0) + STD_FLOOR)).view(rewards.shape[:2])
    return advantages * parts.flatten(1).ne(0).any(1, keepdim=True)


ADVANTAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "centred": advantage_centred,
    "zscore": advantage_zscore,
    "rloo": advantage_rloo,
    "max_rl": advantage_max_rl,
}


def group_advantages(name: str, rewards: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the advantages (P, G) of rewards (P, G), or (P, G, R) with weights (R,), by the rule `name`.

    name: a key of `ADVANTAGES`, which compare the weighted sum of an answer's rewards, or gdpo.
    """
    if name == "gdpo":
        return advantage_gdpo(rewards, weights)
    return ADVANTAGES[name](total_rewards(rewards, weights))


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages and returns (B, T) by generalised advantage estimation (arXiv 1506.02438); 0 where masked.

    A_t = d_t + gamma lam A_{t+1}, d_t = R_t + gamma V_{t+1} - V_t, and nothing comes behind the last token. rewards,
    values: (B, T). Masked tokens within an answer, such as those of a tool, are stepped over. Returns are A + V.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(values)
    later_value = later = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        own = rewards[:, t] + gamma * later_value - values[:, t] + gamma * lam * later
        later = torch.where(mask[:, t], own, later)
        later_value = torch.where(mask[:, t], values[:, t], later_value)
        advantages[:, t] = torch.where(mask[:, t], own, 0.0)
    return advantages, advantages + values


def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    shift: bool = True,
    add_up: Callable[[list[float]], Sequence[float]] = list,
) -> torch.Tensor:
    """Return values with mean 0 and deviation 1 over all unmasked ones, 0 where masked; shift=False keeps the mean.

    The variance is the unbiased one plus 1e-8; a single value becomes 0, or keeps its mean. add_up: adds numbers up
    over processes, whose values are then whitened together.
    """
    kept = values[mask].double()
    total, count = add_up([kept.sum().item(), float(len(kept))])
    mean = total / max(count, 1.0)
    (squares,) = add_up([(kept - mean).square().sum().item()])
    white = (values - mean) * (squares / max(count - 1.0, 1.0) + 1e-8) ** -0.5
    return (white if shift else white + mean).masked_fill(~mask, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Corrections where the engine that drew an answer and the trainer give it different probabilities

CORRECTIONS = ("none", "token_tis", "icepop", "sequence_mask")
TIS_LIMIT, ICEPOP_BAND, SEQUENCE_LIMIT = 2.0, 5.0, 3.0


def correction_weights(
    name: str, logprobs_old: torch.Tensor, logprobs_engine: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return factors (B, T) of the tokens' losses, without gradient; rho = exp(l_old - l_engine).

    none: 1. token_tis: min(rho, 2) (truncated importance sampling). icepop: rho within [1/5, 5], else 0 (IcePop).
    sequence_mask: the product of rho over the answer, 0 for the whole answer where it exceeds 3 (TRL's default).
    """
    ratio = log_ratio(logprobs_old, logprobs_engine, mask).detach()
    if name == "none":
        return torch.ones_like(ratio)
    if name == "token_tis":
        return ratio.exp().clamp(max=TIS_LIMIT)
    if name == "icepop":
        rho = ratio.exp()
        return rho.masked_fill((rho < 1 / ICEPOP_BAND) | (rho > ICEPOP_BAND), 0.0)
    whole = masked_sum(ratio, mask).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().unsqueeze(-1)
    return whole.masked_fill(whole > SEQUENCE_LIMIT, 0.0).expand_as(ratio)


# ---------------------------------------------------------------------------------------------------------------------
# Policy losses


@dataclass(frozen=True)
class PolicyLoss:
    """One loss of the policy-gradient family.

    tokens: function of (l, l_old, A, mask, clip_low, clip_high), all (B, T) and 0 where masked but the last two, that
    returns the losses (B, T) and where they were clipped from below and from above (B, T). unit: what the mean of a
    step is taken over: tokens, sequences (each by the mean of its own tokens), or places (sequences times the length
    limit). clip_low, clip_high: published defaults; None where the loss has no such bound. has_ratio: whether it
    corrects for an answer that older weights have drawn.
    """

    tokens: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    unit: str = "tokens"
    clip_low: float | None = None
    clip_high: float | None = None
    has_ratio: bool = True

    def __call__(
        self,
        logprobs: torch.Tensor,
        logprobs_old: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        clip_low: float | None = None,
        clip_high: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the losses of tokens and where they were clipped from below and from above, (B, T) each.

        logprobs, logprobs_old, advantages: (B, T). A bound that is None is the published default.
        """
        low = self.clip_low if clip_low is None else clip_low
        high = self.clip_high if clip_high is None else clip_high
        own = (x.masked_fill(~mask, 0.0) for x in (logprobs, logprobs_old, advantages))
        return self.tokens(*own, mask, low, high)

    @property
    def has_bounds(self) -> bool:
        """Return whether `clip_low` and `clip_high` mean something to it."""
        return self.clip_high is not None

    def total(self, losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the sum of the losses of tokens (B, T) over the units."""
        return (masked_mean if self.unit == "sequences" else masked_sum)(losses, mask).sum()

    def units(self, n_tokens: int, n_sequences: int, limit: int) -> int:
        """Return the units of a step of so many sampled tokens and answers of at most `limit` tokens."""
        return {"tokens": n_tokens, "sequences": n_sequences, "places": n_sequences * limit}[self.unit]


def _reinforce(logp, old, advantages, mask, low, high):
    """Return -A l (Williams, 1992): nothing is clipped."""
    nothing = torch.zeros_like(mask)
    return -advantages * logp, nothing, nothing


def _clipped(r: torch.Tensor, advantages, mask, low: float, high: float):
    """Return -min(r A, clip(r, 1 - low, 1 + high) A), and where the clipped side is the smaller one."""
    losses = -torch.minimum(r * advantages, r.clamp(1 - low, 1 + high) * advantages)
    return losses, mask & (r < 1 - low) & (advantages < 0), mask & (r > 1 + high) & (advantages > 0)


def _grpo(logp, old, advantages, mask, low, high):
    """Return the clipped surrogate of PPO per token (arXiv 1707.06347, 2402.03300)."""
    return _clipped(log_ratio(logp, old, mask).exp(), advantages, mask, low, high)


def _gspo(logp, old, advantages, mask, low, high):
    """Return the clipped surrogate of one ratio per answer, exp(mean of l - l_old) (GSPO, arXiv 2507.18071)."""
    r = masked_mean(log_ratio(logp, old, mask), mask).exp().unsqueeze(-1)
    return _clipped(r.expand_as(logp), advantages, mask, low, high)


def _cispo(logp, old, advantages, mask, low, high):
    """Return -clip(r) A l, the clipped ratio without gradient: every token keeps one (CISPO, arXiv 2506.13585)."""
    r = log_ratio(logp, old, mask).exp().detach()
    return -r.clamp(1 - low, 1 + high) * advantages * logp, mask & (r < 1 - low), mask & (r > 1 + high)


SAPO_TEMPERATURES = 1.0, 1.05  # for positive and for other advantages


def _sapo(logp, old, advantages, mask, low, high):
    """Return -A (4 / t) sigmoid(t (r - 1)): a smooth gate, t = 1 for A > 0, else 1.05 (SAPO, arXiv 2511.20347)."""
    t = torch.full_like(advantages, SAPO_TEMPERATURES[1]).masked_fill(advantages > 0, SAPO_TEMPERATURES[0])
    gate = (4 / t) * torch.sigmoid(t * (log_ratio(logp, old, mask).exp() - 1))
    nothing = torch.zeros_like(mask)
    return -advantages * gate, nothing, nothing


def _ipo_rl(logp, old, advantages, mask, low, high):
    """Return -A r for tokens whose probability moved by -low to +high, 0 for others (prime-rl's IPO, 2026)."""
    moved = (logp.exp() - old.exp()).detach()
    below, above = mask & (moved < -low), mask & (moved > high)
    losses = -advantages * log_ratio(logp, old, mask).exp()
    return losses.masked_fill(below | above, 0.0), below, above


POLICY_LOSSES = {
    "reinforce": PolicyLoss(_reinforce, has_ratio=False),
    "grpo": PolicyLoss(_grpo, "sequences", 0.2, 0.2),
    "dr_grpo": PolicyLoss(_grpo, "places", 0.2, 0.2),  # arXiv 2503.20783
    "dapo": PolicyLoss(_grpo, "tokens", 0.2, 0.28),  # arXiv 2503.14476
    "gspo": PolicyLoss(_gspo, "sequences", 3e-4, 4e-4),
    "cispo": PolicyLoss(_cispo, "tokens", 1.0, 4.0),  # ratios from 0 to 5, as ScaleRL (arXiv 2510.13786) has them
    "sapo": PolicyLoss(_sapo, "sequences"),
    "ipo_rl": PolicyLoss(_ipo_rl, "tokens", 0.3, 0.3),
}
PPO_LOSS = PolicyLoss(_grpo, "tokens", 0.2, 0.2)  # whose advantages come from a critic


def value_loss(
    values: torch.Tensor, values_old: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PPO's value losses (B, T), 0 where masked, and where they were clipped (arXiv 1707.06347, as OpenAI's).

    0.5 max((V - R)^2, (V_clip - R)^2), V_clip = V_old + clip(V - V_old, -clip, clip); all arguments are (B, T).
    """
    values, values_old, returns = (x.masked_fill(~mask, 0.0) for x in (values, values_old, returns))
    near = values_old + (values - values_old).clamp(-clip, clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(plain, clipped), mask & (clipped > plain)


def effective_share(weights_sum: float, squares_sum: float, count: float) -> float:
    """Return (sum w)^2 / (n sum w^2), the share of n weighted tokens that count: 1 for equal weights, 0 for none."""
    return weights_sum**2 / (count * squares_sum) if count and squares_sum else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Preferences: losses of pairs of answers, of labelled answers, and of a reward model
#
# (N,) holds one number per pair. l_c and l_r are log-probabilities of the chosen and the rejected answer, summed over
# the tokens of each, d = l - l_ref, and a bar over a letter is the mean per token in place of the sum.


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of N answers: sums over tokens (N,) by the network and the reference, and token counts (N,)."""

    logps: torch.Tensor
    tokens: torch.Tensor
    logps_ref: torch.Tensor | None = None

    @classmethod
    def of(cls, logprobs: torch.Tensor, mask: torch.Tensor, logprobs_ref: torch.Tensor | None = None) -> "Answers":
        """Sum log-probabilities of tokens (N, T), and those of a reference if there is one, where `mask` is true."""
        ref = None if logprobs_ref is None else masked_sum(logprobs_ref, mask)
        return cls(masked_sum(logprobs, mask), mask.sum(-1).clamp(min=1), ref)

    def __getitem__(self, rows: slice | torch.Tensor) -> "Answers":
        """Return some of the answers."""
        ref = None if self.logps_ref is None else self.logps_ref[rows]
        return Answers(self.logps[rows], self.tokens[rows], ref)

    @property
    def mean(self) -> torch.Tensor:
        """Mean log-probability of the tokens of each answer (N,)."""
        return self.logps / self.tokens

    @property
    def ratio(self) -> torch.Tensor:
        """Return d = l - l_ref of each answer (N,)."""
        return self.logps - self.logps_ref


@dataclass(frozen=True)
class PreferenceSettings:
    """Numbers of the preference losses; each loss reads those that its formula names."""

    beta: float = 0.1
    label_smoothing: float = 0.0  # share of pairs whose labels are thought to be swapped
    gamma: float = 1.0  # simpo: margin that the rewards are to keep
    odds_weight: float = 0.1  # orpo: lambda, the weight of the odds ratio beside the cross-entropy
    desirable_weight: float = 1.0  # kto
    undesirable_weight: float = 1.0  # kto


def _smoothed(margin: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return -(1 - e) log s(margin) - e log s(-margin), s the sigmoid: the loss of labels of which e are wrong."""
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def dpo_loss(chosen: Answers, rejected: Answers, settings: PreferenceSettings) -> torch.Tensor:
    """Return -log s(beta (d_c - d_r)) per pair (DPO, arXiv 2305.18290); with label_smoothing conservative DPO."""
    return _smoothed(settings.beta * (chosen.ratio - rejected.ratio), settings.label_smoothing)


def ipo_loss(chosen: Answers, rejected: Answers, settings: PreferenceSettings) -> torch.Tensor:
    """Return (mean d_c - mean d_r - 1 / (2 beta))^2 per pair, means per token (IPO, arXiv 2310.12036; TRL's form)."""
    gap = chosen.ratio / chosen.tokens - rejected.ratio / rejected.tokens
    return (gap - 1 / (2 * settings.beta)).square()


def log_odds(mean: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) of mean log-probabilities log p (N,), of which none is taken above -1e-6."""
    mean = mean.clamp(max=-1e-6)  # an answer that is certain has no odds
    return mean - torch.log(-torch.expm1(mean))


def orpo_loss(chosen: Answers, rejected: Answers, settings: PreferenceSettings) -> torch.Tensor:
    """Return -mean l_c - lambda log s(log odds_c - log odds_r) per pair, without reference (ORPO, arXiv 2403.07691)."""
    gap = log_odds(chosen.mean) - log_odds(rejected.mean)
    return -chosen.mean - settings.odds_weight * F.logsigmoid(gap)


def simpo_loss(chosen: Answers, rejected: Answers, settings: PreferenceSettings) -> torch.Tensor:
    """Return -log s(beta (mean l_c - mean l_r) - gamma) per pair, without reference (SimPO, arXiv 2405.14734)."""
    margin = settings.beta * (chosen.mean - rejected.mean) - settings.gamma
    return _smoothed(margin, settings.label_smoothing)


def kto_loss(
    answers: Answers, labels: torch.Tensor, baseline: torch.Tensor, settings: PreferenceSettings
) -> torch.Tensor:
    """Return the losses (N,) of answers that are desirable where `labels` (N,) is true (KTO, arXiv 2402.01306).

    w_d (1 - s(beta (d - z))) for desirable answers, w_u (1 - s(beta (z - d))) for others. baseline: z, the KL
    divergence from the reference, at least 0, of answers to other questions than their own; without gradient.
    """
    gain = settings.beta * (answers.ratio - baseline)
    good = settings.desirable_weight * torch.sigmoid(-gain)
    return torch.where(labels, good, settings.undesirable_weight * torch.sigmoid(gain))


@dataclass(frozen=True)
class PreferenceLoss:
    """One loss of preferences: its function, what it needs, and the reward that it implies for an answer.

    loss: of pairs (chosen, rejected, settings), or of labelled answers (kto). has_reference: whether a frozen copy of
    the parent is compared with. per_token: whether the implied reward is a mean over tokens. beta: published default.
    """

    loss: Callable[..., torch.Tensor]
    has_reference: bool = True
    is_paired: bool = True
    per_token: bool = False
    beta: float = 0.1

    def rewards(self, answers: Answers, beta: float) -> torch.Tensor:
        """Return the implied rewards (N,) of answers: beta d, or without a reference beta mean l."""
        if not self.has_reference:
            return beta * answers.mean
        return beta * (answers.ratio / answers.tokens if self.per_token else answers.ratio)


PREFERENCE_LOSSES = {
    "dpo": PreferenceLoss(dpo_loss),
    "ipo": PreferenceLoss(ipo_loss, per_token=True),
    "orpo": PreferenceLoss(orpo_loss, has_reference=False, per_token=True, beta=1.0),
    "kto": PreferenceLoss(kto_loss, is_paired=False),
    "simpo": PreferenceLoss(simpo_loss, has_reference=False, per_token=True, beta=2.0),
}


def reward_loss(chosen: torch.Tensor, rejected: torch.Tensor, centre: float = 0.0) -> torch.Tensor:
    """Return -log s(r_c - r_r) + centre (r_c + r_r)^2 per pair of rewards (N,) (Bradley-Terry; arXiv 2203.02155).

    The second term keeps the rewards near 0, which the first alone leaves open (arXiv 2312.09244).
    """
    return -F.logsigmoid(chosen - rejected) + centre * (chosen + rejected).square()


def last_values(values: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Return the numbers (B,) of `values` (B, T) at the places `last` (B,)."""
    return values.gather(1, last.unsqueeze(1)).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# Distillation: distances between the distributions of a student and a teacher

CHUNK_ELEMENTS = 1 << 23  # logits of the student, and as many of the teacher, that are held at a time


def distillation_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, name: str) -> torch.Tensor:
    """Return the divergence (N,) in nats between the distributions of logits (N, V) of a student and a teacher.

    reverse_kl: sum p (log p - log q), p the student's and q the teacher's: avoids what the teacher would not say
    (MiniLLM, arXiv 2306.08543). forward_kl: sum q (log q - log p): covers all that the teacher would say (Hinton et
    al., arXiv 1503.02531). Both sums are over the whole vocabulary. Raises ValueError for another name.
    """
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if name == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(-1)
    if name == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    raise ValueError(f"no divergence of the name {name}")


def chunked_distillation(
    student: Callable[[torch.Tensor], torch.Tensor],
    teacher: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    hidden_teacher: torch.Tensor,
    goals: torch.Tensor,
    name: str,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `distillation_loss` (N,) and the student's log-probabilities (N,) of `goals` (N,), without gradient.

    student, teacher: heads that make logits (n, V) of rows of hidden (N, C) and hidden_teacher (N, C'). Logits of
    `chunk` tokens exist at a time, in the backward pass too, which makes them again.
    """

    def part(x: torch.Tensor, y: torch.Tensor, goal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = student(x)
        with torch.no_grad():
            others = teacher(y)
            at_goal = logits.gather(1, goal.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
        return distillation_loss(logits, others, name), at_goal

    parts = zip(hidden.split(chunk), hidden_teacher.split(chunk), goals.split(chunk), strict=True)
    found = [checkpoint(part, *one, use_reentrant=False, preserve_rng_state=False) for one in parts]
    losses, logprobs = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(logprobs)


def sampled_distillation(
    logprobs: torch.Tensor, logprobs_teacher: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return losses (B, T) of sampled tokens, 0 where masked, and d = l - l_teacher, within +-20, without gradient.

    -A l with A = -d: the policy gradient of the reverse KL divergence, token by token, of which only the sampled
    tokens are known ("On-policy distillation", Thinking Machines Lab, 2025).
    """
    d = kl_k1(logprobs.detach(), logprobs_teacher, mask)
    return d * logprobs.masked_fill(~mask, 0.0), d
