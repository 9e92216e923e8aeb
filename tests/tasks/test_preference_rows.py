"""Rows of preferences: pairs in every form, labelled answers, what is refused; the rules of the embedded world."""

import json

import pytest
from conftest import compose
from omegaconf import OmegaConf

from llm.data.embedded import rows as embedded_rows
from llm.data.embedded.preferences import RULES, rule_score
from llm.errors import UserError
from tasks.preferences import Preferences
from tasks.registry import build_preferences, build_task

USER, GOOD, BAD = (
    {"role": "user", "content": "Where is the owl?"},
    {"role": "assistant", "content": "In the barn."},
    {"role": "assistant", "content": "No idea."},
)
PAIR = {"messages": [USER], "chosen": [GOOD], "rejected": [BAD]}
HH = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: Where is the owl?\n\nAssistant: "


def build(folder, *rows, split="train", bad_rows="stop", name="rows.jsonl", **keys):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = {"type": "preference", "source": "local", "train": str(path)} | keys
    return build_task("likes", spec, split, bad_rows=bad_rows)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Where is the owl?", "chosen": "In the barn.", "rejected": "No idea.", "score_chosen": 8.5},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "source": "somewhere"},
        {"prompt": "Where is the owl?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
    ids=["texts", "messages", "UltraFeedback", "no prompt"],
)
def test_forms_of_pairs(tmp_path, row):
    assert list(build(tmp_path, row)) == [PAIR]


def test_transcripts_are_split_into_turns(tmp_path):
    (row,) = build(tmp_path, {"chosen": f"{HH}In the barn.", "rejected": f"{HH}No idea."})
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("user", "Hello"),
        ("assistant", "Hi."),
        ("user", "Where is the owl?"),
    ]
    assert (row["chosen"], row["rejected"]) == ([GOOD], [BAD])


def test_answers_may_go_on_for_several_turns_and_have_a_system_message(tmp_path):
    longer = [USER, BAD, {"role": "user", "content": "Look again."}, GOOD]
    (row,) = build(tmp_path, {"chosen": [USER, GOOD], "rejected": longer, "system": "Be brief."})
    assert row["messages"] == [{"role": "system", "content": "Be brief."}, USER]
    assert row["rejected"] == longer[1:]


def test_columns_of_other_names(tmp_path):
    row = {"q": "Where is the owl?", "win": "In the barn.", "loss": {"text": "No idea."}}
    fields = {"prompt": "q", "chosen": "win", "rejected": "loss.text"}
    assert list(build(tmp_path, row, fields=fields)) == [PAIR]


@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_labelled_answers(tmp_path, label):
    (row,) = build(tmp_path, {"prompt": "Where is the owl?", "completion": "In the barn.", "label": label})
    assert row == {"messages": [USER], "completion": [GOOD], "label": bool(label)}
    assert isinstance(row["label"], bool)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "A?", "completion": "B.", "label": "false"}, "'label' is 'false': it must be true"),
        ({"prompt": "A?", "completion": "B."}, "'label' is None"),
        ({"prompt": "A?", "chosen": "B."}, "no preference .found: prompt, chosen"),
        ({"prompt": "A?", "chosen": "B.", "rejected": "B."}, "are equal, so nothing is preferred"),
        ({"prompt": "A?", "chosen": "B.", "rejected": " "}, "is empty"),
        ({"chosen": "B.", "rejected": "C."}, "must be a list of messages, or a transcript"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "B?"}, GOOD]}, "no question in common"),
        ({"prompt": "A?", "chosen": "B.", "rejected": "C.", "margin": 1}, "a key of unknown meaning: 'margin'"),
        ({"prompt": "A?", "chosen": "B.", "rejected": "C.", "tools": [1]}, "'tools' of the row"),
        ({"prompt": "A?", "chosen": [USER], "rejected": "C."}, "neighbours|role|user message"),
        (["A?"], "a row must be a JSON object"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_with_their_place_or_skipped(tmp_path, row, words):
    good = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    with pytest.raises(UserError, match=words) as error:
        build(tmp_path, good, row)
    assert str(error.value).startswith("data.preferences.likes.train: ") and "row 2" in str(error.value)
    found = build(tmp_path, good, row, bad_rows="skip")
    assert list(found) == [PAIR] and found.skipped == {"bad rows of rows.jsonl": 1}


def test_csv_has_no_labels_that_are_truth_values(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\nA?,B.,false\n")
    with pytest.raises(UserError, match="'label' is 'false'"):
        build_task("likes", {"type": "preference", "source": "local", "train": str(path)}, "train")


def test_the_held_out_part_is_a_share_or_a_file(tmp_path):
    rows = [{"prompt": f"{i}?", "chosen": "B.", "rejected": "C."} for i in range(20)]
    assert len(build(tmp_path, *rows, test="10%")) == 18
    spec = {"type": "preference", "source": "local", "train": str(tmp_path / "rows.jsonl"), "test": "10%"}
    data = OmegaConf.create({"tasks": {}, "preferences": {"likes": spec}})
    (held_out,) = build_preferences(data, ["likes"], "test")
    assert len(held_out) == 2
    with pytest.raises(UserError, match="stage.preferences names 'hates', which is not in data.preferences"):
        build_preferences(data, ["hates"], "test")
    data["preferences"]["likes"]["test"] = None
    with pytest.raises(UserError, match="none of the sources of data.preferences has held-out rows"):
        build_preferences(data, ["likes"], "test")


# ----- the embedded world


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_prefers_the_chosen_answer(rule):
    train, test = (embedded_rows("preferences", split, 100, rule=rule) for split in ("train", "test"))
    for row in [*train, *test]:
        assert rule_score(row, row["chosen"]) > rule_score(row, row["rejected"])
    assert not {json.dumps(row) for row in train} & {json.dumps(row) for row in test}


@pytest.mark.parametrize(
    "rule, row, text, score",
    [
        ("politeness", {}, "Hello! Ana lives in Oakton.", 1),
        ("politeness", {}, "Ana says Hello!", 0),
        ("politeness", {}, "Hello!", 0),  # a greeting is no answer
        ("brevity", {}, "Ana is a baker.", 0),
        ("brevity", {}, "Ana is a baker. She has a cat. She loves red", -1),
        ("brevity", {}, "", -3),
        ("right_fact", {"value": "red", "others": ["blue"]}, "It is red.", 1),
        ("right_fact", {"value": "red", "others": ["blue"]}, "It is red, or blue.", 0),
    ],
)
def test_rules_score_free_answers(rule, row, text, score):
    assert RULES[rule](text, row) == score


def test_generated_rows_keep_what_their_rule_needs():
    spec = {"type": "preference", "source": "embedded", "options": {"rule": "right_fact", "unpaired": True}, "size": 40}
    task = build_task("facts", spec, "train")
    assert isinstance(task, Preferences) and {row["label"] for row in task} == {True, False}
    for row in task:
        assert task.score(row, row["completion"][0]["content"]) == row["label"]
    with pytest.raises(UserError, match="data.preferences.facts.options"):
        build_task("facts", spec | {"options": {"rule": "beauty"}}, "train")


# ----- the configuration


@pytest.mark.parametrize(
    "line, words",
    [
        ("stage.preferences=[kindness]", "stage.preferences: there is no 'kindness' in data.preferences"),
        ("data.preferences.brevity.type=chat", "data.preferences.brevity.type=chat: rows of this type belong into"),
        ("data.tasks.choice.type=preference", "data.tasks.choice.type=preference: .* belong into data.preferences"),
        ("stage.loss=ppo", "stage.loss=ppo"),
    ],
)
def test_wrong_configurations_are_refused(line, words):
    with pytest.raises(UserError, match=words):
        compose("train", "stage=dpo", line)


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_pairs_of_own_data_lie_beside_its_conversations(tmp_path, stage):
    cfg = compose("train", "experiment=own", f"stage={stage}", f"data.tasks_path={tmp_path}")
    (tmp_path / "pairs").mkdir()
    rows = [json.dumps({"prompt": f"Where is {n}?", "chosen": "Here.", "rejected": "Gone."}) for n in range(20)]
    for names, held_out in ((("some.jsonl",), 1), (("some.jsonl", "val.jsonl"), 20)):
        for name in names:
            (tmp_path / "pairs" / name).write_text("\n".join(rows))
        split = {part: build_preferences(cfg.data, ["pairs"], part)[0] for part in ("train", "test")}
        assert len(split["test"]) == held_out and len(split["train"]) == 20 - held_out % 20
