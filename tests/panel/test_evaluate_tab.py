"""The Evaluate tab: scores with their errors, records of items, and evaluations that the queue runs."""

import json
import os
import subprocess
import time

import gradio as gr
import pytest
from experiment_runs import add_run
from omegaconf import OmegaConf
from processes import REPO
from test_inside_tab import save_stage

from llm.cli.compose import compose
from llm.errors import UserError
from llm.experiments.worker import log_of
from llm.panel import evaluations, jobs
from llm.panel.eval_view import choices, evaluated, parts, records_page, scores_page
from llm.panel.evaluate_tab import EvaluateTab
from llm.panel.records import Item, compare_items, parts_of, read_items
from llm.panel.state import Panel
from llm.run.stage_folder import write_manifest
from llm.utils.files import plain

SCORES = {
    "bpb": 1.25,
    "chat": {
        "choice": {"accuracy": 0.75, "stderr": 0.1, "n": 4, "baseline": 0.25, "verdicts": {"pass": 3, "too_long": 1}}
        | {"subjects": {"law": {"accuracy": 0.5, "stderr": 0.35, "n": 2}}}
    },
    "core_tasks": {"hellaswag": {"accuracy": 0.3, "stderr": 0.01, "n": 10, "centered": 0.1}},
    "lm_eval": {"arc": {"acc": 0.5, "acc_stderr": 0.05, "n": 9, "shots": 0}},
    "preferences": {"accuracy": 0.6, "accuracy_low": 0.5, "accuracy_high": 0.7, "n": 50},
    "scored": {"bpb": {"data": "embedded", "source": "held-out text", "tokens": 4096}},
    "other_data": {"local x": {"bpb": 2.5}},
}
RECORDS = [
    {"index": 0, "prompt": "1+1 <b>", "output": "2", "verdict": "pass", "subject": "law"},
    {"index": 1, "prompt": "2+2", "output": "<|python_start|>2+2<|python_end|>", "verdict": "fail", "subject": "law"},
    {"index": 2, "prompt": "3+3", "output": "6", "verdict": "pass"},
]


@pytest.fixture
def panel(tmp_path, monkeypatch):
    root = tmp_path / "runs"
    folder = add_run(root, "mine")
    for name in ("records", "core", "lm_eval", "other_data/x/records", "model"):
        (folder / name).mkdir(parents=True)
    (folder / "model/config.json").write_text("{}")
    (folder / "eval.json").write_text(json.dumps(SCORES))
    (folder / "records/choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    (folder / "other_data/x/records/choice.jsonl").write_text("")
    core = {"index": 0, "line": 7, "cut": 0, "losses": [1.0, 2.0], "prediction": 0, "gold": 1, "correct": False}
    (folder / "core/hellaswag.jsonl").write_text(json.dumps(core) + "\n")
    item = {"index": 3, "target": "1", "arguments": [["Question", {}]], "responses": [["yes"]], "filter": "none"}
    (folder / "lm_eval/arc.jsonl").write_text(json.dumps(item | {"acc": 1.0, "brier": 0.2}) + "\n")
    add_run(root, "bare")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return Panel(root, root / "queue.sqlite", (root, tmp_path / "data"))


@pytest.fixture
def no_worker(monkeypatch):
    monkeypatch.setattr(jobs, "start_worker", lambda path: subprocess.Popen(["true"]))


def test_scores_stand_side_by_side_with_errors_subjects_and_origin(panel):
    assert evaluated(panel) == ["mine/pretrain"], "a stage without a model cannot be evaluated"
    shown = scores_page(panel, ["mine/pretrain", "bare/pretrain"])
    for cell in ("75.0 ± 10.0 % of 4", "50.0 ± 35.0 % of 2", "30.0 ± 1.0 % of 10", "0.5000 ± 0.0500", "too_long 1"):
        assert f">{cell}</td>" in shown, cell
    assert "choice: law" in shown and "60.0 % (50.0 % to 70.0 %)" in shown
    assert "<td>bpb (local x)</td>" in shown and "held-out text, 4,096 tokens" in shown
    assert "None of them has been evaluated" in scores_page(panel, ["bare/pretrain"])
    assert "there is no such stage" in scores_page(panel, ["no/where", "mine/pretrain"])
    assert "12 stand side by side at most" in scores_page(panel, ["mine/pretrain"] * 13)


def test_records_of_every_kind_are_read_in_one_form(panel):
    folder = panel.runs / "mine/pretrain"
    assert parts_of(folder) == ["records/choice", "core/hellaswag", "lm_eval/arc", "other_data/x/records/choice"]
    assert [one.right for one in read_items(folder, "records/choice")] == [True, False, True]
    assert read_items(folder, "core/hellaswag") == (Item(0, "line 7 of the task's file", "0", False, "wanted 1"),)
    (arc,) = read_items(folder, "lm_eval/arc")
    assert (arc.prompt, arc.answer, arc.right, arc.verdict) == ("Question", "yes", True, "acc 1.0, brier 0.2")
    row = {"index": 0, "arguments": [["one\u2028two\x85three"]], "responses": ["a"], "acc": 1.0}
    (folder / "lm_eval/arc.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_items(folder, "lm_eval/arc")[0].prompt == "one\u2028two\x85three"
    for part in ("../run", "records/../../../x", "records/none"):
        with pytest.raises(UserError, match="no such records"):
            read_items(folder, part)
    (folder / "records/choice.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(UserError, match="cannot be read"):
        read_items(folder, "records/choice")


def test_records_are_found_by_verdict_subject_and_words(panel):
    asked = (panel, "mine/pretrain", "records/choice")
    assert choices(*asked) == (["all", "right", "wrong"], ["all", "law"])
    shown, place = records_page(*asked, "all", "all", "", 99)
    assert "3 of 3 records" in shown and place == 0 and "1+1 &lt;b&gt;" in shown and "⟨python: 2+2⟩" in shown
    assert "\n" not in shown
    assert "1 of 3 records" in records_page(*asked, "wrong", "law", "", 0)[0]
    assert "0 of 3 records" in records_page(*asked, "wrong", "all", "3+3", 0)[0]
    assert "Choose a stage" in records_page(panel, None, None, "all", "all", "", 0)[0]
    assert parts(panel, "no/where") == [] and choices(panel, "no/where", "x") == (["all"], ["all"])


def test_items_that_one_has_right_and_the_other_wrong_are_found():
    def items(*verdicts):
        return [Item(n // 2, f"q{n // 2}", f"a{n}", right, "") for n, right in enumerate(verdicts)]

    a = items(True, True, True, False, False, False, None, None)
    b = items(True, True, False, False, True, True, True, True)
    found = compare_items(a, [*b, Item(9, "only here", "", True, "")])
    assert (found.both, found.neither, found.other) == (1, 1, 2), "half right is not right"
    assert found.only_a == [] and [(one.index, one.right, other.right) for one, other in found.only_b] == [
        (2, False, True)
    ]


def test_an_evaluation_is_a_job_of_typed_settings(panel, no_worker):
    name = "mine/pretrain"
    numbers = evaluations.start(panel, [name], ["bpb"], {"eval.tokens": "4096", "eval.ks": " "})
    (job,) = panel.queue.jobs()
    assert numbers == [job.id] and job.script == "evaluate"
    data = f"paths.data={panel.folders[-1]}"
    assert job.settings == ["run=mine", "stage=pretrain", "eval=[bpb]", "eval.tokens=4096", data]
    assert "evaluate run=mine" in jobs.queue_page(panel) and "evaluate run=mine" in jobs.job_label(job)
    assert {"eval.include_path", "eval.judges", "eval.bpb"} & evaluations.keys().keys() == set()


@pytest.mark.parametrize(
    ("chosen", "values", "said"),
    [
        ([], {}, "choose what to measure"),
        (["nonsense"], {}, "eval=nonsense"),
        (["bpb"], {"eval.tokens": "0"}, "must be at least 1"),
        (["bpb"], {"eval.tokens": "many"}, "expected a whole number"),
        (["core"], {"eval.bundle": "/etc"}, "takes paths in these folders only"),
        (["lm_eval"], {"eval.include_path": "x"}, "does not set this key"),
        (["lm_eval"], {"eval.tasks": "[data/mine.yaml]"}, "names of tasks only"),
        (["bpb"], {"plugins": "[os]"}, "does not set this key"),
        (["bpb"], {"eval.tokens": "${oc.env:HOME}"}, "no references"),
        (["bpb"], {"eval.tokens": "1,2"}, "needs -m"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(panel, no_worker, chosen, values, said):
    with pytest.raises(UserError, match=said):
        evaluations.start(panel, ["mine/pretrain"], chosen, values)
    assert not panel.queue.jobs()


def test_a_panel_that_only_shows_starts_nothing_and_a_stage_must_exist(panel, no_worker):
    fixed = Panel(panel.runs, panel.queue_file, panel.folders, readonly=True)
    with pytest.raises(UserError, match="panel.readonly=true"):
        evaluations.start(fixed, ["mine/pretrain"], ["bpb"], {})
    for names in (["no/where"], ["../mine/pretrain"], []):
        with pytest.raises(UserError):
            evaluations.start(panel, names, ["bpb"], {})


def test_the_worker_looks_where_the_panel_does(panel, tmp_path, monkeypatch):
    monkeypatch.chdir(panel.folders[-1])  # where the default folder of runs is another
    assert f"paths.runs={panel.runs}" in evaluations.settings(panel, "mine/pretrain", ["bpb"], {})


def test_names_with_signs_of_the_grammar_are_put_in_quotes(tmp_path, panel, no_worker):
    add_run(tmp_path / "my runs", "base-seed=1,2")
    other = Panel(tmp_path / "my runs", tmp_path / "queue.sqlite", (tmp_path / "my runs", tmp_path / "data"))
    evaluations.start(other, ["base-seed=1,2/pretrain"], ["bpb"], {})
    (job,) = other.queue.jobs()
    cfg = compose("evaluate", job.settings)
    assert (cfg.run, cfg.paths.runs) == ("base-seed=1,2", str(other.runs))


def test_the_tab_checks_starts_and_watches(panel, no_worker):
    with gr.Blocks():
        tab = EvaluateTab(panel)
    stages, with_records = tab.stage_choices()
    assert stages["choices"] == with_records["choices"] == ["mine/pretrain"]
    empty = [""] * len(tab.boxes)
    wrong, line = tab.check(["mine/pretrain"], ["bpb"], *empty)
    assert wrong == "" and "run=mine stage=pretrain 'eval=[bpb]'" in line
    bad = ["0" if name == "eval.tokens" else "" for name in tab.names]
    assert "must be at least 1" in tab.check(["mine/pretrain"], ["bpb"], *bad)[0]
    number, stamp, shown, scores = tab.begin(["mine/pretrain"], ["bpb"], *empty)
    assert f"job {number}" in shown and "75.0 ± 10.0 %" in scores
    assert tab.watch(number, stamp, ["mine/pretrain"]) == [gr.skip()] * 4
    os.utime(panel.runs / "mine/pretrain/eval.json")  # a later job of the same start has written
    assert tab.watch(number, stamp, ["mine/pretrain"])[3] == scores
    with pytest.raises(gr.Error, match="0 stages are chosen"):
        tab.begin([], ["bpb"], *empty)
    assert tab.part_choices("mine/pretrain", "core/hellaswag")["value"] == "core/hellaswag"
    assert tab.part_choices("mine/pretrain", None)["value"] == "records/choice"
    assert tab.filter_choices("mine/pretrain", "records/choice")[0]["choices"] == ["all", "right", "wrong"]
    assert "3 of 3 records" in tab.first("mine/pretrain", "records/choice", "all", "all", "")[0]


@pytest.mark.slow
def test_a_real_evaluation_runs_in_a_process_of_its_own(tmp_path, monkeypatch, tiny_tokenizer):
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    folder = save_stage(tmp_path / "runs", tiny_tokenizer)
    cfg = compose("train", ["experiment=tiny", "stage=sft"])
    config = {name: OmegaConf.to_container(cfg, resolve=True)[name] for name in ("stage", "data", "seed", "model")}
    config |= {"trainer": {"accelerator": "cpu"}, "precision": {"compute": "fp32"}}
    write_manifest(folder, {"stage": "sft", "status": "finished", "config": plain(config), "seconds": 1.0})
    panel = Panel(tmp_path / "runs", tmp_path / "runs/queue.sqlite", (tmp_path / "runs", data))
    (number,) = evaluations.start(panel, ["tiny/sft"], ["chat"], {"eval.max_per_task": "2", "eval.max_new_tokens": "4"})
    end = time.monotonic() + 300
    while (job := panel.queue.job(number)).state in ("queued", "running") and time.monotonic() < end:
        time.sleep(0.5)
    assert job.state == "done", jobs.tail_of(log_of(panel.queue, job))
    parts_there = parts(panel, "tiny/sft")
    assert parts_there and " of 2</td>" in scores_page(panel, ["tiny/sft"])
    assert "2 of 2 records" in records_page(panel, "tiny/sft", parts_there[0], "all", "all", "", 0)[0]
