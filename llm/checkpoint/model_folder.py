"""Model folders, `<stage>/model/`, that one stage hands to the next: weights, config, tokenizer, chat template.

For `arch=classic` and `arch=qwen3` the folder is a Hugging Face checkpoint (NanoChat, Qwen3 or Llama) that
`AutoModelForCausalLM` and `AutoTokenizer` of transformers 5 load unchanged. Everything is written here from plain data:
saving and loading need safetensors only, and no file is ever unpickled. Tensors hold the true vocabulary; Fathom's
padding is cut off and put back on load.
"""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llm.checkpoint.adapter import save_adapter
from llm.checkpoint.hf_config import FORMAT_VERSION, PROGRAM, generation_config, has_program, hf_config
from llm.checkpoint.names import file_name, rows_kept
from llm.errors import UserError, reason_of
from llm.model.config import GPTConfig, config_class, num_params
from llm.model.gpt import GPT, build_network
from llm.model.lora import merged
from llm.run.content import check_content, write_content
from llm.run.formats import SHAPE
from llm.tokenizer.bpe import Tokenizer
from llm.utils.files import check_ordinary, read_json, replaced_folder
from llm.utils.shapes import text

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MEND = "copy the file again, or train the stage again"

FLOATS = ("F64", "F32", "F16", "BF16")  # number formats in which weights may be saved


def save_model_folder(folder: str | os.PathLike, net: GPT, tokenizer: Tokenizer) -> None:
    """Write network (fp32 weights) and tokenizer. An older folder is replaced once the new one is complete.

    Of a network with an adapter, the weights are merged, and the adapter stands beside them.
    Raises UserError where the disk refuses (full, read-only), which leaves the old folder as it was; ValueError where
    the tokenizer has another vocabulary than the network.
    """
    folder, config = Path(folder), net.config
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    with replaced_folder(folder) as new:
        tokenizer.save(new, max_length=config.seq_len)
        _write_json(new / CONFIG_FILE, hf_config(config, tokenizer))
        _write_json(new / GENERATION_FILE, generation_config(tokenizer))
        if has_program(config):
            shutil.copyfile(PROGRAM, new / PROGRAM.name)
        tensors, seen = {}, set()
        for name, value in merged(net).state_dict().items():
            kept = value[: rows_kept(name, value, config)].detach().to("cpu", torch.float32).contiguous()
            # the file has no names for one tensor: what blocks share stands in it for each of them
            tensors[file_name(name, config)] = kept.clone() if kept.data_ptr() in seen else kept
            seen.add(kept.data_ptr())
        try:
            save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
            if net.lora is not None:
                save_adapter(new, net)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        for path in new.glob("*.safetensors"):  # safetensors makes them readable by their owner only
            shutil.copymode(new / CONFIG_FILE, path)
        write_content(new)


def load_model_folder(
    folder: str | os.PathLike, device: str | torch.device = "cpu", verify: bool = True
) -> tuple[GPT, Tokenizer]:
    """Read a saved folder; return the network (fp32 weights, on `device`) and the tokenizer.

    verify: compare every file with its checksum, see `check_content`. Raises UserError where a file is missing,
    damaged, or of another model or tokenizer.
    """
    folder = Path(folder)
    config, fingerprint = _read_config(folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != fingerprint or tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer is not the one this model was trained with "
            f"(fingerprint {tokenizer.fingerprint[:12]}, expected {fingerprint[:12]}); "
            "put the original tokenizer files back, or train the stage again"
        )
    check_size(config, folder / WEIGHTS_FILE)
    net = build_network(config)
    _load_weights(net, folder / WEIGHTS_FILE)
    check_content(folder, verify)  # last: what is wrong with the form of a file says more than its checksum
    return net.to(device), tokenizer


def check_size(config: GPTConfig, path: Path) -> None:
    """Raise UserError where a file of weights is far too small for a shape: no memory is taken for such a network."""
    described = num_params(replace(config, vocab_multiple=1))["total"]
    try:
        check_ordinary(path)
        with safe_open(path, framework="pt") as file:
            found = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {MEND}") from error
    if described > 2 * found:
        raise UserError(
            f"{path} holds {found:,} parameters, but {CONFIG_FILE} describes {described:,}; the two files are of "
            f"different models: {MEND}"
        )


def read_config(folder: str | os.PathLike) -> GPTConfig:
    """Read the shape of the model in `folder`, not its weights. Raises UserError where config.json is not Fathom's."""
    return _read_config(Path(folder))[0]


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_config(folder: Path) -> tuple[GPTConfig, str]:
    """Read config.json: the model's shape, and the fingerprint of the tokenizer that belongs to it."""
    path = folder / CONFIG_FILE
    content = read_json(path)
    if content is None:
        raise UserError(
            f"{path}: cannot be read (No such file or directory); a model folder is what a finished stage leaves in "
            "<run>/<stage>/model. Train that stage, or point run= or init_from= at one that is finished"
        )
    ours = content.get("fathom")
    if not isinstance(ours, dict):
        raise UserError(f"{path}: no `fathom` section, so Fathom did not write this model; use a Fathom model folder")
    if ours.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {str(ours.get('format_version'))[:40]}, but this version of Fathom reads "
            f"{FORMAT_VERSION}; use the version that wrote it, or train the stage again"
        )
    SHAPE(ours.get("model"), f"{path}: fathom.model")
    text(ours.get("tokenizer"), f"{path}: fathom.tokenizer")
    arch = ours["model"].get("arch", "classic")
    try:
        shape = config_class(arch)
    except UserError as error:  # no damage: its plugin is not imported
        raise UserError(f"{path}: {error}: name its module in this command, plugins=[<module>]") from None
    try:
        return shape.from_dict(ours["model"]), ours["tokenizer"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged `fathom` section ({error}); copy it again or train again") from error


def _load_weights(net: GPT, path: Path) -> None:
    """Copy the tensors of the file `path` into `net`, one at a time; padding rows of tables become zero."""
    fix = MEND
    state = net.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            expected, found = {file_name(name, net.config): name for name in state}, set(file.keys())
            if missing := sorted(set(expected) - found):
                raise UserError(f"{path}: tensor {missing[0]} is missing ({len(missing)} in all); {fix}")
            if unknown := sorted(found - set(expected)):
                raise UserError(f"{path}: tensor {unknown[0]} is not of this model ({len(unknown)} in all); {fix}")
            for theirs, name in expected.items():
                target = state[name]
                rows = rows_kept(name, target, net.config)
                shape, kind = tuple(file.get_slice(theirs).get_shape()), file.get_slice(theirs).get_dtype()
                if kind not in FLOATS:
                    raise UserError(f"{path}: tensor {theirs} holds {kind}, but must hold {', '.join(FLOATS)}; {fix}")
                if shape != (rows, *target.shape[1:]):
                    raise UserError(
                        f"{path}: tensor {theirs} has shape {shape}, but {CONFIG_FILE} says "
                        f"{(rows, *target.shape[1:])}; the two files are of different models: {fix}"
                    )
                target[:rows].copy_(file.get_tensor(theirs))
                target[rows:].zero_()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error, path)}); {fix}") from error
