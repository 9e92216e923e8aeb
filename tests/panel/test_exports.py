"""Exports from the page of a run: a job of typed settings, and one that a worker runs to its end."""

import subprocess
import time

import gradio as gr
import pytest
from experiment_runs import add_run
from test_inside_tab import save_stage

from llm.cli.compose import compose
from llm.errors import UserError
from llm.experiments.worker import log_of
from llm.panel import exports, jobs
from llm.panel.runs_tab import RunsTab
from llm.panel.state import Panel


def panel_over(root, **options):
    return Panel(root / "my runs", root / "queue.sqlite", (root / "my runs", root / "data"), **options)


def test_an_export_is_a_job_of_typed_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "start_worker", lambda path: subprocess.Popen(["true"]))
    add_run(tmp_path / "my runs", "base-seed=1,2")
    panel = panel_over(tmp_path)
    number = exports.start(panel, "base-seed=1,2/pretrain", "gguf", replace=True)
    job = panel.queue.job(number)
    assert (job.script, job.program, job.folder, job.waits_for) == ("export", "llm.export", None, ())
    cfg = compose("export", job.settings)
    assert (cfg.run, cfg.stage.name, cfg.to, cfg.overwrite) == ("base-seed=1,2", "pretrain", "gguf", True)
    assert cfg.paths.runs == str(panel.runs)
    assert "export run=" in jobs.queue_page(panel)
    for name, to, said in (("no/where", "hf", "no such stage"), ("base-seed=1,2/pretrain", "zip", "to=zip")):
        with pytest.raises(UserError, match=said):
            exports.start(panel, name, to)
    with pytest.raises(UserError, match="panel.readonly=true"):
        exports.start(panel_over(tmp_path, readonly=True), "base-seed=1,2/pretrain", "hf")
    assert len(panel.queue.jobs()) == 1


def test_a_worker_exports_and_the_page_shows_the_end(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no package llm lies
    monkeypatch.delenv("PYTHONPATH", raising=False)
    save_stage(tmp_path / "my runs", tiny_tokenizer)
    panel = panel_over(tmp_path)
    with gr.Blocks():
        tab = RunsTab(panel)
    assert tab.watch_export(None, ()) == [gr.skip(), gr.skip()]
    with pytest.raises(gr.Error, match="open a stage first"):
        tab.start_export(None, "hf", False)
    shown, number, stamp = tab.start_export("tiny/sft", "hf", False)
    assert f"job {number}" in shown
    end = time.monotonic() + 300
    while (job := panel.queue.job(number)).state in ("queued", "running") and time.monotonic() < end:
        time.sleep(0.5)
    assert job.state == "done", jobs.tail_of(log_of(panel.queue, job))
    assert (tmp_path / "exports/tiny-sft-hf/model.safetensors").is_file()
    shown, _ = tab.watch_export(number, stamp)
    assert "done" in shown and "tiny-sft-hf" in shown
