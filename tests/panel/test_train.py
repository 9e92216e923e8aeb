"""The form of the Train tab and what it starts: settings, mistakes, refusals, jobs of the queue."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from experiment_runs import add_run

from llm.errors import UserError
from llm.experiments.queue_store import NewJob
from llm.experiments.worker import log_of
from llm.panel import jobs
from llm.panel.defaults import defaults
from llm.panel.form import Form, entries, problems_of, refusal, sections
from llm.panel.state import Panel

TINY = {"experiment": "tiny", "stage": "pretrain"}


@pytest.fixture
def panel(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FATHOM_DATA", str(tmp_path / "data"))
    defaults.cache_clear()
    return Panel(tmp_path / "runs", tmp_path / "runs/queue.sqlite", (tmp_path / "runs", tmp_path / "data"))


@pytest.fixture
def no_worker(monkeypatch):
    started = []
    monkeypatch.setattr(jobs, "start_worker", lambda path: started.append(path) or subprocess.Popen(["true"]))
    return started


def test_a_form_is_the_words_of_a_command_line():
    form = Form(TINY | {"model": ""}, {"run": "mine", "max_steps": "10", "data.path": "a b (c)"})
    assert form.settings() == ["experiment=tiny", "stage=pretrain", "run=mine", "max_steps=10", "data.path='a b (c)'"]
    assert shlex.split(form.line())[-5:] == form.settings(), "what is shown is what is started"
    assert Form({}, {"seed": "1,2"}, sweep=True).settings() == ["-m", "seed=1,2"]


def test_every_key_of_the_composition_is_found_with_its_help_bounds_and_default():
    form = Form(TINY)
    found = {entry.key: entry for entry in entries(form, section="all")}
    assert len(found) > 100 and not {"plugins", "trust", "paths.runs", "stage.name"} & found.keys()
    lr = found["optim.matrix_lr"]
    assert float(lr.default) > 0 and "number" in lr.help and "above 0" in lr.help
    assert "cosine" in found["optim.decay_schedule"].choices
    main = [entry.key for entry in entries(form)]
    assert "max_steps" in main and "optim.matrix_lr" not in main
    assert "optim.weight_decay" in [entry.key for entry in entries(form, "weight DECAY")]
    assert {entry.key.split(".")[0] for entry in entries(form, section="optim")} == {"optim"}
    assert {"main", "all", "optim", "model"} <= set(sections(form))


def test_only_changed_keys_are_shown_on_request():
    form = Form(TINY, {"optim.matrix_lr": "0.5"})
    assert [(e.key, e.given) for e in entries(form, changed=True)] == [("optim.matrix_lr", "0.5")]


def test_mistakes_stand_at_their_keys_as_the_command_line_says_them(panel):
    form = Form(TINY, {"max_steps": "-1", "optim.matrix_lr": "abc", "seed": "3"})
    by_key, other = problems_of(form, panel.folders)
    assert by_key == {
        "max_steps": "max_steps=-1: must be at least 1",
        "optim.matrix_lr": "optim.matrix_lr=abc: expected a number",
    }
    assert other == ""
    assert [e.problem for e in entries(form, "nothing has this", problems=by_key)] == list(by_key.values())
    assert problems_of(Form(TINY), panel.folders) == ({}, "")
    by_key, other = problems_of(Form({"experiment": "tiny", "stage": "nonsense"}), panel.folders)
    assert by_key == {} and "stage=nonsense does not exist" in other
    by_key, _ = problems_of(Form(TINY, {"seed": "1,2"}), panel.folders)
    assert "needs -m" in by_key["seed"]
    assert problems_of(Form(TINY, {"seed": "1,2"}, sweep=True), panel.folders) == ({}, "")


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("plugins", "[os]"),
        ("paths.runs", "/tmp"),
        ("hydra.run.dir", "x"),
        ("hydra/launcher", "x"),
        ("+callbacks.mine._target_", "os.system"),
        ("data.source", "{_target_: os.system}"),
        ("run", "${oc.env:FATHOM_API_KEY}"),
        ("data.path", "/etc/passwd"),
        ("data.path", "~/.ssh"),
        ("data.path", "data/../../secret"),
        ("data.path", "secret.txt"),
        ("data.val", "secret.txt"),
        ("data.train", "[data/a.txt, secret.txt]"),
        ("data.train", "*.txt"),
        ("data.path", "file:///etc/passwd"),
        ("data.sources", "{mine:{path:/tmp/secret}}"),
        ("data.train", "{a:/etc/passwd}"),
        ("data.train", "[{a:/etc/passwd}]"),
        ("data.train", "[{a:hf://owner/name}]"),
        ("save_mirror", "s3://bucket/x"),
        ("stage.out", "out.json"),
        ("init_from", "data/link/model"),
        ("stage.parts", "1" * 5000),
        ("a b", "1"),
    ],
)
def test_what_would_load_code_or_lead_out_of_the_folders_is_refused(panel, tmp_path, key, given):
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "data/link").symlink_to("/etc")
    assert refusal(key, given, panel.folders)


def test_a_refused_value_is_a_problem_of_its_key_and_nothing_starts(panel, no_worker):
    form = Form(TINY, {"data.path": "/etc/passwd"})
    assert "in these folders only" in problems_of(form, panel.folders)[0]["data.path"]
    with pytest.raises(UserError, match="in these folders only"):
        jobs.start(panel, form)
    assert panel.queue.jobs() == [] == no_worker


def test_names_and_paths_within_the_folders_are_taken(panel):
    for key, given in (("init_from", "demo/sft"), ("data.path", "data/mine.txt"), ("data.repo", "owner/name")):
        assert refusal(key, given, panel.folders) is None
    assert refusal("data.path", str(panel.runs / "x"), panel.folders) is None


def test_start_puts_jobs_into_the_queue_with_what_they_need(panel, no_worker):
    (first,) = jobs.start(panel, Form({"experiment": "tiny", "stage": "tokenizer"}, {"run": "mine"}))
    (second,) = jobs.start(panel, Form(TINY, {"run": "mine"}), attempts=2)
    made = panel.queue.job(second)
    assert made.needs == (first,) and made.most_attempts == 2 and len(no_worker) == 2
    assert made.settings == ["experiment=tiny", "stage=pretrain", "run=mine"]
    swept = jobs.start(panel, Form(TINY, {"run": "mine", "seed": "1,2"}, sweep=True), after=str(first))
    assert len(swept) == 2 and all(panel.queue.job(n).needs == (first,) for n in swept)
    with pytest.raises(UserError, match="must be at least 1"):
        jobs.start(panel, Form(TINY, {"max_steps": "0"}))
    with pytest.raises(UserError, match="after x: must be"):
        jobs.start(panel, Form(TINY, {"run": "other"}), after="x")
    assert len(panel.queue.jobs()) == 4
    shown = jobs.queue_page(panel)
    assert f"waits for {first} (queued)" in shown and "no worker is at them" in shown


def test_jobs_write_where_the_panel_reads(panel, no_worker, tmp_path):
    other = Panel(tmp_path / "my runs", tmp_path / "my runs/queue.sqlite", (tmp_path / "my runs", tmp_path / "data"))
    (number,) = jobs.start(other, Form({"experiment": "tiny", "stage": "tokenizer"}, {"run": "mine"}))
    job = other.queue.job(number)
    assert job.settings[-1] == f"paths.runs='{tmp_path}/my runs'"
    assert job.folder == str(tmp_path / "my runs/mine/tokenizer")


def test_jobs_are_paused_resumed_cancelled_retried_and_moved(panel, no_worker):
    one, two = panel.queue.add([NewJob(["a=1"]), NewJob(["b=2"])])
    jobs.act(panel, "pause", one)
    assert panel.queue.job(one).state == "paused" and no_worker == []
    jobs.act(panel, "resume", one)
    assert panel.queue.job(one).state == "queued" and len(no_worker) == 1
    jobs.act(panel, "cancel", one)
    jobs.act(panel, "retry", one)
    assert panel.queue.job(one).state == "queued"
    jobs.move_up(panel, two)
    assert [job.id for job in panel.queue.jobs()] == [two, one]
    with pytest.raises(UserError, match="no open job before"):
        jobs.move_up(panel, two)
    with pytest.raises(UserError, match="no such action"):
        jobs.act(panel, "clear", one)


def test_a_panel_that_only_shows_starts_and_stops_nothing(panel, no_worker):
    (number,) = panel.queue.add([NewJob(["a=1"])])
    fixed = Panel(panel.runs, panel.queue_file, panel.folders, readonly=True)
    ways = [lambda: jobs.start(fixed, Form(TINY)), lambda: jobs.act(fixed, "cancel", number)]
    ways += [lambda: jobs.move_up(fixed, number), lambda: jobs.dry_run(fixed, Form(TINY))]
    ways += [lambda: jobs.stop_process(fixed, "a/b")]
    for way in ways:
        with pytest.raises(UserError, match="panel.readonly=true"):
            way()
    assert panel.queue.job(number).state == "queued" and "queued" in jobs.queue_page(fixed)


def test_a_job_shows_progress_curves_and_the_end_of_its_log(panel):
    folder = add_run(panel.runs, "mine", status="interrupted", until=40)
    (number,) = panel.queue.add([NewJob(["a=1"], folder=os.path.realpath(folder))])
    log = log_of(panel.queue, panel.queue.job(number))
    log.parent.mkdir(parents=True)
    log.write_text("first\n" + "x\n" * 20_000 + "  1 %\r  2 %\r\x1b[32m 99 %\x1b[0m\nlast <line>\n")
    before = jobs.stamp(panel, number)
    shown = jobs.job_page(panel, number)
    assert "last &lt;line&gt;" in shown and " 99 %" in shown and "2 %\r" not in shown and "first" not in shown
    assert "interrupted" in shown and "<polyline" in shown
    assert jobs.stamp(panel, number) == before
    with (folder / "metrics.csv").open("a") as file:
        file.write("50,1.5,,\n")
    assert jobs.stamp(panel, number) != before
    assert "job 99 is not in the queue" in jobs.job_page(panel, 99)


def test_a_training_that_somebody_else_started_is_asked_to_save(panel, monkeypatch):
    folder = add_run(panel.runs, "mine", status="running", until=40)
    code = "import sys, time; from llm.run.lock import one_writer; from pathlib import Path\n"
    code += "with one_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    root = str(Path(jobs.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root}
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with monkeypatch.context() as patch:
            patch.setattr(jobs.os, "kill", lambda *_: os.stat("/nothing/there"))
            with pytest.raises(UserError, match="cannot be asked"):
                jobs.stop_process(panel, "mine/pretrain")
        assert "asked to save" in jobs.stop_process(panel, "mine/pretrain")
        assert other.wait(20) == -signal.SIGTERM
    with pytest.raises(UserError, match="no process of this machine"):
        jobs.stop_process(panel, "mine/pretrain")


def test_a_worker_of_its_own_works_the_queue_off_and_a_third_one_goes(panel):
    folder = panel.runs / "none/pretrain"
    panel.queue.add([NewJob(["stage=nonsense"], folder=str(folder))])
    ends = [jobs.start_worker(panel.queue_file) for _ in range(3)]
    assert [one.wait(60) for one in ends] == [0, 0, 0]
    (job,) = panel.queue.jobs()
    assert job.state == "failed" and "nonsense" in job.message
    assert "nonsense" in jobs.job_page(panel, job.id)
