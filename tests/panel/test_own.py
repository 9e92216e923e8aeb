"""The way from own text to a first run: files that are kept or refused, the forms of the steps, the jobs."""

import json
import subprocess

import gradio as gr
import pytest
from experiment_runs import add_run

from llm.errors import UserError
from llm.panel import first_run, jobs, own_files
from llm.panel.defaults import defaults
from llm.panel.first_run import Plan
from llm.panel.own_files import CHAT, TEXT, keep, kept
from llm.panel.own_tab import OwnTab
from llm.panel.state import Panel
from llm.panel.train_tab import DEFAULT, GROUPS
from llm.run.stage_folder import RunDir, write_manifest


@pytest.fixture
def panel(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FATHOM_DATA", str(tmp_path / "data"))
    defaults.cache_clear()
    monkeypatch.setattr(jobs, "start_worker", lambda path: subprocess.Popen(["true"]))
    return Panel(tmp_path / "runs", tmp_path / "runs/queue.sqlite", (tmp_path / "runs", tmp_path / "data"))


@pytest.fixture
def sent(tmp_path):
    def make(name="a.txt", content="some text\n"):
        path = tmp_path / "sent" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return path

    return make


@pytest.fixture
def plan(panel, sent):
    texts = keep(panel, "mine", TEXT, [sent()])
    chat = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    chats = keep(panel, "mine", CHAT, [sent("chat.jsonl", chat + "\n")])
    return Plan("mine", str(texts), str(chats), "512", "d2", "64", "6", "256", "1")


def finish(panel, stage, **facts):
    manifest = {"stage": stage, "status": "finished", "config": {"stage": {"name": stage}}, **facts}
    write_manifest(RunDir(panel.runs, "mine").path / stage, manifest)


def test_files_are_moved_to_their_name_and_replaced(panel, sent, tmp_path):
    first = sent("my text (1).txt", "old")
    folder = keep(panel, "mine", TEXT, [first])
    assert folder == tmp_path / "data/own/mine/text" and not first.exists()
    keep(panel, "mine", TEXT, [sent("my text (1).txt", "new"), sent("b.jsonl.gz")])
    assert [path.name for path in kept(panel, "mine", TEXT)] == ["b.jsonl.gz", "my_text_1_-75f23636.txt"]
    assert (folder / "my_text_1_-75f23636.txt").read_text() == "new"
    assert own_files.names(panel) == ["mine"] and kept(panel, "other", TEXT) == []


def test_files_of_different_names_stay_different_files(panel, sent):
    """Keep names that differ in marks, joiners, emoji or brackets alone; é is é, however it is written."""
    stems = ("की", "का", "می\u200cروم", "میروم", "a_1_", "a (1)", "a [1]", "👍", "👎")
    names = [f"{stem}.txt" for stem in stems]
    for name in [*names, "é.txt", "e\u0301.txt"]:
        keep(panel, "mine", TEXT, [sent(name, name)])
    found = {path.read_text(): path.name for path in kept(panel, "mine", TEXT)}
    assert found.keys() == {*names, "e\u0301.txt"}
    assert all(found[name] == name for name in names[:5]) and found["e\u0301.txt"] == "é.txt"
    assert found["👍.txt"].endswith(".txt")


@pytest.mark.parametrize(
    ("name", "file", "content", "wrong"),
    [
        ("../up", "a.txt", "x", "run=../up: give a name"),
        (".hidden", "a.txt", "x", "run=.hidden: give a name"),
        ("", "a.txt", "x", "run=: give a name"),
        ("mine", "a.exe", "x", "a.exe: is no file that can be read: parquet"),
        ("mine", "a.txt", "", "a.txt: is empty"),
        ("mine", "a.txt", "x" * 101, "101 bytes of files: at most 100 are kept"),
    ],
)
def test_what_is_not_taken_is_refused_and_deleted(panel, sent, monkeypatch, name, file, content, wrong):
    monkeypatch.setattr(own_files, "MOST_BYTES", 100)
    path = sent(file, content)
    with pytest.raises(UserError, match="^" + wrong.replace(".", r"\.")):
        keep(panel, name, TEXT, [path])
    assert not path.exists() and not (panel.folders[-1] / "own").exists()


def test_number_and_size_count_what_is_kept_already(panel, sent, monkeypatch):
    monkeypatch.setattr(own_files, "MOST_FILES", 1)
    keep(panel, "mine", TEXT, [sent("a.txt")])
    keep(panel, "mine", TEXT, [sent("a.txt", "again")])
    with pytest.raises(UserError, match="2 files: at most 1 are kept"):
        keep(panel, "mine", TEXT, [sent("b.txt")])
    fixed = Panel(panel.runs, panel.queue_file, panel.folders, readonly=True)
    with pytest.raises(UserError, match="panel.readonly=true"):
        keep(fixed, "mine", TEXT, [sent("b.txt")])


def test_each_step_is_a_form_with_what_it_needs(plan):
    steps = {stage: first_run.form_of(plan, stage) for stage in ("check", "tokenizer", "pretrain", "sft")}
    assert all(form.groups["experiment"] == "own" and form.values["run"] == "mine" for form in steps.values())
    assert steps["check"].values["stage.parts"] == "[text,tasks]" and "seed" not in steps["check"].values
    assert steps["tokenizer"].values["stage.vocab_size"] == "512" and "max_steps" not in steps["tokenizer"].values
    assert {"max_steps": "6", "batch.tokens_per_step": "256"}.items() <= steps["pretrain"].values.items()
    assert steps["sft"].values["init_from"] == "mine/pretrain" and "max_steps" not in steps["sft"].values
    alone = Plan("mine", plan.texts)
    assert first_run.form_of(alone, "check").values["stage.parts"] == "[text]"
    assert first_run.stages_of(alone) == ["pretrain"] and first_run.stages_of(plan) == ["pretrain", "sft"]


def test_mistakes_are_told_by_field_as_the_command_line_tells_them(panel, plan):
    assert first_run.mistakes(panel, plan) == ({}, "")
    wrong = Plan("mine", "/etc/passwd", "", "many", "d2", "0", "-1", "", "x")
    by_field, other = first_run.mistakes(panel, wrong)
    assert "the panel takes paths in these folders only" in by_field["texts"]
    assert by_field["vocabulary"].startswith("stage.vocab_size=many: expected a whole number")
    assert by_field["steps"] == "max_steps=-1: must be at least 1"
    assert by_field["context"].startswith("model.seq_len=0: must be at least")
    assert by_field["seed"].startswith("seed=x: expected a whole number") and other == ""
    assert set(first_run.mistakes(panel, Plan())[0]) == {"name", "texts"}
    gone = Plan("mine", str(panel.folders[-1] / "gone"))
    assert first_run.mistakes(panel, gone)[0]["texts"].endswith("there is no such file or folder")
    with pytest.raises(UserError, match="expected a whole number"):
        first_run.start(panel, Plan("mine", plan.texts, "", "many"))


def test_a_start_makes_the_stages_that_are_missing_one_after_another(panel, plan):
    with pytest.raises(UserError, match="do step 2 first"):
        first_run.expected(panel, plan)
    numbers = first_run.start(panel, plan)
    made = [panel.queue.job(number) for number in numbers]
    assert [job.settings[1] for job in made] == ["stage=tokenizer", "stage=pretrain", "stage=sft"]
    assert [job.needs for job in made] == [(), (numbers[0],), (numbers[1],)]
    assert "stage=sft" not in first_run.watched(panel, "mine") and "<td>sft</td>" in first_run.watched(panel, "mine")
    assert first_run.watched(panel, "other") == ""
    with pytest.raises(UserError, match=f"mine/pretrain is in the queue already, as job {numbers[1]}"):
        first_run.start(panel, plan)
    with pytest.raises(UserError, match=f"mine/tokenizer is in the queue already, as job {numbers[0]}"):
        first_run.start_tokenizer(panel, plan)


def test_a_tokenizer_that_is_trained_is_not_trained_again(panel, plan):
    finish(panel, "tokenizer", derived={"vocab_size": 512}, metrics={"bytes_per_token_val": 2.5})
    (RunDir(panel.runs, "mine").path / "tokenizer/model").mkdir()
    assert "vocabulary of 512; 2.50 bytes" in first_run.tokenizer_facts(panel, "mine")
    numbers = first_run.start(panel, plan)
    assert [panel.queue.job(number).settings[1] for number in numbers] == ["stage=pretrain", "stage=sft"]


def test_a_finished_run_tells_how_to_chat_evaluate_and_export(panel):
    assert first_run.afterwards(panel, "mine") == ""
    add_run(panel.runs, "mine")
    told = first_run.afterwards(panel, "mine")
    for line in ("serve.py run=mine stage=pretrain", "eval=[bpb,samples]", "llm.export run=mine stage=pretrain to=hf"):
        assert line in told.replace("&#x27;", ""), line


def test_a_vocabulary_is_proposed_by_the_size_of_the_text(tmp_path):
    assert [first_run.proposed(size) for size in (0, 600_000, 5_000_000, 10**9)] == ["512", "1024", "8192", "32768"]
    for name in ("a/x.txt", "a/b/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("12345")
    assert first_run.size_of(str(tmp_path / "a")) == 10 and first_run.size_of(str(tmp_path / "a/x.txt")) == 5


def test_the_page_fills_in_the_folders_of_a_name_and_shows_mistakes(panel, plan, sent):
    with gr.Blocks():
        tab = OwnTab(panel)
    assert tab.choices()["choices"] == ["mine"]
    assert tab.open("mine")[:2] == [plan.texts, plan.chats] and tab.open("min")[:2] == [gr.skip(), gr.skip()]
    assert tab.open("mine")[2] == gr.skip()
    finish(panel, "tokenizer", derived={"vocab_size": 512})
    assert tab.open("mine")[2] == "512"
    assert tab.typed(*[""] * 9) == tab.typed("new", *[""] * 8) == [""] * 9, "what is still empty is no mistake yet"
    assert [bool(line) for line in tab.mistakes(*[""] * 9)] == [True, True, *[False] * 7]
    assert tab.typed("mine", plan.texts, "", "many", *[""] * 5) == tab.mistakes(
        "mine", plan.texts, "", "many", *[""] * 5
    )
    told = dict(
        zip([*tab.wrong, "other"], tab.mistakes("mine", plan.texts, "", "many", "default", *[""] * 4), strict=True)
    )
    assert "expected a whole number" in told.pop("vocabulary") and set(told.values()) == {""}
    assert tab._keeper(TEXT)("mine", [str(sent("more.txt"))]) == [plan.texts, ""]
    assert len(kept(panel, "mine", TEXT)) == 2
    assert "give the run a name first" in tab._keeper(TEXT)(" ", [str(sent())])[1]
    unchanged, told = tab._keeper(TEXT)("mine", [str(sent("a.exe"))])
    assert unchanged == gr.skip() and "a.exe: is no file that can be read" in told
    form, *options, sweep = tab.to_form(*["mine", plan.texts, "", "512", "d2", "", "7", "", ""])
    assert form.groups["model"] == "d2" and form.values["max_steps"] == "7"
    assert dict(zip(GROUPS, options, strict=True)) == dict.fromkeys(GROUPS, DEFAULT) | form.groups and not sweep
    assert "problem" in tab.check_data("mine", "", "", *[""] * 6)[0]
    assert tab.watch("mine", tab.watch("mine", ())[2]) == [gr.skip()] * 3
