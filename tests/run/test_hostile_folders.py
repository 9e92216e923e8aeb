"""Run folders of somebody else, mutated at random: every loader answers or refuses in one line, and runs nothing.

FOLDERS of them go through the loaders in `make test`, ten times as many where FATHOM_FUZZ=2000 is set.
"""

import contextlib
import copy
import json
import os
import random
import shutil
import socket
import time

import pytest
import torch
from conftest import compose
from omegaconf import OmegaConf

from llm.checkpoint.model_folder import load_model_folder, save_model_folder
from llm.checkpoint.resume import CheckpointWriter, newest_checkpoint
from llm.errors import UserError
from llm.eval.saved import saved_config
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.report.report import final_metrics, read_stages
from llm.run.formats import read_scores
from llm.run.stage_folder import RunDir, find_stage, read_manifest, read_metrics
from llm.stages.job import fingerprints
from llm.stages.shape import shape_in
from llm.tokenizer.bpe import Tokenizer

FOLDERS = int(os.environ.get("FATHOM_FUZZ", 100))
HANG = 10  # seconds of processor time
FILES = ("run.json", "eval.json", "model/config.json", "model/manifest.json", "checkpoints/manifest.json")
FILES += ("model/fathom_tokenizer.json", "metrics.csv")
VALUES = (None, True, -1, 0, 1.5, 10**9, 2**40, 10**12, 10**30, 1e308, "4", "", "x" * 5000, [], [[]], {}, {"a": 1})
VALUES += ("${oc.env:HOME}", "http://127.0.0.1:1/x", "os.system", {"_target_": "os.mkdir", "path": "/tmp/hostile"})
TEXTS = (b"", b"{", b"[]", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b"[" * 200_000, b"null")
SCORES = {"bpb": 2.0, "chat": {"choice": {"accuracy": 0.5, "n": 4, "stderr": 0.1}}, "samples": []}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A finished stage as training and evaluation leave it."""
    folder = tmp_path_factory.mktemp("hostile") / "demo" / "sft"
    tokenizer = Tokenizer([bytes([b]) for b in range(256)])
    save_model_folder(folder / "model", GPT(GPTConfig(1, 1, 1, 16, 16, 8, 265)).init_weights(0), tokenizer)
    config = OmegaConf.to_container(compose("train", "experiment=tiny", "stage=sft"), resolve=True)
    record = {"stage": "sft", "status": "finished", "parent": None, "config": config, "steps": 4, "seconds": 1.0}
    record |= {"metrics": {"loss": 1.0}, "fingerprints": fingerprints(folder / "model"), "finished": "2026"}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "eval.json").write_text(json.dumps(SCORES))
    (folder / "metrics.csv").write_text("step,loss\n1,2.0\n2,1.5\n")
    state = {"state_dict": {"w": torch.zeros(3)}, "optimizer_states": [{"state": {}, "param_groups": []}]}
    state |= {"StepData": {"positions": [None]}, "global_step": 2, "loops": {}}
    CheckpointWriter(2, False).save_checkpoint(state, folder / "checkpoints" / "step_000002.ckpt")
    return folder


def mutate(folder, draw: random.Random) -> str:
    """Change one file of a run; return what was done, in words."""
    name = draw.choice(FILES)
    path = folder / name
    how = draw.choice(("value", "value", "value", "key", "text", "bytes", "gone"))
    if how == "gone":
        path.unlink()
    elif how == "text":
        path.write_bytes(text := draw.choice(TEXTS))
        return f"{name}: {text[:20]}"
    elif how == "bytes" or name.endswith(".csv"):
        content = bytearray(path.read_bytes())
        for _ in range(draw.randint(1, 20)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
    else:
        content = json.loads(path.read_text())
        place, key = draw.choice(list(places(content)))
        if how == "key":
            del place[key]
        else:
            place[key] = copy.deepcopy(draw.choice(VALUES))
        path.write_text(json.dumps(content))
        return f"{name}: {how} {key}"
    return f"{name}: {how}"


def places(thing):
    """Yield (mapping or list, key) of everything in a JSON value."""
    for key, item in list(thing.items() if isinstance(thing, dict) else enumerate(thing)):
        yield thing, key
        if isinstance(item, dict | list):
            yield from places(item)


LOADERS = {
    "read_manifest": read_manifest,
    "read_scores": read_scores,
    "read_metrics": read_metrics,
    "read_stages": lambda folder: [final_metrics(facts) for facts in read_stages(folder.parent)[0].values()],
    "find_stage": lambda folder: find_stage(folder.parent.parent, "demo"),
    "stages": lambda folder: RunDir(folder.parent.parent, "demo").finished(),
    "saved_config": lambda folder: saved_config(folder, str(folder)),
    "shape_in": lambda folder: shape_in(folder / "model"),
    "load_model_folder": lambda folder: load_model_folder(folder / "model"),
    "unverified": lambda folder: load_model_folder(folder / "model", verify=False),
    "newest_checkpoint": lambda folder: newest_checkpoint(folder / "checkpoints"),
}


def test_the_loaders_take_a_sound_folder(sound):
    for load in LOADERS.values():
        load(sound)


@pytest.mark.parametrize("part", range(4))
def test_mutated_folders_are_read_or_refused_in_one_line(sound, tmp_path, monkeypatch, part):
    def refuse(*args, **kwargs):
        raise AssertionError("network or a program")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(os, "system", refuse)
    refused = 0
    for number in range(part, FOLDERS, 4):
        draw = random.Random(number)
        folder = tmp_path / str(number) / "demo" / "sft"
        shutil.copytree(sound, folder)
        done = mutate(folder, draw)
        for name, load in LOADERS.items():
            start = time.process_time()
            try:
                load(folder)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error).strip() and len(str(error)) < 1500, (number, done, name)
            except Exception as error:
                raise AssertionError(f"folder {number}, {done}, {name}: {type(error).__name__}: {error}") from error
            assert time.process_time() - start < HANG, (number, done, name)
        with contextlib.suppress(OSError):
            shutil.rmtree(tmp_path / str(number))
    assert refused and not os.path.exists("/tmp/hostile")
