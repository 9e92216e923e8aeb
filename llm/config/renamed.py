"""Keys that have new names: the one table by which old runs and checkpoints are read.

On the command line and in YAML files an old key is an error that names the new one. What was saved under old names
(run.json, checkpoints) is translated when it is read, and never rewritten on the disk.
"""

from typing import Any

CONFIG_KEYS = {
    "batch.device": "batch.micro_batch_size",
    "batch.total": "batch.tokens_per_step",
    "stage.ratio": "stage.tokens_per_param",
    "stage.ratio_of": "stage.count_params",
    "optim.equalize": "optim.row_normalize",
}
# Keywords of Lightning's Trainer whose place is taken by a key of another name.
LIGHTNING_KEYS = {
    "trainer.max_time": "max_minutes",
    "trainer.max_steps": "max_steps",
    "trainer.min_steps": "max_steps",
    "trainer.max_epochs": "stage.epochs or max_steps",
    "trainer.min_epochs": "stage.epochs or max_steps",
    "trainer.log_every_n_steps": "log_every",
    "trainer.accumulate_grad_batches": "batch.tokens_per_step",
    "trainer.precision": "precision.compute",
    "trainer.val_check_interval": "stage.eval_every",
    "trainer.check_val_every_n_epoch": "stage.eval_every",
    "trainer.limit_val_batches": "stage.eval_tokens",
    "trainer.limit_train_batches": "max_steps",
    "trainer.fast_dev_run": "experiment=debug or max_steps=1",
    "trainer.enable_checkpointing": "save_every",
    "trainer.gradient_clip_algorithm": "trainer.gradient_clip_val (by norm)",
    "trainer.default_root_dir": "paths.runs",
    "trainer.strategy": "strategy",
    "trainer.logger": "logger",
    "trainer.callbacks": "callbacks",
}
# Where users look for the door of a class of their own, and where it is.
OWN_CLASSES = {
    "stage.reward._target_": "stage.reward_options.<name>._target_ with stage.reward=<name>",
    "stage.rewards._target_": "stage.reward_options.<name>._target_ with stage.rewards={<name>: 1.0}",
    "data._target_": "data.source._target_ with data=custom",
    "eval._target_": "eval.judges.<name>._target_",
    "callbacks._target_": "callbacks.<name>._target_",
    "logger._target_": "logger.<name>._target_",
    "optim._target_": "optim=<name>, which a plugin registers (register_optimizer)",
    "arch._target_": "arch=<name>, which a plugin registers (register_arch)",
    "model._target_": "arch=<name>, which a plugin registers (register_arch)",
    "stage._target_": "stage=<name>, which a plugin registers (register_stage)",
}
# Keys of the usual template of Lightning with Hydra, and what does the same here.
TEMPLATE_KEYS = {
    "ckpt_path": "init_from=<run>/<stage>; an unfinished stage resumes by itself",
    "task_name": "run=<name>",
    "tags": "run=<name>",
    "train": "stage=<name>",
    "test": "python evaluate.py run=<name>",
    "extras": "--cfg job shows the configuration, and config.yaml of the stage keeps it",
}
OPTIMIZER_GROUP_KEYS = {"equalize": "row_normalize"}
MUON_BEFORE = {"coupled_decay": False, "norm_margin": None}  # what groups of Muon did before they had these keys
CURSOR_KEYS = {"taken": "consumed"}  # of the position of a data loader


def renamed_key(name: str) -> str | None:
    """Return the error text for a dotted configuration key that has a new name; None for any other key."""
    if name in OWN_CLASSES:
        return f"{name}: a class of your own comes in by {OWN_CLASSES[name]} (docs/extend.md)"
    if (first := name.partition(".")[0]) in TEMPLATE_KEYS:
        return f"{first} is written otherwise here: {TEMPLATE_KEYS[first]}"
    if name in LIGHTNING_KEYS:
        return f"{name} is set by another key here: {LIGHTNING_KEYS[name]}"
    return f"{name} is now called {CONFIG_KEYS[name]}" if name in CONFIG_KEYS else None


def renamed_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a run.json with its configuration under the present names."""
    if not isinstance(manifest.get("config"), dict):
        return manifest
    return manifest | {"config": renamed_config(manifest["config"])}


def renamed_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a saved, resolved configuration (nested dicts) under the present names; the argument is left as it is."""
    names: dict[str, dict[str, str]] = {}
    for old, new in CONFIG_KEYS.items():
        group, key = old.split(".")
        names.setdefault(group, {})[key] = new.removeprefix(f"{group}.")
    present = {
        group: _renamed(section, names[group]) if group in names and isinstance(section, dict) else section
        for group, section in config.items()
    }
    data = present.get("data")
    if isinstance(data, dict) and isinstance(data.get("tasks"), dict):
        present["data"] = data | {"tasks": {name: _own_class(task) for name, task in data["tasks"].items()}}
    return present


def _own_class(task: Any) -> Any:
    """Return the configuration of a task with a class of the user's as `_target_`, where its type named one before."""
    kind = task.get("type") if isinstance(task, dict) else None
    return task | {"type": None, "_target_": kind} if isinstance(kind, str) and "." in kind else task


def renamed_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a resume checkpoint whose optimizer groups and data positions have the present names, and no fewer.

    Tensors are passed on, not copied.
    """
    changed = dict(checkpoint)
    if "optimizer_states" in checkpoint:
        changed["optimizer_states"] = [
            state | {"param_groups": [_present_group(group) for group in state["param_groups"]]}
            for state in checkpoint["optimizer_states"]
        ]
    if "StepData" in checkpoint:
        changed["StepData"] = _renamed_cursors(checkpoint["StepData"])
    return changed


def _renamed(section: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in section.items()}


def _present_group(group: dict[str, Any]) -> dict[str, Any]:
    found = _renamed(group, OPTIMIZER_GROUP_KEYS)
    return (MUON_BEFORE if found.get("kind") == "muon" else {}) | found


def _renamed_cursors(thing: Any) -> Any:
    """Rename cursor keys at any depth. A source of text may have the name of an old key: its value is a dict."""
    if isinstance(thing, dict):
        return {
            CURSOR_KEYS.get(key, key) if isinstance(value, list) else key: _renamed_cursors(value)
            for key, value in thing.items()
        }
    return [_renamed_cursors(item) for item in thing] if isinstance(thing, list) else thing
