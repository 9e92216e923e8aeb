"""Judges from outside: models of transformers scored by our code, our models scored by lm-eval, and that they agree."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import REPO, compose, run_cli
from eval_data import data_config, phrase
from hub_server import Hub
from omegaconf import OmegaConf

from llm.checkpoint.model_folder import save_model_folder
from llm.config.schema import TaskSpec
from llm.errors import UserError
from llm.eval import core
from llm.eval.core_bundle import load_bundle
from llm.eval.evaluate import HFSubject, folder_name, load_harness, run_evaluation
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.report.report import runs_table
from llm.run.stage_folder import RunDir, write_manifest
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.chat_format import render_prompt
from llm.tokenizer.compression import SAMPLE_TEXTS
from llm.utils.files import read_json

transformers = pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")

from llm.eval.hf_model import load_hf  # noqa: E402
from llm.eval.lm_eval_harness import Harness, HarnessModel, answer_text, sampling_params  # noqa: E402

REAL_BUNDLE = REPO.parent / "shared" / "data" / "eval_bundle"
REAL_FILES = {
    "arc_easy": REAL_BUNDLE / "eval_data" / "world_knowledge" / "arc_easy.jsonl",
    "hellaswag": REAL_BUNDLE / "eval_data" / "language_understanding" / "hellaswag.jsonl",
}
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


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Nothing is fetched, and what `datasets` makes of local files goes to a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets_of_others")))
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
    path = tmp_path_factory.mktemp("mine") / "sft" / "model"
    save_model_folder(path, net, tokenizer)
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


# ---------------------------------------------------------------------------------------------------------------------
# Agreement


def test_four_judges_agree_on_one_of_our_models(net, tokenizer, folder, bundle, tasks, tmp_path):
    """CORE, lm-eval over our network, both over the exported folder in transformers, lm-eval's own transformers."""
    ours = by_core(net, tokenizer, bundle)
    assert len(ours) == 24 and len({one["prediction"] for one in ours.values()}) > 1
    loaded = load_hf(str(folder), None, "cpu")
    for line, record in by_core(*loaded, bundle).items():
        assert record["losses"] == pytest.approx(ours[line]["losses"], abs=1e-4)
        assert (record["prediction"], record["correct"]) == (ours[line]["prediction"], ours[line]["correct"])
    names = ("mine_choice", "mine_answer", "mine_text")
    scores, records = by_harness(net, tokenizer, tasks, tmp_path / "a", *names)
    check_agreement(ours, *likelihoods(records["mine_choice"]))
    sums, _ = likelihoods(records["mine_choice"])
    assert all(sums[line] == pytest.approx(one["sums"], abs=1e-3) for line, one in ours.items())
    scores_hf, records_hf = by_harness(*loaded, tasks, tmp_path / "b", *names)
    check_agreement(ours, *likelihoods(records_hf["mine_choice"]))
    assert [r["responses"] for r in records["mine_answer"]] == [r["responses"] for r in records_hf["mine_answer"]]
    assert scores_hf == {task: pytest.approx(one, abs=1e-4) for task, one in scores.items()}
    theirs = by_hf_of_lm_eval(folder, tasks, "mine_choice", "mine_answer", add_bos_token=True)
    check_agreement(ours, *likelihoods(theirs["samples"]["mine_choice"], "filtered_resps"))
    generated = [sample["filtered_resps"] for sample in theirs["samples"]["mine_answer"]]
    assert generated == [record["responses"] for record in records["mine_answer"]]
    assert all("\n" not in one[0] and " t" not in one[0] for one in generated)
    for metric in ("acc", "acc_norm"):
        assert theirs["results"]["mine_choice"][f"{metric},none"] == scores["mine_choice"][metric]


def test_a_gpt2_is_judged_as_lm_eval_judges_it(gpt2, bundle, tasks, tmp_path):
    loaded = load_hf(str(gpt2), None, "cpu")
    with_first = by_hf_of_lm_eval(gpt2, tasks, "mine_choice", add_bos_token=True)
    check_agreement(by_core(*loaded, bundle), *likelihoods(with_first["samples"]["mine_choice"], "filtered_resps"))
    names = ("mine_choice", "mine_answer", "mine_text")
    scores, records = by_harness(*loaded, tasks, tmp_path, *names)  # nothing before a prompt, as lm-eval has it
    theirs = by_hf_of_lm_eval(gpt2, tasks, *names)
    for name in names:
        for ours, sample in zip(records[name], theirs["samples"][name], strict=True):
            flat, flat_theirs = np.array(ours["responses"]).ravel(), np.array(sample["filtered_resps"]).ravel()
            if name == "mine_answer":
                assert list(flat) == list(flat_theirs)
            else:
                assert flat == pytest.approx(flat_theirs.astype(float), abs=1e-3)
    assert scores["mine_text"]["bits_per_byte"] == pytest.approx(theirs["results"]["mine_text"]["bits_per_byte,none"])
    different = likelihoods(with_first["samples"]["mine_choice"], "filtered_resps")[0]
    assert different[0] != pytest.approx(likelihoods(records["mine_choice"])[0][0], abs=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_BUNDLE.exists(), reason="needs the published bundle's data")
def test_the_judges_agree_on_arc_and_hellaswag(net, tokenizer, folder, gpt2, tmp_path):
    files = {n: [json.loads(x) for x in path.read_text().splitlines()[:40]] for n, path in REAL_FILES.items()}
    write_bundle(tmp_path / "bundle", files)
    write_tasks(tmp_path / "tasks", tmp_path / "bundle", files)
    loaded, small = load_hf(str(folder), None, "cpu"), load_hf(str(gpt2), None, "cpu")
    for name in files:
        ours = by_core(net, tokenizer, tmp_path / "bundle", name)
        fitting = {line: one for line, one in ours.items() if not one["cut"]}
        assert len(fitting) > 10
        for pair in ((net, tokenizer), loaded):
            _, records = by_harness(*pair, tmp_path / "tasks", tmp_path / "out", f"{name}_choice")
            check_agreement(fitting, *likelihoods(records[f"{name}_choice"]))
        theirs = by_hf_of_lm_eval(folder, tmp_path / "tasks", f"{name}_choice", add_bos_token=True)
        check_agreement(fitting, *likelihoods(theirs["samples"][f"{name}_choice"], "filtered_resps"))
        theirs = by_hf_of_lm_eval(gpt2, tmp_path / "tasks", f"{name}_choice", add_bos_token=True)
        ours = by_core(*small, tmp_path / "bundle", name)
        fitting = {line: one for line, one in ours.items() if not one["cut"]}
        check_agreement(fitting, *likelihoods(theirs["samples"][f"{name}_choice"], "filtered_resps"))


# ---------------------------------------------------------------------------------------------------------------------
# Models of transformers


@torch.no_grad()
def test_the_exported_network_gives_the_same_scores_and_samples(net, tokenizer, folder):
    theirs, tokens = load_hf(str(folder), None, "cpu")
    assert tokens.stop_ids == tokenizer.stop_ids and (tokens.token_bytes() == tokenizer.token_bytes()).all()
    ids = torch.randint(400, (3, 40), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    targets[:, :5] = -1
    assert theirs(ids) == pytest.approx(net(ids), abs=1e-4)
    nats = theirs(ids, targets=targets, reduction="none")
    assert nats == pytest.approx(net(ids, targets=targets, reduction="none"), abs=1e-4)
    lengths = torch.tensor([40, 7, 22])
    assert theirs(ids, lengths=lengths, last_only=True) == pytest.approx(
        net(ids, lengths=lengths, last_only=True), abs=1e-4
    )
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("Apples", "the red fox lives near a river", "")]
    for params in (SamplingParams(0.0, max_new_tokens=30), SamplingParams(1.0, top_k=30, max_new_tokens=30)):
        one, other = (Engine(*pair).generate(prompts, params, 2) for pair in ((net, tokenizer), (theirs, tokens)))
        assert one == other
    chat = [{"role": "user", "content": "What is 3 * 4?"}]
    assert render_prompt(tokens, chat) == render_prompt(tokenizer, chat)


def test_a_chat_without_a_template_is_written_in_plain_words(gpt2):
    _, tokens = load_hf(str(gpt2), None, "cpu")
    ids = render_prompt(tokens, [{"role": "user", "content": "Hello <|endoftext|>"}])
    assert ids[0] == tokens.bos_id and tokens.bos_id not in ids[1:]
    assert tokens.decode(ids[1:]) == "User:\nHello <|endoftext|>\n\nAssistant:\n"


def test_bytes_of_tokens_add_up_to_the_text(gpt2):
    _, tokens = load_hf(str(gpt2), None, "cpu")
    sizes = tokens.token_bytes()
    assert sizes[tokens.bos_id] == 0
    for text in SAMPLE_TEXTS.values():
        assert sizes[tokens.encode(text)].sum() == len(text.encode())
        assert tokens.decode_bytes(tokens.encode(text)) == text.encode()


def test_a_tokenizer_that_changes_the_text_has_no_bits_per_byte(gpt2, tmp_path):
    shutil.copytree(gpt2, tmp_path / "lower")
    path = tmp_path / "lower" / "tokenizer.json"
    content = json.loads(path.read_text()) | {"normalizer": {"type": "NFKD"}}
    path.write_text(json.dumps(content))
    _, tokens = load_hf(str(tmp_path / "lower"), None, "cpu")
    with pytest.raises(UserError, match="bits per byte cannot be measured"):
        tokens.token_bytes()


def test_a_chat_has_one_first_token(gpt2):
    """Its template writes BOS, and so does the post-processor of the tokenizer before any other text."""
    from tokenizers import processors

    _, tokens = load_hf(str(gpt2), None, "cpu")
    tokens.hf.add_special_tokens({"bos_token": "<s>"})
    first = tokens.bos_id = tokens.hf.bos_token_id
    adds = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    tokens.hf.backend_tokenizer.post_processor = adds
    tokens.hf.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert tokens.encode_prompt("Apples") == [first, *tokens.encode("Apples")]
    text = tokens.chat_text([{"role": "user", "content": "Apples"}])
    assert text == "<s>Apples" and tokens.encode_prompt(text) == [first, *tokens.encode("Apples")]


@pytest.fixture(scope="module")
def lfm2(gpt2, tmp_path_factory):
    """A small hybrid: a convolution with a state of its own, then attention."""
    path = tmp_path_factory.mktemp("lfm2")
    tokens = transformers.AutoTokenizer.from_pretrained(gpt2)
    tokens.save_pretrained(path)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    ends = {"bos_token_id": tokens.eos_token_id, "eos_token_id": tokens.eos_token_id}
    config = transformers.Lfm2Config(
        vocab_size=len(tokens), max_position_embeddings=128, initializer_range=0.3, **shape, **ends
    )
    torch.manual_seed(0)
    transformers.Lfm2ForCausalLM(config).save_pretrained(path)
    return path


def test_a_hybrid_is_scored_but_does_not_generate(lfm2, gpt2, bundle, tasks, tmp_path):
    net, tokens = load_hf(str(lfm2), None, "cpu")
    assert not net.can_branch and load_hf(str(gpt2), None, "cpu")[0].can_branch
    ours = by_core(net, tokens, bundle)
    assert len({one["prediction"] for one in ours.values()}) > 1
    theirs = by_hf_of_lm_eval(lfm2, tasks, "mine_choice", add_bos_token=True)
    check_agreement(ours, *likelihoods(theirs["samples"]["mine_choice"], "filtered_resps"))
    by_harness(net, tokens, tasks, tmp_path, "mine_choice", max_per_task=2)
    with pytest.raises(UserError, match="Lfm2ForCausalLM has no key-value cache in all its layers"):
        Engine(net, tokens).generate([tokens.encode_prompt("Apples")], SamplingParams(0.0, max_new_tokens=4))


def test_a_step_of_generation_is_one_pass(gpt2):
    net, tokens = load_hf(str(gpt2), None, "cpu")
    passes = []
    net.model.transformer.h[0].register_forward_hook(lambda *_: passes.append(1))
    tokens.stop_ids = frozenset()
    params = SamplingParams(0.0, max_new_tokens=8)
    ((done,),) = Engine(net, tokens).generate([tokens.encode_prompt("Apples")], params)
    assert len(done.ids) == len(passes) == 8


def test_a_model_of_transformers_from_the_command_line(gpt2, bundle, tasks, tmp_path):
    """bpb, chat, samples, core and lm_eval in one call; the same name again adds to the scores."""
    data = data_config(tmp_path / "data")
    keys = ["data=local", f"data.path={data['path']}", "eval.tokens=2048", "eval.max_per_task=4", "eval.seq_len=96"]
    cfg = compose("evaluate", "eval=[bpb,chat,samples,core]", *keys, f"paths.runs={tmp_path}")
    described = {name: OmegaConf.merge(TaskSpec("chat", "local"), task) for name, task in data["tasks"].items()}
    cfg.data.tasks, cfg.data.eval = described, data["eval"]
    cfg.model, cfg.eval.bundle, cfg.eval.max_new_tokens = f"hf:{gpt2}", str(bundle), 8
    scores = run_evaluation(cfg)
    out = tmp_path / "hf" / folder_name(str(gpt2))
    assert scores == read_json(out / "eval.json") and scores["model"] == f"hf:{gpt2}" and scores["seq_len"] == 96
    # Random weights are worse than the uniform distribution, and bytes per token lie between one and a few.
    assert math.log2(420) / 6 < scores["bpb"] < 30
    assert scores["chat"]["choice"]["n"] == 4 and len((out / "records" / "sums.jsonl").read_text().splitlines()) == 4
    assert len(scores["samples"]) == 4 and scores["core_tasks"]["mine"]["n"] == 4
    assert (out / "core.csv").is_file() and (out / "core" / "mine.jsonl").is_file()

    done = run_cli(
        "evaluate.py",
        f"model=hf:{gpt2}",
        "eval=lm_eval",
        f"eval.include_path={tasks}",
        "eval.tasks=[mine_choice]",
        "eval.num_fewshot=2",
        "eval.max_per_task=5",
        "eval.seq_len=96",
        f"paths.runs={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout and "eval.json" in done.stdout
    merged = read_json(out / "eval.json")
    assert merged["lm_eval"]["mine_choice"]["n"] == 5 and merged["lm_eval"]["mine_choice"]["shots"] == 2
    assert merged["core_tasks"] == scores["core_tasks"]
    assert runs_table(tmp_path)[1] == []  # no run, so not in the table of runs


def test_a_run_judged_by_lm_eval(net, tokenizer, tasks, tmp_path):
    stage_dir = RunDir(tmp_path, "demo").stage_dir("sft")
    config = {"stage": {"name": "sft"}, "data": {"name": "local"}, "seed": 42, "precision": {"compute": "fp32"}}
    config |= {"trainer": {"accelerator": "cpu"}, "model": {"depth": 1}}
    write_manifest(stage_dir, {"stage": "sft", "status": "finished", "config": config, "seconds": 1.0})
    save_model_folder(stage_dir / "model", net, tokenizer)
    command = ("evaluate.py", "run=demo", "eval=lm_eval", f"eval.include_path={tasks}", f"paths.runs={tmp_path}")
    done = run_cli(*command, "eval.tasks=[mine_choice,mine_answer]", "eval.max_per_task=6", "eval.chat_template=true")
    assert done.returncode == 0, done.stderr
    scores = read_json(stage_dir / "eval.json")["lm_eval"]
    assert list(scores) == ["mine_choice", "mine_answer"]
    assert scores["mine_choice"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n", "shots"}
    assert scores["mine_answer"]["n"] == 6
    lines = [json.loads(x) for x in (stage_dir / "lm_eval" / "mine_choice.jsonl").open()]
    assert [one["index"] for one in lines] == list(range(6))
    assert lines[0]["arguments"][0][0].startswith("<|bos|><|user_start|>")
    assert "lm_eval/mine_choice/acc" in (tmp_path / "demo" / "report.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What lm-eval asks


def test_long_prompts_lose_their_beginning_and_are_counted(net, tokenizer):
    model = HarnessModel(Engine(net, tokenizer), 4)
    context, continuation = list(range(200)), [7, 8, 9]
    (long, _), (short, _) = model._loglikelihood_tokens(
        [(None, context, continuation), (None, context[-126:], continuation)]
    )
    assert model.cut == 1 and long == pytest.approx(short, abs=1e-5)  # 126 + 3 tokens: the last one is not fed


def test_many_requests_are_scored_in_parts_and_answered_in_order(net, tokenizer, monkeypatch):
    model = HarnessModel(Engine(net, tokenizer), 4)
    requests = [(None, [5, 6, i], [7] * (1 + i % 3)) for i in range(20)]
    whole = model._loglikelihood_tokens(requests)
    sizes, score_rows = [], core.score_rows
    monkeypatch.setattr("llm.eval.lm_eval_harness.CHUNK", 6)
    monkeypatch.setattr("llm.eval.lm_eval_harness.score_rows", lambda *a: sizes.append(len(a[1])) or score_rows(*a))
    parts = model._loglikelihood_tokens(requests)
    assert sizes == [6, 6, 6, 2] and model._loglikelihood_tokens([]) == []
    assert [nats for nats, _ in parts] == pytest.approx([nats for nats, _ in whole], abs=1e-4)


def test_an_empty_prompt_begins_a_text(gpt2):
    """The tokenizer of a GPT-2 puts nothing before a prompt."""
    net, tokens = load_hf(str(gpt2), None, "cpu")
    model = HarnessModel(Engine(net, tokens), 2)
    gen = {"until": [], "max_gen_toks": 6}
    empty, text = model.generate_until([SimpleNamespace(args=(p, gen), task_name="t") for p in ("", "Apples")])
    expected = Engine(net, tokens).generate([[tokens.bos_id]], SamplingParams(0.0, max_new_tokens=6))
    assert empty == tokens.decode(expected[0][0].ids) and text


def test_whole_texts_are_the_sum_over_their_windows(net, tokenizer):
    text = " ".join(TEXTS[8:60])
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    assert len(ids) > 3 * net.config.seq_len
    model = HarnessModel(Engine(net, tokenizer), 4)
    found = model.loglikelihood_rolling([SimpleNamespace(args=(text,)), SimpleNamespace(args=("Apples",))])
    expected, size = 0.0, net.config.seq_len
    starts = [*range(0, len(ids) - 1 - size, size), len(ids) - 1 - size]
    done = 0
    with torch.no_grad():
        for start in starts:
            logits = net(torch.tensor([ids[start : start + size]]))[0].log_softmax(-1)
            for k in range(done - start, size):
                expected += logits[k, ids[start + k + 1]].item()
            done = start + size
    assert found[0] == pytest.approx(expected, rel=1e-5) and found[1] > found[0] and model.cut == 0


def test_generation_ends_at_stop_texts_wherever_tokens_end(net, tokenizer):
    """The same text as without stop texts, cut at the first of them."""
    model = HarnessModel(Engine(net, tokenizer), 3)

    def answers(until, **more):
        gen = {"until": until, "max_gen_toks": 40, **more}
        return model.generate_until([SimpleNamespace(args=(p, gen), task_name="t") for p in FIRST_WORDS])

    free = answers([])
    assert len(set(free)) > 1
    stop = [free[0][9:11], free[1][4:7]]
    for text, cut in zip(free, answers(stop), strict=True):
        assert cut == text[: min((text.find(one) for one in stop if one in text), default=len(text))]
    engine = Engine(net, tokenizer)
    prompt = tokenizer.encode_prompt(FIRST_WORDS[0])
    whole, ended = (
        engine.generate([prompt], SamplingParams(0.0, max_new_tokens=40, stop=one))[0][0] for one in ((), (stop[0],))
    )
    assert len(ended.ids) < len(whole.ids) and ended.finish_reason == "stop"
    drawn = answers([], do_sample=True, temperature=1.0, top_k=50)
    assert drawn != free and drawn == answers([], do_sample=True, temperature=1.0, top_k=50)


def test_a_calculator_call_is_no_text(tokenizer):
    marks = ("python_start", "python_end", "output_start", "output_end")
    start, end, out, out_end = (tokenizer.special_id(name) for name in marks)
    call = [start, *tokenizer.encode("3*4"), end, out, *tokenizer.encode("12"), out_end]
    ids = [*tokenizer.encode("It is "), *call, *tokenizer.encode("12. Stop here")]
    assert answer_text(tokenizer, ids, ("Stop",)) == "It is 12. "
    assert answer_text(tokenizer, [*tokenizer.encode("a"), start, *tokenizer.encode("b")]) == "ab"  # never closed


def test_options_of_generation():
    params = sampling_params({"until": ["\n"], "do_sample": True, "temperature": 0.7, "top_p": 0.9}, "t")
    assert (params.temperature, params.top_p, params.stop, params.max_new_tokens) == (0.7, 0.9, ("\n",), 256)
    assert sampling_params({"until": "x", "max_tokens": 5, "num_beams": 1}, "t").temperature == 0
    with pytest.raises(UserError, match="t asks for num_beams=4"):
        sampling_params({"num_beams": 4}, "t")


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_mistakes_about_tasks(tasks, tmp_path):
    for more, message in (
        ({"tasks": ["mine_choise"]}, "no task, group or tag 'mine_choise'; near it: mine_choice"),
        ({"num_fewshot": 25}, "eval.num_fewshot=25: mine_choice has only 24 examples"),
        ({"include_path": str(tmp_path / "none")}, "eval.include_path=.*: no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            Harness(options(tasks, "mine_choice", **more) if "tasks" not in more else options(tasks, *more["tasks"]))
    (tmp_path / "t").mkdir()
    broken = {"task": "broken", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}
    (tmp_path / "t" / "broken.yaml").write_text(yaml.safe_dump(broken | {"test_split": "test"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        Harness(options(tmp_path / "t", "broken"))


def test_unknown_options_of_generation_are_found_before_any_work(tasks, tmp_path):
    content = yaml.safe_load((tasks / "mine_answer.yaml").read_text()) | {"task": "beams"}
    content["generation_kwargs"]["num_beams"] = 4
    (tmp_path / "beams.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="beams asks for num_beams=4"):
        Harness(options(tmp_path, "beams"))


def test_all_examples_but_the_one_asked_can_be_shown(net, tokenizer, tasks, tmp_path):
    content = yaml.safe_load((tasks / "mine_choice.yaml").read_text()) | {"task": "shown", "fewshot_split": "test"}
    (tmp_path / "shown.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="shown has only 23 examples"):
        Harness(options(tmp_path, "shown", num_fewshot=24))
    scores, _ = by_harness(net, tokenizer, tmp_path, tmp_path / "out", "shown", num_fewshot=23, max_per_task=3)
    assert scores["shown"]["shots"] == 23 and scores["shown"]["n"] == 3


def test_groups_of_groups_and_groups_without_a_score(net, tokenizer, tasks, tmp_path):
    content = yaml.safe_load((tasks / "mine_choice.yaml").read_text())
    for shots in (0, 1, 2):
        one = content | {"task": f"with_{shots}", "num_fewshot": shots}
        (tmp_path / f"with_{shots}.yaml").write_text(yaml.safe_dump(one))
    mean = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    groups = {
        "inner": {"task": ["with_0", "with_1"]} | mean,  # of different shots
        "outer": {"task": ["inner"]} | mean,
        "listed": {"task": ["with_2"]},
    }
    for name, group in groups.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"group": name} | group))
    harness = Harness(options(tmp_path, "outer", "listed", max_per_task=3))
    scores = harness.measure(Engine(net, tokenizer), tmp_path / "out")["lm_eval"]
    assert set(scores) == {"outer", "inner", "with_0", "with_1", "with_2"}
    assert [scores[name]["n"] for name in ("outer", "inner", "with_2")] == [6, 6, 3]
    assert [scores[name]["shots"] for name in ("outer", "inner", "with_0", "with_2")] == [None, None, 0, 2]
    assert scores["inner"]["acc"] == pytest.approx((scores["with_0"]["acc"] + scores["with_1"]["acc"]) / 2)


def test_mistakes_about_keys(tmp_path):
    core_keys = {"eval": ["core"], "bundle": str(tmp_path)}
    for changes, message in (
        ({"eval": ["lm_eval"]}, "eval=lm_eval needs the names of tasks"),
        ({"eval": ["core"], "bundle": "x", "num_fewshot": 3}, "eval.num_fewshot=3: only eval=lm_eval reads it"),
        ({"eval": ["bpb"], "tasks": ["arc_easy"]}, "eval.tasks=.*: only eval=lm_eval"),
        (core_keys | {"model": "gpt2"}, "model=gpt2: write model=hf:"),
        (core_keys | {"model": "hf:a/b", "run": "demo"}, "run=demo and model=hf:a/b: give either"),
        (core_keys | {"model": "hf:a/b", "stage": "sft"}, "stage=sft and model=hf:a/b"),
        (core_keys, "run= is missing"),
        ({"eval": ["bpb", "samples"], "model": "hf:a/b"}, r"eval=\[bpb,samples\]: model=hf:a/b comes without data"),
    ):
        changes = dict(changes)
        cfg = compose("evaluate", f"eval=[{','.join(changes.pop('eval'))}]", f"paths.runs={tmp_path / 'runs'}")
        for key, value in changes.items():
            (cfg if key in cfg else cfg.eval)[key] = value
        with pytest.raises(UserError, match=message):
            run_evaluation(cfg)


def test_models_that_cannot_be_judged(gpt2, tokenizer, tmp_path):
    tokens = transformers.AutoTokenizer.from_pretrained(gpt2)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    small["initializer_range"] = 0.5
    bert = transformers.BertConfig(vocab_size=len(tokens), **small)
    t5 = transformers.T5Config(vocab_size=len(tokens), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=1)
    body = transformers.GPT2Model(transformers.GPT2Config.from_pretrained(gpt2, tie_word_embeddings=False))
    models = {"bert": transformers.BertLMHeadModel(bert), "t5": transformers.T5Model(t5), "body": body}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokens.save_pretrained(tmp_path / name)
    net = GPT(GPTConfig(1, 1, 1, 16, 32, 64, tokenizer.vocab_size, arch="modern", smear=True)).init_weights(0)
    save_model_folder(tmp_path / "modern", net, tokenizer)
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("bert", "BertLMHeadModel is no causal language model"),
        ("t5", "no causal language model"),
        ("body", "its files lack lm_head.weight"),
        ("modern", "only arch=classic"),
        ("empty", "no config.json"),
        ("none", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_hf(str(tmp_path / name), None, "cpu")
    with pytest.raises(UserError, match="eval.seq_len=129: .* has a context of 128 tokens"):
        load_hf(str(gpt2), 129, "cpu")
    assert load_hf(str(gpt2), 64, "cpu")[0].config.seq_len == 64


def test_weights_that_cannot_be_read(gpt2, tmp_path):
    whole = (gpt2 / "model.safetensors").read_bytes()
    config = json.loads((gpt2 / "config.json").read_text())
    for name, weights, changes, message in (
        ("truncated", whole[: len(whole) // 2], {}, "transformers cannot load it"),
        ("empty", b"", {}, "transformers cannot load it"),
        ("shapes", whole, {"vocab_size": config["vocab_size"] + 8}, "have other shapes than its config.json says"),
    ):
        shutil.copytree(gpt2, tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            load_hf(str(tmp_path / name), None, "cpu")


def test_scores_with_another_context_are_not_mixed(gpt2, bundle, tmp_path):
    cfg = compose("evaluate", "eval=[core]", f"paths.runs={tmp_path}", "eval.seq_len=96")
    cfg.model, cfg.eval.bundle, cfg.eval.max_per_task = f"hf:{gpt2}", str(bundle), 2
    run_evaluation(cfg)
    run_evaluation(cfg)
    cfg.eval.seq_len = None
    with pytest.raises(UserError, match="context of 96 tokens, now it would be 128: set eval.seq_len=96"):
        run_evaluation(cfg)


def test_scores_of_another_model_are_not_overwritten(gpt2, tmp_path):
    other = tmp_path / "hf" / folder_name(str(gpt2)) / "eval.json"
    other.parent.mkdir(parents=True)
    other.write_text('{"model": "hf:other"}')
    cfg = compose("evaluate", "eval=[core]", f"paths.runs={tmp_path}")
    cfg.model, cfg.eval.bundle = f"hf:{gpt2}", "x"
    with pytest.raises(UserError, match="holds scores of model=hf:other"):
        HFSubject(cfg)


def test_without_lm_eval_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm.eval.lm_eval_harness", None)
    monkeypatch.delitem(sys.modules, "llm.eval.lm_eval_harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[lm_eval\]'"):
        load_harness(SimpleNamespace())


def test_the_hub(gpt2, bundle, tmp_path):
    """A model of the hub is fetched once; what the hub refuses, and a hub that is away, are one line each."""
    files = {path.name: path.read_bytes() for path in gpt2.iterdir()}
    with Hub(files) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        keys = ("eval=[core]", f"eval.bundle={bundle}", "eval.max_per_task=4", f"paths.runs={tmp_path / 'runs'}")
        done = run_cli("evaluate.py", "model=hf:fathom/test", *keys, **env)
        assert done.returncode == 0, done.stderr
        assert read_json(tmp_path / "runs" / "hf" / "fathom--test" / "eval.json")["model"] == "hf:fathom/test"
        done = run_cli("evaluate.py", "model=hf:fathom/other", *keys, **env)
        assert done.returncode == 2 and "the hub refuses it (401)" in done.stderr, done.stderr
    done = run_cli("evaluate.py", "model=hf:fathom/test", *keys, **env)
    assert done.returncode == 0, done.stderr  # from what was fetched
    done = run_cli("evaluate.py", "model=hf:fathom/unknown", *keys, **env)
    assert done.returncode == 2 and "the hub cannot be reached" in done.stderr, done.stderr
