"""The Preferences tab: decisions become rows that the project's reader and the preference stages read."""

import json

import gradio as gr
import pytest
from test_inside_tab import save_stage

from llm.cli.compose import compose, find_sources
from llm.cli.overrides import check_overrides
from llm.data.preferences import PreferenceSteps, Usable
from llm.errors import UserError
from llm.panel import labels as labels_module
from llm.panel.labels import Labels, Pair, draw_pairs, option_of, recorded_questions, sets_of, settings_for, tally
from llm.panel.models import PanelModels
from llm.panel.preferences_tab import PreferencesTab, Work, pair_page
from llm.panel.state import Panel
from llm.run.stage_folder import read_manifest, write_manifest
from tasks.hub import Cache
from tasks.registry import build_preferences

CALL = "It is <|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>5."


@pytest.fixture
def panel(tmp_path):
    return Panel(tmp_path / "runs", tmp_path / "runs/queue.sqlite", (tmp_path / "runs", tmp_path / "data"))


@pytest.fixture
def models(panel, tiny_tokenizer):
    save_stage(panel.runs, tiny_tokenizer)
    save_stage(panel.runs, tiny_tokenizer, run="other", seed=3)
    return PanelModels(panel)


def pair(n=0, left="a <b>", right="b"):
    return Pair(f"question {n}\nline two", left, right, "tiny/sft", "other/sft")


def filled(panel, name="mine", n=40):
    found = Labels(panel, name)
    for number in range(n):
        found.add(pair(number, right=CALL), "left" if number % 2 else "right")
    return found


def test_decisions_become_rows_and_ties_do_not(panel):
    found = Labels(panel, "mine")
    for number, choice in enumerate(("left", "right", "tie", "skip")):
        found.add(pair(number), choice)
    rows = [json.loads(line) for line in found.rows_file.read_text().splitlines()]
    assert rows == [
        {"prompt": "question 0\nline two", "chosen": "a <b>", "rejected": "b"},
        {"prompt": "question 1\nline two", "chosen": "b", "rejected": "a <b>"},
    ]
    assert [vote["choice"] for vote in found.votes()] == ["left", "right", "tie", "skip"]
    assert tally(found.votes()) == [("other/sft", "tiny/sft", 1, 1, 1)] and sets_of(panel) == ["mine"]
    assert found.undo() == pair(3) and found.undo() == pair(2) and found.undo() == pair(1)
    assert found.rows_file.read_text().count("\n") == 1 and Labels(panel, "new").undo() is None


@pytest.mark.parametrize("data", ["own", "embedded"])
def test_reward_and_dpo_read_what_was_labelled(panel, tmp_path, tiny_tokenizer, data):
    found, words = filled(panel), ["data=embedded"]
    if data == "own":
        assert settings_for(found, data) == []
        (tmp_path / "my_conf/data").mkdir(parents=True)
        (tmp_path / "my_conf/data/mine.yaml").write_text(option_of(found, data))
        words = ["--config-dir", str(tmp_path / "my_conf"), "data=mine"]
    for stage in ("reward", "dpo"):
        line = [*words, "run=tiny", f"stage={stage}", *settings_for(found, data)]
        check_overrides("train", line)
        sources, argv = find_sources("train", line)
        cfg = compose("train", argv, sources)
        names = list(cfg.data.preferences) if cfg.stage.preferences is None else list(cfg.stage.preferences)
        for split, n in (("train", 38), ("test", 2)):
            sources = build_preferences(cfg.data, names, split, Cache(panel.folders[-1]))
            assert sum(map(len, sources)) == n
            usable = Usable.of(sources, tiny_tokenizer, 256)
            assert len(usable) == n and usable.is_paired and usable.dropped == 0
        steps = PreferenceSteps(sources, usable, tiny_tokenizer, rows_per_micro=4)
        (batch,) = steps.fixed()
        kept = [batch["inputs"][row][: batch["last"][row] + 1].tolist() for row in (0, 1)]
        chosen, rejected = map(tiny_tokenizer.decode, kept)
        assert "question" in chosen and CALL in chosen + rejected and "a <b>" in chosen + rejected
        assert tiny_tokenizer.special_id("<|python_start|>") in kept[0] + kept[1], "a call stays a call"


def test_what_could_not_be_trained_on_is_refused(panel):
    found = Labels(panel, "mine")
    for one, choice, said in (
        (pair(), "both", "choose one of"),
        (pair(right="a <b>"), "left", "equal"),
        (pair(right=""), "left", "empty|no answer"),
    ):
        with pytest.raises(UserError, match=said):
            found.add(one, choice)
    assert found.votes() == [] and not found.rows_file.exists()
    for name in ("", "../x", "a/b", "a.votes", ".x", "x" * 70):
        with pytest.raises(UserError, match="set of labels has a name"):
            Labels(panel, name)
    fixed = Panel(panel.runs, panel.queue_file, panel.folders, readonly=True)
    for act in (lambda: Labels(fixed, "mine").add(pair(), "left"), lambda: Labels(fixed, "mine").undo()):
        with pytest.raises(UserError, match="panel.readonly=true"):
            act()
    found.votes_file.parent.mkdir(parents=True)
    found.votes_file.write_text('{"choice": "left"}\n')
    with pytest.raises(UserError, match="is no decision"):
        found.votes()


def test_pairs_are_two_answers_on_sides_by_chance(models, monkeypatch):
    monkeypatch.setattr(
        models, "texts", lambda name, questions, params, samples=1: [[f"{name} {n}" for n in range(samples)]] * 8
    )
    asked = [f"q{n}" for n in range(8)]
    pairs, equal = draw_pairs(models, asked, "a", "b", 1.0, 8, 1)
    assert equal == 0 and {one.left_from for one in pairs} == {"a", "b"}
    assert all(one.left.startswith(one.left_from) and one.right.startswith(one.right_from) for one in pairs)
    twice, _ = draw_pairs(models, asked, "a", "a", 1.0, 8, 1)
    assert {one.left for one in twice} == {"a 0", "a 1"}
    assert draw_pairs(models, asked, "a", "b", 1.0, 8, 1) == (pairs, 0), "by the seed"
    monkeypatch.setattr(models, "texts", lambda name, questions, params, samples=1: [["same"] * samples] * 8)
    assert draw_pairs(models, asked, "a", "b", 1.0, 8, 1) == ([], 8)
    with pytest.raises(UserError, match="temperature 0"):
        draw_pairs(models, asked, "a", "a", 0, 8, 1)
    for wrong in ([], [" "], ["q"] * 17):
        with pytest.raises(UserError, match="1 to 16 are answered at once"):
            draw_pairs(models, wrong, "a", "b", 1, 8, 1)


def test_questions_come_from_records(panel, models):
    folder = panel.runs / "tiny/sft/records"
    folder.mkdir()
    lines = [{"index": n // 2, "prompt": f"q{n // 2}", "output": "x", "verdict": "pass"} for n in range(20)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = recorded_questions(panel, "tiny/sft", "records/choice", 4, 1)
    assert len(set(found)) == 4 and found == recorded_questions(panel, "tiny/sft", "records/choice", 4, 1)
    assert len(recorded_questions(panel, "tiny/sft", "records/choice", 99, 1)) == 10


def test_the_tab_draws_decides_and_takes_back(models, panel):
    with gr.Blocks():
        tab = PreferencesTab(models)
    sets, one, other = tab.choices("mine", None, None)
    assert one["choices"] == ["other/sft", "tiny/sft"] and other["value"] == "tiny/sft" and sets["value"] == "mine"
    work, shown, seed = tab.begin("tiny/sft", "other/sft", "Who?\nWhat?\n", "typed above", 1.0, 8, 1)
    assert len(work.pairs) == 2 and "Pair 1 of 2" in shown and "Who?" in shown and seed == 2 and "\n" not in shown
    work, shown, counts = tab.decide(work, "left", "mine", "tiny/sft")
    assert "Pair 2 of 2" in shown and "mine: 1 rows of preferences, 0 ties, 0 skipped" in counts
    work, shown, _ = tab.decide(work, "tie", "mine", None)
    assert "All pairs are decided" in shown
    with pytest.raises(gr.Error, match="draw pairs first"):
        tab.decide(work, "left", "mine", None)
    work, shown, counts = tab.take_back(work, "mine", None)
    assert "Pair 2 of 2" in shown and "0 ties" in counts
    _, shown, counts = tab.take_back(Work(), "mine", None)
    assert "Pair 1 of 1" in shown and "Who?" in shown, "also after a reload of the page"
    with pytest.raises(gr.Error, match="no decision to take back"):
        tab.take_back(Work(), "mine", None)
    assert "choose a stage" in tab.begin(None, None, "x", "typed above", 1, 8, 1)[1]
    assert "problem" in tab.count("../x", None) and "preferences:&#10;  mine:" in tab.count("mine", None)
    assert "&lt;b&gt;" in pair_page(Work((pair(),)))


def test_labels_join_the_data_option_that_a_run_was_composed_of(models, panel):
    with gr.Blocks():
        tab = PreferencesTab(models)
    folder = panel.runs / "tiny/sft"
    manifest = read_manifest(folder) | {"config": {"data": {"name": "local"}}}
    for options, option in ((None, "local"), ({"data": "own"}, "own")):
        write_manifest(folder, manifest | {"options": options})
        assert f"defaults:&#10;  - {option}&#10;" in tab.count("mine", "tiny/sft")


def test_a_set_is_not_endless(panel, monkeypatch):
    monkeypatch.setattr(labels_module, "MOST_VOTES", 1)
    found = Labels(panel, "mine")
    found.add(pair(), "left")
    with pytest.raises(UserError, match="begin another set"):
        found.add(pair(1), "left")
