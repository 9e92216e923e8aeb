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
