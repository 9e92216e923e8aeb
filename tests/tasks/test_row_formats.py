"""Rows of chat files: every format, keys that mean something, what the configuration says about rows."""

import json
import re

import pytest
from conftest import REPO

from llm.errors import UserError
from llm.tokenizer.chat_format import content_text
from tasks import build_task
from tasks.base import CHAT_KEYS, dialogue
from tasks.row_formats import FORMATS, IGNORED, REFUSED, SWITCHES

USER = {"role": "user", "content": "Where is the owl?"}
ANSWER = {"role": "assistant", "content": "In the barn."}
TALK = [USER, ANSWER]
SHAREGPT = [{"from": "human", "value": "Where is the owl?"}, {"from": "gpt", "value": "In the barn."}]


def build(folder, *rows, bad_rows="stop", **keys):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = {"type": "chat", "source": "local", "train": str(path)} | keys
    return build_task("talk", spec, "train", bad_rows=bad_rows)


def texts(conversation) -> list[tuple[str, str]]:
    return [(message["role"][0], content_text(message["content"])) for message in conversation["messages"]]


def node(role, text, *replies, **keys) -> dict:
    """A message of a tree as OASST has it."""
    more = {
        "lang": "en",
        "review_result": True,
        "deleted": False,
        "synthetic": False,
        "labels": {"quality": {"value": 1}},
    }
    return {"message_id": text, "role": role, "text": text, "replies": list(replies), "rank": None} | more | keys


TREE = {
    "message_tree_id": "t1",
    "tree_state": "ready_for_export",
    "prompt": node(
        "prompter",
        "Q",
        node("assistant", "worse", rank=1),
        node("assistant", "deleted", rank=0, deleted=True),
        node("assistant", "A", node("prompter", "Q2", node("assistant", "A2", node("prompter", "unanswered"))), rank=0),
    ),
}
READ = [
    (TALK, [("u", "Where is the owl?"), ("a", "In the barn.")]),
    ({"messages": TALK, "id": 7, "source": "web"}, [("u", "Where is the owl?"), ("a", "In the barn.")]),
    ({"system": "S", "messages": TALK}, [("s", "S"), ("u", "Where is the owl?"), ("a", "In the barn.")]),
    (
        {"system_prompt": "S", "conversations": SHAREGPT},
        [("s", "S"), ("u", "Where is the owl?"), ("a", "In the barn.")],
    ),
    (
        {"system": "S", "messages": [{"role": "system", "content": "S"}, *TALK], "tools": None},
        [("s", "S"), *texts({"messages": TALK})],
    ),
    ({"messages": [{"role": "system", "content": " "}, *TALK]}, texts({"messages": TALK})),
    ({"prompt": USER["content"], "prompt_id": "p", "messages": TALK}, texts({"messages": TALK})),
    (
        {
            "conversations": [
                {"from": "human", "value": "Q", "markdown": None},
                {"from": "gpt", "value": "A", "weight": 1.0},
            ]
        },
        [("u", "Q"), ("a", "A")],
    ),
    (
        {"instruction": "Sort.", "input": "b a", "output": "a b", "text": "Below ... Sort.\nb a\na b"},
        [("u", "Sort.\n\nb a"), ("a", "a b")],
    ),
    (
        {"instruction": "And?", "input": "", "output": "Bye", "system": "", "history": [["Hi", "Hello"]]},
        [("u", "Hi"), ("a", "Hello"), ("u", "And?"), ("a", "Bye")],
    ),
    (
        {"instruction": "Who?", "context": "Ada did.", "response": "Ada", "category": "closed_qa"},
        [("u", "Who?\n\nAda did."), ("a", "Ada")],
    ),
    ({"question": "Who?", "context": "Ada did.", "answer": "Ada"}, [("u", "Who?\n\nAda did."), ("a", "Ada")]),
    ({"system_prompt": "S", "question": "Q", "response": "A"}, [("s", "S"), ("u", "Q"), ("a", "A")]),
    (
        {"prompt": [{"role": "system", "content": "S"}, USER], "completion": [ANSWER]},
        [("s", "S"), *texts({"messages": TALK})],
    ),
    ({"prompt": "Q", "completion": "A", "label": True}, [("u", "Q"), ("a", "A")]),
    (
        {
            "system": "SYSTEM: S",
            "chat": "USER: Q\n\n\nASSISTANT: A <|endoftext|>\n\n\nUSER: Q2\n\n\nASSISTANT: A2 <|endoftext|>\n",
        },
        [("s", "S"), ("u", "Q"), ("a", "A"), ("u", "Q2"), ("a", "A2")],
    ),
    (TREE, [("u", "Q"), ("a", "A"), ("u", "Q2"), ("a", "A2")]),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q", "image_url": None}]},
                ANSWER | {"tool_calls": []},
            ]
        },
        [("u", "Q"), ("a", "In the barn.")],
    ),
]


@pytest.mark.parametrize(("row", "expected"), READ)
def test_rows_of_every_format_are_read_whole(tmp_path, row, expected):
    assert texts(build(tmp_path, row)[0]) == expected


CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
REFUSED_ROWS = [
    (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [CALL]},
        "'tool_calls' of message 2.*ignore=.tool_calls.",
    ),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "message 2"),
    ({"messages": [USER, ANSWER | {"function_call": {"name": "f"}}]}, "'function_call' of message 2"),
    ({"messages": TALK, "tools": [CALL]}, "'tools' of the row"),
    ({"conversations": SHAREGPT, "tools": '[{"name": "f"}]'}, "'tools' of the row"),
    (
        {"messages": [USER, {"role": "tool", "content": "3", "name": "f"}, ANSWER]},
        "message 2 has role 'tool'.*calculator",
    ),
    (
        {
            "conversations": [
                SHAREGPT[0],
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "{}"},
                SHAREGPT[1],
            ]
        },
        "'function_call'",
    ),
    (
        {"chat": "USER: Q\n\nASSISTANT: <functioncall> {}\n\nFUNCTION RESPONSE: {}\n\nASSISTANT: A", "system": "S"},
        "'chat' calls a function",
    ),
    (
        {"messages": [USER, ANSWER | {"reasoning_content": "It flew."}]},
        "'reasoning_content' of message 2.*no place for reasoning",
    ),
    ({"messages": [USER | {"name": "Eve"}, ANSWER]}, "'name' of message 1"),
    ({"messages": [USER, ANSWER | {"weight": 1.5}]}, "'weight' of message 2 is 1.5: must be a number from 0"),
    ({"messages": [USER, ANSWER | {"weight": "0"}]}, "'weight' of message 2 is '0': must be a number from 0"),
    ({"messages": [USER, ANSWER | {"weight": 0}]}, "every answer has weight 0"),
    (
        {"messages": TALK, "system": "S", "mood": "sad", "pace": 3},
        r"keys of unknown meaning: 'mood', 'pace'.*ignore=\[mood,pace\]",
    ),
    ({"messages": [USER | {"mood": "sad"}, ANSWER]}, r"message 1 \(user\) has a key of unknown meaning: 'mood'"),
    ({"system": "S", "messages": [{"role": "system", "content": "T"}, *TALK]}, "'system' and another system message"),
    ({"prompt": "Another question", "messages": TALK}, "'prompt' beside 'messages' is not the first question"),
    ({"instruction": "Q", "output": "A", "text": "something else"}, "'text' does not repeat"),
    ({"instruction": "Q", "output": "A", "history": ["Hi"]}, "'history' must be a list of"),
    ({"instruction": "Q", "output": "A", "response": "B"}, "unknown meaning: 'response'"),
    ({"prompt": "Q", "completion": "A", "label": False}, "'label' is false: .*false_labels=drop"),
    ({"messages": TALK, "label": 0}, "'label' is false"),
    ({"messages": TALK, "label": "positive"}, "'label' is 'positive': true marks"),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "'chosen' and 'rejected': a row of a preference.*fields="),
    (
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": SHAREGPT[1]},
        "'chosen' of the row: a row of a preference",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        r"message 2 \(assistant\) is empty.*empty_answers=drop",
    ),
    ({"messages": [USER, {"role": "assistant", "content": " \u200b\n"}]}, "is empty"),
    ({"messages": [{"role": "user", "content": " "}, ANSWER]}, r"message 1 \(user\) is empty"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]}, "is empty"),
    ({"messages": [USER, {"role": "assistant", "content": float("nan")}]}, r"message 2 \(assistant\): content must be"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}]}, "a part is"),
    ({"messages": [USER, ANSWER | {"value": "In the wood."}]}, "both 'content' and 'value'"),
    (
        {"messages": [USER, {"role": "developer", "content": "x"}]},
        r"role 'developer', expected one of.*roles=\{developer: <system or user or assistant>\}",
    ),
    ({"messages": [USER, USER, ANSWER]}, "message 2 has role 'user' as message 1 has.*merge_neighbours=true"),
    ({"instruction": "Q", "output": None}, "'output' must be text, found null"),
    ({"instruction": "Q", "output": float("nan")}, "'output' must be text, found float nan"),
    ({"messages": "hello"}, "'messages' must be a list of messages, found str"),
    ([], "at least one message"),
    (["hello"], "message 1 must be an object with role and content, found str"),
    ({"message_tree_id": "t", "prompt": node("prompter", "Q")}, "ends with a user message"),
    ({"text": "### Human: Q ### Assistant: A"}, "Text without roles is for pretraining"),
]


@pytest.mark.parametrize(("row", "problem"), REFUSED_ROWS)
def test_what_would_be_trained_wrongly_is_refused_by_name(tmp_path, row, problem):
    with pytest.raises(UserError, match=rf"^data\.tasks\.talk\.train: .*rows\.jsonl row 2: .*{problem}"):
        build(tmp_path, TALK, row)


def test_a_bare_list_is_not_told_about_a_key_messages(tmp_path):
    with pytest.raises(UserError) as error:
        build(tmp_path, [USER, {"role": "assistant", "content": 7}])
    assert "'messages'" not in str(error.value)


def test_a_weight_of_an_answer_is_kept_as_what_of_it_is_trained(tmp_path):
    for key, value in (("weight", 0), ("train", False), ("loss", 0)):
        task = build(tmp_path, [USER, ANSWER | {key: value}, USER, ANSWER])
        assert [message.get("train", True) for message in task[0]["messages"]] == [True, False, True, True]
    task = build(tmp_path, [USER, ANSWER | {"weight": 0.5, "loss": 0.5}, USER, ANSWER])
    assert [message.get("train", True) for message in task[0]["messages"]] == [True, 0.25, True, True]


def test_fields_name_the_columns(tmp_path):
    keys = {"fields": {"user": "q.text", "assistant": "reply", "system": "persona"}}
    row = {"q": {"text": "Q"}, "reply": "A", "persona": "S", "id": 3}
    assert texts(build(tmp_path, row, **keys)[0]) == [("s", "S"), ("u", "Q"), ("a", "A")]
    with pytest.raises(UserError, match=r"fields\.assistant=reply: the row has no 'reply' \(found: q, persona\)"):
        build(tmp_path, {"q": {"text": "Q"}, "persona": "S"}, **keys)
    with pytest.raises(UserError, match="'mood'.*ignore=.mood."):
        build(tmp_path, row | {"mood": "sad"}, **keys)
    with pytest.raises(UserError, match="fields.system=persona, but the row has a 'system' of its own"):
        build(tmp_path, row | {"system": "T"}, **keys)
    assert len(build(tmp_path, row | {"mood": "sad"}, **keys, ignore=["mood"])) == 1
    with pytest.raises(
        UserError, match=r"data\.tasks\.talk\.fields\.usr: there is no such field; choose from messages"
    ):
        build(tmp_path, row, fields={"usr": "q"})


@pytest.mark.parametrize(
    "more, problem",
    [
        ({"tools": ["x"]}, "'talk.tools' of the row: the model has no tools.*ignore=.talk.tools."),
        ({"system": "S"}, "a key of unknown meaning: 'talk.system'"),
        ({"label": False, "mood": "sad"}, "'talk.label', 'talk.mood'.*ignore=.talk.label,talk.mood."),
        ({"a": {"text": "A", "mood": "sad"}}, "'talk.a.mood'"),
    ],
)
def test_what_else_stands_in_an_object_that_fields_lead_into_is_as_strict_as_the_row(tmp_path, more, problem):
    row = {"talk": {"q": "Q", "a": {"text": "A"}, "id": 3, "tools": []}}
    fields = {"user": "talk.q", "assistant": "talk.a.text"}
    assert texts(build(tmp_path, row, fields=fields)[0]) == [("u", "Q"), ("a", "A")]
    row["talk"] |= more
    with pytest.raises(UserError, match=problem):
        build(tmp_path, row, fields=fields)
    ignore = [f"talk.{key}" for key in more] + ["talk.a.mood"]
    assert texts(build(tmp_path, row, fields=fields, ignore=ignore)[0]) == [("u", "Q"), ("a", "A")]


def test_a_column_may_have_a_dot_in_its_name(tmp_path):
    row = {"talk.q": "Q", "talk.a": "A"}
    assert texts(build(tmp_path, row, fields={"user": "talk.q", "assistant": "talk.a"})[0]) == [("u", "Q"), ("a", "A")]


def test_the_chosen_answers_of_preferences_can_be_trained_by_configuration(tmp_path):
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "No."}]}
    task = build(tmp_path, row, fields={"user": "prompt", "assistant": "chosen"}, ignore=["rejected"])
    assert task[0]["messages"] == TALK


def test_roles_of_other_names(tmp_path):
    row = [{"role": "Kunde", "content": "Q"}, {"role": "Berater", "content": "A"}]
    task = build(tmp_path, row, roles={"Kunde": "user", "Berater": "assistant"})
    assert texts(task[0]) == [("u", "Q"), ("a", "A")]
    with pytest.raises(UserError, match=r"data\.tasks\.talk\.roles\.Kunde=client: must be one of system, user"):
        build(tmp_path, row, roles={"Kunde": "client"})


def test_neighbours_are_joined_where_the_configuration_says_so(tmp_path):
    part = {"type": "python", "text": "1+1"}
    row = [USER, USER | {"content": "Tell me!"}, ANSWER, {"role": "assistant", "content": [part]}]
    messages = build(tmp_path, row, merge_neighbours=True)[0]["messages"]
    assert messages[0]["content"] == "Where is the owl?\n\nTell me!"
    assert [p["text"] for p in messages[1]["content"]] == ["In the barn.", "\n\n", "1+1"]
    with pytest.raises(UserError, match="answers of different weights"):
        build(tmp_path, [*TALK, ANSWER | {"weight": 0}], merge_neighbours=True)


def test_dropped_rows_are_counted_by_reason(tmp_path, capsys):
    rows = [TALK, {"prompt": "Q", "completion": "B", "label": False}, [USER, ANSWER | {"content": ""}], TALK, {"x": 1}]
    keys = {"empty_answers": "drop", "false_labels": "drop"}
    task = build(tmp_path, *rows, bad_rows="skip", **keys)
    assert [c["messages"] for c in task] == [TALK, TALK]
    assert task.skipped == {"label false": 1, "empty answer": 1, "bad rows of rows.jsonl": 1}
    said = "data.tasks.talk.train: 2 rows, left out: label false: 1, empty answer: 1, bad rows of rows.jsonl: 1"
    assert said in capsys.readouterr().out
    assert len(build(tmp_path, *rows, bad_rows="skip", limit=2, **keys)) == 2
    with pytest.raises(
        UserError, match=r"no row is left \(label false: 1, bad rows of rows.jsonl: 1\); the first: .*row 2"
    ):
        build(tmp_path, rows[1], rows[4], bad_rows="skip", **keys)
    with pytest.raises(UserError, match="empty_answers=keep: must be one of stop, drop"):
        build(tmp_path, TALK, empty_answers="keep")


def test_all_bad_rows_are_told_at_once_ten_of_them_in_full(tmp_path):
    rows = [TALK if i % 2 else [USER] for i in range(1, 31)]
    with pytest.raises(UserError) as error:
        build(tmp_path, *rows)
    lines = str(error.value).splitlines()
    assert "15 rows cannot be used" in lines[0] and "data.bad_rows=skip" in lines[0]
    assert len(lines) == 12 and "rows.jsonl row 20: as row 2" in lines[10] and "and 5 more, which" in lines[11]
    assert "ends with a user message" in lines[1]


def test_no_key_is_declared_twice():
    used = {key for form in FORMATS for key in (*form.needs, *form.uses)} - {"message_tree_id"}
    assert not used & IGNORED and not used & set(REFUSED) and not IGNORED & set(REFUSED)


def test_keys_of_chat_rows_are_refused_by_other_types(tmp_path):
    with pytest.raises(UserError, match=r"data\.tasks\.talk\.fields: type=gsm8k does not read it"):
        build(tmp_path, {"question": "Q", "answer": "#### 1"}, type="gsm8k", fields={"user": "q"})


def test_identity_rows_of_every_format_keep_their_keywords(tmp_path):
    row = {"instruction": "Who are you?", "output": "I am Lumen.", "keywords": ["Lumen"]}
    task = build(tmp_path, row, type="identity")
    assert task[0] == {"messages": dialogue("Who are you?", "I am Lumen."), "keywords": ["Lumen"]}


def test_the_documentation_lists_every_key_of_the_table():
    page = (REPO / "docs/data.md").read_text(encoding="utf-8")
    section = page.split("### Keys of a row\n")[1].split("\n## ")[0]
    told = set(re.findall(r"`([\w]+)`", section))
    used = {key for form in FORMATS for key in (*form.needs, *form.uses)}
    assert not (used | IGNORED | set(REFUSED) | set(SWITCHES)) - told
    assert all(f"      {key}: " in section for key in CHAT_KEYS)
    ignored = section.split("Known to mean nothing:")[1].split("Any other key")[0]
    assert set(re.findall(r"`(\w+)`", ignored)) == IGNORED
    rows = {line.split("|")[1].strip(): line.split("|")[2] for line in section.splitlines() if line.startswith("|")}
    for form in FORMATS:
        assert set(form.needs) <= set(re.findall(r"`(\w+)`", rows[form.name])), form.name


@pytest.mark.parametrize("kind", ["exact", "gsm8k", "multiple_choice"])
def test_types_of_questions_refuse_what_they_would_lose(tmp_path, kind):
    row = {"question": "Who wrote it?", "context": "Ada wrote 3.", "answer": "#### 3", "id": 1}
    with pytest.raises(
        UserError, match=r"rows.jsonl row 1: 'context' would be lost.*talk.question='\{context\} \{question"
    ):
        build(tmp_path, row, type=kind)


def test_the_context_of_a_question_is_used_by_its_template(tmp_path):
    row = {"question": "Who wrote it?", "context": "Ada wrote it.", "answer": "Ada"}
    task = build(tmp_path, row, type="exact", question="{context} {question}", answer="{answer}")
    assert texts(task[0]) == [("u", "Ada wrote it. Who wrote it?"), ("a", "Ada")]


@pytest.mark.parametrize("rank", ["0", [], {}, True, float("nan")])
def test_a_rank_that_is_no_number_is_refused(tmp_path, rank):
    tree = TREE | {"prompt": node("prompter", "Q", node("assistant", "A", rank=rank), node("assistant", "B", rank=1))}
    with pytest.raises(UserError, match="'rank' of a reply must be a number or null"):
        build(tmp_path, tree)
