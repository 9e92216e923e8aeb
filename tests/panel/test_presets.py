"""Saved forms of the Train tab, and the line on the machine."""

import os
import sqlite3

import gradio as gr
import pytest

from llm.errors import UserError
from llm.panel import hardware, presets
from llm.panel.form import Form
from llm.panel.hardware import Machine
from llm.panel.presets import Presets
from llm.panel.state import Panel
from llm.panel.train_tab import DEFAULT, GROUPS, TrainTab

FORM = Form({"experiment": "tiny", "stage": "sft"}, {"seed": "1,2"}, sweep=True)


def test_a_form_is_kept_beside_queue_and_notes_and_found_again(tmp_path):
    kept, file = Presets(tmp_path / "queue.sqlite"), tmp_path / "queue.sqlite"
    assert kept.names() == [] and not file.exists()
    kept.save(" mine ", FORM)
    kept.save("a", Form())
    kept.save("a", Form({}, {"seed": "3"}))
    assert Presets(file).names() == ["a", "mine"]
    assert Presets(file).load("mine") == FORM and kept.load("a").values == {"seed": "3"}
    panel = Panel(tmp_path, file, (tmp_path,))
    assert panel.queue.jobs() == [] and panel.notes.all() == {}
    kept.delete("a")
    assert kept.names() == ["mine"]


def test_what_is_no_preset_is_refused(tmp_path, monkeypatch):
    kept = Presets(tmp_path / "queue.sqlite")
    for act in (kept.load, kept.delete):
        with pytest.raises(UserError, match="there is no preset gone"):
            act("gone")
    for name in ("  ", "x" * 81):
        with pytest.raises(UserError, match="a name of 1 to 80 letters"):
            kept.save(name, FORM)
    with pytest.raises(UserError, match="at most 100,000 are kept"):
        kept.save("long", Form({}, {"a": "x" * 100_001}))
    monkeypatch.setattr(presets, "MOST", 1)
    kept.save("one", FORM)
    kept.save("one", Form())
    with pytest.raises(UserError, match="1 are kept at most"):
        kept.save("two", FORM)
    for content in ('{"groups": {}}', '{"groups": {"a": 1}, "values": {}, "sweep": false}', "[]"):
        with sqlite3.connect(kept.path) as db:
            db.execute("UPDATE panel_presets SET form = ?", (content,))
        with pytest.raises(UserError, match="does not hold a form"):
            kept.load("one")


def test_a_preset_fills_the_form_and_a_panel_that_only_shows_keeps_none(tmp_path):
    panel = Panel(tmp_path, tmp_path / "queue.sqlite", (tmp_path,))
    with gr.Blocks():
        tab = TrainTab(panel)
    assert tab.save_preset("mine", FORM)["choices"] == ["mine"]
    form, *options, sweep = tab.load_preset("mine")
    assert form == FORM and sweep is True
    assert dict(zip(GROUPS, options, strict=True)) == dict.fromkeys(GROUPS, DEFAULT) | FORM.groups
    fixed = TrainTab.__new__(TrainTab)
    fixed.panel = Panel(tmp_path, tmp_path / "queue.sqlite", (tmp_path,), readonly=True)
    for act in (lambda: fixed.save_preset("other", FORM), lambda: fixed.delete_preset("mine")):
        with pytest.raises(gr.Error, match="panel.readonly=true"):
            act()
    assert tab.delete_preset("mine")["choices"] == []
    with pytest.raises(gr.Error, match="there is no preset mine"):
        tab.load_preset("mine")


def test_the_line_on_the_machine_tells_load_since_the_look_before_and_memory(tmp_path, monkeypatch):
    stat, memory = tmp_path / "stat", tmp_path / "meminfo"
    stat.write_text("cpu  100 0 0 100 0 0 0 0 0 0\ncpu0 1\n")
    memory.write_text("MemTotal:  4194304 kB\nMemFree: 1 kB\nMemAvailable:  1048576 kB\n")
    monkeypatch.setattr(hardware, "_gpus", lambda: ["GPU 0 7 %, 1.0 of 80.0 GiB"])
    machine = Machine(stat, memory)
    stat.write_text("cpu  120 5 5 150 20 0 0 0 0 0\n")
    line = machine.line()
    assert line == f"CPU 30.0 % of {os.cpu_count()} cores; memory 3.0 of 4.0 GiB; GPU 0 7 %, 1.0 of 80.0 GiB"
    stat.write_text("cpu  999 0 0 150 0 0 0 0 0 0\n")
    assert machine.line() == line, "it is not asked for more often"
    assert Machine(tmp_path / "none", tmp_path / "none").line() == "GPU 0 7 %, 1.0 of 80.0 GiB"


def test_gpus_are_those_of_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "0, 87, 2048, 81920"\necho "1, 3, 512, 81920"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert hardware._gpus() == ["GPU 0 87 %, 2.0 of 80.0 GiB", "GPU 1 3 %, 0.5 of 80.0 GiB"]
    program.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert hardware._gpus() == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert hardware._gpus() == []
