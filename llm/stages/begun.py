"""Knows what a stage that is resumed was planned as: the derived values in its run.json."""

from llm.run.stage_folder import RunDir


def kept(cfg) -> dict:
    """Return the derived values in the run.json of a run that is resumed, {} where none is."""
    return (_run(cfg).manifest(cfg.stage.name) or {}).get("derived") or {} if has_begun(cfg) else {}


def has_begun(cfg) -> bool:
    """Return whether a run is resumed: it has a checkpoint."""
    saved = (_run(cfg).stage_dir(cfg.stage.name) / "checkpoints").glob("*.ckpt")
    return not (cfg.overwrite or cfg.dry_run) and any(saved)


def is_lengthened(cfg) -> bool:
    """Return whether stage.extend=true lengthens the stage: only one that was trained to its end before."""
    return bool(cfg.stage.get("extend")) and cfg.stage.name in _run(cfg).finished()


def _run(cfg) -> RunDir:
    return RunDir(cfg.paths.runs, cfg.run or f"d{cfg.model.depth}")
