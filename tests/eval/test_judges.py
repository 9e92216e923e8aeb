"""Judges from outside: models of transformers scored by our code, our models scored by lm-eval, and that they agree."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED, compose, needs_shared
from eval_data import data_config
from judging import (
    by_core,
    by_harness,
    by_hf_of_lm_eval,
    check_agreement,
    likelihoods,
    write_bundle,
    write_tasks,
)
from omegaconf import OmegaConf

from llm.checkpoint.model_folder import save_model_folder
from llm.config.data_schema import TaskSpec
from llm.errors import UserError
from llm.eval.evaluate import folder_name, run_evaluation
from llm.experiments.runs import stage_rows
from llm.inference.engine import Engine
from llm.inference.sampling import SamplingParams
from llm.run.stage_folder import RunDir, write_manifest
from llm.tokenizer.chat_format import render_prompt
from llm.tokenizer.compression import SAMPLE_TEXTS
from llm.utils.files import read_json

transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from llm.checkpoint.hf_model import load_hf  # noqa: E402

REAL_BUNDLE = SHARED / "data" / "eval_bundle"
REAL_FILES = {
    "arc_easy": REAL_BUNDLE / "eval_data" / "world_knowledge" / "arc_easy.jsonl",
    "hellaswag": REAL_BUNDLE / "eval_data" / "language_understanding" / "hellaswag.jsonl",
}

pytest_plugins = ["judging"]  # its fixtures
pytestmark = pytest.mark.usefixtures("offline")

# ---------------------------------------------------------------------------------------------------------------------
# Agreement


@pytest.mark.slow
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


@pytest.mark.slow
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
@needs_shared("data/eval_bundle")
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


def test_few_shapes_change_no_token_of_a_gpt2(gpt2, monkeypatch):
    net, tokens = load_hf(str(gpt2), None, "cpu")
    prompts, found = [[tokens.bos_id, *range(5, 5 + n)] for n in (0, 3, 31, 40, 120)], []
    for keeps in (False, True):
        monkeypatch.setattr("llm.inference.static_batch.keeps_shapes", lambda device, dtype, keeps=keeps: keeps)
        found.append(Engine(net, tokens).generate(prompts, SamplingParams(0.0, max_new_tokens=20), 2))
    assert found[0] == found[1] and any(completion.ids for (completion, _) in found[0])


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
    assert not net.can_share_prefix and load_hf(str(gpt2), None, "cpu")[0].can_share_prefix
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


def test_a_model_of_transformers_is_judged_by_all_sections(gpt2, bundle, tasks, tmp_path, capsys):
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

    asked = [f"eval.include_path={tasks}", "eval.tasks=[mine_choice]", "eval.num_fewshot=2", "eval.max_per_task=5"]
    again = compose("evaluate", "eval=[lm_eval]", "eval.seq_len=96", *asked, f"paths.runs={tmp_path}")
    again.model = f"hf:{gpt2}"
    run_evaluation(again)
    out_text = capsys.readouterr().out
    assert "acc_norm" in out_text and "eval.json" in out_text
    merged = read_json(out / "eval.json")
    assert merged["lm_eval"]["mine_choice"]["n"] == 5 and merged["lm_eval"]["mine_choice"]["shots"] == 2
    assert merged["core_tasks"] == scores["core_tasks"]
    assert list(stage_rows(tmp_path)) == []  # no run, so not in the table of runs


def test_a_run_judged_by_lm_eval(net, tokenizer, tasks, tmp_path):
    stage_dir = RunDir(tmp_path, "demo").stage_dir("sft")
    config = {"stage": {"name": "sft"}, "seed": 42, "precision": {"compute": "fp32"}}
    config |= {"trainer": {"accelerator": "cpu"}, "model": {"depth": 1}}
    config["data"] = {"name": "local", "tasks": {}, "mixture": {}, "eval": []}
    write_manifest(stage_dir, {"stage": "sft", "status": "finished", "config": config, "seconds": 1.0})
    save_model_folder(stage_dir / "model", net, tokenizer)
    asked = [f"eval.include_path={tasks}", "eval.tasks=[mine_choice,mine_answer]", "eval.max_per_task=6"]
    lines = ("run=demo", *asked, "eval.chat_template=true", f"paths.runs={tmp_path}")
    run_evaluation(compose("evaluate", "eval=[lm_eval]", *lines))
    scores = read_json(stage_dir / "eval.json")["lm_eval"]
    assert list(scores) == ["mine_choice", "mine_answer"]
    assert scores["mine_choice"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n", "shots"}
    assert scores["mine_answer"]["n"] == 6
    lines = [json.loads(x) for x in (stage_dir / "lm_eval" / "mine_choice.jsonl").open()]
    assert [one["index"] for one in lines] == list(range(6))
    assert lines[0]["arguments"][0][0].startswith("<|bos|><|user_start|>")
    assert "lm_eval/mine_choice/acc" in (tmp_path / "demo" / "report.md").read_text()
