"""Arithmetic behind the configuration, as pure functions: from the depth to all sizes of a run.

Shape: width 64 x depth, heads of 128 channels. Horizon, batch, rates and decay follow nanochat's rules: tuned at depth
12, they are carried to other depths by the tokens D that each trains on (batch ~ D^0.383, Power Lines, arXiv
2505.13738; weight decay by a constant time scale, arXiv 2405.13698).
"""

import math

from llm.errors import UserError
from llm.model.config import GPTConfig, config_class, flops_per_token, num_params, scaling_params
from llm.tokenizer.bpe import SPECIAL_TOKENS

REFERENCE_DEPTH = 12  # where the hyperparameters were tuned,
REFERENCE_BATCH = 2**19  # with steps of this many tokens
SMALLEST_BATCH = 2**18
BATCH_EXPONENT = 0.383
STEPS_PER_PASS = 100  # of finetuning, where there are enough conversations for it
SMALLEST_STEP = 2**10
FINETUNING_TOKENS = 2**20  # fewer are repeated,
MOST_PASSES = 40  # but not more often: 136 questions were learnt in 40 passes
GPT2_AS_PUBLISHED = {"softcap": None, "vocab_multiple": 1}  # parts of arch=gpt2 that are no options


def model_config(model, arch, vocab_size: int) -> GPTConfig:
    """Return the model's shape for the config groups `model` and `arch` (mappings) and a vocabulary of `vocab_size`.

    Raises UserError for a shape that cannot be.
    """
    for key in ("depth", "aspect_ratio", "head_dim", "seq_len"):
        if model[key] < 1:
            raise UserError(f"model.{key}={model[key]}: must be at least 1")
    n_head = -(-model["depth"] * model["aspect_ratio"] // model["head_dim"])
    features = {name: arch[name] for name in arch if name != "name"}
    for name in {"resid_init", "x0_init"} & set(features):
        if len(features[name]) != 2:
            raise UserError(f"arch.{name}={list(features[name])}: give two numbers, for the first and the last layer")
        features[name] = tuple(features[name])
    first_special = vocab_size - len(SPECIAL_TOKENS)  # BOS
    bos_id = first_special if features.pop("document_masks", False) else None
    if features.get("loops", 1) > 1 and model["depth"] == 1:
        raise UserError(f"arch.loops={features['loops']}: model.depth=1 has no middle blocks; set arch.loops=1")
    if features.get("backout") and not has_middle_block(model["depth"]):
        features["backout"] = False
    if "ngrams" in features:
        features["ngrams"] = tuple(features["ngrams"])
        features["ngram_bos"] = first_special if features["ngrams"] else None
    if "copy_candidate" in features:
        features["copy_bos"] = first_special if features["copy_candidate"] else None
    n_embd = features.pop("width", None) or n_head * model["head_dim"]  # only arch=qwen3 has a width of its own
    if arch["name"] == "gpt2":
        features |= GPT2_AS_PUBLISHED
    try:
        return config_class(arch["name"])(
            n_layer=model["depth"] + (features.get("loops", 1) - 1) * (model["depth"] // 2),
            n_head=n_head,
            n_kv_head=n_head if model["n_kv_head"] is None else model["n_kv_head"],
            head_dim=model["head_dim"],
            n_embd=n_embd,
            seq_len=model["seq_len"],
            vocab_size=vocab_size,
            arch=arch["name"],
            bos_id=bos_id,
            **features,
        )
    except ValueError as error:
        raise UserError(f"model.depth={model['depth']}: {error}") from error


def has_middle_block(depth: int) -> bool:
    """Return whether block depth // 2, whose output backout subtracts, is followed by another one.

    Behind the last block only a norm follows, (1 - b) x is x to that, and the coefficient b drifts: beyond 1 it turns
    the sign of every logit.
    """
    return depth // 2 < depth - 1


def training_tokens(config: GPTConfig, tokens_per_param: float, count_params: str) -> int:
    """Return the training horizon in tokens. count_params: all = every parameter, matrices = blocks and head."""
    return int(tokens_per_param * (num_params(config)["total"] if count_params == "all" else scaling_params(config)))


def auto_batch(tokens: int, reference_tokens: int) -> int:
    """Return the tokens of a step: a power of two, 2^19 for a depth-12 model, growing as tokens^0.383."""
    return 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference_tokens) ** BATCH_EXPONENT))


def finetuning_batch(tokens: int, seq_len: int, devices: int = 1) -> int:
    """Return the tokens of a step where a pass over the conversations has `tokens`: about a hundredth of them.

    It is the largest power of two times a row of `seq_len` within that, from 2^10 to 2^19, and rounded up to whole rows
    on every device: as long as they divide it, their number does not change the step.
    """
    largest = min(max(tokens // STEPS_PER_PASS, SMALLEST_STEP), REFERENCE_BATCH)
    rows = 2 ** max(0, math.floor(math.log2(largest / seq_len)))
    return -(-rows // devices) * devices * seq_len


def finetuning_passes(tokens: int) -> float:
    """Return the passes over conversations of `tokens`: as many as make 2^20 tokens, at least 1 and at most 40."""
    return min(max(FINETUNING_TOKENS / tokens, 1.0), float(MOST_PASSES))


def lr_batch_factor(batch_tokens: int) -> float:
    """Return the factor on all learning rates: sqrt(batch_tokens / 2^19), but never less than that of 2^18 tokens.

    Below 2^18 tokens the rule wastes steps: at 8,192 tokens rates of 1/8 train far worse than full ones (lab notebook).
    """
    return (max(batch_tokens, SMALLEST_BATCH) / REFERENCE_BATCH) ** 0.5


def decay_factor(batch_tokens: int, tokens: int, reference_tokens: int) -> float:
    """Return the factor on Muon's weight decay that makes weights forget over one share of a run, long or short."""
    return (batch_tokens / REFERENCE_BATCH) ** 0.5 * reference_tokens / tokens


def pretrain_steps(
    config: GPTConfig, batch_tokens: int, tokens_per_param: float, count_params: str, target_flops: float | None
) -> int:
    """Return the horizon in optimizer steps: by `target_flops` if given, else by training tokens per parameter.

    Raises UserError where that is no whole step.
    """
    if target_flops is not None:
        steps = round(target_flops / (flops_per_token(config) * batch_tokens))
        cause = f"stage.target_flops={target_flops:g}"
    else:
        steps = training_tokens(config, tokens_per_param, count_params) // batch_tokens
        cause = f"stage.tokens_per_param={tokens_per_param:g}"
    if steps < 1:
        raise UserError(
            f"{cause} gives no step of batch.tokens_per_step={batch_tokens} tokens: raise it, or set max_steps"
        )
    return steps


def micro_batches(total_tokens: int, rows: int, seq_len: int, world: int = 1) -> int:
    """Return the micro-batches per rank and step: total_tokens / (rows x seq_len x world).

    Raises UserError, with batch sizes that fit, where that is no whole number.
    """
    if rows < 1 or total_tokens < 1:
        raise UserError(f"batch.micro_batch_size={rows}, batch.tokens_per_step={total_tokens}: both must be at least 1")
    per_pass = rows * seq_len * world
    if total_tokens % per_pass:
        below = total_tokens // per_pass * per_pass
        nearest = f"{below} or {below + per_pass}" if below else f"{per_pass}"
        raise UserError(
            f"batch.tokens_per_step={total_tokens}: not a multiple of batch.micro_batch_size x model.seq_len x devices "
            f"= {rows} x {seq_len} x {world} = {per_pass}; set batch.tokens_per_step={nearest}, or another "
            "batch.micro_batch_size"
        )
    return total_tokens // per_pass


def adam_lr_scale(n_embd: int) -> float:
    """Return the factor on AdamW's learning rates of tables and head, which were tuned at width 768."""
    return (n_embd / 768) ** -0.5
