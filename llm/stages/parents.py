"""The models that a stage starts from: found, and compared by their content with those that it began with."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from llm.config.stages import Stage
from llm.errors import UserError
from llm.parallel.env import launched_rank
from llm.run.config_diff import describe_differences, diff_configs, neutral_keys
from llm.run.content import fingerprints, other_part
from llm.run.further import further_names
from llm.run.notes import code_note, say
from llm.run.stage_folder import MANIFEST, RunDir, find_further
from llm.stages.job import Job, identity
from llm.stages.lengthen import HORIZONS
from llm.stages.shape import parent_of


def find_parents(cfg: DictConfig, row: Stage, run: RunDir) -> tuple[Path | None, dict[str, Path]] | None:
    """Return the model/ folder that the stage starts from, and those that its other keys name by key.

    None where the parent is missing and a dry run can do without one. Raises UserError in all other such cases.
    """
    models = {key: find_model(cfg, row, run, key) for key in further_names(cfg, row)}
    try:
        return parent_of(cfg, row, run), models
    except UserError:
        if cfg.dry_run and row.derive and cfg.init_from is None and cfg.model.vocab_size:
            return None
        raise


def find_model(cfg: DictConfig, row: Stage, run: RunDir, key: str) -> Path | None:
    """Return the model/ folder that `key` names: init_from, or one of `further_names`; None where it names none."""
    if key == "init_from":
        return parent_of(cfg, row, run)
    value = further_names(cfg, row).get(key)
    return None if value is None else find_further(run.root, run.name, row.name, key, value)


def holds_work(stage_dir: Path) -> bool:
    """Return True if a stage got as far as a checkpoint or its result: only then is there something to lose."""
    return (stage_dir / "model").is_dir() or any(stage_dir.glob("checkpoints/*.ckpt"))


def known_parents(manifest: dict) -> dict[str, tuple[str, str | None]]:
    """Return the model/ folders in a run.json and when their stages were finished, by the key that named them."""
    found = {} if manifest.get("parent") is None else {"init_from": (manifest["parent"], manifest.get("parent_id"))}
    return found | {key: tuple(pair) for key, pair in (manifest.get("further") or {}).items()}


def other_than(manifest: dict, key: str, model: Path, verify: bool = True) -> str | None:
    """Say in words how a model/ folder differs from the one that `key` named when a run.json was written.

    Fingerprints decide. Where that folder's weights had none, as of older releases, the end of its training does too.
    None if it does not. verify: compute the fingerprint of weights without manifest.json.
    """
    known = (manifest.get("parents") or {}).get(key) or {}
    if problem := other_part(model, known, verify):
        return f"holds {problem}"
    finished = known_parents(manifest).get(key, (None, None))[1]
    if "weights" not in known and identity(model) != finished:
        return f"was finished {identity(model)}, not {finished}"
    return None


def check_parents_unchanged(run: RunDir, stage: str, manifest: dict) -> None:
    """Raise UserError where a finished stage is out of date because a parent was trained again."""
    for key, (path, _) in known_parents(manifest).items():
        if path and Path(path).is_dir() and (problem := other_than(manifest, key, Path(path))):
            raise UserError(
                f"{run.stage_dir(stage)} was trained from an earlier version of {path}, which now {problem}: "
                "overwrite=true trains it again from the present one"
            )


def check_same_origin(job: Job) -> None:
    """Raise UserError where an unfinished stage would be resumed from other parents or another training's checkpoint.

    run.json and checkpoints of older releases say less, and pass.
    """
    if job.cfg.overwrite or job.cfg.dry_run or not holds_work(job.stage_dir):
        return
    from llm.checkpoint.resume import origins

    saved = origins(job.stage_dir / "checkpoints")
    for path, origin in saved:
        check_same_settings(job, path, origin)
    record = job.run.manifest(job.row.name)
    for path, origin in [*([] if record is None else [(job.stage_dir / MANIFEST, record)]), *saved]:
        for key, model in job.models.items():
            if key in known_parents(origin) and (problem := other_than(origin, key, model, job.cfg.verify)):
                raise UserError(
                    f"{path}: this stage was begun from another version of {model} ({key}), which now {problem}: put "
                    "that one back, or overwrite=true starts the stage again"
                )
    if launched_rank() == 0:
        say(*beginning_notes(job, record or {}, [origin for _, origin in saved]))


def beginning_notes(job: Job, record: dict, saved: list[dict]) -> list[str | None]:
    """Return what should be known of an unfinished stage before it is resumed.

    record: run.json. saved: what the checkpoints repeat of it, the newest last, which says what code made the weights.
    """
    known = [origin.get("parents") or {} for origin in (record, *saved)]
    unknown = [str(model) for key, model in job.models.items() if not any(parents.get(key) for parents in known)]
    note = f"{job.stage_dir} keeps no fingerprints (an older release began it): " if unknown else None
    note = note and f"{note}whether {' and '.join(unknown)} has changed since could not be compared"
    return [code_note(saved[-1] if saved else record, job.stage_dir), note]


def differing(
    origin: dict, config: dict, ignored: Iterable[str], find: Callable[[str], Path | None]
) -> list[tuple[str, Any, Any]]:
    """Return in which keys `config` differs from that of a run.json, `origin`; see `diff_configs`.

    Two names of one model that the stage starts from are no difference. find: returns the model/ folder that a key of
    `config` names; it is called where names differ, and may raise UserError.
    """
    found = diff_configs(origin.get("config") or {}, config, ignored)
    return [one for one in found if not is_one_model(origin, *one, find)]


def is_one_model(origin: dict, key: str, old: Any, new: Any, find: Callable[[str], Path | None]) -> bool:
    """Return whether `old` and `new` name the model that a run.json, `origin`, knows by `key`: one folder or content.

    Lists of names are compared item by item. Without fingerprints, as older releases left it, the folder decides.
    """
    lists = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    keys = [f"{key}.{i}" for i in range(len(new))] if lists else [key]
    folders, prints = known_parents(origin), origin.get("parents") or {}
    if not folders.keys() >= set(keys):
        return False
    try:
        models = {name: find(name) for name in keys}
    except UserError:
        return False
    return all(
        model is not None and (folders[name][0] == str(model) or is_content(prints.get(name) or {}, model))
        for name, model in models.items()
    )


def is_content(known: dict[str, str | None], model: Path) -> bool:
    """Return whether a model/ folder has the known fingerprints, both of them; weights None: it has none."""
    return bool(known.get("tokenizer")) and "weights" in known and fingerprints(model, weigh=True) == known


def check_same_settings(job: Job, path: Path, origin: dict) -> None:
    """Raise UserError where a training with another configuration has saved a checkpoint; a horizon may differ."""
    ignored = (*neutral_keys(job.row.name), *HORIZONS)
    if differences := differing(origin, job.config, ignored, job.models.get):
        raise UserError(
            f"{path} was saved by a training with another configuration ({describe_differences(differences)}): put "
            "the checkpoints of this stage back, or overwrite=true starts the stage again"
        )
