"""The model's shape of a stage: its parent's, unless the command says otherwise.

Presets and defaults yield to the parent. A value of the command line stays in the configuration; where it contradicts
the parent, `llm.stages.common.load_parent` refuses it. Reads small files only, so that a finished stage says so fast.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from llm.config.said import knows_settings, said
from llm.config.schema import VARIANTS
from llm.config.stages import Stage
from llm.errors import UserError
from llm.model.config import depth_of
from llm.run.config_diff import BEFORE_KEYS
from llm.run.formats import SHAPE
from llm.run.stage_folder import RunDir, find_parent, stage_before
from llm.utils.files import read_json


def take_shape(cfg: DictConfig, row: Stage, run: RunDir) -> RunDir:
    """Write the parent's shape into `cfg.model` and `cfg.arch`; return the run that the stage belongs to.

    The run is `run`, or where neither the command nor a preset names one and init_from gives the parent, d<its depth>.
    Nothing changes where it is unknown what the command said, or where the parent has no model.
    """
    if not knows_settings(cfg) or not row.parents:
        return run
    shape = parent_shape(cfg, row, run)
    if shape is not None:
        set_model(cfg, shape)
        set_arch(cfg, shape)
        if cfg.run is None and cfg.init_from is not None:
            return RunDir(cfg.paths.runs, f"d{cfg.model.depth}")
    return run


def parent_of(cfg: Any, row: Stage, run: RunDir) -> Path | None:
    """Return the model/ folder that the stage starts from (see `find_parent`); a checkpoint of others becomes one."""
    init_from = cfg.init_from
    if row.parents and init_from is not None and init_from.startswith(("nanochat:", "hf:")):
        from llm.parallel import collectives

        if init_from.startswith("hf:"):
            from llm.checkpoint.hf_weights import imported_folder
        else:
            from llm.checkpoint.nanochat import imported_folder

        if collectives.is_main():
            imported_folder(init_from, cfg.paths.runs)
        collectives.barrier()
        init_from = str(imported_folder(init_from, cfg.paths.runs))
    return find_parent(run.root, run.name, row.name, init_from, stage_before(cfg))


def parent_shape(cfg: Any, row: Stage, run: RunDir) -> dict | None:
    """Return the options of the parent's GPTConfig; None where there is no parent, or one without a model.

    A finished stage can do without its parent: its own model has the shape. Raises UserError where that of an
    unfinished one is gone: with another shape its configuration would be refused, for keys that nobody has changed.
    """
    try:
        parent = parent_of(cfg, row, run)
    except UserError:
        status = run.status(row.name)
        if status not in ("missing", "finished"):
            raise
        parent = run.model_dir(row.name) if status == "finished" else None  # said where the parent is needed
    return None if parent is None else shape_in(parent)


def shape_in(folder: Path) -> dict | None:
    """Return the options of the GPTConfig in a model/ folder; None where it holds a tokenizer alone."""
    content = read_json(folder / "config.json")
    ours = content.get("fathom") if isinstance(content, dict) else None
    shape = ours.get("model") if isinstance(ours, dict) else None
    if not isinstance(shape, dict) or "n_layer" not in shape:
        return None
    SHAPE(shape, f"{folder / 'config.json'}: fathom.model")
    return shape


def set_model(cfg: Any, shape: dict) -> None:
    """Set the keys of `cfg.model` that the command did not say to those that make `shape`."""
    layers, heads, head_dim = depth_of(shape["n_layer"], shape.get("loops", 1)), shape["n_head"], shape["head_dim"]
    taken = {"depth": layers, "head_dim": head_dim, "seq_len": shape["seq_len"]}
    taken["n_kv_head"] = None if shape["n_kv_head"] == heads else shape["n_kv_head"]
    if -(-layers * cfg.model.aspect_ratio // head_dim) != heads:
        taken["aspect_ratio"] = heads * head_dim // layers
    if cfg.model.n_kv_head == shape["n_kv_head"]:
        del taken["n_kv_head"]
    for name, value in taken.items():
        if not said(cfg, f"model.{name}"):
            cfg.model[name] = value


def set_arch(cfg: Any, shape: dict) -> None:
    """Set `cfg.arch` to the architecture of `shape` and its options, but for keys that the command said."""
    name = shape.get("arch", cfg.arch.name)
    before = {"window_multiple": BEFORE_KEYS["arch.window_multiple"]}  # in files that do not say it
    found = before | shape | {"document_masks": shape.get("bos_id") is not None}
    found["width"] = None if shape["n_embd"] == shape["n_head"] * shape["head_dim"] else shape["n_embd"]
    if name != cfg.arch.name:
        if said(cfg, "arch") or name not in VARIANTS["arch"]:
            return
        schema = OmegaConf.structured(VARIANTS["arch"][name])
        kept = {key: cfg.arch[key] for key in cfg.arch if said(cfg, f"arch.{key}")}
        if set(kept) <= set(schema):  # else the command speaks of an option that the parent's architecture lacks
            taken = {key: found[key] for key in schema if key in found}
            cfg.arch = OmegaConf.merge(schema, taken | kept | {"name": name})
        return
    for key in cfg.arch:
        if key != "name" and key in found and not said(cfg, f"arch.{key}"):
            cfg.arch[key] = found[key]
