"""Mixtures: a mapping on the command line is the whole mixture, one in a YAML file is merged; text needs no tasks."""

import pytest
from conftest import compose, run_cli

from llm.cli import overrides
from llm.cli.compose import find_sources, whole_mixtures
from llm.cli.overrides import check_overrides
from llm.errors import UserError


def mixture(*lines: str, stage: str = "sft", config_dir: str | None = None) -> dict:
    return dict(composed(lines, config_dir).data.mixture[stage])


def composed(lines, config_dir: str | None):
    sources, lines = find_sources("train", [*(["--config-dir", config_dir] if config_dir else []), *lines])
    return overrides.compose("train", lines, sources)


def test_a_mapping_on_the_command_line_is_the_whole_mixture():
    assert mixture("data.mixture.sft={smalltalk: 2}") == {"smalltalk": 2}
    assert mixture("data.mixture.midtrain={}", stage="midtrain") == {}
    assert dict(compose("train", "stage=sft", "data.mixture.sft={choice: 1}").data.mixture.sft) == {"choice": 1}
    rest = mixture("data.mixture.sft={smalltalk: 2}", stage="midtrain")
    assert rest == mixture(stage="midtrain") and len(rest) == 6


def test_a_whole_mixture_takes_tasks_that_it_had_not():
    assert mixture("data=local", "data.mixture.sft={mmlu: 1}") == {"mmlu": 1}
    check_overrides("train", ["data=local", "data.mixture.sft={mmlu: 1}"])
    assert mixture("data.mixture.sft_val={choice: 1}", stage="sft_val") == {"choice": 1}


def test_settings_are_taken_in_their_order():
    assert mixture("data.mixture.sft={choice: 1}", "+data.mixture.sft.identity=3") == {"choice": 1, "identity": 3}
    assert mixture("data.mixture.sft.identity=3", "data.mixture.sft={choice: 1}") == {"choice": 1}
    assert mixture("data.mixture.sft={choice: 1}", "data.mixture.sft={identity: 1}") == {"identity": 1}
    assert mixture("data.mixture.sft={choice: 1}", "experiment=own", "data=embedded") == {"choice": 1}


def test_single_repeats_and_tasks_go_on_merging():
    assert mixture("data.mixture.sft.choice=7") == mixture() | {"choice": 7}
    assert len(compose("train", "data.tasks.choice={limit: 3}").data.tasks) == 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data.mixture.sft={chioce: 2}", "data.mixture.sft.choice.*data.tasks has choice, arithmetic"),
        ("data.mixture.sft={choice: many}", "many"),
        ("data.mixture={sft: {choice: 1}}", "give each mixture by itself, as in data.mixture.sft="),
        ("data.mixture.sfft={choice: 1}", "data.mixture.sft"),
    ],
)
def test_a_wrong_mixture_is_one_line(line, message):
    with pytest.raises(UserError, match=message) as caught:
        check_overrides("train", [line])
    assert "\n" not in str(caught.value)


def test_jobs_of_a_sweep_share_a_whole_mixture():
    lines = ["-m", "stage=midtrain,sft", "data.mixture.sft={choice: 1},{identity: 1}"]
    check_overrides("train", lines)
    changed = whole_mixtures("train", lines)
    assert changed[-1] == "++data.mixture.sft={choice: 1},{identity: 1}" and "~data.mixture.sft.choice" in changed
    with pytest.raises(UserError, match="the jobs of this sweep have different tasks"):
        whole_mixtures("train", ["-m", "data=embedded,own", "data.mixture.sft={}"])


def test_what_is_printed_before_training_is_the_whole_mixture():
    done = run_cli("train.py", "experiment=demo", "stage=sft", "data.mixture.sft={choice: 1}", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "    sft:\n      choice: 1" in done.stdout
    assert "identity" not in done.stdout.split("    sft:\n")[1].split("    midtrain_val")[0].split("sft_val")[0]


# ---------------------------------------------------------------------------------------------------------------------
# YAML files


@pytest.fixture
def files(tmp_path):
    """Writes a YAML file below a folder for --config-dir and returns that folder."""

    def write(name: str, text: str) -> str:
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(tmp_path)

    return write


def test_an_experiment_a_mixture_option_and_local_defaults_merge(files):
    full, sft = mixture(), "{choice: 9, identity: 0}"
    changed = full | {"choice": 9, "identity": 0}
    folder = files("experiment/mine", f"# @package _global_\ndata: {{mixture: {{sft: {sft}}}}}\n")
    assert mixture("experiment=mine", config_dir=folder) == changed
    folder = files("mixture/mine", f"# @package data.mixture\nsft: {sft}\n")
    assert mixture("mixture=mine", config_dir=folder) == changed
    assert mixture("mixture=mine", "data.mixture.sft={choice: 1}", config_dir=folder) == {"choice": 1}
    folder = files("local/train", f"data: {{mixture: {{sft: {sft}}}}}\n")
    assert mixture(config_dir=folder) == changed


def test_an_experiment_adds_one_task_and_keeps_the_others(files):
    task = "{type: chat, source: local, train: a.jsonl, test: b.jsonl}"
    folder = files("experiment/mine", f"# @package _global_\ndata: {{tasks: {{poems: {task}}}}}\n")
    assert len(composed(["experiment=mine"], folder).data.tasks) == 7
    assert mixture("experiment=mine", "data.mixture.sft={poems: 1}", config_dir=folder) == {"poems": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Text without tasks


def test_an_option_of_text_alone_is_complete(files, tmp_path):
    folder = files("data/mytext", f"defaults: [_local, _self_]\npath: {tmp_path}\n")
    for stage in ("tokenizer", "pretrain", "sft"):
        check_overrides("train", ["--config-dir", folder, "data=mytext", f"stage={stage}", "experiment=tiny"])
    data = composed(["data=mytext"], folder).data
    assert (data.tasks, data.mixture.sft, data.rl, data.eval) == ({}, {}, None, [])
    with pytest.raises(UserError, match=r"no task 'x' in data\.tasks|data.tasks has no task"):
        check_overrides("train", ["--config-dir", folder, "data=mytext", "data.mixture.sft={x: 1}"])


def test_a_key_without_a_value_is_one_line(files):
    folder = files("data/bare", "name: local\npath: x\n")
    for lines in (["data.mixture.sft={x: 1}"], ["+data.tasks.x.limit=1"], []):
        with pytest.raises(UserError, match=r"data\.\w+.* has no ") as caught:
            check_overrides("train", ["--config-dir", folder, "data=bare", *lines])
        assert "\n" not in str(caught.value)
