"""Looks at a user's own classes before anything else of a stage: that they exist, fit, and take their arguments."""

from omegaconf import OmegaConf

from llm.config.stages import CHAT_KINDS, Stage
from llm.config.targets import check_arguments, load_target


def check_own_parts(cfg, row: Stage) -> None:
    """Raise UserError with key and value for a class or function in the configuration that cannot be used."""
    if row.build:
        check_of_trainer(cfg)
    if row.reads_text and cfg.data.name == "custom":
        check_arguments(load_target(cfg.data.source, "data.source"), cfg.data.source, "data.source")
    if row.kind in CHAT_KINDS:
        from tasks.registry import all_specs, place, task_class

        for name, spec in all_specs(cfg.data).items():
            task_class(spec, place(name, spec))
    if row.kind == "rl":
        from tasks.rewards import reward_kind

        for name, options in (OmegaConf.select(cfg, "stage.reward_options") or {}).items():
            if "_target_" in (options or {}):
                reward_kind(name, options, "stage.reward")


def check_of_trainer(cfg) -> None:
    """Raise UserError for a callback, a logger or a plugin of Lightning that cannot be built."""
    from llm.stages.trainer import check_part

    for group, parts in (
        ("callbacks", cfg.callbacks),
        ("logger", cfg.logger),
        ("trainer.plugins", cfg.trainer.plugins),
    ):
        for name, part in parts.items():
            check_part(f"{group}.{name}", part)
