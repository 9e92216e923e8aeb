"""Typed schemas of the config group `stage`: the keys of each stage of training."""

from dataclasses import dataclass
from typing import Any

from llm.config.key import CONTEXT, ITEMS, STEPS, VOCABULARY, key

# Names of llm.objectives, which imports torch.
POLICY_LOSSES = ("reinforce", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "ipo_rl")
ADVANTAGES = ("centred", "zscore", "rloo", "max_rl", "gdpo")
CORRECTIONS = ("none", "token_tis", "icepop", "sequence_mask")
DIVERGENCES = ("reverse_kl", "forward_kl", "sampled")


@dataclass
class StageConfig:
    """Config group `stage`: keys of every stage."""

    name: str = key("name of the phase, a row of the table in llm/config/stages.py", fixed=True)


@dataclass
class CheckStage(StageConfig):
    """Settings of stage=check."""

    parts: list[str] = key("parts of `data` to read: text, tasks or both")
    out: str | None = key("JSON file for all counts; null = <paths.runs>/data_check.json")


@dataclass
class WriteTokensStage(StageConfig):
    """Settings of stage=write_tokens."""

    part: int = key("number of the part of the files that a job writes, from 0", low=0, high=10**6)
    parts: int = key("parts that the files are dealt to", low=1, high=10**6)


@dataclass
class TokenizerStage(StageConfig):
    """Settings of stage=tokenizer."""

    vocab_size: int = key("entries of the vocabulary, the nine special tokens included", low=265, high=VOCABULARY)
    pretrained: str | None = key("instead of training: a tiktoken encoding (r50k_base, cl100k_base) or tokenizer.json")
    digits: int = key("digits of a number that may become one token", low=1, high=3)
    marks: bool = key("combining marks belong to words, as Hindi, Thai or Arabic need")
    pattern: str | None = key(
        "regular expression that cuts text into pieces, or qwen2 = Qwen2's, which llama.cpp knows; null = ours, by "
        "digits and marks"
    )
    max_chars: int = key("characters of text to train on, at most", low=1, high=10**13)
    doc_cap: int = key("characters taken of one document, at most", low=1, high=10**9)
    compare: list[str] = key("tokenizers to compare with: tiktoken names such as gpt2, folders or files")


@dataclass
class ModelStage(StageConfig):
    """Settings of every stage that trains a network."""

    lr_frac: float = key("learning rates of this stage as a fraction of optim's", above=0, high=1000)
    warmup_steps: int = key(
        "steps in which the learning rate rises from 0, at most a quarter of all", low=0, high=STEPS
    )
    warmdown_ratio: float = key("share of the steps, at the end, in which the learning rate falls", low=0, high=1)
    final_lr_frac: float = key("learning rate of the last step as a fraction of the peak", low=0, high=1)
    eval_every: int = key(
        "steps between evaluations on held-out data, also after the last step; 0 = never", low=0, high=STEPS
    )
    extend: bool = key("lengthen a finished stage by a longer horizon; a larger max_steps does so by itself")
    sample_every: int = key("steps between printed samples, also after the last step; 0 = never", low=0, high=STEPS)
    prompts: list[str] | None = key(
        "texts that samples continue, or questions that a chat model answers; null = from held-out data"
    )


@dataclass
class PretrainStage(ModelStage):
    """Settings of stage=pretrain."""

    warm_start: bool = key(
        "where init_from gives the weights, take the optimizer state of the parent's last checkpoint too"
    )
    eval_tokens: int = key("tokens of one evaluation (bits per byte)", low=1, high=10**12)
    tokens_per_param: float = key(
        "horizon: training tokens per parameter (max_steps and target_flops come first)", above=0, high=10**6
    )
    count_params: str = key(
        "parameters that tokens_per_param counts: all, or the matrices of blocks and head", choices=("all", "matrices")
    )
    target_flops: float | None = key("horizon: training FLOPs; null = by tokens_per_param", above=0, high=1e30)
    max_passes: float | None = key(
        "horizon: passes over the training text, at most, unless max_steps is given; null = no limit",
        above=0,
        high=10**6,
    )
    keep_best: str | None = key(
        "bpb = hand over the weights with the lowest bits per byte; null = those of the last step", choices=("bpb",)
    )
    warmdown_power: float | None = key(
        "power of what is left of the falling learning rate; null = 1, a straight line", above=0, high=10
    )
    average_steps: int | None = key(
        "evaluate and hand over a mixture of the weights and a running average over about so many steps; null = not",
        low=1,
        high=STEPS,
    )
    average_share: float | None = key(
        "share of the running average in the mixture of average_steps; null = 0.6", above=0, high=1
    )
    dropout: float | None = key(
        "share of what attention and MLP add that training steps zero, often 0.1; null = none", above=0, below=1
    )
    window_ramp: float | None = key(
        "share of the steps, at the start, in which attention reaches over 1/4, then 1/2 of each window; null = none",
        above=0,
        high=1,
    )
    row_ramp: float | None = key(
        "share of the steps, at the start, in which rows are cut to 1/4, then 1/2 of the context; null = none",
        above=0,
        high=1,
    )
    batch_ramp: float | None = key(
        "share of the steps, at the start, in which steps have fewer tokens, at first one of batch_parts; null = none",
        above=0,
        high=1,
    )
    batch_parts: int | None = key(
        "equal parts of batch.tokens_per_step, by which the steps of batch_ramp grow; null = 4", low=2, high=1024
    )
    sampled_softmax: float | None = key(
        "share of the vocabulary in the softmax of the first training steps; it grows, and at the end is whole; null "
        "= whole",
        above=0,
        below=1,
    )
    multi_token: float | None = key(
        "weight at first of the loss for the token after the next; the one behind has half; null = 0",
        above=0,
        high=10,
    )
    prefix_token: float | None = key(
        "weight at first of the loss for the longest token that the next one begins with; null = 0", above=0, high=10
    )
    teachers: list[str] = key("models, <run> or <run>/<stage>, whose mean distribution is learnt beside the text")
    teacher_share: float | None = key(
        "share of the divergence from the teachers in the loss; null = 0.5", above=0, high=1
    )
    buffer: int = key("documents that best-fit packing chooses from", low=1, high=10**7)
    core_every: int = key("steps between CORE evaluations, also after the last step; 0 = never", low=0, high=STEPS)
    core_max_per_task: int | None = key("examples per task of a CORE evaluation; null = all", low=1, high=ITEMS)
    core_bundle: str | None = key("folder or zip of a CORE evaluation bundle; null = no CORE evaluations")


@dataclass
class AssistantStage(ModelStage):
    """Stages whose model answers: their answers can be judged."""

    chat_every: int = key("steps between chat task evaluations, also after the last step; 0 = never", low=0, high=STEPS)
    chat_max_per_task: int | None = key("items per task of a chat task evaluation; null = all", low=1, high=ITEMS)
    chat_tasks: list[str] | None = key("tasks of a chat task evaluation; null = data.eval")


@dataclass
class ChatStage(AssistantStage):
    """Settings of stages that train on conversations: midtrain and sft."""

    eval_tokens: int = key("tokens of one evaluation (bits per byte)", low=1, high=10**12)
    epochs: float | None = key(
        "horizon: passes over the mixture (max_steps comes first); null = one, more where conversations are few",
        above=0,
        high=10**6,
    )
    train_on: str = key("tokens that are trained on", choices=("all", "assistant"))
    warm_start: bool = key("take the optimizer state of the parent's last checkpoint")
    neftune_alpha: float | None = key(
        "strength of uniform noise on the embeddings of training steps (NEFTune), often 5; null = none",
        above=0,
        high=10**4,
    )


@dataclass
class PreferenceStage(ModelStage):
    """Settings of stages that train on preferences."""

    preferences: list[str] | None = key("sources of data.preferences to train on; null = all")
    pairs_per_step: int = key("rows of preferences of one step", low=1, high=10**6)
    epochs: float = key("horizon: passes over the preferences (max_steps comes first)", above=0, high=10**6)
    eval_pairs: int = key("held-out rows of preferences in one evaluation, at most", low=1, high=ITEMS)


@dataclass
class RewardStage(PreferenceStage):
    """Settings of stage=reward."""

    centre: float = key("weight of the square of both rewards' sum, which keeps rewards near 0", low=0, high=1000)


@dataclass
class DPOStage(PreferenceStage, AssistantStage):
    """Settings of stage=dpo."""

    loss: str = key("loss of preferences: docs/post_training.md", choices=("dpo", "ipo", "orpo", "kto", "simpo"))
    beta: float | None = key(
        "weight of the log-probabilities in the loss; null = 0.1, orpo 1, simpo 2", above=0, high=1000
    )
    label_smoothing: float = key("dpo, simpo: share of pairs whose labels may be swapped", low=0, below=0.5)
    gamma: float = key("simpo: margin between the two rewards that is aimed at", low=0, high=1000)
    odds_weight: float = key("orpo: weight of the odds ratio beside the cross-entropy (lambda)", low=0, high=1000)
    desirable_weight: float = key("kto: weight of good answers", low=0, high=1000)
    undesirable_weight: float = key("kto: weight of bad answers", low=0, high=1000)
    eval_tokens: int = key("tokens of one evaluation (bits per byte)", low=1, high=10**12)
    eval_examples: int = key(
        "held-out prompts answered freely and compared with the parent's answers, where a rule can judge",
        low=0,
        high=ITEMS,
    )
    max_new_tokens: int = key("length limit of a free answer", low=1, high=CONTEXT)
    judge: str | None = key(
        "reward model that compares free answers to held-out prompts with the parent's: <run>/<stage> or a folder; "
        "null = none"
    )


@dataclass
class RolloutStage(AssistantStage):
    """Settings of stages that train on sampled answers."""

    task: str | None = key("task to be rewarded for, or source of data.preferences that gives prompts; null = data.rl")
    reward: str | None = key(
        "reward of an answer: a name of docs/post_training.md or of stage.reward_options; null = as the task scores it"
    )
    rewards: Any = key("several rewards and the weight of each, instead of stage.reward: {number: 1.0, format: 0.2}")
    reward_options: Any = key(
        "options of rewards by name, as {length: {words: 50}}; your own has _target_: {mine: {_target_: my.reward}}"
    )
    judge: str | None = key(
        "reward model that compares free answers to held-out prompts with the parent's: <run>/<stage> or a folder; "
        "null = none"
    )
    turns: int = key("answers of the model in one conversation, at most, where the task replies", low=1, high=100)
    keep_rollouts: int = key("steps whose answers rollouts.jsonl keeps for the report; 0 = none", low=0, high=1000)
    updates_per_rollout: int = key("optimizer steps on the answers of one rollout", low=1, high=1000)
    overlong: int = key(
        "tokens before the length limit over which the reward falls by up to 1; 0 = none", low=0, high=CONTEXT
    )
    curriculum: str | None = key(
        "pass_rate = leave out questions lately answered rightly by the whole group; null = ask all",
        choices=("pass_rate",),
    )
    prompts_per_step: int = key("questions of one step", low=1, high=10**5)
    max_new_tokens: int = key("length limit of an answer", low=1, high=CONTEXT)
    temperature: float = key("sampling temperature of the answers", above=0, high=100)
    top_k: int = key("sample among the k most likely tokens; 0 = all", low=0, high=VOCABULARY)
    epochs: float = key("horizon: passes over the mixture or the task (max_steps comes first)", above=0, high=10**6)
    rehearsal: int = key(
        "conversations of data.mixture.sft trained on beside the answers, per step; 0 = none", low=0, high=10**5
    )
    rehearsal_weight: float = key("weight of the rehearsed conversations' mean loss per token", above=0, high=1000)
    eval_tokens: int = key("tokens of one evaluation (bits per byte)", low=1, high=10**12)
    eval_examples: int = key("held-out questions of an evaluation: pass@k, or wins over the parent", low=1, high=ITEMS)
    eval_samples: int = key("answers per question of a pass@k evaluation, the largest k", low=1, high=10**4)


@dataclass
class GRPOStage(RolloutStage):
    """Settings of stage=grpo."""

    loss: str = key("form of the policy gradient, see docs/post_training.md", choices=POLICY_LOSSES)
    advantage: str = key(
        "comparison of an answer's reward with the rest of the group, see docs/post_training.md", choices=ADVANTAGES
    )
    clip_low: float | None = key(
        "bound on the ratio of new to old probabilities: 1 - clip_low; null = the loss's published default",
        low=0,
        high=1,
    )
    clip_high: float | None = key(
        "bound on the ratio of new to old probabilities: 1 + clip_high; null = the loss's published default",
        low=0,
        high=1000,
    )
    kl: float = key("weight of the KL divergence (k3) from the parent's model; 0 = none", low=0, high=1000)
    correction: str = key(
        "weights for tokens that sampling and training give different probabilities", choices=CORRECTIONS
    )
    filter_equal: str | None = key(
        "groups of equal rewards: drop = out of the mean, resample = replaced by other questions; null = kept",
        choices=("drop", "resample"),
    )
    samples_per_prompt: int = key(
        "answers drawn per question, the group within which rewards are compared", low=2, high=10**4
    )


@dataclass
class PPOStage(RolloutStage):
    """Settings of stage=ppo."""

    samples_per_prompt: int = key("answers drawn per question", low=1, high=10**4)
    clip: float = key("bound on the ratio of new to old probabilities: 1 - clip to 1 + clip", above=0, high=1)
    kl: float = key("weight of the KL divergence (k1) from the parent in the reward; 0 = none", low=0, high=1000)
    gamma: float = key("discount of rewards per token; 1 = none", above=0, high=1)
    lam: float = key("lambda of GAE: 1 = advantages from whole answers, 0 = from the next value", low=0, high=1)
    value_coef: float = key("weight of the critic's loss beside that of the policy", above=0, high=1000)
    value_clip: float = key("bound on the change of a value by the updates of a rollout", above=0, high=1000)


@dataclass
class DistillStage(RolloutStage):
    """Settings of stage=distill."""

    teacher: str | None = key("model to learn from: <run>, <run>/<stage> or a folder, with an equal tokenizer")
    source: str = key(
        "rollouts = answers that the student draws, data = the conversations of data.mixture.sft",
        choices=("rollouts", "data"),
    )
    divergence: str = key(
        "distance from the teacher per token: docs/post_training.md; sampled needs source=rollouts", choices=DIVERGENCES
    )
    samples_per_prompt: int = key("answers drawn per question", low=1, high=10**4)


@dataclass
class BestOfNStage(RolloutStage):
    """Settings of stage=best_of_n."""

    samples_per_prompt: int = key("answers drawn per question, the best of which is trained on", low=2, high=10**4)
    min_reward: float = key("reward below which the best answer to a question is left out", low=-1000, high=1000)
