"""Read checkpoints of nanochat: `init_from=nanochat:<folder>`.

A folder such as base_checkpoints/d20 holds model_<step>.pt (weights), meta_<step>.json (shape) and more. The tokenizer
lies in it or beside base_checkpoints/. Weights are loaded with `weights_only=True`; the pickled tokenizer is read by
`llm.checkpoint.nanochat_tokenizer`, which runs nothing. Optimizer state is not taken.

nanochat's forms are told apart by their tensors. Its constants that no file states (RoPE base, q/k scale, gates) are
those of the form's own time, see `FORMS`.
"""

import hashlib
import pickle
import re
from pathlib import Path

import torch

from llm.checkpoint.model_folder import CONFIG_FILE, save_model_folder
from llm.checkpoint.names import VOCAB_PARAMS
from llm.checkpoint.nanochat_tokenizer import read_tokenizer
from llm.errors import UserError, reason_of
from llm.model.config import GPTConfig
from llm.model.gpt import GPT, build_network
from llm.run.lock import IMPORT_SECONDS, waiting_lock
from llm.utils.files import read_json

PREFIX = "nanochat:"
# Name in nanochat -> name here; all others are equal.
NAMES = {
    "resid_lambdas": "resid_scalars",
    "x0_lambdas": "x0_scalars",
    "smear_lambda": "smear_scalar",
    "backout_lambda": "backout_scalar",
}
# Channels of the gates of value embeddings, residual scalars, smear, backout -> options of that form.
FORMS = {
    (0, False, False, False): {"arch": "classic"},  # October 2025 to January 2026
    (32, True, False, False): {  # February 2026
        "arch": "modern",
        "rope_base": 10_000.0,
        "window_divisor": 2,
        "window_multiple": None,
        "gate_channels": 32,
        "gate_range": 2.0,
    },
    (12, True, True, True): {  # since March 2026
        "arch": "modern",
        "rope_base": 100_000.0,
        "qk_scale": 1.2,
        "window_divisor": 4,
        "gate_channels": 12,
        "gate_range": 3.0,
    },
}
SHAPE_KEYS = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"}


def imported_folder(init_from: str, runs: str | Path) -> Path:
    """Return a model/ folder with what `init_from`=nanochat:<path> names, written below `runs` where it is missing.

    Raises UserError where a file is missing, damaged, or of a form that is not known.
    """
    weights, meta, tokenizer = find_files(Path(init_from.removeprefix(PREFIX)))
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in (weights, meta, tokenizer)]
    name = hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
    folder = Path(runs) / ".nanochat" / name / "model"
    if not (folder / CONFIG_FILE).is_file():
        with waiting_lock(folder.parent.with_suffix(".lock"), IMPORT_SECONDS):  # another job may start from it too
            if not (folder / CONFIG_FILE).is_file():
                save_model_folder(folder, *read_nanochat(weights, meta, tokenizer))
                print(f"{weights} was written as {folder}, without its optimizer state", flush=True)
    return folder


def find_files(path: Path) -> tuple[Path, Path, Path]:
    """Return weights, meta file and tokenizer of a checkpoint: a file model_<step>.pt, or the last one of a folder."""
    found = [path] if path.is_file() else sorted(path.glob("model_*.pt"))
    step = re.fullmatch(r"model_(\d+)\.pt", found[-1].name) if found else None
    if step is None:
        raise UserError(
            f"init_from={PREFIX}{path}: no checkpoint there; give a folder of nanochat with model_<step>.pt and "
            "meta_<step>.json, such as base_checkpoints/d20"
        )
    folder = found[-1].parent
    places = [folder, folder / "tokenizer", *(above / "tokenizer" for above in folder.resolve().parents[:2])]
    tokenizer = next((place / "tokenizer.pkl" for place in places if (place / "tokenizer.pkl").is_file()), None)
    meta = folder / f"meta_{step[1]}.json"
    if not meta.is_file() or tokenizer is None:
        missing = "tokenizer.pkl" if meta.is_file() else meta.name
        raise UserError(f"init_from={PREFIX}{path}: {missing} is missing; copy it into {folder}")
    return found[-1], meta, tokenizer


def read_nanochat(weights: Path, meta: Path, tokenizer: Path) -> tuple[GPT, object]:
    """Return network (fp32) and tokenizer of a checkpoint. Raises UserError where the files do not fit together."""
    tensors = load_tensors(weights)
    config = shape(read_json(meta), tensors, meta)
    loaded = read_tokenizer(tokenizer)
    if loaded.vocab_size != config.vocab_size:
        raise UserError(f"{tokenizer} has {loaded.vocab_size} tokens, the model in {weights} {config.vocab_size}")
    net = build_network(config)
    copy_tensors(net, tensors, weights)
    return net, loaded


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of model_<step>.pt by our names; a prefix of torch.compile is cut off."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as weights ({reason_of(error, path)[:160]})") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path}: holds something else than tensors by name")
    names = {name: name.removeprefix("_orig_mod.") for name in content}
    return {NAMES.get(short, short): content[name] for name, short in names.items()}


def shape(meta: object, tensors: dict[str, torch.Tensor], path: Path) -> GPTConfig:
    """Return the shape that meta_<step>.json and the tensors describe. Raises UserError for an unknown form."""
    model = meta.get("model_config") if isinstance(meta, dict) else None
    unknown = set(model or {}) - SHAPE_KEYS - {"window_pattern"}
    if model is None or not SHAPE_KEYS <= set(model) or unknown:
        what = f"unknown keys {', '.join(sorted(unknown))}" if unknown else f"needs {', '.join(sorted(SHAPE_KEYS))}"
        raise UserError(f"{path}: model_config {what}; this is no form of nanochat that is known")
    gates = [tensor.shape[-1] for name, tensor in tensors.items() if name.endswith(".attn.ve_gate.weight")]
    parts = tuple(name in tensors for name in ("resid_scalars", "smear_scalar", "backout_scalar"))
    form = FORMS.get((gates[0] if gates else 0, *parts))
    if form is None:
        raise UserError(f"{path}: its tensors are of a form of nanochat that is not known (2025, 2026-02, 2026-07)")
    options = dict(form)
    if form["arch"] == "modern":
        options |= {"value_embeds": True, "residual_scalars": True, "smear": parts[1], "backout": parts[2]}
        options["window_pattern"] = str(model.get("window_pattern", "L")).upper()
    try:
        return GPTConfig(
            n_layer=model["n_layer"],
            n_head=model["n_head"],
            n_kv_head=model["n_kv_head"],
            head_dim=model["n_embd"] // model["n_head"],
            n_embd=model["n_embd"],
            seq_len=model["sequence_len"],
            vocab_size=model["vocab_size"],
            **options,
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: model_config is not a shape that can be ({error})") from error


def copy_tensors(net: GPT, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copy all tensors into `net`; tables may be padded to any size. Raises UserError for missing or unknown ones."""
    state, rows = net.state_dict(), net.config.vocab_size
    derived = {"cos", "sin"}  # rotary tables, which some versions saved
    for words, names in (
        ("is missing", set(state) - set(tensors)),
        ("is unknown", set(tensors) - set(state) - derived),
    ):
        if names:
            raise UserError(f"{path}: tensor {min(names)} {words} ({len(names)} in all); nothing was taken")
    for name, target in state.items():
        found, is_table = tensors[name], name.startswith(VOCAB_PARAMS)
        count = rows if is_table else len(target)
        fits = found.shape[1:] == target.shape[1:] and (found.shape[0] >= rows if is_table else len(found) == count)
        if not fits:
            raise UserError(
                f"{path}: tensor {name} has shape {tuple(found.shape)}, the model has {tuple(target.shape)}"
            )
        target[:count].copy_(found[:count])
        target[count:].zero_()
