"""Plugins of Hydra: whether the package of a launcher or sweeper is installed, and where its jobs can be started."""

import importlib.util
import re
import shutil
from collections.abc import Sequence
from typing import Any

from llm.errors import UserError

SLURM = "-e '.[slurm]'"
# Group of Hydra -> pattern of options -> module, and what pip installs it by.
PLUGINS = {
    "hydra/launcher": {
        "slurm|submitit_.*": ("submitit", SLURM),
        "joblib": ("hydra_plugins.hydra_joblib_launcher", "-e '.[search]'"),
        "ray.*": ("hydra_plugins.hydra_ray_launcher", "hydra-ray-launcher"),
        "rq": ("hydra_plugins.hydra_rq_launcher", "hydra-rq-launcher"),
    },
    "hydra/sweeper": {
        "optuna": ("hydra_plugins.hydra_optuna_sweeper", "-e '.[search]'"),
        "ax": ("hydra_plugins.hydra_ax_sweeper", "hydra-ax-sweeper"),
        "nevergrad": ("hydra_plugins.hydra_nevergrad_sweeper", "hydra-nevergrad-sweeper"),
    },
    "hydra/sweeper/sampler": {".*": ("hydra_plugins.hydra_optuna_sweeper", "-e '.[search]'")},
    "hydra/job_logging": {"colorlog": ("hydra_colorlog", "hydra-colorlog")},
    "hydra/hydra_logging": {"colorlog": ("hydra_colorlog", "hydra-colorlog")},
}
# Where jobs of hydra/launcher=submitit_* print: by default it would be the temporary folder of the sweep.
SUBMITTED = "hydra.launcher.submitit_folder=${paths.runs}/.submitit/%j"
SEARCHES = re.compile(r"hydra_plugins\.hydra_(optuna|ax|nevergrad)_sweeper\.")  # they need a value of each job


def missing_plugin(group: str, option: str) -> str | None:
    """Return the error line for an option of Hydra whose package is not installed; None for all others."""
    for pattern, (module, package) in PLUGINS.get(group, {}).items():
        if re.fullmatch(pattern, option) and not _is_there(module):
            return f"{group}={option}: needs a package of its own: pip install {package}"
    return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it lies in
        return False


def check_of_hydra(override: Any) -> None:
    """Raise UserError for a setting of Hydra that names a plugin wrongly, or one that is not installed."""
    name, line = override.key_or_group, override.input_line
    if name.startswith("hydra.sweeper.params."):
        key, value = name.removeprefix("hydra.sweeper.params."), line.partition("=")[2].strip("'\"")
        raise UserError(f"{line}: write it in braces: 'hydra.sweeper.params={{{key}: \"{value}\"}}'")
    if override.is_sweep_override():
        raise UserError(f"{line}: settings of Hydra hold for all jobs of a sweep: give one value")
    value = override.value()
    if name in ("hydra.launcher", "hydra.sweeper") and not isinstance(value, dict):
        group = name.replace(".", "/")
        raise UserError(f"{line}: choose one by name, {group}=<name>; its settings are {name}.<key>")
    if "/" in name and isinstance(value, str) and (problem := missing_plugin(name, value)):
        raise UserError(problem)


def check_launcher(name: str, overrides: Sequence[Any]) -> None:
    """Raise UserError for a launcher that finds no SLURM here, or would start a chain of stages all at once."""
    if name == "basic":
        return
    if name.endswith("slurm") and shutil.which("sbatch") is None:
        raise UserError(f"hydra/launcher={name}: there is no sbatch here; run this where jobs are submitted")
    if any(o.key_or_group == "stage" and o.is_sweep_override() for o in overrides):
        raise UserError(f"hydra/launcher={name} starts all jobs at once, but stages follow each other: give one stage")


def check_search(cfg: Any, sweeper: str, direction: Any, is_launched: bool) -> None:
    """Raise UserError where a search has nothing to compare, or would run once in each of several processes.

    direction: of the sweeper; a list stands for several objectives, which no job gives.
    """
    where = f"hydra/sweeper={sweeper}"
    if "objective" not in cfg or cfg.objective is None:
        raise UserError(f"{where}: say what to search for: objective=<column of metrics.csv>, as in objective=bpb")
    if isinstance(direction, list):
        raise UserError(f"hydra.sweeper.direction={direction}: a search has one objective: give minimize or maximize")
    if cfg.dry_run:
        raise UserError(f"{where}: dry_run=true measures nothing to compare; leave one of them out")
    if is_launched:
        raise UserError(f"{where}: each process would search by itself: start it without torchrun, trainer.devices=N")
