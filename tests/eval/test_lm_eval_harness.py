"""Tests of what lm-eval asks of a model, of what our harness answers, and of mistakes about tasks, keys and models."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import compose
from hub_server import Hub
from judging import FIRST_WORDS, TEXTS, by_harness, options
from processes import run_python

from llm.checkpoint.model_folder import save_model_folder
from llm.errors import UserError
from llm.eval import core
from llm.eval.evaluate import HFSubject, folder_name, load_harness, run_evaluation
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.utils.files import read_json

transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from llm.checkpoint.hf_model import load_hf  # noqa: E402
from llm.eval.lm_eval_harness import Harness, HarnessModel, answer_text, sampling_params  # noqa: E402

pytest_plugins = ["judging"]  # its fixtures
pytestmark = pytest.mark.usefixtures("offline")

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
    """Check that a text equals the one without stop texts, cut at the first stop."""
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


@pytest.mark.slow
def test_tasks_of_lm_eval_are_known_beside_ours(tasks, monkeypatch):
    """The other tests leave them out, which saves seconds for each."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("llm.eval.lm_eval_harness.task_manager", TaskManager)
    with pytest.raises(UserError, match="no task, group or tag 'arc_eazy'; near it: .*arc_easy"):
        Harness(options(tasks, "arc_eazy"))


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
        ({"eval": ["samples"], "core_tasks": ["x"]}, r"eval.core_tasks=\['x'\]: only eval=\[core\] reads it"),
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
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("bert", "BertLMHeadModel is no causal language model"),
        ("t5", "no causal language model"),
        ("body", "its files lack lm_head.weight"),
        ("empty", "no config.json"),
        ("none", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_hf(str(tmp_path / name), None, "cpu")
    with pytest.raises(UserError, match="eval.seq_len=129: .* has a context of 128 tokens"):
        load_hf(str(gpt2), 129, "cpu")
    assert load_hf(str(gpt2), 64, "cpu")[0].config.seq_len == 64


AUTO_MAP = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": [None, "own.Tokens"]}


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_a_model_of_ours_is_loaded_by_our_classes(tokenizer, tmp_path, arch):
    net = GPT(GPTConfig(1, 1, 1, 16, 32, 64, tokenizer.vocab_size, arch=arch)).init_weights(0)
    save_model_folder(tmp_path / "model", net, tokenizer)
    add_program(tmp_path / "model")
    loaded, tokens = load_hf(str(tmp_path / "model"), 32, "cpu")
    assert type(loaded) is GPT and type(tokens) is type(tokenizer) and loaded.config.seq_len == 32
    ids = torch.arange(32)[None]
    assert torch.equal(loaded(ids), net(ids))
    with pytest.raises(UserError, match="eval.seq_len=65: .* has a context of 64 tokens"):
        load_hf(str(tmp_path / "model"), 65, "cpu")


def test_a_program_in_a_folder_is_neither_run_nor_asked_about(gpt2, tmp_path, monkeypatch):
    """Check a model that transformers knows, which loads without its program, and one that needs it, which does not."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the program"))
    for name, changes in (("known", {}), ("unknown", {"model_type": "own"})):
        shutil.copytree(gpt2, tmp_path / name)
        add_program(tmp_path / name, **changes)
    assert load_hf(str(tmp_path / "known"), None, "cpu")[0].config.seq_len == 128
    with pytest.raises(UserError, match="it brings code of its own, which is not run here"):
        load_hf(str(tmp_path / "unknown"), None, "cpu")


def add_program(folder, **changes):
    """Put a program into a model's folder that fails the test if it runs, and name it as transformers wants it."""
    for file, auto_map in (("config.json", AUTO_MAP), ("tokenizer_config.json", AUTO_MAP)):
        content = json.loads((folder / file).read_text()) | {"auto_map": auto_map} | changes
        (folder / file).write_text(json.dumps(content))
    (folder / "own.py").write_text("raise SystemExit('a program of the folder was run')")
    (folder / "manifest.json").unlink(missing_ok=True)  # its checksums are those of the files before


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


# evaluate.py twice, for two models, in one process: the libraries read the address of the hub when they are imported.
EVALUATE = """
import sys
from llm.cli.app import run_app
models, keys, statuses = sys.argv[1:3], sys.argv[3:], []
for model in models:
    sys.argv[1:] = [f"model=hf:{model}", *keys]
    try:
        run_app("evaluate", "llm.eval.evaluate.run_evaluation")
    except SystemExit as end:
        statuses.append(end.code or 0)
print(*statuses)
"""


@pytest.mark.slow
def test_the_hub(gpt2, bundle, tmp_path):
    """A model of the hub is fetched once; what the hub refuses, and a hub that is away, are one line each."""
    files = {path.name: path.read_bytes() for path in gpt2.iterdir()}
    with Hub(files) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        keys = ("eval=[core]", f"eval.bundle={bundle}", "eval.max_per_task=4", f"paths.runs={tmp_path / 'runs'}")
        done = run_python(EVALUATE, "fathom/test", "fathom/other", *keys, env=env)
        assert done.stdout.endswith("\n0 2\n") and done.stderr.count("error: ") == 1, done.stderr
        assert read_json(tmp_path / "runs" / "hf" / "fathom--test" / "eval.json")["model"] == "hf:fathom/test"
        assert "error: model=hf:fathom/other" in done.stderr and "the hub refuses it (401)" in done.stderr, done.stderr
    done = run_python(EVALUATE, "fathom/test", "fathom/unknown", *keys, env=env)  # the first from what was fetched
    assert done.stdout.endswith("\n0 2\n") and done.stderr.count("error: ") == 1, done.stderr
    assert "error: model=hf:fathom/unknown" in done.stderr and "the hub cannot be reached" in done.stderr, done.stderr
