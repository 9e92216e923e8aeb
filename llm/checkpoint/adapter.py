"""The adapter in a model folder: `adapter.safetensors` and `adapter.json`, beside the merged weights.

A stage with `model.lora.rank` leaves both. The names of the tensors are those that PEFT gives to an adapter of a
Hugging Face model: `base_model.model.<module>.lora_A.weight` (rank, in) and `...lora_B.weight` (out, rank), where
<module> is its name in model.safetensors. Of tables PEFT keeps the transposes: its lora_embedding_B is the transpose of
our A, its lora_embedding_A that of our B. `adapter.json` holds rank, alpha, targets, rate, and the base's fingerprint.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llm.checkpoint.names import file_name, rows_kept
from llm.errors import UserError, reason_of
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.model.lora import Adapter, LoRA, adapter_weights, targeted
from llm.run.formats import ADAPTER, read_form
from llm.utils.files import check_ordinary, write_json

ADAPTER_FILE = "adapter.safetensors"
ADAPTER_CONFIG = "adapter.json"
PREFIX, SUFFIX = "base_model.model.", ".weight"
VERSION = 1


def save_adapter(folder: Path, net: GPT) -> None:
    """Write the adapter of a network into a folder."""
    lora, tensors = net.lora, {}
    for name, weight in adapter_weights(net).items():
        kept = weight[: rows_kept(name, weight, net.config)]
        tensors[adapter_name(name, net.config)] = kept.detach().to("cpu", torch.float32).contiguous()
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    content = {"format_version": VERSION, "rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
    write_json(folder / ADAPTER_CONFIG, content | {"lr": lora.lr, "base": lora.base})


def read_adapter(folder: Path) -> LoRA:
    """Return the shape of the adapter in a model folder. Raises UserError where there is none, or a damaged one."""
    path = folder / ADAPTER_CONFIG
    content = read_form(path, ADAPTER)
    if content is None:
        raise UserError(f"{path}: there is no adapter here; a stage trained with model.lora.rank leaves one in model/")
    if content["format_version"] != VERSION:
        raise UserError(f"{path}: format_version {content['format_version']}, but this release reads {VERSION}")
    return LoRA(content["rank"], content["alpha"], tuple(content["targets"]), content["lr"], content["base"])


def load_adapter(folder: Path, net: GPT) -> Adapter:
    """Return the adapter in a model folder for its base `net`, which stays as it is; padding rows of tables are zero.

    The caller compares `LoRA.base` with the base's fingerprint. Raises UserError where the files do not fit.
    """
    path, lora = folder / ADAPTER_FILE, read_adapter(folder)
    weights = {}
    for name, module in targeted(net, lora):
        out, width = module.weight.shape
        weights |= {f"{name}.lora_A": torch.zeros(lora.rank, width), f"{name}.lora_B": torch.zeros(out, lora.rank)}
    expected = {adapter_name(name, net.config): w[: rows_kept(name, w, net.config)] for name, w in weights.items()}
    try:
        check_ordinary(path)
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(expected):
                raise UserError(f"{path}: its tensors are not those that {ADAPTER_CONFIG} describes; copy it again")
            for name, weight in expected.items():
                found = tuple(file.get_slice(name).get_shape())
                if found != tuple(weight.shape):
                    raise UserError(
                        f"{path}: tensor {name} has the shape {found}, but rank {lora.rank} beside this base needs "
                        f"{tuple(weight.shape)}; copy {ADAPTER_FILE} and {ADAPTER_CONFIG} from one stage again"
                    )
                weight.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error, path)}); copy it again") from error
    return Adapter(lora, weights)


def adapter_name(name: str, config: GPTConfig) -> str:
    """Return the name in adapter.safetensors of an adapter's matrix."""
    module, _, part = name.rpartition(".")
    return PREFIX + file_name(f"{module}.weight", config).removesuffix(SUFFIX) + f".{part}{SUFFIX}"
