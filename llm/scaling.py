"""From depth to everything: the arithmetic behind the configuration, as pure functions.

Rules of nanochat, October 2025: width 64 x depth, heads of 128 channels, 20 training tokens per parameter, AdamW
learning rates scaled by (width / 768)^-0.5.
"""

from llm.errors import UserError
from llm.gpt import GPTConfig, flops_per_token, num_params


def model_config(model, arch, vocab_size: int) -> GPTConfig:
    """Model shape for the config groups `model` and `arch` (any objects with their keys) and a vocabulary."""
    for key in ("depth", "aspect_ratio", "head_dim", "seq_len"):
        if model[key] < 1:
            raise UserError(f"model.{key}={model[key]}: must be at least 1")
    n_head = -(-model.depth * model.aspect_ratio // model.head_dim)
    features = {name: arch[name] for name in arch if name != "name"}
    features |= {name: tuple(features[name]) for name in ("resid_init", "x0_init") if name in features}
    if arch.name == "gpt2":
        features |= {"softcap": None, "vocab_multiple": 1}  # as published
    try:
        return GPTConfig(
            n_layer=model.depth,
            n_head=n_head,
            n_kv_head=n_head if model.n_kv_head is None else model.n_kv_head,
            head_dim=model.head_dim,
            n_embd=n_head * model.head_dim,
            seq_len=model.seq_len,
            vocab_size=vocab_size,
            arch=arch.name,
            **features,
        )
    except ValueError as error:
        raise UserError(f"model.depth={model.depth}: {error}") from error


def pretrain_steps(config: GPTConfig, batch_tokens: int, ratio: float | None, target_flops: float | None) -> int:
    """Horizon in optimizer steps: a FLOP budget if given, else `ratio` training tokens per parameter."""
    if target_flops is not None:
        steps = round(target_flops / (flops_per_token(config) * batch_tokens))
        cause = f"stage.target_flops={target_flops:g}"
    else:
        steps = int(ratio * num_params(config)["total"]) // batch_tokens
        cause = f"stage.ratio={ratio:g}"
    if steps < 1:
        raise UserError(f"{cause} gives no step of batch.total={batch_tokens} tokens: raise it, or set max_steps")
    return steps


def micro_batches(total_tokens: int, rows: int, seq_len: int, world: int = 1) -> int:
    """Micro-batches per rank and step: total tokens / (rows x seq_len x world), which must be whole."""
    if rows < 1 or total_tokens < 1:
        raise UserError(f"batch.device={rows}, batch.total={total_tokens}: both must be at least 1")
    per_pass = rows * seq_len * world
    if total_tokens % per_pass:
        below = total_tokens // per_pass * per_pass
        nearest = f"{below} or {below + per_pass}" if below else f"{per_pass}"
        raise UserError(
            f"batch.total={total_tokens}: not a multiple of batch.device x model.seq_len x devices = "
            f"{rows} x {seq_len} x {world} = {per_pass}; set batch.total={nearest}, or another batch.device"
        )
    return total_tokens // per_pass


def adam_lr_scale(n_embd: int) -> float:
    """Factor on the AdamW learning rates, which are tuned at width 768."""
    return (n_embd / 768) ** -0.5
