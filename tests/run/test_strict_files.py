"""Files of a run that are no files, are too large or too deep, and saved values of a wrong kind: one line, at once."""

import json
import os

import pytest
from conftest import compose
from omegaconf import OmegaConf

from llm.errors import UserError
from llm.eval.saved import saved_keys
from llm.run.config_diff import describe_differences
from llm.run.stage_folder import RunDir, read_manifest, read_metrics
from llm.stages.job import identity
from llm.stages.lengthen import lengthens
from llm.stages.run_stage import is_finished, keep_old_defaults
from llm.utils.files import DEEPEST, parse_json, read_bytes, read_json

IN_PLACE = {
    "pipe": (os.mkfifo, "is a pipe, a socket or a device"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a pipe, a socket or a device"),
    "folder": (lambda path: path.mkdir(), "cannot be read"),
    "loop": (lambda path: path.symlink_to(path), "symbolic link in a circle"),
    "holes": (lambda path: (path.touch(), os.truncate(path, 2**40)), "is larger than"),
}


@pytest.mark.parametrize("what", IN_PLACE)
def test_what_is_no_file_is_told_at_once(tmp_path, what):
    make, words = IN_PLACE[what]
    make(tmp_path / "run.json")
    for read in (read_json, read_manifest):
        with pytest.raises(UserError, match=words):
            read(tmp_path / "run.json")
    with pytest.raises(UserError, match=words):
        identity(tmp_path / "model")
    if what in ("holes",):
        (tmp_path / "run.json").rename(tmp_path / "metrics.csv")
        with pytest.raises(UserError, match=words):
            read_metrics(tmp_path)
    assert read_json(tmp_path / "nothing.json") is None
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "nothing.json")


def test_values_nest_to_a_limit():
    nested = lambda depth: b'{"a":' * depth + b"1" + b"}" * depth  # noqa: E731
    parse_json(nested(DEEPEST - 1), "run.json")
    for depth in (DEEPEST, 900, 100_000):
        with pytest.raises(UserError, match="run.json cannot be read .nested too deeply"):
            parse_json(nested(depth), "run.json")


@pytest.mark.parametrize("content", [rb'{"a": "\ud800"}', rb'{"\udfff": 1}', rb'{"a": [{"b": ["\ud800x"]}]}'])
def test_half_a_character_is_no_text(content):
    with pytest.raises(UserError, match="run.json cannot be read .*surrogates not allowed"):
        parse_json(content, "run.json")
    assert parse_json(rb'{"a": "\ud83d\ude00 \u00e9"}', "run.json") == {"a": "😀 é"}


@pytest.fixture
def begun(tmp_path):
    """Return a function that starts the stage sft of a run whose run.json is changed; returns whether it is done."""
    cfg = compose("train", "experiment=tiny", "stage=sft", "run=demo")
    config = OmegaConf.to_container(cfg, resolve=True)
    folder = tmp_path / "demo" / "sft"
    (folder / "model").mkdir(parents=True)

    def start(**changes):
        record = {"stage": "sft", "status": "finished", "config": config} | changes
        (folder / "run.json").write_text(json.dumps(record))
        run = RunDir(tmp_path, "demo")
        keep_old_defaults(cfg, run.manifest("sft"))
        return is_finished(run, "sft", OmegaConf.to_container(cfg, resolve=True), cfg)

    start.config = config
    return start


def test_a_saved_configuration_that_lacks_a_part(begun):
    assert begun()
    for missing in (None, {}):
        with pytest.raises(UserError, match=r"sft/run.json: config is missing; .*overwrite=true"):
            begun(config=missing)
    for group in ("data", "model", "stage", "optim"):
        left = {name: part for name, part in begun.config.items() if name != group}
        with pytest.raises(UserError, match=rf"made with another configuration \({group}\."):
            begun(config=left)
    with pytest.raises(UserError, match=r"data.more: 1 -> \(absent\)"):
        begun(config=begun.config | {"data": begun.config["data"] | {"more": 1}})


@pytest.mark.parametrize("epochs", ["x", {"a": 1}, -1, [1]])
def test_an_old_default_of_a_wrong_kind(begun, epochs):
    """From before data.shuffle existed: values of the saved run are taken over, so they are checked."""
    data = {name: value for name, value in begun.config["data"].items() if name != "shuffle"}
    config = begun.config | {"data": data, "stage": begun.config["stage"] | {"epochs": epochs}}
    with pytest.raises(UserError, match="run.json.*config.stage.epochs"):
        begun(config=config)


def test_a_saved_number_that_is_missing():
    cfg = compose("train", "experiment=tiny", "stage=sft", "max_steps=9")
    assert not lengthens({"steps": None}, [("max_steps", 4, 9)], cfg)


def test_keys_of_saved_data_name_their_file(tmp_path):
    data = OmegaConf.create({"data": {"name": "hub"}}).data
    with pytest.raises(UserError, match=r"run.json: config: data.workers is missing; restore the file"):
        with saved_keys(tmp_path):
            data.workers  # noqa: B018


def test_differences_stay_one_line():
    text = describe_differences([(f"data.key{i}", "x\n" * 500, i) for i in range(40)])
    assert "\n" not in text and len(text) < 3000 and text.endswith("; and 28 more")
