"""evaluate.py on a run folder with a small untrained model and task files on disk."""

import errno
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import compose, run_cli
from eval_data import TEXT, data_config, jsonl
from omegaconf import OmegaConf

from callbacks.samples import Samples
from llm.checkpoint.model_folder import save_model_folder
from llm.data.documents import text_id
from llm.data.sources import build_source
from llm.errors import UserError
from llm.eval import core, evaluate
from llm.eval.bits_per_byte import bits_per_byte
from llm.eval.evaluate import data_title, merge_scores, print_scores, run_evaluation, same_data, warn_of_change
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.run.stage_folder import RunDir, read_manifest, write_manifest
from llm.tokenizer.bpe import Tokenizer
from llm.utils.files import read_json, write_json


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs folder with finished pretrain, sft and grpo stages of one untrained model."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = Tokenizer.train([TEXT + "A B C D which question answer letter only 0 1 2 3 4 5 6 7 8 9"], 290)
    net = GPT(GPTConfig(1, 1, 1, 16, 16, seq_len=256, vocab_size=tokenizer.vocab_size)).init_weights(0)
    data = data_config(folder / "data")
    for stage in ("pretrain", "sft", "grpo"):
        stage_dir = RunDir(folder / "runs", "demo").stage_dir(stage)
        settings = {"name": stage} | ({"train_on": "assistant"} if stage == "sft" else {})
        config = {"stage": settings, "data": data, "seed": 42, "precision": {"compute": "fp32"}}
        config |= {"trainer": {"accelerator": "cpu"}, "model": {"depth": 1}}
        write_manifest(stage_dir, {"stage": stage, "status": "finished", "config": config, "seconds": 1.0})
        save_model_folder(stage_dir / "model", net, tokenizer)
    return folder / "runs"


def settings(runs, sections, **more):
    """The composed configuration of conf/evaluate.yaml, as run_app hands it over."""
    chosen = {name: name in sections for name in ("bpb", "chat", "core", "lm_eval", "samples")}
    options = {"tokens": 2048, "max_per_task": 4, "max_new_tokens": 8, "batch_size": 4, "bundle": None}
    options |= {"core_tasks": None, "num_samples": 1, "ks": None, "temperature": 0.8, "python": False, "seq_len": None}
    options |= {"tasks": None, "num_fewshot": None, "include_path": None, "chat_template": False, "judges": {}}
    config = {
        "run": "demo",
        "stage": "sft",
        "model": None,
        "verify": False,
        "data": None,
        "paths": {"runs": str(runs), "data": str(runs)},
        "eval": options | chosen,
    }
    return OmegaConf.create(OmegaConf.merge(config, more))


def test_scores_of_a_chat_stage(runs, capsys):
    scores = run_evaluation(settings(runs, ["bpb", "chat", "samples"]))
    assert scores == read_json(runs / "demo" / "sft" / "eval.json")
    assert scores["bpb"] > 1 and scores["bpb_text"] > 1 and scores["bpb"] != scores["bpb_text"]
    assert list(scores["chat"]) == ["choice", "sums"]
    choice, sums = scores["chat"]["choice"], scores["chat"]["sums"]
    assert choice["n"] == 4 and choice["baseline"] == 0.25 and sums["baseline"] == choice["too_long"] == 0
    assert [s["n"] for s in choice["subjects"].values()] == [2, 2] and sum(choice["verdicts"].values()) == 4
    assert scores["chatcore"] == pytest.approx(((choice["accuracy"] - 0.25) / 0.75 + sums["accuracy"]) / 2)
    lines = (runs / "demo" / "sft" / "records" / "choice.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["index"] for record in records] == [0, 2, 4, 6] and records[0]["subject"] == "fox0"
    assert all(record["output"] in "ABCD" and record["verdict"] in ("pass", "fail") for record in records)
    assert records[1]["prompt"].startswith("Fox 2?")
    assert len(scores["samples"]) == 6 and all(s.keys() == {"prompt", "completion"} for s in scores["samples"])
    output = capsys.readouterr().out
    assert "ChatCORE" in output and "fox1" in output and "bpb_text" in output and "eval.json" in output
    assert "choice" in (runs / "demo" / "report.md").read_text()


def test_pretraining_is_scored_on_text_only(runs, capsys):
    scores = run_evaluation(settings(runs, ["bpb", "chat", "samples"], stage="pretrain"))
    assert scores.keys() == {"bpb", "samples", "scored"} and "chat: left out" in capsys.readouterr().out
    assert all(sample["prompt"].startswith("Page 1.") for sample in scores["samples"])  # the last shard is held out
    # An untrained model is uniform over the vocabulary, whatever the text: log2(290) bits per token.
    assert 1 < scores["bpb"] < 8.2


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_padding_is_no_token_that_was_measured(runs, stage):
    """Few rows are held out; micro-batches of 4 and of 64 are filled up with different numbers of empty ones."""
    measured = []
    for rows in (4, 64):
        scores = run_evaluation(settings(runs, ["bpb"], stage=stage, eval={"tokens": 10**6, "batch_size": rows}))
        measured.append((scores["bpb"], scores["scored"]["bpb"]))
    (first, origin), (second, again) = measured
    assert origin == again and first == pytest.approx(second, rel=1e-5) and 0 < origin["tokens"] < 64 * 256


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_samples_take_the_prompts_that_the_training_was_given(runs, stage):
    folder, given = runs / "demo" / stage, ["The fox", "Which one?"]
    before = read_manifest(folder)
    config = before["config"]
    write_manifest(folder, before | {"config": config | {"stage": config["stage"] | {"prompts": given}}})
    scores = run_evaluation(settings(runs, ["samples"], stage=stage))
    write_manifest(folder, before)
    assert [sample["prompt"] for sample in scores["samples"]] == given and "other_data" not in scores


def test_a_line_says_that_held_out_data_gives_no_prompt(runs, capsys, monkeypatch):
    """Say it at the start of a training, and in an evaluation."""
    monkeypatch.setattr("llm.eval.evaluate.text_prompts", lambda documents: [])
    assert run_evaluation(settings(runs, ["samples"], stage="pretrain"))["samples"] == []
    assert "samples: none, the held-out data gives no prompt" in capsys.readouterr().out
    trainer = SimpleNamespace(is_global_zero=True)
    for prompts, every in (([], 2), (["text"], 2), ([], 0)):
        module = SimpleNamespace(context=SimpleNamespace(prompts=prompts), row_is_missing=False)
        Samples(every).on_train_start(trainer, module)
    assert capsys.readouterr().out == "samples: none, the held-out data gives no prompt\n"


def test_samples_do_nothing_to_the_terminal(capsys, monkeypatch):
    """Show control signs of a model's text, in an evaluation and while training; loggers get the text as it is."""
    drawn = [{"prompt": "a\x1b[31m", "completion": "b\u202e\nc"}]
    print_scores("title", {"samples": drawn})
    assert capsys.readouterr().out == "\n> a\\x1b[31m\nb\\u202e\nc\n"
    logged = []
    for name, stand_in in (
        ("draw_samples", lambda *args: drawn),
        ("full_model", lambda net: net),
        ("Engine", lambda *args: None),
        ("log_table", lambda loggers, name, columns, rows, step: logged.extend(rows)),
    ):
        monkeypatch.setattr(f"callbacks.samples.{name}", stand_in)
    trainer = SimpleNamespace(is_global_zero=True, loggers=[])
    module = SimpleNamespace(net=torch.nn.Identity(), context=SimpleNamespace(tokenizer=None, prompts=["a"]))
    Samples(1).act(trainer, module, 3)
    assert capsys.readouterr().out == "  step 3 | a\\x1b[31m -> b\\u202e / c\n" and logged[0][0] == "a\x1b[31m"


def test_public_web_text_brings_prompts_for_pretraining_alone():
    prompts = {
        stage: compose("train", "data=climbmix", f"stage={stage}").stage.prompts for stage in ("pretrain", "sft")
    }
    assert len(prompts["pretrain"]) == 7 and prompts["pretrain"][0] == "The capital of France is"
    assert prompts["sft"] is None and compose("train").stage.prompts is None
    assert compose("train", "stage=sft", "stage.prompts=[Hello]").stage.prompts == ["Hello"]
    with pytest.raises(UserError, match=r"stage\.prompts\.1=: must be a text that is not empty"):
        compose("train", "stage.prompts=[a,'']")


def test_reinforcement_learning_is_scored_on_the_conversations_of_sft(runs):
    run_evaluation(settings(runs, ["bpb"]))
    scores = run_evaluation(settings(runs, ["bpb"], stage="grpo"))
    assert scores["bpb"] == read_json(runs / "demo" / "sft" / "eval.json")["bpb"]


def test_held_out_data_without_bytes_is_not_measured(runs, monkeypatch, capsys):
    monkeypatch.setattr("llm.eval.evaluate.bits_per_byte", lambda net, batches, sizes: bits_per_byte(net, [], sizes))
    scores = run_evaluation(settings(runs, ["bpb"], stage="pretrain"))
    assert scores["bpb"] is None
    output = capsys.readouterr().out
    assert "bpb: not measured, the targets have no bytes" in output and "inf" not in output
    assert "Infinity" not in (runs / "demo" / "pretrain" / "eval.json").read_text()


def test_best_stage_is_the_default_and_the_command_line_may_give_other_data(runs):
    saved = read_manifest(runs / "demo" / "sft")["config"]["data"]
    scores = run_evaluation(settings(runs, ["chat"], stage=None, data=saved | {"eval": ["sums"]}))
    assert list(scores["chat"]) == ["sums"] and (runs / "demo" / "grpo" / "eval.json").is_file()


def test_bits_per_byte_of_another_text_replace_no_score_of_the_stage(runs, tmp_path, capsys):
    """They stand beside it under their own name, and eval.json says of each what was measured."""
    own = run_evaluation(settings(runs, ["bpb"], stage="pretrain"))
    saved = read_manifest(runs / "demo" / "pretrain")["config"]["data"]
    rows = "".join(json.dumps({"text": f"Another text {i}. {TEXT}"}) + "\n" for i in range(40))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(rows)
    scores = run_evaluation(settings(runs, ["bpb"], stage="pretrain", data=saved | {"path": str(tmp_path)}))
    title = f"local {tmp_path}"
    assert scores["bpb"] == own["bpb"] and scores["scored"]["bpb"] == own["scored"]["bpb"]
    other = scores["other_data"][title]
    assert other["scored"]["bpb"]["fingerprint"] != own["scored"]["bpb"]["fingerprint"]
    assert own["scored"]["bpb"]["data"] == f"local {saved['path']}" and "jsonl" in own["scored"]["bpb"]["source"]
    assert f"bpb ({title})" in capsys.readouterr().out
    report = (runs / "demo" / "report.md").read_text()
    assert "## What was scored" in report and f"bpb ({title})" in report
    assert own["scored"]["bpb"]["fingerprint"] in report and other["scored"]["bpb"]["fingerprint"] in report
    write_json(runs / "demo" / "pretrain" / "eval.json", own)


def write_text(folder, word) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("a.jsonl", "b.jsonl"):
        rows = (json.dumps({"text": f"{word} text {number}. {TEXT}"}) for number in range(40))
        (folder / name).write_text("\n".join(rows))


@pytest.fixture
def changing(runs, tmp_path):
    """Return the runs folder and a function that writes another text, on which its stages are said to be trained."""
    folders = [runs / "demo" / stage for stage in ("pretrain", "sft")]
    before = {folder: (read_manifest(folder), read_json(folder / "eval.json")) for folder in folders}
    for folder, (manifest, _) in before.items():
        data = manifest["config"]["data"] | {"path": str(tmp_path / "text")}
        write_manifest(folder, manifest | {"config": manifest["config"] | {"data": data}})
        (folder / "eval.json").unlink(missing_ok=True)
    yield runs, lambda word: write_text(tmp_path / "text", word)
    for folder, (manifest, scores) in before.items():
        write_manifest(folder, manifest)
        if scores is not None:
            write_json(folder / "eval.json", scores)


def test_a_text_that_changed_after_the_training_is_not_the_own_one(changing, tmp_path, capsys):
    runs, write = changing
    folder, title = runs / "demo" / "pretrain", f"local {tmp_path}/text"
    write("Own")
    identity = text_id(build_source(OmegaConf.create(read_manifest(folder)["config"]["data"]), str(tmp_path)))
    write_manifest(folder, read_manifest(folder) | {"data": {"held_out_text": identity}})
    write("Another")
    scores = run_evaluation(settings(runs, ["bpb", "samples"], stage="pretrain"))
    assert f"WARNING: the held-out text of {title} is another than before ({identity} -> " in capsys.readouterr().out
    (name,) = scores["other_data"]
    assert name.startswith(f"{title}, text ") and scores.keys() == {"other_data"}
    assert scores["other_data"][name].keys() == {"bpb", "samples", "scored"}
    write("Own")
    own = run_evaluation(settings(runs, ["bpb"], stage="pretrain"))
    assert own["scored"]["bpb"]["text"] == identity and own["other_data"] == scores["other_data"]


def test_a_text_that_changed_between_evaluations_replaces_no_score(changing, capsys):
    runs, write = changing
    write("Own")
    own = run_evaluation(settings(runs, ["bpb"]))
    write("Another")
    scores = run_evaluation(settings(runs, ["bpb"]))
    (beside,) = scores.pop("other_data").values()
    assert scores == own and beside.keys() == {"bpb_text", "scored"}
    assert beside["scored"]["bpb_text"]["text"] != own["scored"]["bpb_text"]["text"]
    assert "its files have changed" in capsys.readouterr().out


def test_two_other_texts_at_one_place_have_two_names(runs, tmp_path):
    folder = runs / "demo" / "pretrain"
    before, saved = read_json(folder / "eval.json"), read_manifest(folder)["config"]["data"]
    for word in ("One", "Two", "One"):
        write_text(tmp_path / "text", word)
        scores = run_evaluation(settings(runs, ["bpb"], stage="pretrain", data=saved | {"path": f"{tmp_path}/text"}))
    title, found = f"local {tmp_path}/text", scores["other_data"]
    first, second = [name for name in found if name.startswith(title)]
    assert first == title and second == f"{title}, text {found[second]['scored']['bpb']['text'][:8]}"
    write_json(folder / "eval.json", before or {})


def test_tasks_and_samples_of_other_data_replace_none_of_the_stage(runs, tmp_path, capsys):
    """Sections measured one after the other lie together under the name of that data, and so do their records."""
    folder = runs / "demo" / "sft"
    own = run_evaluation(settings(runs, ["bpb", "chat", "samples"]))
    records = (folder / "records" / "sums.jsonl").read_text()
    other = data_config(tmp_path / "other")
    other["tasks"]["sums"]["test"] = other["tasks"]["sums"]["train"]
    assert run_evaluation(settings(runs, ["chat"], data=other))["chat"] == own["chat"]
    scores = run_evaluation(settings(runs, ["bpb", "samples"], data=other))
    beside = scores.pop("other_data")[f"local {other['path']}"]
    assert scores == {key: part for key, part in own.items() if key != "other_data"}
    assert beside.keys() == {"bpb", "bpb_text", "chat", "chatcore", "samples", "scored"}
    assert (folder / "records" / "sums.jsonl").read_text() == records
    assert len(list((folder / "other_data").glob("*/records/sums.jsonl"))) == 1
    assert f"sums (local {other['path']})" in (runs / "demo" / "report.md").read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("more", "same"),
    [
        ({}, True),
        ({"val": None, "encoding": None, "bad_rows": "stop", "shuffle": 42, "packing": "auto"}, True),
        ({"eval": ["sums"], "workers": 7}, True),
        ({"val": "other.txt"}, False),
        ({"encoding": "cp1252"}, False),
        ({"bad_rows": "skip"}, False),
    ],
)
def test_a_key_younger_than_the_run_counts_where_it_is_set(tmp_path, more, same):
    saved = data_config(tmp_path)
    saved = {key: value for key, value in saved.items() if key not in ("val", "encoding", "bad_rows")}
    for is_chat in (False, True):
        assert same_data(OmegaConf.create(saved | more), OmegaConf.create(saved), is_chat) is same


def test_tasks_count_for_chat_stages_only(tmp_path):
    saved = data_config(tmp_path)
    name = next(iter(saved["tasks"]))
    younger = saved | {"tasks": saved["tasks"] | {name: saved["tasks"][name] | {"fields": None, "roles": None}}}
    assert same_data(younger, saved, True)
    other = saved | {"tasks": saved["tasks"] | {name: saved["tasks"][name] | {"test": "other.jsonl"}}}
    assert same_data(other, saved, False) and not same_data(other, saved, True)


def test_preferences_count_for_reward_models_only(tmp_path):
    saved = data_config(tmp_path) | {"preferences": {"mine": {"source": "local", "test": "a.jsonl"}}}
    other = saved | {"preferences": {"mine": {"source": "local", "test": "b.jsonl"}}}
    assert same_data(other, saved, True) and not same_data(other, saved, True, is_reward_model=True)
    assert same_data(saved, saved, True, is_reward_model=True)


def test_files_that_have_changed_since_the_last_score_are_told(tmp_path, capsys):
    path, score = tmp_path / "eval.json", {"data": "local x", "source": "1 file", "tokens": 64}
    write_json(path, {"bpb": 1.0, "scored": {"bpb": score | {"fingerprint": "a"}}})
    warn_of_change(path, {"bpb": 1.0, "scored": {"bpb": score | {"fingerprint": "a"}}})
    warn_of_change(path, {"bpb": 1.0, "scored": {"bpb": score | {"fingerprint": "b", "tokens": 65}}})
    assert capsys.readouterr().out == ""
    warn_of_change(path, {"bpb": 1.0, "scored": {"bpb": score | {"fingerprint": "b"}}})
    assert "WARNING: bpb: the held-out part of local x is another" in capsys.readouterr().out


def test_chat_without_tasks_says_why_it_is_left_out(runs, capsys):
    saved = read_manifest(runs / "demo" / "sft")["config"]["data"]
    run_evaluation(settings(runs, ["chat"], data=saved | {"eval": []}))
    assert "chat: left out, data.eval names no task" in capsys.readouterr().out


def test_several_samples_give_pass_at_k(runs, capsys):
    more = {"eval": {"num_samples": 3, "ks": [1, 3], "max_per_task": 2}}
    scores = run_evaluation(settings(runs, ["chat"], stage="grpo", **more))["chat"]
    assert {"pass@1", "pass@3"} <= scores["sums"].keys() and "pass@1" not in scores["choice"]
    assert scores["sums"]["pass@1"] == pytest.approx(scores["sums"]["accuracy"])
    assert len((runs / "demo" / "grpo" / "records" / "sums.jsonl").read_text().splitlines()) == 6
    assert "pass@3" in capsys.readouterr().out


def test_a_section_that_fails_costs_none_before_it(runs, monkeypatch):
    def broken(self):
        raise UserError("no samples today")

    (runs / "demo" / "pretrain" / "eval.json").unlink(missing_ok=True)
    monkeypatch.setattr("llm.eval.evaluate.StageSubject.samples", broken, raising=False)
    with pytest.raises(UserError, match="no samples today"):
        run_evaluation(settings(runs, ["bpb", "samples"], stage="pretrain"))
    assert read_json(runs / "demo" / "pretrain" / "eval.json").keys() == {"bpb", "scored"}


@pytest.mark.parametrize(("sections", "drawn"), [(["samples"], False), (["bpb"], True), (["bpb", "samples"], True)])
def test_new_scores_stand_in_the_figures_too(runs, sections, drawn, monkeypatch):
    asked = []
    monkeypatch.setattr("llm.eval.evaluate.build_report", lambda folder, redraw: asked.append(redraw))
    run_evaluation(settings(runs, sections))
    assert asked == [drawn]


def test_tasks_are_read_before_anything_is_measured(runs, tmp_path):
    data = data_config(tmp_path)
    (tmp_path / "sums.jsonl").write_text('{"question": "1 + 1?"}\n')
    with pytest.raises(UserError, match="data.tasks.sums.test: .*sums.jsonl row 1: key 'answer' is missing"):
        run_evaluation(settings(runs, ["bpb", "chat"], data=data, paths={"runs": str(runs), "data": str(tmp_path)}))
    scored = read_json(runs / "demo" / "sft" / "eval.json") or {}
    assert data_title(OmegaConf.create(data)) not in scored.get("other_data", {})


@pytest.mark.parametrize(("section", "part"), [("chat", "chat"), ("core", "core_tasks")])
def test_an_evaluation_that_is_stopped_keeps_the_tasks_before(runs, tmp_path, monkeypatch, section, part):
    path, bundle = runs / "demo" / "sft" / "eval.json", tmp_path / "bundle"
    path.unlink(missing_ok=True)
    rows = [{"context": f"fox {i}", "continuation": "apples"} for i in range(3)]
    for name in ("first", "second"):
        jsonl(bundle / f"eval_data/{name}.jsonl", rows)
    task = "{{label: {0}, dataset_uri: {0}.jsonl, num_fewshot: [1], icl_task_type: language_modeling}}"
    (bundle / "core.yaml").write_text(f"icl_tasks: [{task.format('first')}, {task.format('second')}]")
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nfirst,0\nsecond,0\n")
    module = {"chat": evaluate, "core": core}[section]
    name = {"chat": "evaluate_task", "core": "evaluate_core_task"}[section]
    measure, done = getattr(module, name), []

    def stopped(*args, **more):
        if done:
            raise KeyboardInterrupt
        done.append(True)
        return measure(*args, **more)

    monkeypatch.setattr(module, name, stopped)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(settings(runs, [section], eval={"bundle": str(bundle) if section == "core" else None}))
    kept = read_json(path)
    assert list(kept[part]) == [{"chat": "choice", "core": "first"}[section]] and "core" not in kept


def test_a_folder_that_cannot_be_written_is_told_before_the_model_is_loaded(runs, monkeypatch):
    def full(*args, **more):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match="demo/sft: cannot be written: the file system is read-only"):
        run_evaluation(settings(runs, ["bpb"]))


def test_sections_measured_earlier_stay(tmp_path):
    path = tmp_path / "eval.json"
    write_json(path, {"bpb": 1.5, "chat": {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.25}}, "core": 0.1})
    merge_scores(path, {"chat": {"b": {"accuracy": 0.75}}, "samples": []})
    assert read_json(path) == {
        "bpb": 1.5,
        "chat": {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.75}},
        "core": 0.1,
        "samples": [],
    }


def test_core_is_the_mean_of_the_tasks_that_stand_beside_it(tmp_path):
    path = tmp_path / "eval.json"
    some = {"core_tasks": {"a": {"centered": 0.5}}}
    assert "core" not in merge_scores(path, some)  # of all tasks it was never measured
    merge_scores(path, {"core": 0.25, "core_tasks": {"a": {"centered": 0.5}, "b": {"centered": 0.0}}})
    assert merge_scores(path, {"core_tasks": {"b": {"centered": 0.3}}})["core"] == pytest.approx(0.4)
    assert merge_scores(path, {"bpb": 1.5})["core"] == pytest.approx(0.4)


def test_user_errors(runs):
    for more, pattern in (
        ({"stage": "midtrain"}, "stage=midtrain of run=demo is missing"),
        ({"run": "other"}, "run=other"),
        ({"eval": {"bundle": "bundle.zip"}}, "only eval=.core. reads it"),
        ({"eval": {"core": True}}, "needs eval.bundle"),
        ({"eval": {"core": True, "bundle": "bundle.zip"}}, "bundle.zip: no such file"),
        ({"eval": {"chat": False}}, r"eval=\[\]"),
        ({"eval": {"max_per_task": 0}}, "eval.max_per_task=0"),
        ({"eval": {"ks": [1, 4]}}, "eval.ks=.*num_samples=4"),
        ({"eval": {"seq_len": 64}}, "eval.seq_len=64: only model=hf"),
    ):
        with pytest.raises(UserError, match=pattern):
            run_evaluation(settings(runs, ["chat"], **more))
    saved = read_manifest(runs / "demo" / "sft")["config"]["data"]
    for names, pattern in ((["nothing"], "data.eval names 'nothing'"), (["talk"], "talk is only for training")):
        with pytest.raises(UserError, match=pattern):
            run_evaluation(settings(runs, ["chat"], data=saved | {"eval": names}))


def test_command_line(runs):
    options = ["eval=[chat]", "eval.max_per_task=3", "eval.max_new_tokens=4"]
    done = run_cli("evaluate.py", "run=demo", "stage=sft", f"paths.runs={runs}", *options, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "choice" in done.stdout and read_json(runs / "demo" / "sft" / "eval.json")["chat"]["choice"]["n"] == 3
