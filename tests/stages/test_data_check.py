"""Data that is not there is named before parents are sought, processes launched and networks loaded."""

import json

import pytest
from conftest import compose

from llm.cli.options import CONF, Sources
from llm.config.stages import stage_row
from llm.errors import UserError
from llm.stages import finetune, grpo, run_stage
from llm.stages.data_check import check_data

BAD = '{"messages": [{"role": "user", "content": "a"}, {"role": "judge", "content": "b"}]}\n'
GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def settings(tmp_path, stage: str, *lines: str) -> list[str]:
    return ["experiment=tiny", "data=own", f"stage={stage}", f"paths.runs={tmp_path / 'runs'}", *lines]


def refused(tmp_path, stage: str, *lines: str) -> str:
    with pytest.raises(UserError) as caught:
        run_stage.run_stage(compose("train", *settings(tmp_path, stage, *lines)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def no_launch(monkeypatch):
    def launch(*_):
        raise AssertionError("processes were launched")

    monkeypatch.setattr(run_stage, "launch", launch)


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain"])
def test_text_that_is_not_there_is_named_before_the_parent_and_the_launch(tmp_path, monkeypatch, stage):
    no_launch(monkeypatch)
    said = refused(tmp_path, stage, f"data.path={tmp_path}/nothing", "trainer.devices=2", "trainer.accelerator=cpu")
    assert said.startswith("data.path") and "nothing" in said


@pytest.mark.parametrize("split", ["train", "test"])
def test_task_files_that_are_not_there_are_named_first(tmp_path, monkeypatch, split):
    no_launch(monkeypatch)
    files = {"train": tmp_path / "train.jsonl", "test": tmp_path / "test.jsonl"}
    for name, path in files.items():
        if name != split:
            path.write_text(GOOD)
    lines = [f"data.tasks.chat.{name}={path}" for name, path in files.items()]
    said = refused(tmp_path, "sft", *lines, "trainer.devices=2", "trainer.accelerator=cpu")
    assert said.startswith(f"data.tasks.chat.{split}: no file matches {files[split]}")


def test_files_of_evaluated_and_rewarded_tasks_count_too(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(GOOD)
    lines = [f"data.tasks.chat.train={rows}", f"data.tasks.chat.test={rows}"]
    quiz = "{type: gsm8k, source: local, train: none.jsonl, test: none.jsonl}"
    folder = tmp_path / "conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment/quiz.yaml").write_text(f"# @package _global_\ndata: {{tasks: {{quiz: {quiz}}}}}\n")
    from llm.cli import overrides

    for stage, more, split in [
        ("sft", ["stage.chat_every=1", "stage.chat_tasks=[quiz]"], "test"),
        ("grpo", ["stage.task=quiz"], "train"),
    ]:
        cfg = overrides.compose(
            "train", ["experiment=quiz", "data=own", f"stage={stage}", *lines, *more], Sources((CONF, folder))
        )
        with pytest.raises(UserError, match=rf"data\.tasks\.quiz\.{split}: no file matches none.jsonl"):
            check_data(cfg, stage_row(stage))


@pytest.mark.parametrize(
    "source, setting, way",
    [
        ("mixture", "data.column=body", "give data.sources.<name>.column"),
        ("mixture", "data.val_size=5", "give data.sources.<name>.val_size"),
        ("tokens", "data.val_size=5", "leave it out"),
        ("embedded", "data.column=body", "leave it out"),
    ],
)
def test_a_key_of_text_that_the_source_does_not_read_is_refused(tmp_path, source, setting, way):
    said = refused(tmp_path, "tokenizer", f"data={source}", setting)
    assert said == f"{setting} is not read by data={source}; {way}"
    cfg = compose("train", *settings(tmp_path, "sft", f"data={source}", "dry_run=true", setting))
    check_data(cfg, stage_row("sft"))  # reads no text


@pytest.mark.parametrize("key", ["size", "test_size"])
def test_a_size_of_rows_that_are_not_drawn_is_refused(tmp_path, key):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(GOOD)
    files = [f"data.tasks.{task}.{split}={rows}" for task in ("chat", "identity") for split in ("train", "test")]
    files.append("data.tasks.identity.source=local")  # its size is that of the option, not of the command
    check_data(compose("train", *settings(tmp_path, "sft", *files)), stage_row("sft"))
    for task in ("chat", "identity"):
        said = refused(tmp_path, "sft", *files, f"data.tasks.{task}.{key}=5")
        assert said.startswith(f"data.tasks.{task}.{key}=5: only generated rows") and f"{task}.limit takes" in said


@pytest.mark.parametrize("part, key", [("train", "data.mixture.sft"), ("test", "data.mixture.sft_val")])
def test_repeats_that_come_to_no_row_are_refused(tmp_path, part, key):
    files = {"train": tmp_path / "train.jsonl", "test": tmp_path / "test.jsonl"}
    for path in files.values():
        path.write_text(GOOD * 4)
    lines = [f"data.tasks.chat.{name}={path}" for name, path in files.items()]
    shares = ["data.mixture.sft.chat=0.25", "data.mixture.sft_val={chat: 0.25, identity: 1}"]
    assert [
        len(mixture) for mixture in finetune.mixtures(compose("train", *settings(tmp_path, "sft", *lines, *shares)))
    ]
    cfg = compose("train", *settings(tmp_path, "sft", *lines, *shares, f"{key}.chat=0.2"))
    with pytest.raises(UserError, match=rf"{key}.chat=0.2: of 4 {part} rows that is none; give 0.25 or more, or 0 to"):
        finetune.mixtures(cfg)


def test_nothing_to_train_on_is_said_first(tmp_path):
    said = refused(tmp_path, "midtrain", "data.mixture.midtrain={}")
    assert said == "data.mixture.midtrain names no task with repeats above 0: nothing to train on"
    folder = tmp_path / "conf"
    (folder / "data").mkdir(parents=True)
    (folder / "data/mytext.yaml").write_text(f"defaults: [_local, _self_]\npath: {tmp_path}\n")
    from llm.cli import overrides

    for stage, key in (("sft", "data.mixture.sft"), ("midtrain", "data.mixture.midtrain"), ("grpo", "data.rl")):
        cfg = overrides.compose("train", ["data=mytext", f"stage={stage}"], Sources((CONF, folder)))
        with pytest.raises(UserError, match=rf"^data\.tasks is empty: stage={stage} .*{key}$"):
            check_data(cfg, stage_row(stage))


def test_rows_are_checked_before_weights_are_loaded(tmp_path):
    rows, good = tmp_path / "rows.jsonl", tmp_path / "good.jsonl"
    rows.write_text(GOOD + BAD)
    good.write_text(GOOD)
    lines = [f"data.tasks.chat.train={rows}", f"data.tasks.chat.test={good}"]
    with pytest.raises(UserError, match="judge"):
        finetune.build(compose("train", *settings(tmp_path, "sft", *lines)), tmp_path / "no model here")
    rows.write_text(json.dumps({"question": "1 + 1?", "answer": "no number"}) + "\n")
    lines = ["data.tasks.arithmetic.source=local", f"data.tasks.arithmetic.train={rows}", "stage=grpo"]
    cfg = compose("train", "experiment=tiny", *lines, f"data.tasks.arithmetic.test={rows}")
    with pytest.raises(UserError, match=r"data\.tasks\.arithmetic\.train"):
        grpo.build(cfg, tmp_path / "no model here")
