"""A finished stage made longer: a larger `max_steps`, or with `stage.extend=true` any larger horizon.

Training goes on from the last checkpoint: weights, optimizer state and the place in the data. The schedules of learning
rate, momentum and decay are pure functions of the step, so from there on they are those of the whole new length. Where
the first training had let the rate fall, it rises again.
"""

from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.run.stage_folder import read_manifest

HORIZONS = {"max_steps", "stage.tokens_per_param", "stage.epochs", "stage.target_flops"}


def lengthens(manifest: dict, differences: list[tuple[str, Any, Any]], cfg: Any) -> bool:
    """Return whether a finished stage with this run.json goes on, by the keys in which the configuration differs."""
    keys = {key for key, _, _ in differences}
    if keys == {"max_steps"} and cfg.max_steps is not None:
        return cfg.max_steps > (manifest.get("steps") or cfg.max_steps)
    return "extend" in cfg.stage and cfg.stage.extend and keys <= HORIZONS


def begin_longer(job: Any, built: Any) -> None:
    """Check and note that a finished stage goes on; nothing where `job` is begun or resumed.

    Raises UserError where the new horizon is not longer, or the checkpoint of the last step is gone.
    """
    old = None if job.cfg.overwrite else read_manifest(job.stage_dir)
    if old is None or old.get("status") != "finished" or not (job.stage_dir / "model").is_dir():
        return
    steps, total = old.get("steps"), built.module.context.total_steps
    if steps is None:
        raise UserError(f"{job.stage_dir / 'run.json'}: steps is missing; restore the file, or set overwrite=true")
    if total <= steps:
        raise UserError(f"{job.title} has {steps} steps already, and the new horizon is {total}: set a larger one")
    check_checkpoint(job.stage_dir, steps)
    job.manifest["horizons"] = old.get("horizons") or [steps]
    rate = built.module.lr_frac(steps)
    print(
        f"lengthened from {steps} to {total} steps: weights, optimizer and data go on from step {steps}; the schedule "
        f"is that of all {total} steps, learning rate x{rate:.3f} in the next one",
        flush=True,
    )


def check_checkpoint(stage_dir: Path, steps: int) -> None:
    """Raise UserError where the newest sound checkpoint is not that of step `steps`."""
    from llm.checkpoint.resume import newest_checkpoint

    found = newest_checkpoint(stage_dir / "checkpoints")
    if found is None or found[0] != steps:
        raise UserError(
            f"{stage_dir / 'checkpoints'} has no checkpoint of step {steps}, so the stage cannot be lengthened: "
            f"continue its weights in another run, run=<name> init_from={stage_dir}"
        )
