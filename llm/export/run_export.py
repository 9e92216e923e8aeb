"""The command `python -m llm.export`: a finished stage as a folder for transformers or a GGUF file, with its card."""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from llm.checkpoint.model_folder import CONFIG_FILE, WEIGHTS_FILE, load_model_folder
from llm.errors import UserError
from llm.export.card import TAG, model_card
from llm.export.gguf_file import check_gguf, write_gguf
from llm.export.hub import check_hub, push
from llm.export.number_format import check_range
from llm.model.linear import DTYPES
from llm.run.content import CONTENT
from llm.run.stage_folder import find_stage
from llm.utils.files import read_json, replaced_folder, write_json

CARD = "README.md"
LEFT_OUT = (CONTENT, "adapter.safetensors", "adapter.json")  # checksums of other files; what is merged into the weights


def run_export(cfg: Any) -> None:
    """Write what `cfg` asks for and say where it lies. Raises UserError before anything is written."""
    stage = find_stage(cfg.paths.runs, cfg.run, cfg.stage)
    run = stage.parent.name
    out = Path(cfg.out or Path(cfg.paths.runs).parent / "exports" / f"{run}-{stage.name}-{cfg.to}")
    if out.exists() and not cfg.overwrite:
        raise UserError(f"out={out} exists; set another out=, or overwrite=true to replace the folder")
    if out.exists() and out.samefile(Path.cwd()):
        raise UserError(f"out={out} is the folder that this command runs in; set another out=")
    if not is_replaceable(out):
        raise UserError(
            f"out={out} is not what an export has written (files alone, {CARD} with the tag {TAG}), so overwrite=true "
            "does not replace it; set another out="
        )
    name, private = cfg.push, cfg.private
    if name is not None:
        check_hub(name)
    net, tokenizer = load_model_folder(stage / "model", verify=cfg.verify)
    if cfg.to == "gguf":
        check_gguf(net.config, tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(out) as new:
        if cfg.to == "gguf":
            write_gguf(new / f"{run}-{stage.name}-{cfg.dtype}.gguf", net, tokenizer, cfg.dtype)
        else:
            copy_folder(stage / "model", new, cfg.dtype)
        (new / CARD).write_text(model_card(stage, net, cfg.to, cfg.licence), encoding="utf-8")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))} ({size / 2**20:,.1f} MiB)", flush=True)
    if name is not None:
        print(f"pushed to {push(out, name, private)}", flush=True)


def is_replaceable(out: Path) -> bool:
    """Return whether a folder may go: it is empty or not there, or holds an export by its card, and no folder."""
    if not out.exists():
        return True
    if not out.is_dir() or any(path.is_dir() for path in out.iterdir()):
        return False
    card = out / CARD
    is_export = card.is_file() and f"\n- {TAG}\n" in card.read_text(encoding="utf-8", errors="replace")
    return is_export or not any(out.iterdir())


def copy_folder(model: Path, out: Path, dtype: str) -> None:
    """Copy a model/ folder into the folder `out`, with weights in the number format `dtype` (a key of DTYPES)."""
    for path in model.iterdir():
        if path.name not in (*LEFT_OUT, WEIGHTS_FILE):
            shutil.copyfile(path, out / path.name)
    kind = DTYPES[dtype]
    tensors = load_file(model / WEIGHTS_FILE)
    for name, value in tensors.items():
        check_range(name, value, dtype)
        tensors[name] = value.to(kind).contiguous()
    save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copymode(out / CONFIG_FILE, out / WEIGHTS_FILE)
    write_json(out / CONFIG_FILE, read_json(out / CONFIG_FILE) | {"dtype": str(kind).removeprefix("torch.")})
