"""A tiny stage, trained with callbacks, loggers and keys of `trainer` as the configuration gives them."""

from small_training import Numbers, StepData, make_module, step_batch

from llm.stages.common import BuiltStage
from llm.stages.loggers import logging_to
from llm.stages.trainer import build_trainer
from llm.utils.addresses import public
from llm.utils.files import plain

BPB = {"_target_": "callbacks.bpb.BitsPerByte", "every": 2}


def stage(total=6, config=None) -> BuiltStage:
    """A stage of a tiny network, with held-out batches."""
    module = make_module(total)
    module.context.val_batches = step_batch(99)["micro"]
    module.context.config = {} if config is None else public(plain(config))
    return BuiltStage(module, StepData(Numbers), {"steps": total})


def trained(config, folder, total=6, **changes):
    """Train a stage with `callbacks` and keys of `trainer` as the configuration would; return trainer and stage."""
    from omegaconf import OmegaConf

    cfg = config.copy()
    cfg.callbacks = changes.pop("callbacks", {})
    cfg.trainer.update(changes)
    built = stage(total, OmegaConf.to_container(cfg, resolve=True))
    folder.mkdir(parents=True, exist_ok=True)
    trainer, _ = build_trainer(cfg, folder, built)
    with logging_to(trainer, cfg, folder):
        trainer.fit(built.module, datamodule=built.data)
    return trainer, built
