"""Settings of one stage that contradict each other. Light to import, as `llm.stages.plan` is."""

from llm import objectives
from llm.errors import UserError
from llm.model.config import GPTConfig
from llm.stages.plan import check_shares


def check_sampled(cfg, config: GPTConfig) -> None:
    """Raise UserError for settings of sampled answers that cannot be, or that leave a device without any."""
    check_overlong(cfg.stage)
    check_drawn(cfg)
    check_shares(cfg, config)


def check_grpo(cfg, config: GPTConfig) -> None:
    """Raise UserError for a loss that does not go with its settings, or too few questions for the devices."""
    check_policy(cfg.stage)
    check_drawn(cfg)
    check_shares(cfg, config)


def check_distill(cfg, config: GPTConfig) -> None:
    """Raise UserError for a divergence that does not go with its settings, or too few questions for the devices."""
    check_distillation(cfg.stage)
    check_drawn(cfg)
    check_shares(cfg, config)


def check_kto(cfg, config: GPTConfig | None = None) -> None:
    """Raise UserError for kto with a row a step, or steps that are repeated: its baseline belongs to one step.

    It is of answers to another question of the step, by the weights of that step.
    """
    if cfg.stage.loss == "kto" and (first := cfg.trainer.overfit_batches):
        raise UserError(
            f"trainer.overfit_batches={first}: stage.loss=kto measures its baseline when a step is made, so repeated "
            "steps would keep an old one; set it to 0, or choose another loss"
        )
    if cfg.stage.loss == "kto" and cfg.stage.pairs_per_step < 2:
        raise UserError("stage.pairs_per_step=1: stage.loss=kto needs the answers of another row; give 2 or more")
    check_shares(cfg, config)


def check_drawn(cfg) -> None:
    """Raise UserError where steps are to be repeated whose answers the network draws anew in each."""
    if (first := cfg.trainer.overfit_batches) and cfg.stage.get("source") != "data":
        raise UserError(
            f"trainer.overfit_batches={first}: stage={cfg.stage.name} trains on answers that the weights of each step "
            "draw, so none comes twice; set it to 0"
        )


def check_overlong(stage) -> None:
    """Raise UserError where the penalty for long answers would begin before the first token."""
    if stage.overlong >= stage.max_new_tokens:
        raise UserError(
            f"stage.overlong={stage.overlong}: must be smaller than stage.max_new_tokens={stage.max_new_tokens}"
        )


def check_policy(stage) -> None:
    """Raise UserError for settings of the loss that contradict each other."""
    loss = objectives.POLICY_LOSSES[stage.loss]
    bounds = [name for name in ("clip_low", "clip_high") if stage[name] is not None]
    if bounds and not loss.has_bounds:
        raise UserError(f"stage.{bounds[0]}={stage[bounds[0]]}: stage.loss={stage.loss} clips nothing; set it to null")
    if stage.updates_per_rollout > 1 and not loss.has_ratio:
        raise UserError(
            f"stage.updates_per_rollout={stage.updates_per_rollout}: stage.loss={stage.loss} takes answers to be the "
            "current weights'; choose a loss with a ratio, such as grpo, or 1 update"
        )
    if stage.correction != "none" and stage.loss == "ipo_rl":
        raise UserError(f"stage.correction={stage.correction}: stage.loss=ipo_rl corrects by itself; set it to none")
    check_overlong(stage)


def check_distillation(stage) -> None:
    """Raise UserError for settings that are missing or contradict each other."""
    if stage.teacher is None:
        raise UserError("stage.teacher=null: name the model to learn from, stage.teacher=<run>/<stage> or a folder")
    if stage.divergence == "sampled" and stage.source == "data":
        raise UserError(
            "stage.divergence=sampled: needs tokens that the student drew; choose reverse_kl or forward_kl, or "
            "stage.source=rollouts"
        )
    if stage.divergence == "sampled" and stage.updates_per_rollout > 1:
        raise UserError(
            f"stage.updates_per_rollout={stage.updates_per_rollout}: stage.divergence=sampled takes answers to be the "
            "current weights'; choose reverse_kl or forward_kl, or 1 update"
        )
    if stage.overlong:
        raise UserError(f"stage.overlong={stage.overlong}: stage=distill learns from no reward; set it to 0")
