"""The cost of a stage: devices times wall-clock times `device_price`, over all parts of a resumed training."""

import pytest
from conftest import compose
from omegaconf import OmegaConf

from llm.config.stages import stage_row
from llm.errors import UserError
from llm.run.cost import cost, device_hours
from llm.run.stage_folder import RunDir, read_manifest, write_manifest
from llm.stages import job as jobs
from llm.stages.job import Job


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Return a function that works on a stage for some seconds on some devices, and returns its run.json."""
    cfg = compose("train", "experiment=tiny", "device_price=2", f"paths.runs={tmp_path}", "run=demo")

    def work(seconds, devices):
        job = Job(cfg, stage_row("pretrain"), RunDir(tmp_path, "demo"), OmegaConf.to_container(cfg, resolve=True), None)
        monkeypatch.setattr(jobs, "processes", lambda cfg: devices)
        job.begin()
        job.finish({"steps": 1}, seconds)
        return read_manifest(job.stage_dir)

    return work


def test_each_part_of_a_training_counts_its_own_devices(finished):
    assert cost(finished(1800.0, 4)) == 4.0
    again = finished(3600.0, 1)
    assert (again["seconds"], again["device_seconds"]) == (5400.0, 10_800.0)
    assert device_hours(again) == 3.0 and cost(again) == 6.0
    assert again["code"]["characters"] > 10**6 and again["code"]["files"] > 100


def test_a_training_that_an_older_release_began_counts_by_its_devices(finished, tmp_path):
    folder = RunDir(tmp_path, "demo").stage_dir("pretrain")
    write_manifest(folder, {"stage": "pretrain", "status": "interrupted", "seconds": 1800.0})
    later = finished(1800.0, 4)
    assert later["seconds"] == 3600.0 and "device_seconds" not in later
    later["config"]["trainer"] |= {"devices": 2, "num_nodes": 3}
    assert device_hours(later) == 6.0 and cost(later) == 12.0


def test_no_cost_is_made_up():
    config = {"trainer": {"devices": "auto", "num_nodes": 1}, "device_price": 2.0}
    gpus = {"gpus": [{"name": "x", "memory_gb": 80.0}]}
    assert device_hours({"seconds": 3600.0, "config": config, "environment": gpus}) is None
    assert cost({"seconds": 3600.0, "config": config}) == 2.0  # one process on a CPU
    assert cost({"device_seconds": 3600.0, "config": config | {"device_price": None}}) is None
    assert cost({"config": config}) is None and cost({}) is None
    with pytest.raises(UserError, match="device_price=-1.0: must be at least 0"):
        compose("train", "device_price=-1")
