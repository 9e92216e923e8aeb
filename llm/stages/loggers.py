"""Build the loggers of the configuration, and attach them to a trainer for the time of its training."""

import contextlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from llm.config.check import shown
from llm.errors import UserError

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
            raise UserError(f"logger.{name}: needs the package {module}: pip install -e '.[{extra}]'")


def check_loggers(cfg) -> None:
    """Raise UserError for a logger that is no class, or lacks an argument: before the stage's folder is touched."""
    for name, part in cfg.logger.items():
        with told(f"logger.{name}", part):
            if not part or "_target_" not in part:
                raise TypeError("it has no _target_, a class of loggers")
            given = {key: None for key in part if not key.startswith("_")}
            inspect.signature(get_object(part["_target_"])).bind(**given | ({"save_dir": None} if wants(part) else {}))


@contextlib.contextmanager
def logging_to(trainer, cfg, stage_dir: Path) -> Iterator[None]:
    """Attach the loggers of the configuration to a trainer, and end them in any case.

    They are built when the stage's folder is theirs to write to, see `check_loggers` for what was checked before.
    """
    from callbacks.loggers import close

    own: list[Any] = []
    try:
        for name, part in cfg.logger.items():
            with told(f"logger.{name}", part):
                own.append(instantiate(placed(part, stage_dir.absolute())))
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
    return found | ({"save_dir": str(folder)} if wants(part) else {})


def wants(part) -> bool:
    """Return whether the class of a logger has an argument `save_dir` that the configuration does not give."""
    arguments = inspect.signature(get_object(part["_target_"])).parameters.values()
    takes = any(one.name == "save_dir" or one.kind is one.VAR_KEYWORD for one in arguments)
    return takes and "save_dir" not in part


@contextlib.contextmanager
def told(key: str, part) -> Iterator[None]:
    """Turn what goes wrong while a part of the configuration is built into a UserError that names its key."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"{key}: cannot be built from {shown(part)} ({cause})") from error
