"""The recipe `A stage` of docs/extend.md, done as written: a stage from outside is trained, evaluated and served."""

import json
import os
import re
from dataclasses import replace

import pytest
from conftest import REPO, compose, run_cli

PAGE = REPO / "docs" / "extend.md"
TINY = ("experiment=tiny", "stage.sample_every=0")


def files_of(page: str) -> dict[str, str]:
    """{path: content} of the code blocks of the section `A stage` that a line with a file's name precedes."""
    section = page.partition("\n## A stage\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^`([\w./]+)`\n```\w+\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the recipe's files, some text, and a run `tiny` trained up to the new stage."""
    root = tmp_path_factory.mktemp("door")
    recipe = files_of(PAGE.read_text(encoding="utf-8"))
    assert 1 <= len(recipe) <= 3 and sum(len(text.splitlines()) for text in recipe.values()) <= 40
    lines = [json.dumps({"text": f"The red fox number {i} lives near the river and likes pears."}) for i in range(40)]
    for name, text in (recipe | {"my_text/one.jsonl": "\n".join(lines)}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    succeeds(root, "train.py", "-m", "experiment=tiny", "stage=tokenizer,pretrain", "max_steps=1")
    own = ("--config-dir", ".", "plugins=[my_stage]", "stage=anneal", "data=local", "data.path=my_text")
    succeeds(root, "train.py", *own, *TINY, "data.val_size=10", "stage.tokens=1024", "stage.eval_tokens=1024")
    return root


def succeeds(root, *command):
    done = run_cli(*command, cwd=root)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def test_the_stage_is_trained_on_other_text_from_the_weights_of_its_parent(folder):
    record = json.loads((folder / "runs/tiny/anneal/run.json").read_text())
    assert record["status"] == "finished" and record["steps"] == 2  # stage.tokens / batch.tokens_per_step
    assert record["parent"].endswith("tiny/pretrain/model") and record["config"]["data"]["path"] == "my_text"
    assert record["config"]["plugins"] == ["my_stage"]
    report = (folder / "runs/tiny/report.md").read_text()
    assert re.search(r"\| pretrain .*\n\| anneal ", report) and "Problem" not in report


def test_pretraining_continues_the_network_of_its_parent_where_the_row_says_so(folder, monkeypatch):
    import torch

    from llm.checkpoint.model_folder import load_model_folder
    from llm.config import stages
    from llm.stages import pretrain

    monkeypatch.setattr(stages, "_TABLE", dict(stages._TABLE))
    changes = {"name": "again", "rank": 11, "parents": ("pretrain",), "takes": "weights"}
    stages.register_stage(replace(stages.stage_row("pretrain"), **changes))
    cfg, parent = compose("train", *TINY, "stage=pretrain", "stage.eval_every=0"), folder / "runs/tiny/pretrain/model"
    fresh = pretrain.build(cfg, folder / "runs/tiny/tokenizer/model").module.net.state_dict()
    cfg.stage.name = "again"
    built, trained = pretrain.build(cfg, parent).module.net.state_dict(), load_model_folder(parent)[0].state_dict()
    assert all(torch.equal(built[name], value) for name, value in trained.items())
    assert not all(torch.equal(built[name], value) for name, value in fresh.items())


def test_it_is_evaluated_and_served_where_the_command_names_the_plugin(folder):
    succeeds(folder, "evaluate.py", "run=tiny", "stage=anneal", "plugins=[my_stage]", "eval=[bpb]", "eval.tokens=1024")
    scores = json.loads((folder / "runs/tiny/anneal/eval.json").read_text())
    logged = json.loads((folder / "runs/tiny/anneal/run.json").read_text())["metrics"]["bpb"]
    assert scores["bpb"] == pytest.approx(logged, rel=0.02)  # bf16, other micro-batches
    answer = succeeds(folder, "serve.py", "run=tiny", "trust=[my_stage]", "prompt=The red fox", "max_new_tokens=4")
    assert answer.stdout.strip() and "base model" in answer.stderr


def test_sft_starts_from_it_though_its_plugin_is_not_loaded(folder, monkeypatch, capsys):
    from llm.stages.run_stage import run_stage

    monkeypatch.chdir(folder)
    run_stage(compose("train", *TINY, "stage=sft", "init_from=tiny/anneal", "max_steps=1", "stage.eval_every=0"))
    assert json.loads((folder / "runs/tiny/sft/run.json").read_text())["parent"].endswith("tiny/anneal/model")


def test_without_the_plugin_the_stage_is_named_with_a_hint(folder):
    environment = {"PYTHONPATH": str(REPO)}  # and not the folder that holds my_stage
    other = folder / "elsewhere"
    other.mkdir(exist_ok=True)
    command = ("serve.py", f"paths.runs={folder}/runs", "run=tiny", "stage=anneal")
    served = run_cli(*command, cwd=other, **environment)
    assert served.returncode == 2 and "trust=[my_stage]" in served.stderr
    served = run_cli(*command, "trust=[my_stage]", cwd=other, **environment)
    assert served.returncode == 2 and "plugins=[my_stage]: no module 'my_stage'" in served.stderr
    assert os.listdir(other) == []
