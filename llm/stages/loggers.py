"""Build the loggers of the configuration, and attach them to a trainer for the time of its training."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from llm.config.targets import load_target, takes
from llm.errors import UserError
from llm.stages.own_parts import instantiate_part
from llm.utils.source import pip_install

# Class of a logger -> module that it needs, extra of pyproject.toml that brings it.
PACKAGES = {
    "TensorBoardLogger": ("tensorboard", "tensorboard"),
    "WandbLogger": ("wandb", "wandb"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "TrackioLogger": ("trackio", "trackio"),
    "AimLogger": ("aim", "aim"),
    "OfflineComet": ("comet_ml", "comet"),
    "CometLogger": ("comet_ml", "comet"),
}


def check_packages(cfg) -> None:
    """Raise UserError for a logger whose package is not installed. Imports nothing, so it comes first of all."""
    for name, part in cfg.logger.items():
        target = str((part or {}).get("_target_"))
        module, extra = PACKAGES.get(target.rpartition(".")[2], (None, None))
        if module is not None and importlib.util.find_spec(module) is None:
            raise UserError(f"logger.{name}: needs the package {module}: {pip_install(extra)}")


@contextlib.contextmanager
def logging_to(trainer, cfg, stage_dir: Path) -> Iterator[None]:
    """Attach the loggers of the configuration to a trainer, and end them in any case.

    They are built when the stage's folder is theirs to write to, see `check_own_parts` for what was checked before.
    """
    from callbacks.loggers import close

    own: list[Any] = []
    try:
        for name, part in cfg.logger.items():
            own.append(instantiate_part(f"logger.{name}", placed(part, stage_dir.absolute())))
        trainer.loggers = [*trainer.loggers, *own]
        yield
    finally:
        close(own)


def placed(part, folder: Path) -> dict:
    """Return the arguments of a logger, with {folder}, {run}, {stage} and {runs} in its texts filled in.

    folder: the stage's, which a logger gets as `save_dir` if it takes one and nothing else is said.
    """
    names = {"{folder}": folder, "{stage}": folder.name, "{run}": folder.parent.name, "{runs}": folder.parents[1]}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        for name, text in names.items() if isinstance(value, str) else ():
            value = value.replace(name, str(text))
        return value

    found = filled(OmegaConf.to_container(part, resolve=True))
    if "save_dir" not in found and takes(load_target(part, "logger"), "save_dir"):
        found["save_dir"] = str(folder)
    return found
