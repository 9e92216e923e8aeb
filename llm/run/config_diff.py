"""Compare the configuration of a run with the one it is started with now."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from llm.config.check import SHOWN, shown
from llm.config.stages import row_or_stranger, unread_keys
from llm.utils.addresses import public
from llm.utils.files import plain

ABSENT = "(absent)"
MOST = 12  # differing keys that an error names
# Keys that decide how a run is executed or watched, not which weights it ends with (up to rounding).
NEUTRAL_KEYS = (
    *("run", "plugins", "trust", "resume", "overwrite", "dry_run", "verbose", "paths", "log_every", "save_*"),
    *("keep_last", "watch", "verify", "objective", "objective_mode", "device_price"),
    *("logger", "callbacks", "strategy", "batch.micro_batch_size", "estimate"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.max_restarts", "trainer.plugins"),
    *("trainer.deterministic", "trainer.detect_anomaly", "trainer.benchmark", "trainer.activation_checkpointing"),
    *("trainer.profiler", "trainer.enable_progress_bar"),
    *("gpu.early_check", "gpu.muon_kernels"),
    *("stage.*_every", "stage.eval_*", "stage.chat_max_per_task", "stage.chat_tasks", "stage.core_*", "data.eval"),
    *("stage.extend", "stage.judge", "stage.keep_rollouts", "stage.prompts", "data.prompts", "stage.compare"),
    *("data.mixture.*_val", "data.token_cache", "data.workers", "data.streaming", "data.sources.*.streaming"),
    *("data.bad_rows", "data.sources.*.bad_rows"),
)

# What stages did before these keys existed: runs without them are equal to runs with these values.
CHANGED_KEYS = {
    "stage.loss": "reinforce",
    "stage.advantage": "centred",
    "stage.correction": "none",
    "stage.kl": 0.0,
    "stage.updates_per_rollout": 1,
    "stage.overlong": 0,
    "arch.window_multiple": 128,
    "optim.coupled_decay": False,
    "optim.momentum_overlap": True,
    "optim.norm_margin": None,
}
# Of switches, and of parameters that only these have: with the default a run is as before the key existed.
ADDED_KEYS = {
    "arch.activation": "relu_squared",
    "arch.ngrams": [],
    "arch.ngram_rows": 4,
    "arch.ngram_into": "residual",
    "arch.loops": 1,
    "stage.teachers": [],
    "trainer.overfit_batches": 0,
    "optim.ngram_lr": 0.06,
    "optim.ngram_betas": [0.75, 0.95],
    "optim.ngram_decay": 0.0,
    "optim.copy_lr": 0.05,
}
BEFORE_KEYS = CHANGED_KEYS | ADDED_KEYS


def rules_before(config: dict[str, Any]) -> dict[str, Any]:
    """Return those values of `CHANGED_KEYS`, by key, that a saved configuration goes by.

    It lacks the key; or it has the value, since the run was resumed by a later release.
    """
    found = {}
    for key, before in CHANGED_KEYS.items():
        group, name = key.split(".")
        saved = config.get(group) if group in ("arch", "optim") else None
        if isinstance(saved, dict) and saved.get(name, before) == before:
            found[key] = before
    return found


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn a nested mapping into {dotted key: leaf}; an empty mapping stays as a leaf."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def neutral_keys(stage: str) -> tuple[str, ...]:
    """Return patterns of the config keys that cannot change what `stage` produces."""
    return NEUTRAL_KEYS + unread_keys(row_or_stranger(stage))


def diff_configs(
    old: dict[str, Any], new: dict[str, Any], ignore: Iterable[str] = NEUTRAL_KEYS
) -> list[tuple[str, Any, Any]]:
    """Return differing keys as (dotted key, old value, new value), sorted; a missing key shows as `ABSENT`.

    `ignore` holds dotted keys or shell patterns; a match covers everything below it. Pass `neutral_keys(stage)`.
    Secrets in addresses are not kept with a run, so they neither differ nor are shown.
    """
    before, after, patterns = flatten(public(plain(old))), flatten(public(plain(new))), tuple(ignore)
    if before.get("max_steps") and after.get("max_steps"):
        patterns += ("stage.epochs",)  # not read beside max_steps; older versions saved 1 where null is the default now
    if after.get("stage.rehearsal") == 0 and after.get("stage.source") != "data":
        patterns += ("data.mixture",)  # answers are trained on, and no conversations
    if "stage.task" in after:  # a stage that samples answers reads the prompts of one source of preferences at most
        sources = {key.split(".")[2] for key in before.keys() | after.keys() if key.startswith("data.preferences.")}
        patterns += tuple(f"data.preferences.{name}" for name in sources - {after["stage.task"]})
    differences = []
    for key in sorted(before.keys() | after.keys()):
        pair = (before.get(key, BEFORE_KEYS.get(key, ABSENT)), after.get(key, ABSENT))
        off = ABSENT in pair and all(value is False or value in (None, ABSENT, {}) for value in pair)
        unset = off or all(value in (None, ABSENT, {}) for value in pair)  # as before the key existed
        if pair[0] != pair[1] and not unset and not any(covers(pattern, key) for pattern in patterns):
            differences.append((key, *pair))
    return differences


def covers(pattern: str, key: str) -> bool:
    """Say whether a dotted key or shell pattern covers `key`, by itself or from above."""
    return fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*")


def describe_differences(differences: list[tuple[str, Any, Any]]) -> str:
    """Return `seed: 42 -> 43; model.depth: 4 -> 6`, the form used in error messages: one line, cut where it is long."""
    shown_ones = (f"{key[:SHOWN]}: {shown(old)} -> {shown(new)}" for key, old, new in differences[:MOST])
    more = f"; and {len(differences) - MOST} more" if len(differences) > MOST else ""
    return "; ".join(shown_ones) + more
