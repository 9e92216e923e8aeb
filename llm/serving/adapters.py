"""Adapters that are served beside their base: stages trained by `model.lora.rank`, several in one engine."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from llm.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_FILE, load_adapter, read_adapter
from llm.checkpoint.model_folder import CONFIG_FILE, read_config
from llm.config.stages import row_or_stranger
from llm.errors import UserError
from llm.model.gpt import build_network
from llm.model.lora import Adapter
from llm.run.content import weights_sum, wrong_file
from llm.run.stage_folder import HF, MANIFEST, find_stage, list_runs, read_manifest, readable_stages

MADE_BY = "a stage trained with model.lora.rank leaves them in model/"


def chosen_adapters(
    given: Iterable[str] | None, runs: str | Path, model: str, offers_all: bool = False, verify: bool = True
) -> dict[str, str]:
    """Return the folders of the adapters to serve beside a model (a stage folder or hf:<name>), by name.

    given: the key `adapters`; None = those in `runs` that are for this model, if `offers_all`. Of these a damaged one
    is left out with a line; one that was asked for raises UserError. verify: as in `load_adapters`.
    """
    if given is None:
        return _found(Path(runs), model, verify) if offers_all and not model.startswith(HF) else {}
    folders: dict[str, str] = {}
    for value in dict.fromkeys(given):
        name, folder = _named(str(value), runs)
        if folders.setdefault(name, str(folder)) != str(folder):
            raise UserError(f"adapters: {folders[name]} and {folder} are both called {name}; rename a folder")
    load_adapters(model, folders, verify)
    return folders


def load_adapters(model: str | Path, folders: Mapping[str, str], verify: bool = True) -> dict[str, Adapter]:
    """Return adapters by name, read from their folders, for the model in a stage folder.

    verify: compare the files with their checksums. Raises UserError for one whose base is another model or that has
    another shape, and where files are missing or damaged.
    """
    if not folders:
        return {}
    if str(model).startswith(HF):
        raise UserError(f"adapters with model={model}: their base must be a run of yours; give run= and stage=")
    base, found = Path(model) / "model", {}
    config, weights = read_config(base), weights_sum(base)
    with torch.device("meta"):
        net = build_network(config)
    for name, folder in folders.items():
        path = Path(folder)
        _check_base(name, path, base, weights)
        if (path / CONFIG_FILE).is_file():
            _check_shape(name, read_config(path).to_dict(), config.to_dict())
        if verify and (problem := wrong_file(path, (ADAPTER_FILE, ADAPTER_CONFIG))) is not None:
            raise UserError(f"{path}: {problem}; copy the folder again, or train the stage again")
        found[name] = load_adapter(path, net)
    return found


def _named(value: str, runs: str | Path) -> tuple[str, Path]:
    """Return the name and the folder of an adapter that is given as run/stage, stage folder or adapter folder."""
    run, _, stage = value.strip("/").partition("/")
    if stage and (Path(runs) / run / stage / MANIFEST).is_file():
        places = [find_stage(runs, run, stage) / "model"]
    else:
        places = [Path(value) / "model", Path(value)]
    folder = next((place.resolve() for place in places if (place / ADAPTER_CONFIG).is_file()), None)
    if folder is None:
        raise UserError(
            f"adapters: {value} has no {ADAPTER_CONFIG} (looked in {', '.join(map(str, places))}); {MADE_BY}: name "
            "such a run/stage or folder"
        )
    is_stage = folder.name == "model" and (folder.parent / MANIFEST).is_file()
    return f"{folder.parent.parent.name}/{folder.parent.name}" if is_stage else folder.name, folder


def _check_base(name: str, folder: Path, base: Path, weights: str | None) -> None:
    """Raise UserError where an adapter was trained beside other weights than those of the model folder `base`."""
    own = read_adapter(folder).base
    if own is None or own != weights:
        parent = (read_manifest(folder.parent) or {}).get("parent") if folder.name == "model" else None
        raise UserError(
            f"adapters: {name} belongs to weights {str(own)[:12]}, but {base} holds {str(weights)[:12]}; serve its base"
            + (f", {parent}" if parent else "")
        )


def _check_shape(name: str, own: dict, wanted: dict) -> None:
    """Raise UserError where the network of an adapter's stage had another shape than the base's `wanted`."""
    if other := [key for key in own | wanted if own.get(key) != wanted.get(key)]:
        key = other[0]
        raise UserError(
            f"adapters: {name} was trained with {key}={own.get(key)}, but its base is served with {wanted.get(key)}; "
            "serve it by its merged weights, as a model of its own (run=, stage=)"
        )


def _found(runs: Path, model: str, verify: bool) -> dict[str, str]:
    """Return the finished stages of all runs that are adapters of the model in a stage folder."""
    base, folders = Path(model) / "model", {}
    weights = None
    for run in list_runs(runs):
        for stage in readable_stages(run):
            folder = run.model_dir(stage)
            if not ((folder / ADAPTER_CONFIG).is_file() and row_or_stranger(stage).servable):
                continue
            name = f"{run.name}/{stage}"
            try:
                weights = weights or weights_sum(base)
                if read_adapter(folder).base == weights:
                    load_adapters(model, {name: str(folder)}, verify)
                    folders[name] = str(folder)
            except UserError as error:
                print(f"note: {name} is not served as an adapter ({error})", file=sys.stderr)
    return folders
