"""The table of stages: rows from outside, what follows from a row, and no stage's name anywhere else."""

import ast
import sys

import pytest
from conftest import REPO, compose
from omegaconf import OmegaConf

from llm.checkpoint.resume import inspect
from llm.config import stages
from llm.config.schema import known_keys
from llm.config.stage_schema import ChatStage
from llm.config.stages import Stage, all_stages, register_stage, stage_names, stage_row
from llm.errors import UserError
from llm.experiments.table import as_text, read_rows
from llm.report.report import build_report
from llm.run.config_diff import diff_configs, neutral_keys
from llm.run.stage_folder import RunDir, find_further, find_parent, find_stage, stage_before, write_manifest
from tasks.registry import fetched_tasks, held_out_weights

ROW = {"name": "polish", "rank": 35, "kind": "chat", "schema": ChatStage, "build": "mine.build", "parents": ("sft",)}


@pytest.fixture
def polish(monkeypatch):
    """A chat stage of a plugin, after sft; the table is as it was afterwards."""
    monkeypatch.setattr(stages, "_TABLE", dict(stages._TABLE))
    register_stage(Stage(**ROW))
    return stage_row("polish")


def finish(root, run, stage, **config):
    folder = root / run / stage
    write_manifest(folder, {"stage": stage, "status": "finished", "config": config})
    (folder / "model").mkdir()
    for name in ("tokenizer.tiktoken", "model.safetensors"):
        (folder / "model" / name).write_text("x")
    return folder / "model"


# ----- rows


@pytest.mark.parametrize(
    "change,words",
    [
        ({"name": "sft"}, "a stage of this name exists already"),
        ({"name": "my-stage"}, "plain word"),
        ({"name": "polish_val"}, "plain word"),
        ({"parents": ("sfft",)}, "parents name 'sfft'"),
        ({"kind": "speech"}, "kind='speech', must be one of data, tokenizer, text, chat, rl, preference"),
        ({"takes": "all"}, "takes='all', must be one of nothing, tokenizer, weights"),
        ({"takes": "nothing"}, "contradict"),
        ({"rank": 30}, "rank=30 must be above that of a parent"),
    ],
)
def test_a_row_that_cannot_be_is_refused(monkeypatch, change, words):
    monkeypatch.setattr(stages, "_TABLE", dict(stages._TABLE))
    with pytest.raises(UserError, match=words):
        register_stage(Stage(**(ROW | change)))
    assert "polish" not in stage_names()


LATER = ("distill", "best_of_n", "dpo", "ppo", "grpo")


def test_rows_are_in_the_order_of_the_pipeline(polish):
    assert stage_names() == ["tokenizer", "pretrain", "midtrain", "sft", "reward", "polish", *LATER]
    register_stage(polish)  # a module that is imported twice
    with pytest.raises(UserError, match="stage=poolish does not exist; choose one of download, check, .*plugins="):
        stage_row("poolish")


def test_builders_and_schemas_of_the_table_can_be_imported():
    for row in all_stages():
        for name in filter(None, (row.run, row.build, row.derive, row.schema)):
            assert callable(stages.load_object(name, row.name)), name
    with pytest.raises(UserError, match="builder: no.such.thing cannot be imported"):
        stages.load_object("no.such.thing", "builder")
    with pytest.raises(UserError, match="llm.config.stages has no 'nothing'"):
        stages.load_object("llm.config.stages.nothing", "builder")


# ----- what follows from a row


def test_a_chat_stage_of_a_plugin_has_its_mixture(polish):
    cfg = compose("train", "stage=sft", "+data.mixture.polish.choice=2", "+data.mixture.polish_val.smalltalk=1")
    assert dict(cfg.data.mixture.polish) == {"choice": 2}
    assert held_out_weights(cfg.data, "polish") == {"smalltalk": 1}
    assert {"data.mixture.polish", "data.mixture.polish_val", "data.mixture.sft"} <= known_keys("train").keys()
    with pytest.raises(UserError, match=r"data\.mixture\.polisch.*did you mean 'data\.mixture\.polish'"):
        compose("train", "stage=sft", "data.mixture.polisch={}")
    cfg.data.tasks.choice.merge_with({"source": "hub", "repo": "a/b", "train": "train", "test": "test"})
    cfg.data.mixture.midtrain = cfg.data.mixture.sft = {"smalltalk": 1}
    cfg.data.eval = []
    assert fetched_tasks(cfg.data) == {"choice": ["train"]}


def test_without_the_plugin_its_mixture_is_no_key():
    with pytest.raises(
        UserError, match=r"data\.mixture\.polish: there is no chat stage of this name \(midtrain, sft\)"
    ):
        compose("train", "stage=sft", "+data.mixture.polish.choice=2")


def test_runs_compare_equal_beside_a_stage_that_they_did_not_know(polish):
    old = OmegaConf.to_container(compose("train", "stage=sft"))
    del old["data"]["mixture"]["polish"], old["data"]["mixture"]["polish_val"]
    new = OmegaConf.to_container(compose("train", "stage=sft"))
    assert diff_configs(old, new, neutral_keys("sft")) == diff_configs(old, new, neutral_keys("pretrain")) == []
    new["data"]["mixture"]["polish"] = {"choice": 1.0}
    assert diff_configs(old, new, neutral_keys("sft")) == []
    assert [key for key, *_ in diff_configs(old, new, neutral_keys("polish"))] == ["data.mixture.polish.choice"]


def test_parents_follow_the_row(polish, tmp_path):
    sft, pretrain = finish(tmp_path, "demo", "sft"), finish(tmp_path, "demo", "pretrain")
    cfg = OmegaConf.create({"stage": {"name": "polish"}, "data": {"mixture": {}}})
    assert stage_before(cfg) == "sft" and find_parent(tmp_path, "demo", "polish", None, "sft") == sft
    assert find_parent(tmp_path, "new", "polish", "demo/pretrain") == pretrain
    (sft / "model.safetensors").unlink()
    with pytest.raises(UserError, match="stage=polish cannot start from demo/sft.*no model.safetensors"):
        find_parent(tmp_path, "demo", "polish")


def test_a_key_names_a_further_model(polish, tmp_path):
    pretrain, sft = finish(tmp_path, "big", "pretrain"), finish(tmp_path, "big", "sft")
    assert find_further(tmp_path, "new", "polish", "stage.teacher", "big") == sft
    assert find_further(tmp_path, "new", "polish", "stage.teacher", "big/pretrain") == pretrain
    assert find_further(tmp_path, "new", "polish", "stage.teacher", str(sft)) == sft
    for value in ("nowhere", "big/sfft"):
        with pytest.raises(UserError, match=f"stage.teacher={value}"):
            find_further(tmp_path, "new", "polish", "stage.teacher", value)


def test_further_models_are_found_before_work_and_must_not_change(monkeypatch, tmp_path):
    from llm.stages.parents import check_parents_unchanged, find_parents, known_parents

    monkeypatch.setattr(stages, "_TABLE", dict(stages._TABLE))
    register_stage(Stage(**ROW, other_parents=("stage.teacher", "stage.judge")))
    sft, teacher = finish(tmp_path, "demo", "sft"), finish(tmp_path, "big", "sft")
    stage = {"name": "polish", "teacher": "big/sft", "judge": None}
    cfg = OmegaConf.create({"stage": stage, "data": {"mixture": {}}, "init_from": None, "dry_run": False})
    run = RunDir(tmp_path, "demo")
    assert find_parents(cfg, stage_row("polish"), run) == (sft, {"stage.teacher": teacher})
    known = {"parent": str(sft), "parent_id": None, "further": {"stage.teacher": [str(teacher), None]}}
    assert known_parents(known) == {"init_from": (str(sft), None), "stage.teacher": (str(teacher), None)}
    check_parents_unchanged(run, "polish", known)
    write_manifest(tmp_path / "big" / "sft", {"status": "finished", "finished": "later"})
    with pytest.raises(UserError, match="trained from an earlier version of .*big/sft/model"):
        check_parents_unchanged(run, "polish", known)
    cfg.stage.teacher = "bigg"
    with pytest.raises(UserError, match="stage.teacher=bigg is neither a run nor a folder"):
        find_parents(cfg, stage_row("polish"), run)


def test_two_stages_at_the_end_of_the_pipeline_have_to_be_told_apart(polish, tmp_path):
    register_stage(Stage(**(ROW | {"name": "prefer"})))
    finish(tmp_path, "demo", "sft")
    assert find_stage(tmp_path, "demo").name == "sft"
    finish(tmp_path, "demo", "polish")
    assert find_stage(tmp_path, "demo").name == "polish"
    finish(tmp_path, "demo", "prefer")
    with pytest.raises(UserError, match="run=demo has 2 stages.*choose stage=polish or stage=prefer"):
        find_stage(tmp_path, "demo")
    assert find_stage(tmp_path, None, "prefer").name == "prefer"


# ----- stages whose plugin is not loaded


def test_a_stage_of_a_missing_plugin_is_shown_and_named(tmp_path, capsys):
    finish(tmp_path, "demo", "sft")
    finish(tmp_path, "demo", "alien", plugins=["no_such_plugin"])
    assert RunDir(tmp_path, "demo").stages() == ["sft", "alien"]
    header, rows = as_text(read_rows(tmp_path))
    assert [row[header.index("stage")] for row in rows] == ["sft", "alien"]
    report = build_report(tmp_path / "demo").read_text()
    assert "| alien " in report and "its plugins: no_such_plugin" in report
    inspect(tmp_path / "demo")
    assert "demo/alien: finished" in capsys.readouterr().out
    assert find_stage(tmp_path, "demo").name == "sft"
    assert "trust=[no_such_plugin]" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"alien/run.json: config.plugins is 'no_such_plugin', .*trust="):
        find_stage(tmp_path, "demo", "alien")
    finish(tmp_path, "demo", "stray")
    with pytest.raises(UserError, match="stage=stray of run=demo is not in the table.*name the plugin"):
        find_stage(tmp_path, "demo", "stray")


def test_the_plugins_of_a_run_are_imported_before_its_stage_is_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_TABLE", dict(stages._TABLE))
    code = f"from llm.config.stages import Stage, register_stage\nregister_stage(Stage(**{ROW | {'schema': ''}}))\n"
    (tmp_path / "polish_plugin.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    finish(tmp_path / "runs", "demo", "sft")
    finish(tmp_path / "runs", "demo", "polish", plugins=["polish_plugin"])
    with pytest.raises(UserError, match="code of somebody's own"):
        find_stage(tmp_path / "runs", "demo", "polish")
    assert "polish_plugin" not in sys.modules
    monkeypatch.setattr("llm.config.trust._trusted", {"polish_plugin"})
    assert find_stage(tmp_path / "runs", "demo").name == "polish"


# ----- names


OWN = (
    "llm/config/stages.py",
    *(f"llm/stages/{n}.py" for n in ("check", "download", "tokenizer", "pretrain", "finetune", "grpo", "dpo", "ppo")),
    "llm/objectives.py",  # losses are called like the stages that made them known
)
NAMES = frozenset(stage_names(in_run=False))
COMMON = frozenset({"tokenizer", "download", "check", "reward"})  # words that also mean other things than a stage


def named_stages(node: ast.AST) -> set[str]:
    """Names of stages that a comparison, a pattern, a mapping or an access to a mixture asks for."""
    if isinstance(node, ast.Compare):
        return {c.value for part in (node.left, *node.comparators) for c in ast.walk(part) if is_name(c, NAMES)}
    if isinstance(node, ast.MatchValue):
        return {node.value.value} if is_name(node.value, NAMES) else set()
    if isinstance(node, ast.Dict):
        return {k.value for k in node.keys if is_name(k, NAMES - COMMON)}
    if isinstance(node, ast.Attribute):
        return {node.attr} & (NAMES - COMMON)
    if isinstance(node, ast.Subscript):
        return {node.slice.value} if is_name(node.slice, NAMES - COMMON) else set()
    return set()


def is_name(node: ast.AST | None, names: frozenset[str]) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names


def test_only_the_table_and_the_builders_ask_for_a_stage_by_name():
    found = []
    for path in (p for folder in ("llm", "callbacks", "tasks") for p in (REPO / folder).rglob("*.py")):
        place = path.relative_to(REPO).as_posix()
        if place not in OWN:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [f"{place}:{node.lineno}: {names}" for node in ast.walk(tree) if (names := named_stages(node))]
    assert found == []


@pytest.mark.parametrize(
    "code",
    ["if stage == 'sft': pass", "stage in ('pretrain', 'x')", "{'midtrain': 1}[stage]", "data.mixture.sft", "m['sft']"],
)
def test_the_search_for_names_finds_them(code):
    assert any(named_stages(node) for node in ast.walk(ast.parse(code)))
