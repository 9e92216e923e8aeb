"""Parts that the tests of judges from outside share: our models and transformers', tasks of CORE and lm-eval."""

import json
from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from eval_data import phrase

from llm.checkpoint.model_folder import save_model_folder
from llm.eval import core
from llm.eval.core_bundle import load_bundle
from llm.inference.engine import Engine
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.compression import SAMPLE_TEXTS

transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")

from llm.eval.lm_eval_harness import Harness  # noqa: E402

FIRST_WORDS = ("Apples", "Stones", "Rivers", "Hills")  # no two choices begin with the same token
TEXTS = [*SAMPLE_TEXTS.values(), *(f"{phrase(i, 5)} {word} {phrase(i, 5)}" for i in range(30) for word in FIRST_WORDS)]
CPU = {"device": "cpu", "batch_size": 8}


def choices_of(i):
    return [f"{word} {phrase(10 * i + k, 1 + (i + k) % 5)}" for k, word in enumerate(FIRST_WORDS)]


ROWS = [{"query": phrase(i, 4 + i % 9), "choices": choices_of(i), "gold": i % 4} for i in range(24)]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_bundle(folder, files):
    """A CORE bundle whose tasks show no examples; files: {task: rows}."""
    for name, rows in files.items():
        write_jsonl(folder / "eval_data" / f"{name}.jsonl", rows)
    entries = [
        {"label": n, "dataset_uri": f"{n}.jsonl", "num_fewshot": [0], "icl_task_type": "multiple_choice"} for n in files
    ]
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    lines = ["Eval Task,Random baseline", *(f"{name},25" for name in files)]
    (folder / "eval_meta_data.csv").write_text("\n".join(lines) + "\n")


def write_tasks(folder, bundle, names):
    """lm-eval task files over the files of the bundle: multiple choice, generation and whole texts."""
    folder.mkdir(exist_ok=True)
    kinds = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [
                {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
            ],
        },
        "answer": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["\n", " t"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{query}}",
            "metric_list": [
                {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            ],
        },
    }
    for name in names:
        data = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{query}}"}
        data["dataset_kwargs"] = {"data_files": {"test": str(bundle / "eval_data" / f"{name}.jsonl")}}
        for kind, more in kinds.items():
            content = data | {"task": f"{name}_{kind}"} | more
            (folder / f"{name}_{kind}.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Nothing is fetched, what `datasets` makes of local files goes to a folder of its own, and lm-eval reads our task
    files alone: its own are thousands, which take seconds.
    """
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets_of_others")))
        ours_alone = partial(lm_eval.tasks.TaskManager, include_defaults=False)
        patch.setattr("llm.eval.lm_eval_harness.task_manager", lru_cache(ours_alone))
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 400)


@pytest.fixture(scope="module")
def net(tokenizer):
    """Random weights, large enough that every choice has a loss of its own."""
    net = GPT(GPTConfig(2, 2, 1, 16, 32, 128, tokenizer.vocab_size))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return net.eval()


@pytest.fixture(scope="module")
def folder(net, tokenizer, tmp_path_factory):
    """Our model as one of others: without the section that names it as ours, transformers loads it."""
    path = tmp_path_factory.mktemp("mine") / "sft" / "model"
    save_model_folder(path, net, tokenizer)
    config = json.loads((path / "config.json").read_text())
    del config["fathom"]
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A small GPT-2 of transformers with random weights and a byte-level tokenizer of its own."""
    from tokenizers import ByteLevelBPETokenizer

    path = tmp_path_factory.mktemp("gpt2")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS, vocab_size=420, min_frequency=1, special_tokens=["<|endoftext|>"])
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **end)
    tokens.save_pretrained(path)
    shape = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    ends = {"bos_token_id": tokens.eos_token_id, "eos_token_id": tokens.eos_token_id}
    config = transformers.GPT2Config(vocab_size=len(tokens), **shape, **ends)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle")
    write_bundle(path, {"mine": ROWS})
    return path


@pytest.fixture(scope="module")
def tasks(bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    write_tasks(path, bundle, ["mine"])
    return path


def options(tasks, *names, **more):
    common = {"num_fewshot": None, "max_per_task": None, "chat_template": False, "batch_size": 8}
    return SimpleNamespace(**(common | {"include_path": str(tasks), "tasks": list(names)} | more))


def by_harness(net, tokenizer, tasks, out, *names, **more):
    """({task: scores}, {task: records}) of lm-eval over a network."""
    scores = Harness(options(tasks, *names, **more)).measure(Engine(net, tokenizer), out)["lm_eval"]
    return scores, {n: [json.loads(line) for line in (out / "lm_eval" / f"{n}.jsonl").open()] for n in names}


def by_hf_of_lm_eval(path, tasks, *names, **more):
    """lm-eval's own model of transformers on the same tasks."""
    from lm_eval.models.huggingface import HFLM

    harness = Harness(options(tasks, *names))
    model = HFLM(pretrained=str(path), **CPU, **more)
    return lm_eval.simple_evaluate(model=model, tasks=harness.tasks, task_manager=harness.manager)


def by_core(net, tokenizer, bundle, name="mine", most=None):
    """Records of CORE by line of the file, each with "sums": log-likelihood of each choice from where they differ."""
    task = load_bundle(bundle, [name], most)[0]
    records = core.evaluate_core_task(net, tokenizer, task, 8)["records"]
    lengths = {}
    for row in core.encode(task, tokenizer, range(len(task.examples)), net.config.seq_len):
        lengths.setdefault(row.example, []).append(len(row.ids) - row.start)
    for one in records:
        one["lengths"] = lengths[one["index"]]
        one["sums"] = [-loss * n for loss, n in zip(one["losses"], one["lengths"], strict=True)]
    return {one["line"] - 1: one for one in records}


def check_agreement(found, sums_by_item, accuracies, tolerance=2e-3):
    """The choices of each item lie as far apart by CORE as by a judge, and either rule takes the same one by both.

    Tokens that all choices begin with count for lm-eval and not for CORE: a constant of the item.
    """
    assert set(found) <= set(sums_by_item)
    for item, ours in found.items():
        theirs = np.array(sums_by_item[item])
        differences = theirs - np.array(ours["sums"])
        assert np.ptp(differences) < tolerance, item
        assert int(theirs.argmax()) == int(np.argmax(ours["sums"]))
        assert accuracies[item] == (int(np.argmax(ours["sums"])) == ours["gold"])
        by_mean = (theirs - differences.mean()) / ours["lengths"]
        assert int(by_mean.argmax()) == ours["prediction"]


def likelihoods(records, key="responses"):
    """{item: log-likelihoods of its choices} and {item: whether lm-eval calls it right}."""
    index = "index" if key == "responses" else "doc_id"
    return {r[index]: [nats for nats, _ in r[key]] for r in records}, {r[index]: bool(r["acc"]) for r in records}
