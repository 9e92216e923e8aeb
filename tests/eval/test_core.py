"""CORE: bundles read and checked, prompts, and the same decisions as a plain reading of the definition."""

import csv
import dataclasses
import json
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import core_reference
import numpy as np
import pytest
import torch
import yaml
from conftest import SHARED, needs_shared, run_cli
from eval_data import phrase

from callbacks.core import CoreEval
from llm.checkpoint.model_folder import save_model_folder
from llm.errors import UserError
from llm.eval import core
from llm.eval.core_bundle import CoreTask, load_bundle, prompts, shots
from llm.eval.metrics import numbers
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.run.stage_folder import RunDir, read_metrics, write_manifest
from llm.tokenizer.bpe import Tokenizer
from llm.utils.files import read_json

REAL_BUNDLE = SHARED / "data" / "eval_bundle"
KINDS = {"choices": ("multiple_choice", 3), "letters": ("multiple_choice", 2), "who": ("schema", 0)}
KINDS |= {"continue": ("language_modeling", 2), "story": ("language_modeling", 0), "long": ("multiple_choice", 9)}


def rows_of(name: str, n: int) -> list[dict]:
    """Examples whose choices differ in number of tokens, share letters, stories or nothing."""
    made = []
    for i in range(n):
        choices = [phrase(100 * i + k, 1 + (i + k) % 4) + f" {k}" for k in range(4)]
        if name in ("choices", "long"):
            made.append({"query": phrase(i, 4 + i % 9), "choices": choices, "gold": i % 4})
        elif name == "letters":
            made.append(
                {"query": f"{phrase(i, 5)}?\nA. {choices[0]}\nB. {choices[1]}", "choices": ["A", "B"], "gold": i % 2}
            )
        elif name == "who":
            made.append({"context_options": choices[:2], "continuation": phrase(i, 3), "gold": i % 2})
        elif name == "continue":
            made.append({"context": phrase(i, 5) + " ", "continuation": phrase(i + 7, 1 + i % 2)})
        else:
            story = f"{phrase(i // 5, 20)}. {phrase(i, 3)}?"
            made.append({"context": story, "continuation": phrase(i + 9, 1)})
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    entries = []
    for name, (kind, n_shots) in KINDS.items():
        file = folder / "eval_data" / "kinds" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(name, 20)))
        entry = {"label": name, "dataset_uri": f"kinds/{name}.jsonl", "num_fewshot": [n_shots], "icl_task_type": kind}
        entries.append(entry | ({"continuation_delimiter": "\nAnswer: "} if name == "choices" else {}))
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    baselines = [f"{name},{25 if name in ('choices', 'long') else 50 if n else 0}" for name, (_, n) in KINDS.items()]
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nunused,10\n" + "\n".join(baselines) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(phrase(i, 30) for i in range(50)) + "? A. B. Answer: 0 1 2 3"], vocab_size=320)


MODERN = {"value_embeds": True, "residual_scalars": True, "smear": True, "backout": True, "gate_channels": 8}
MODERN |= {"window_pattern": "SL", "window_divisor": 4}  # of 512: windows of 128
ARCHS = {"classic": {}, "modern": MODERN, "gpt2": {"softcap": None, "tied": True}, "documents": {"bos_id": 311}}


@pytest.fixture(scope="module")
def nets(tokenizer):
    """nets(arch): random weights everywhere, so that losses differ and no logit is special."""

    def make(arch: str, seq_len: int = 512) -> GPT:
        base = "classic" if arch == "documents" else arch
        config = GPTConfig(2, 2, 1, 16, 32, seq_len, tokenizer.vocab_size, arch=base, **ARCHS[arch])
        net = GPT(config).init_weights(1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, weight in net.named_parameters():
                if any(part in name for part in ("c_proj.weight", "lm_head", "smear", "gate")):
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        return net

    return make


@pytest.fixture(scope="module")
def trained(tokenizer, bundle):
    """A small net that has learnt the bundle's own texts: it answers many questions, and some of them surely."""
    net = GPT(GPTConfig(2, 2, 1, 16, 32, 512, tokenizer.vocab_size)).init_weights(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    texts = [prompts(task, i)[task.examples[i].get("gold", -1)] for task in load_bundle(bundle) for i in range(20)]
    ids = torch.tensor([t for text in texts for t in (tokenizer.bos_id, *tokenizer.encode(text))])
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        at = torch.randint(len(ids) - 129, (4,), generator=generator).unsqueeze(1) + torch.arange(129)
        net(ids[at[:, :-1]], targets=ids[at[:, 1:]]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def decisions(net, tokenizer, bundle, batch_size=32, **more):
    return {t.name: core.evaluate_core_task(net, tokenizer, t, batch_size) for t in load_bundle(bundle, **more)}


def reference(net, tokenizer, bundle, max_per_task=None):
    """{task: [(right, losses or predicted tokens)]}"""
    found = {}
    for entry in yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]:
        lines = (bundle / "eval_data" / entry["dataset_uri"]).read_text().splitlines()
        data = core_reference.load(map(json.loads, lines))
        found[entry["label"]] = [
            core_reference.judge(net, tokenizer, entry, data, i) for i in range(len(data[:max_per_task]))
        ]
    return found


def check_same(results, expected, tokenizer):
    for name, judged in expected.items():
        records = results[name]["records"]
        assert [r["correct"] for r in records] == [right for right, _ in judged], name
        for one, (_, found) in zip(records, judged, strict=True):
            if "losses" in one:
                assert one["losses"] == pytest.approx(found, abs=1e-4)
                assert one["prediction"] == found.index(min(found))
            else:
                assert one["prediction"] == tokenizer.decode(found)


# ---------------------------------------------------------------------------------------------------------------------
# Decisions


@pytest.mark.parametrize("arch", ARCHS)
def test_decisions_are_those_of_one_example_at_a_time(nets, tokenizer, bundle, arch):
    net = nets(arch)
    expected = reference(net, tokenizer, bundle)
    for batch_size in (1, 32):
        check_same(decisions(net, tokenizer, bundle, batch_size), expected, tokenizer)


def test_decisions_of_a_trained_model(trained, tokenizer, bundle):
    expected = reference(trained, tokenizer, bundle)
    results = decisions(trained, tokenizer, bundle)
    check_same(results, expected, tokenizer)
    assert any(0 < result["accuracy"] < 1 for result in results.values())
    assert sum(result["centered"] for result in results.values()) / len(results) > 0.1


def test_prompts_beyond_the_context_lose_their_beginning(nets, tokenizer, bundle):
    net = nets("classic", seq_len=96)
    results = decisions(net, tokenizer, bundle)
    check_same(results, reference(net, tokenizer, bundle), tokenizer)
    assert results["long"]["cut"] == 20 and results["who"]["cut"] == 0
    assert all(record["cut"] > 0 for record in results["long"]["records"])


def test_ties_go_to_the_first_choice_as_they_do_one_at_a_time(tokenizer, bundle):
    """An untrained network finds every token equally likely: nothing but rounding tells choices apart."""
    net = GPT(GPTConfig(1, 1, 1, 16, 16, 512, tokenizer.vocab_size)).init_weights(0)
    for batch_size in (1, 32):
        check_same(decisions(net, tokenizer, bundle, batch_size), reference(net, tokenizer, bundle), tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_decide_nothing_in_any_number_format(nets, tokenizer, bundle, dtype):
    net = nets("modern")
    net.compute_dtype = dtype
    one, many = (decisions(net, tokenizer, bundle, size) for size in (1, 32))
    for name in KINDS:
        for key in ("prediction", "correct") if KINDS[name][0] != "language_modeling" else ("correct",):
            assert [r[key] for r in one[name]["records"]] == [r[key] for r in many[name]["records"]]


def test_what_is_close_is_decided_by_a_plain_pass(nets, tokenizer, bundle, monkeypatch):
    """With a margin that all fall under, records are the same to the last bit, however examples were batched."""
    net = nets("modern")
    net.compute_dtype = torch.bfloat16
    monkeypatch.setitem(core.MARGIN, torch.bfloat16, 1e9)
    one, many = (decisions(net, tokenizer, bundle, size) for size in (1, 32))
    assert [one[name]["records"] for name in KINDS] == [many[name]["records"] for name in KINDS]


def test_processes_share_the_work_and_all_get_the_result(nets, tokenizer, bundle, monkeypatch):
    """Three processes, played by threads that exchange what they have found."""
    net, task = nets("classic"), load_bundle(bundle, ["choices"])[0]
    alone = core.evaluate_core_task(net, tokenizer, task, 4)
    me, barrier, box, passes = threading.local(), threading.Barrier(3), {}, []

    def gathered(thing):
        box[me.rank] = thing
        barrier.wait()
        things = [box[rank] for rank in range(3)]
        barrier.wait()
        return things

    def process(rank):
        me.rank = rank
        return core.evaluate_core_task(net, tokenizer, task, 4)

    def counted(net, groups):
        passes.append(me.rank)
        return score_shared(net, groups)

    score_shared = core.score_shared
    monkeypatch.setattr(core, "score_shared", counted)
    monkeypatch.setattr(core, "ENOUGH", {})
    for name, replacement in (("rank", lambda: me.rank), ("world_size", lambda: 3), ("all_gather_object", gathered)):
        monkeypatch.setattr(core.collectives, name, replacement)
    with ThreadPoolExecutor(3) as executor:
        results = list(executor.map(process, range(3)))
    decided = [[(r["prediction"], r["correct"]) for r in result["records"]] for result in (alone, *results)]
    assert decided == 4 * decided[:1] and set(passes) == {0, 1, 2}


def test_score_and_its_parts(trained, tokenizer, bundle):
    results = decisions(trained, tokenizer, bundle)
    one = results["choices"]
    assert one["accuracy"] == sum(r["correct"] for r in one["records"]) / 20
    assert one["centered"] == pytest.approx((one["accuracy"] - 0.25) / 0.75)
    assert results["continue"]["centered"] == pytest.approx((results["continue"]["accuracy"] - 0.5) / 0.5)
    metric = core.core_metric(load_bundle(bundle, ["choices", "who"]))
    for name in metric.names:
        metric.update(name, [record["correct"] for record in results[name]["records"]])
    mean = numbers(metric)
    assert mean["core"] == pytest.approx((one["centered"] + results["who"]["centered"]) / 2)
    assert mean["core/choices"] == pytest.approx(one["centered"])
    errors = [one["stderr"] / 0.75, results["who"]["stderr"]]
    assert mean["core_stderr"] == pytest.approx(np.hypot(*errors) / 2)


def test_shared_beginnings_are_computed_once(tokenizer, bundle):
    by_name = {task.name: task for task in load_bundle(bundle)}
    groups = core.group(core.encode(by_name["letters"], tokenizer, range(20), 512))
    assert len(groups) == 20 and all(len(one.rows) == 2 for one in groups)  # the choices of an example
    groups = core.group(core.encode(by_name["story"], tokenizer, range(20), 512))
    assert {len(one.rows) for one in groups} == {5}  # the questions about a story
    for one in groups:
        assert all((row.ids[: one.shared] == one.rows[0].ids[: one.shared]).all() for row in one.rows)
        assert one.shared <= min(row.start for row in one.rows)


def test_batches_hold_alike_groups_and_each_once():
    def row(n):
        return core.Row(0, 0, np.arange(n), n - 1, 0)

    groups = [core.Group(n - 1, [row(n)] * k) for n in (100, 60, 30, 95, 58) for k in (1, 2)]
    formed = core.batches(groups, 4, enough=110)
    assert sorted(map(id, groups)) == sorted(id(one) for batch in formed for one in batch)
    assert [[len(one.rows[0].ids) for one in batch] for batch in formed] == 2 * [[100, 95], [60, 58], [30]]
    assert [len(batch) for batch in core.batches(groups, 1)] == [1] * 10


def test_answers_always_have_a_token_and_one_before_it():
    a, b = np.array([9, 1, 2]), np.array([9, 1, 2, 3])
    assert [start for _, start in core.answers("multiple_choice", [a, b])] == [2, 2]  # one choice begins the other
    assert [start for _, start in core.answers("multiple_choice", [a, a])] == [2, 2]
    assert [start for _, start in core.answers("schema", [a, a])] == [1, 1]
    assert core.answers("language_modeling", [a, b])[0][1] == 3
    assert core.answers("language_modeling", [np.array([9, 1, 7]), b])[0][1] == 2  # a token over the border


def test_an_answer_longer_than_the_context(nets, tokenizer):
    rows = [{"context": "the fox", "continuation": phrase(1, 80), "line": 1}]
    task = CoreTask("t", "language_modeling", 0, " ", 0.0, rows, rows)
    result = core.evaluate_core_task(nets("classic", seq_len=32), tokenizer, task)
    assert (result["n"], result["cut"], result["accuracy"]) == (1, 1, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Bundles


def test_prompts_and_shots(bundle):
    task = load_bundle(bundle, ["choices"])[0]
    assert len(shots(task, 3)) == 3 and task.examples[3] not in shots(task, 3)
    assert shots(task, 3) == shots(task, 3) != shots(task, 4)
    first, item = shots(task, 3)[0], task.examples[3]
    texts = prompts(task, 3)
    assert all(text.startswith(f"{first['query']}\nAnswer: {first['choices'][first['gold']]}\n\n") for text in texts)
    ends = [f"\n\n{item['query']}\nAnswer: {choice}" for choice in item["choices"]]
    assert all(text.endswith(end) for text, end in zip(texts, ends, strict=True))
    alone, whole = prompts(load_bundle(bundle, ["continue"])[0], 0)
    assert whole.startswith(alone) and not alone.endswith(" ")


def test_a_cut_changes_no_prompt(nets, tokenizer, bundle):
    """Few-shot examples come from the whole file; where that has too few, all others are shown, and it is said."""
    cut, whole = (load_bundle(bundle, ["long"], max_per_task=most)[0] for most in (4, None))
    assert len(cut.examples) == 4 < len(whole.examples) and cut.shots_used == cut.n_shots == 9
    assert [prompts(cut, i) for i in range(4)] == [prompts(whole, i) for i in range(4)]
    small = dataclasses.replace(cut, pool=cut.examples)
    result = core.evaluate_core_task(nets("classic"), tokenizer, small)
    assert result["shots"] == 3 and "3 shots of 9" in core.notes(small, result)
    check_same(
        decisions(nets("classic"), tokenizer, bundle, max_per_task=4),
        reference(nets("classic"), tokenizer, bundle, max_per_task=4),
        tokenizer,
    )


def test_half_a_surrogate_pair_is_a_replacement_character(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "b")
    path = tmp_path / "b/eval_data/kinds/story.jsonl"
    path.write_text(json.dumps({"context": "a \ud83d", "continuation": "b\udc00"}))
    (task,) = load_bundle(tmp_path / "b", ["story"])
    assert (task.examples[0]["context"], task.examples[0]["continuation"]) == ("a \ufffd", "b\ufffd")


def test_zip_and_folder_are_the_same(bundle, tmp_path):
    for inside in ("", "eval_bundle/"):
        path = tmp_path / f"{len(inside)}.zip"
        with zipfile.ZipFile(path, "w") as file:
            for one in bundle.rglob("*.*"):
                file.write(one, inside + one.relative_to(bundle).as_posix())
        assert load_bundle(path) == load_bundle(bundle)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("core.yaml", None, "holds no core.yaml"),
        ("core.yaml", lambda s: "icl_tasks: [", "core.yaml: not valid YAML"),
        ("core.yaml", lambda s: "tasks: []", "core.yaml: has no list `icl_tasks`"),
        ("core.yaml", lambda s: s.replace("num_fewshot", "shots", 1), "core.yaml: task 1 has no 'num_fewshot'"),
        ("core.yaml", lambda s: s.replace(": schema", ": essay"), "who is of type 'essay'"),
        ("core.yaml", lambda s: s.replace("label: who", "label: letters"), "two tasks have the label 'letters'"),
        ("core.yaml", lambda s: s.replace("kinds/who.jsonl", "7"), "who: dataset_uri=7 must be text"),
        (
            "core.yaml",
            lambda s: s.replace("- dataset_uri: kinds/who", "- continuation_delimiter: null\n  dataset_uri: kinds/who"),
            "who: continuation_delimiter=None must be text",
        ),
        ("eval_meta_data.csv", None, "eval_meta_data.csv: missing"),
        ("eval_meta_data.csv", lambda s: s.replace("Random", "Chance"), "csv: line 1: no column 'Random baseline'"),
        (
            "eval_meta_data.csv",
            lambda s: s.replace("letters,50", "letters,half"),
            "csv: line 4: Random baseline 'half'",
        ),
        ("eval_meta_data.csv", lambda s: s.replace("letters,50\n", ""), "no row of task 'letters'"),
        ("eval_data/kinds/who.jsonl", None, "who.jsonl: missing"),
        ("eval_data/kinds/who.jsonl", lambda s: "\n", "who.jsonl: has no examples"),
        ("eval_data/kinds/who.jsonl", lambda s: s.replace("\n", "\n{oops\n", 1), "who.jsonl: line 2: not valid JSON"),
        ("eval_data/kinds/who.jsonl", lambda s: s.replace("gold", "golden", 1), "who.jsonl: line 1: no 'gold'"),
        (
            "eval_data/kinds/who.jsonl",
            lambda s: s.replace('"gold": 1', '"gold": 2', 1),
            "who.jsonl: line 2: 'gold' is 2",
        ),
        (
            "eval_data/kinds/story.jsonl",
            lambda s: s + '{"context": "a", "continuation": " "}',
            "line 21: the continuation",
        ),
        (
            "eval_data/kinds/long.jsonl",
            lambda s: '{"query": [], "choices": ["a", "b"], "gold": 0}',
            "'query' must be text",
        ),
        ("eval_data/kinds/long.jsonl", lambda s: '{"query": "a", "choices": "ab", "gold": 0}', "list of at least two"),
    ],
)
def test_a_damaged_bundle_is_named(bundle, tmp_path, file, change, message):
    shutil.copytree(bundle, tmp_path / "b")
    path = tmp_path / "b" / file
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))
    with pytest.raises(UserError) as error:
        load_bundle(tmp_path / "b")
    assert message in str(error.value) and str(tmp_path / "b") in str(error.value)


def test_paths_and_names_that_are_not_there(bundle, tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    for path, names, message in (
        (tmp_path / "nothing", None, "no such file"),
        (tmp_path / "text.zip", None, "neither a folder nor a zip"),
        (bundle, ["letter"], "eval.core_tasks: the bundle has no task 'letter'"),
        (bundle, [], r"eval.core_tasks=\[\]"),
    ):
        with pytest.raises(UserError, match=message):
            load_bundle(path, names)


@needs_shared("data/eval_bundle")
def test_the_real_bundle(nets, tokenizer):
    net = nets("classic", seq_len=256)
    results = decisions(net, tokenizer, REAL_BUNDLE, max_per_task=2)
    assert len(results) == 22
    check_same(results, reference(net, tokenizer, REAL_BUNDLE, max_per_task=2), tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py and training


def test_evaluate_writes_scores_table_and_records(nets, tokenizer, bundle, tmp_path):
    stage_dir = RunDir(tmp_path, "demo").stage_dir("pretrain")
    config = {"stage": {"name": "pretrain"}, "seed": 42, "precision": {"compute": "fp32"}}
    config |= {"trainer": {"accelerator": "cpu"}, "model": {"depth": 1}}
    config["data"] = {"name": "local", "tasks": {}, "mixture": {}, "eval": []}
    write_manifest(stage_dir, {"stage": "pretrain", "status": "finished", "config": config, "seconds": 1.0})
    save_model_folder(stage_dir / "model", nets("classic"), tokenizer)
    command = ("evaluate.py", "run=demo", f"paths.runs={tmp_path}", "eval=[core]", "eval.max_per_task=6")
    done = run_cli(*command, f"eval.bundle={bundle}")
    assert done.returncode == 0, done.stderr
    assert "CORE: " in done.stdout and "shots of 9" not in done.stdout
    scores = read_json(stage_dir / "eval.json")
    assert scores.keys() == {"core", "core_tasks"} and list(scores["core_tasks"]) == list(KINDS)
    assert scores["core_tasks"]["who"].keys() == {"accuracy", "centered", "n", "stderr"}
    table = list(csv.DictReader((stage_dir / "core.csv").open()))
    assert [row["task"] for row in table] == list(KINDS) and {row["n"] for row in table} == {"6"}
    mean = sum(float(row["centered"]) for row in table) / len(table)
    assert scores["core"] == pytest.approx(mean)
    lines = [json.loads(line) for line in (stage_dir / "core" / "who.jsonl").read_text().splitlines()]
    assert [one["index"] for one in lines] == list(range(6)) and len({one["line"] for one in lines}) == 6
    assert lines[0].keys() == {"index", "line", "cut", "losses", "prediction", "gold", "correct"}

    done = run_cli(*command, f"eval.bundle={bundle}", "eval.core_tasks=[who]")
    assert done.returncode == 0 and "mean of 1 tasks" in done.stdout, done.stderr
    assert read_json(stage_dir / "eval.json")["core"] == scores["core"]  # over all tasks, as before


def test_training_measures_core_on_all_processes(tokenizer_runs, bundle, tmp_path):
    shutil.copytree(tokenizer_runs, tmp_path, dirs_exist_ok=True)
    base = ("train.py", "experiment=tiny", f"paths.runs={tmp_path}", "trainer=cpu")
    keys = (f"stage.core_bundle={bundle}", "stage.core_every=1", "stage.core_max_per_task=8")
    done = run_cli(*base, "stage=pretrain", "trainer.devices=2", "batch.micro_batch_size=2", "max_steps=2", *keys)
    assert done.returncode == 0, done.stderr
    rows = [row for row in read_metrics(tmp_path / "tiny" / "pretrain") if "core" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["core"] == pytest.approx(sum(row[f"core/{name}"] for name in KINDS) / len(KINDS))


def test_training_measures_as_many_examples_as_it_is_told_to(bundle):
    assert {len(task.examples) for task in CoreEval(5, bundle=str(bundle), max_per_task=8).tasks} == {8}
    assert {len(task.examples) for task in CoreEval(5, bundle=str(bundle)).tasks} == {20}


def test_without_a_bundle_nothing_is_measured(tmp_path):
    assert CoreEval(5).every == 0 and CoreEval(5).tasks == []
    assert CoreEval(0, bundle=str(tmp_path / "missing")).tasks == []
    with pytest.raises(UserError, match="no such file"):
        CoreEval(5, bundle=str(tmp_path / "missing"))
