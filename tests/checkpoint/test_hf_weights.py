"""init_from=hf: models of transformers become ours, whole or not at all, and are trained on."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import compose
from hub_server import Hub, point_to
from safetensors.torch import load_file, save_file

from llm.checkpoint import hf_weights
from llm.checkpoint.hf_weights import imported_folder
from llm.checkpoint.model_folder import load_model_folder
from llm.errors import UserError
from llm.run.stage_folder import read_metrics
from llm.stages.run_stage import run_stage
from llm.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from llm.tokenizer.compression import SAMPLE_TEXTS

transformers = pytest.importorskip("transformers")
PADDED = 352  # rows of their tables
SMALL = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "vocab_size": PADDED, "eos_token_id": 330,
}  # fmt: skip
FORMS = {
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False, "rope_theta": 50_000.0, "head_dim": 24}),
}


def checkpoint(folder, form: str, own_names: bool = False):
    """A model of transformers with random weights and a byte-level tokenizer that has special tokens of its own."""
    kind, more = FORMS[form]
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SMALL, bos_token_id=329, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    tok = Tokenizer.train(SAMPLE_TEXTS.values(), 333)
    tok.save(folder)
    (folder / "fathom_tokenizer.json").unlink()
    if not own_names:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"] = content["added_tokens"][:1]
        content["added_tokens"][0] |= {"id": 330, "content": "<|im_end|>"}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return model, tok


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_tokens_keep_their_rows_and_logits(form, tmp_path, capsys):
    model, tok = checkpoint(tmp_path / "theirs", form)
    folder = imported_folder(f"hf:{tmp_path}/theirs", tmp_path / "runs")
    net, found = load_model_folder(folder)
    n = 333 - len(SPECIAL_TOKENS)
    assert found.tokens == tok.tokens and net.config.arch == "qwen3" and net.config.qk_norm is (form == "qwen3")
    ids = torch.randint(n, (2, 50))
    assert torch.allclose(net(ids)[..., :n], model(ids).logits[..., :n], atol=1e-5)
    table = model.get_input_embeddings().weight
    assert torch.equal(net.transformer.wte.weight[found.bos_id], table[329])
    assert torch.allclose(net.transformer.wte.weight[found.bos_id + 1], table.mean(dim=0), atol=1e-6)
    said = capsys.readouterr().out
    assert f"{PADDED - n - 1} rows of its tables belong to tokens that are not kept" in said
    assert "8 special tokens begin as the mean of all rows" in said
    assert imported_folder(f"hf:{tmp_path}/theirs", tmp_path / "runs") == folder and not capsys.readouterr().out


def test_jobs_that_start_at_once_read_it_once(tmp_path, monkeypatch):
    checkpoint(tmp_path / "theirs", "llama")
    read, times = hf_weights.read_hf, []

    def slow(folder):
        times.append(1)
        time.sleep(0.3)
        return read(folder)

    monkeypatch.setattr(hf_weights, "read_hf", slow)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(imported_folder, f"hf:{tmp_path}/theirs", tmp_path / "runs") for _ in range(3)]
        (folder,) = {job.result() for job in jobs}
    assert len(times) == 1 and load_model_folder(folder)
    assert [path.name for path in (tmp_path / "runs/.hf").iterdir()] == [folder.parent.name]


@torch.no_grad()
def test_our_own_special_tokens_keep_their_rows(tmp_path):
    model, tok = checkpoint(tmp_path / "theirs", "qwen3", own_names=True)
    net, found = load_model_folder(imported_folder(f"hf:{tmp_path}/theirs", tmp_path / "runs"))
    assert found.fingerprint == tok.fingerprint
    assert torch.equal(net.transformer.wte.weight[:333], model.get_input_embeddings().weight[:333])


@torch.no_grad()
@pytest.mark.parametrize("bos", [-1, True, PADDED, None])
def test_the_first_token_takes_the_row_of_the_end_where_no_row_is_named(bos, tmp_path):
    model, _ = checkpoint(tmp_path / "theirs", "qwen3")
    _config(bos_token_id=bos)(tmp_path / "theirs")
    net, found = load_model_folder(imported_folder(f"hf:{tmp_path}/theirs", tmp_path / "runs"))
    assert torch.equal(net.transformer.wte.weight[found.bos_id], model.get_input_embeddings().weight[330])


@torch.no_grad()
def test_the_old_key_of_rotary_positions_goes_before_the_new_one(tmp_path):
    """Both name plain positions, and transformers takes the wavelength of the first."""
    checkpoint(tmp_path / "theirs", "qwen3")
    both = {"rope_scaling": {"rope_type": "default", "rope_theta": 3e4}, "rope_parameters": {"rope_theta": 5e4}}
    _config(**both)(tmp_path / "theirs")
    net, found = load_model_folder(imported_folder(f"hf:{tmp_path}/theirs", tmp_path / "runs"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    ids = torch.randint(found.bos_id, (2, 50))
    assert net.config.rope_base == 3e4
    assert torch.allclose(net(ids)[..., : found.bos_id], theirs(ids).logits[..., : found.bos_id], atol=1e-5)


@pytest.mark.parametrize(
    ("fault", "reason"), [(None, "Expecting value"), (("cut", 3), "peer closed connection"), (500, "500")]
)
def test_a_hub_that_answers_wrongly_is_a_line(fault, reason, tmp_path, monkeypatch):
    with Hub({}) as hub:
        point_to(hub, monkeypatch, tmp_path)
        path = "/api/models/me/model/revision/main"
        hub.web[path], hub.faults = b"<html>sign in to this network</html>", [(path, fault)] * 20
        with pytest.raises(UserError, match=f"init_from=hf:me/model: the hub cannot be .*{reason}.*Check the network"):
            imported_folder("hf:me/model", tmp_path / "runs")


def _weights(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def _config(**changes):
    def edit(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return edit


WRONG = {
    "missing": (_weights(lambda t: t.pop("model.norm.weight")), "tensor model.norm.weight is missing"),
    "unknown": (_weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(2)})), "is unknown"),
    "shape": (_weights(lambda t: t.update({"model.norm.weight": torch.ones(3)})), r"has shape \(3,\), not \(48,\)"),
    "integers": (_weights(lambda t: t.update({"model.norm.weight": torch.ones(48).char()})), "holds I8"),
    "another head": (_weights(lambda t: t.update({"lm_head.weight": torch.ones(PADDED, 48)})), "but they differ"),
    "type": (_config(model_type="gemma"), "model_type gemma: only models of the types qwen3, llama"),
    "biases": (_config(attention_bias=True), "attention_bias=True"),
    "rotary": (_config(rope_parameters={"rope_type": "llama3"}), "rotary positions of type llama3"),
    "old rotary key": (_config(rope_scaling={"type": "yarn", "factor": 2.0}), "rotary positions of type yarn"),
    "rotary word": (_config(rope_scaling="yarn", rope_parameters=None), "rope_scaling=yarn is no object"),
    "not finite": (
        _weights(lambda t: t["model.norm.weight"][3:4].fill_(math.nan)),
        "norm.weight has values that are not",
    ),
    "shape of nothing": (_config(num_hidden_layers=None), "config.json.*n_layer"),
    "heads": (_config(num_key_value_heads=3), "is not a shape that can be"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "there is no tokenizer.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "its weights cannot be read"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "init_from=hf:.*has no config.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_whole_is_refused(case, tmp_path):
    edit, message = WRONG[case]
    checkpoint(tmp_path / "theirs", "qwen3")
    edit(tmp_path / "theirs")
    with pytest.raises(UserError, match=message):
        imported_folder(f"hf:{tmp_path}/theirs", tmp_path / "runs")
    assert not list(tmp_path.glob("runs/.hf/*/model"))


@pytest.mark.slow
def test_pretraining_and_finetuning_go_on_from_it_with_a_shorter_context(tmp_path):
    checkpoint(tmp_path / "theirs", "qwen3")
    for stage, parent in (("pretrain", f"hf:{tmp_path}/theirs"), ("sft", "a/pretrain")):
        args = ["experiment=tiny", f"paths.runs={tmp_path}/runs", "trainer=cpu", "run=a", f"stage={stage}"]
        args += [f"init_from={parent}", "optim=adamw", "optim.lr=1e-4", "stage.sample_every=0"]
        run_stage(compose("train", *args, "model.seq_len=128", "max_steps=2"))
        net, _ = load_model_folder(tmp_path / f"runs/a/{stage}/model")
        assert (net.config.arch, net.config.seq_len, net.config.n_embd, net.config.head_dim) == ("qwen3", 128, 48, 32)
    rows = read_metrics(tmp_path / "runs/a/pretrain")
    assert rows[-1]["bpb"] < rows[0]["bpb"]


RL = {"stage.prompts_per_step": 2, "stage.samples_per_prompt": 4, "stage.max_new_tokens": 12, "stage.eval_examples": 2}


@pytest.mark.parametrize("stage", ["grpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_reinforcement_learning_begins_with_it(stage, tmp_path):
    """Answers are drawn and rewarded by their length, weights move, and a model is handed over."""
    checkpoint(tmp_path / "theirs", "qwen3")
    first, _ = load_model_folder(imported_folder(f"hf:{tmp_path}/theirs", tmp_path / "runs"))
    args = ["experiment=tiny", f"paths.runs={tmp_path}/runs", "trainer=cpu", "run=a", f"stage={stage}", "max_steps=2"]
    args += [f"init_from=hf:{tmp_path}/theirs", "optim=adamw", "optim.lr=1e-3", "data.size=40", "stage.reward=length"]
    args += ["stage.reward_options={length: {words: 5}}"]
    args += [f"{key}={value}" for key, value in RL.items()]
    run_stage(compose("train", *args))
    net, tokenizer = load_model_folder(tmp_path / f"runs/a/{stage}/model")
    assert (net.config.arch, net.config.n_embd, tokenizer.vocab_size) == ("qwen3", 48, first.config.vocab_size)
    assert not torch.equal(net.transformer.wte.weight, first.transformer.wte.weight)
    assert max(row["step"] for row in read_metrics(tmp_path / f"runs/a/{stage}")) == 2
