"""What the tabs Runs and Compare show, and what may be done with runs."""

import csv
import json
import re
from types import SimpleNamespace

import gradio as gr
import pytest
from experiment_runs import add_run, add_sweep

from llm.errors import UserError
from llm.panel import index, runs_view, shelf
from llm.panel.compare_view import comparison_page, lines_of, metrics_of, verdict_page
from llm.panel.eval_view import scores_page
from llm.panel.notes import Note, Notes
from llm.panel.runs_tab import RunsTab
from llm.panel.runs_view import MOST_TIMES, files, lineage, live_page, rest_page, run_table
from llm.panel.state import Panel
from llm.panel.train_tab import TrainTab
from llm.report.report import build_report
from llm.run.lock import one_writer
from llm.run.samples_file import SamplesFile
from llm.run.stage_folder import RunDir, write_manifest


@pytest.fixture
def panel(tmp_path):
    root = tmp_path / "runs"
    add_sweep(root, "base", (1, 2, 3))
    add_sweep(root, "fast", (1, 2, 3), level=1.9, lr=0.03)
    return Panel(root, root / "queue.sqlite", (root,))


def child(panel, run="base-seed=1", stage="sft", parent="base-seed=1/pretrain"):
    folder = RunDir(panel.runs, run).path / stage
    facts = {"stage": stage, "status": "finished", "config": {"stage": {"name": stage}, "seed": 1}, "steps": 5}
    write_manifest(folder, facts | {"parent": str(panel.runs / parent / "model"), "metrics": {"loss": 1.0}})
    return folder


def run_page(panel, name, other=None):
    return live_page(panel, name) + rest_page(panel, name, other)


def stages(panel, query="", state="all"):
    header, lines = run_table(panel.index.rows(), panel.notes.all(), query, state)
    assert all(len(line) == len(header) for line in lines)
    return sorted(line[0] for line in lines)


def test_the_table_takes_words_conditions_and_states(panel):
    add_run(panel.runs, "ill", status="interrupted", until=40)
    panel.notes.write("fast-seed=2/pretrain", "good, cheap", "try <again>")
    assert len(stages(panel)) == 7
    assert stages(panel, "base seed=1") == stages(panel, "base-seed=1") == ["base-seed=1/pretrain"]
    assert stages(panel, "base") == [f"base-seed={n}/pretrain" for n in (1, 2, 3)]
    assert stages(panel, "bpb<1.95") == [f"fast-seed={n}/pretrain" for n in (1, 2, 3)]
    assert stages(panel, "seed=2 GOOD") == ["fast-seed=2/pretrain"]
    assert stages(panel, state="interrupted") == ["ill/pretrain"]
    assert stages(panel, "stage=sft") == []
    with pytest.raises(UserError, match="bpb<x: < needs a number"):
        stages(panel, "bpb<x")


def test_notes_are_kept_in_the_file_of_the_queue_and_deleted_when_empty(panel):
    assert panel.notes.all() == {} and not panel.queue_file.exists()
    panel.notes.write("a/b", "x y, x", " text\n")
    assert panel.queue.jobs() == [], "the queue opens the same file"
    assert Notes(panel.queue_file).all() == {"a/b": Note("x y", "text")}
    panel.notes.write("a/b", "", "")
    assert panel.notes.all() == {}
    with pytest.raises(UserError, match="10,001 letters"):
        panel.notes.write("a/b", "", "x" * 10_001)


def test_the_page_of_a_stage_has_all_its_parts(panel):
    folder = child(panel)
    (folder / "eval.json").write_text(
        json.dumps({"samples": [{"prompt": "2 < 3?", "completion": "<script>alert(1)</script>"}]})
    )
    shown = run_page(panel, "base-seed=1/sft")
    assert "&lt;script&gt;" in shown and "<script" not in shown and "2 &lt; 3?" in shown
    assert "base-seed=1/pretrain <small>finished bpb" in shown
    shown = run_page(panel, "fast-seed=1/pretrain", "base-seed=1/pretrain")
    for part in ("Facts", "Scores", "Curves", "Lineage", "Files", "metrics.csv", "<polyline"):
        assert part in shown, part
    assert "<td>optim.matrix_lr</td><td>0.02</td><td>0.03</td>" in shown
    assert "\n\n" not in shown, "an empty line would end the block"
    assert "there is no such stage" in run_page(panel, "no/where")


def test_samples_over_time_are_shown_by_prompt_the_latest_step_first(panel):
    folder = panel.runs / "fast-seed=1/pretrain"
    assert "Samples over time" not in live_page(panel, "fast-seed=1/pretrain")
    file = SamplesFile(folder)
    for step in range(100, 2100, 100):
        file.add(step, [("2 < 3?", f"<b>answer {step}</b>\n\nend"), ("other", f"word {step}")])
    shown = live_page(panel, "fast-seed=1/pretrain")
    assert "Samples over time" in shown and "<h4>2 &lt; 3?</h4>" in shown and "<h4>other</h4>" in shown
    assert "\n\n" not in shown and "&lt;b&gt;answer 2000" in shown
    places = [shown.index(f"<td>word {step}</td>") for step in (2000, 1200, 100)]
    assert places == sorted(places) and len(re.findall("<td>word ", shown)) == MOST_TIMES
    before = RunsTab._stamp(SimpleNamespace(panel=panel), "fast-seed=1/pretrain")
    file.add(2100, [("other", "word 2100")])
    assert RunsTab._stamp(SimpleNamespace(panel=panel), "fast-seed=1/pretrain") != before
    (folder / "samples.jsonl").write_text("[]\n")
    assert "samples.jsonl: line 1 is [], but must be a mapping" in live_page(panel, "fast-seed=1/pretrain")


def test_the_lineage_goes_down_from_the_first_ancestor_and_ends_in_a_circle(panel):
    child(panel)
    child(panel, "other", "grpo", "base-seed=1/sft")
    rows = panel.index.rows()
    tree = lineage(rows, "other/grpo")
    assert tree.index("base-seed=1/pretrain") < tree.index("base-seed=1/sft") < tree.index("<b>other/grpo</b>")
    for row in rows:
        row["parent"] = "other/grpo"
    assert lineage(rows, "other/grpo").count("<b>other/grpo</b>") == 1


def test_seeds_become_one_band_and_colours_stay(panel):
    rows = panel.index.rows()
    assert "bpb" in metrics_of(panel.columns, rows)
    single = lines_of(panel.columns, rows, "bpb", "step", 0.0, seeds=False)
    assert [len(line.low) for line in single] == [0] * 6 and len({line.colour for line in single}) == 6
    banded = lines_of(panel.columns, rows, "bpb", "seconds", 0.5, seeds=True)
    assert [line.name for line in banded] == [f"3 seeds of {n}-seed=1/pretrain" for n in ("base", "fast")]
    assert all((line.low <= line.y).all() and (line.y <= line.high).all() and len(line.x) for line in banded)
    names = [f"{row['run']}/{row['stage']}" for row in rows]
    shown = comparison_page(panel, names, ["bpb", "loss"], "step", 0.0, True)
    assert shown.count("<figure") == 2 and shown.count("<polygon") == 4 and "Scores side by side" in shown
    assert "takes 40 at most" in comparison_page(panel, names * 9, ["bpb"], "step", 0.0, True)


def test_a_band_counts_the_seeds_that_have_points(panel):
    def drawn():
        rows = [row for row in panel.index.rows() if row["run"].startswith("base")]
        return [line.name for line in lines_of(panel.columns, rows, "bpb", "step", 0.0, seeds=True)]

    (panel.runs / "base-seed=1/pretrain/metrics.csv").write_text("step,loss\n1,3.0\n")
    assert drawn() == ["2 seeds of base-seed=2/pretrain"]
    (panel.runs / "base-seed=2/pretrain/metrics.csv").write_text("step,loss\n1,3.0\n")
    assert drawn() == ["base-seed=3/pretrain"]


def test_the_verdict_is_that_of_compare(panel):
    shown = verdict_page(panel, "base", "fast", "bpb")
    assert '<p class="verdict better">B is better than A' in shown and "optim.matrix_lr" in shown
    assert "problem" in verdict_page(panel, "base", "nothing", "bpb")
    assert "Name the runs" in verdict_page(panel, "base", " ", "bpb")


def test_runs_are_put_away_brought_back_and_deleted_only_with_their_name(panel):
    with pytest.raises(UserError, match="write the name of the run"):
        shelf.delete(panel, "fast-seed=1", "yes")
    shelf.archive(panel, "fast-seed=1", "fast-seed=1")
    assert "fast-seed=1/pretrain" not in stages(panel) and shelf.archived(panel) == ["fast-seed=1"]
    shelf.bring_back(panel, "fast-seed=1")
    assert "fast-seed=1/pretrain" in stages(panel) and shelf.archived(panel) == []
    (panel.runs / ".deleted-fast-seed=1/pretrain").mkdir(parents=True)  # of a deletion that was cut off
    shelf.delete(panel, "fast-seed=1", "fast-seed=1")
    assert not any("fast-seed=1" in path.name for path in panel.runs.iterdir())


def test_a_run_that_cannot_be_moved_is_a_line(panel):
    (panel.runs / shelf.ARCHIVE).write_text("a file in the place of the folder")
    with pytest.raises(UserError, match="fast-seed=1: cannot be moved"):
        shelf.archive(panel, "fast-seed=1", "fast-seed=1")


def test_files_that_go_while_they_are_listed_are_left_out(panel, monkeypatch):
    folder = panel.runs / "base-seed=1/pretrain"

    def sized(size):
        (folder / "run.json").unlink(missing_ok=True)
        return str(size)

    monkeypatch.setattr(runs_view, "in_bytes", sized)
    assert "metrics.csv" in files(folder) and "run.json" not in files(folder)


def test_a_run_that_is_written_or_needed_stays(panel):
    child(panel, "other", "sft", "base-seed=2/pretrain")
    with pytest.raises(UserError, match="other/sft started from it"):
        shelf.delete(panel, "base-seed=2", "base-seed=2")
    with one_writer(panel.runs / "base-seed=3/pretrain"):
        with pytest.raises(UserError, match="is being written"):
            shelf.archive(panel, "base-seed=3", "base-seed=3")
    for name in ("../outside", ".hidden", "a/b"):
        with pytest.raises(UserError, match="plain folder name"):
            shelf.archive(panel, name, name)
        with pytest.raises(UserError, match="plain folder name"):
            shelf.bring_back(panel, name)


def test_a_panel_that_only_shows_changes_nothing(panel):
    fixed = Panel(panel.runs, panel.queue_file, panel.folders, readonly=True)
    for act in (lambda: shelf.delete(fixed, "base-seed=1", "base-seed=1"), lambda: shelf.bring_back(fixed, "x")):
        with pytest.raises(UserError, match="panel.readonly=true"):
            act()
    assert len(stages(fixed)) == 6


def test_what_cannot_be_read_or_written_beside_the_runs_hides_none_of_them(panel, request):
    limit = csv.field_size_limit(1 << 17)  # Python's own; readers of data raise it in their process
    request.addfinalizer(lambda: csv.field_size_limit(limit))
    (panel.runs / ".panel").write_text("a file in the place of the cache, as in a folder that may not be written")
    panel.queue_file.write_bytes(b"no database")
    live = panel.runs / "base-seed=1/pretrain"
    write_manifest(live, json.loads((live / "run.json").read_text()) | {"status": "running"})
    with gr.Blocks():
        runs, train = RunsTab(panel), TrainTab(panel)
    assert len(runs.first_view()["value"]["data"]) == 6
    assert "notes cannot be kept there" in runs.fill("", "all")[1]
    assert panel.runs not in panel.cache.parents and "<polyline" in live_page(panel, "fast-seed=2/pretrain")
    (live / "metrics.csv").write_text("step,loss\n1," + "x" * 200_000 + "\n")
    assert "field larger than" in runs.fill("", "all")[1]
    assert "field larger than" in live_page(panel, "base-seed=1/pretrain")
    assert "cannot be used as a queue" in train.watch(None, ())[0]


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("run.json", {"config": {"init_from": 5}}),
        ("run.json", {"environment": {"cpu": 5}}),
        ("run.json", {"code": {"characters": 5, "files": None}}),
        ("eval.json", {"chat": {"a": {"accuracy": 0.5, "subjects": {"b": None}}}}),
        ("eval.json", {"lm_eval": {"arc": {"acc": 0.5, "acc_stderr": "N/A"}, "cola": {"mcc": "N/A"}}}),
    ],
)
def test_a_wrong_value_in_a_file_of_a_run_is_a_line_at_most(panel, file, keys):
    name, path = "base-seed=1/pretrain", panel.runs / "base-seed=1/pretrain" / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))
    assert len(panel.index.rows()) + len(panel.index.problems) >= 6
    assert "base-seed=1" in run_page(panel, name) + scores_page(panel, [name])
    assert "base-seed=1" in build_report(path.parents[1]).read_text()


def test_a_cache_on_a_full_disk_hides_no_run(panel, monkeypatch):
    def full(*_):
        raise UserError("cannot write: no space left on the device")

    monkeypatch.setattr(index, "write_json", full)
    assert len(panel.index.rows()) == 6
