"""Identity is content: changed weights, weights of another stage and another tokenizer are found on loading."""

import json
import shutil

import pytest
import torch

from llm.checkpoint.model_folder import load_model_folder, save_model_folder
from llm.errors import UserError
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.run.content import fingerprints, weights_sum, wrong_file
from llm.tokenizer.bpe import Tokenizer

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])


def stage(folder, seed):
    """A finished stage with a small model, as training leaves it."""
    torch.manual_seed(seed)
    save_model_folder(folder / "model", GPT(GPTConfig(1, 1, 1, 16, 16, 8, 265)).init_weights(seed), TOKENIZER)
    record = {"stage": folder.name, "status": "finished", "fingerprints": fingerprints(folder / "model")}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def run(tmp_path):
    """A run with two stages of the same shape and other weights."""
    stage(tmp_path / "pretrain", 0)
    stage(tmp_path / "sft", 1)
    return tmp_path


@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_a_flipped_bit_is_found_on_loading(run, place):
    path = run / "sft" / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + int(place * 1000)] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors is not what was written"):
        load_model_folder(run / "sft" / "model")
    load_model_folder(run / "sft" / "model", verify=False)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_weights_of_another_stage_are_found(run, with_manifest):
    ours, theirs = run / "sft" / "model", run / "pretrain" / "model"
    shutil.copy(theirs / "model.safetensors", ours)
    if with_manifest:
        shutil.copy(theirs / "manifest.json", ours)
    else:
        (ours / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds other weights .* than its stage handed over"):
        load_model_folder(ours)


def test_a_damaged_list_is_told_from_other_weights(run):
    path = run / "sft" / "model" / "manifest.json"
    listed = json.loads(path.read_text())
    listed["model.safetensors"]["sha256"] = "0" + listed["model.safetensors"]["sha256"][1:-1] + "x"
    path.write_text(json.dumps(listed))
    with pytest.raises(UserError, match="model/manifest.json is damaged, the weights are not"):
        load_model_folder(path.parent)


def test_folders_without_manifest_load(run):
    folder = run / "sft" / "model"
    (folder / "manifest.json").unlink()
    assert wrong_file(folder) is None and weights_sum(folder)
    load_model_folder(folder)


@pytest.mark.parametrize("name", ["../run.json", "/etc/hostname", "absent"])
def test_a_manifest_of_somebody_else_names_files_of_the_folder_only(run, name):
    folder = run / "sft" / "model"
    (folder / "manifest.json").write_text(json.dumps({name: {"bytes": 1, "sha256": "a", "xxh3": "b"}}))
    assert wrong_file(folder)


@pytest.mark.parametrize("content", [None, "{}"])
def test_weights_of_another_stage_are_found_without_their_list_too(run, content):
    shutil.copy(run / "pretrain" / "model" / "model.safetensors", run / "sft" / "model" / "model.safetensors")
    (run / "sft" / "model" / "manifest.json").unlink()
    if content is not None:
        (run / "sft" / "model" / "manifest.json").write_text(content)
    for verify in (True, False):
        with pytest.raises(UserError, match="other weights"):
            load_model_folder(run / "sft" / "model", verify=verify)
