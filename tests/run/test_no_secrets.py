"""Secrets in addresses reach no file of a run and no message: run.json, config.yaml, eval.json, report, differences."""

import json

import pytest
from conftest import compose
from omegaconf import OmegaConf

from llm.cli.app import _complain
from llm.config.stages import stage_row
from llm.eval.evaluate import data_title
from llm.report.report import build_report
from llm.run.config_diff import describe_differences, diff_configs
from llm.run.mirror import Mirror
from llm.run.stage_folder import RunDir, write_manifest
from llm.stages.job import Job, data_fingerprint, show_config

SECRET = "S3CRET"
PLACES = (
    f"https://user:{SECRET}@host/x.txt",
    f"s3://bucket/x?key={SECRET}",
    f"https://host/y.txt?X-Sig={SECRET}&b=1,2",
)


@pytest.fixture
def cfg(tmp_path):
    words = ",".join(f"'{place}'" for place in PLACES[1:])
    return compose(
        "train",
        "experiment=tiny",
        "stage=pretrain",
        "data=local",
        f"data.path='{PLACES[0]}'",
        f"data.val=[{words}]",
        f"save_mirror='{PLACES[1]}'",
        f"paths.runs={tmp_path}",
        "run=demo",
    )


def test_what_a_stage_writes_and_prints(cfg, tmp_path, capsys):
    config = OmegaConf.to_container(cfg, resolve=True)
    job = Job(cfg, stage_row("pretrain"), RunDir(tmp_path, "demo"), config, None)
    job.manifest["data"] = {"skipped": {f"{PLACES[2]}: empty": 1}}
    job.begin()
    show_config(cfg)
    build_report(tmp_path / "demo", redraw=False)
    written = [path for path in (tmp_path / "demo").rglob("*") if path.is_file()]
    assert {"run.json", "config.yaml", "report.md"} <= {path.name for path in written}
    for path in written:
        assert SECRET not in path.read_text() and ("https://host/" in path.read_text() or path.suffix == ".png"), path
    assert SECRET not in capsys.readouterr().out
    assert config["data"]["path"] == PLACES[0]  # the stage itself reads with it


def test_a_report_of_an_older_run_hides_them_too(tmp_path):
    (tmp_path / "demo" / "pretrain").mkdir(parents=True)
    record = {"stage": "pretrain", "status": "finished", "config": {"data": {"path": PLACES[0]}}}
    (tmp_path / "demo" / "pretrain" / "run.json").write_text(json.dumps(record))
    scored = {"bpb": {"data": f"local {PLACES[2]}", "source": PLACES[1], "tokens": 1}}
    (tmp_path / "demo" / "pretrain" / "eval.json").write_text(json.dumps({"bpb": 1.0, "scored": scored}))
    text = build_report(tmp_path / "demo", redraw=False).read_text()
    assert SECRET not in text and "https://host/y.txt" in text


def test_a_new_password_is_no_other_data(cfg, tmp_path):
    config = OmegaConf.to_container(cfg, resolve=True)
    write_manifest(tmp_path, {"config": config})
    saved = json.loads((tmp_path / "run.json").read_text())["config"]
    assert diff_configs(saved, config) == []
    assert data_fingerprint(saved) == data_fingerprint(config)
    other = {**config, "data": {**config["data"], "path": f"https://user:{SECRET}@host/z.txt"}}
    assert describe_differences(diff_configs(saved, other)) == "data.path: https://host/x.txt -> https://host/z.txt"


@pytest.mark.parametrize("place", PLACES)
def test_titles_errors_and_the_mirrors_lines(place, capsys):
    data = OmegaConf.create({"name": "local", "val": None, "path": place})
    _complain(f"data.path={place}: cannot\nbe read")
    Mirror.say(f"copy to {place} failed")
    shown = data_title(data) + "".join(capsys.readouterr())
    assert SECRET not in shown and shown.count("://") == 3 and "error: data.path=" in shown
