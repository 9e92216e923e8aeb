"""`python -m llm.export`: folders and files that others load, cards, refusals, and the push to a hub."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import REPO, compose
from hub_server import Hub, point_to
from safetensors.torch import load_file
from serving_run import make_run

from llm.checkpoint.model_folder import save_model_folder
from llm.errors import UserError
from llm.export.card import TAG, model_card, trail_of
from llm.export.hub import push
from llm.export.run_export import run_export
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.model.qwen3 import Qwen3
from llm.model.qwen3_config import Qwen3Config
from llm.run import content
from llm.run.content import fingerprints
from llm.tokenizer.bpe import NAMED_PATTERNS, Tokenizer, checked_pattern
from llm.tokenizer.compression import SAMPLE_TEXTS

transformers = pytest.importorskip("transformers")
TEXT = "It's 1,234 °C, DON'T we'LL naïve 中文 हिन्दी 한국어 👍\r\n\n\tdef f(x_1):  return  x\n   \n"


def finish(stage, net, tokenizer, **more):
    """Save a network as a finished stage."""
    save_model_folder(stage / "model", net, tokenizer)
    manifest = {"stage": stage.name, "status": "finished", "parent": None, "metrics": {"loss": 1.0}}
    manifest |= {"fingerprints": fingerprints(stage / "model"), **more}
    (stage / "run.json").write_text(json.dumps(manifest))


def qwen3(tokenizer, **more) -> Qwen3:
    shape = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "head_dim": 128, "n_embd": 64, "seq_len": 96, "mlp_width": 96}
    net = Qwen3(Qwen3Config(**(shape | {"vocab_size": tokenizer.vocab_size} | more))).init_weights(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return net.eval()


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(SAMPLE_TEXTS.values(), 400, checked_pattern("qwen2"))


def export(root, *args):
    run_export(compose("export", f"paths.runs={root}/runs", *args))


def test_a_folder_for_transformers_with_a_card(tmp_path, capsys):
    make_run(tmp_path / "runs", steps=1)
    stage = tmp_path / "runs/tiny/sft"
    manifest = json.loads((stage / "run.json").read_text())
    manifest |= {
        "seconds": 7200.0,
        "device_seconds": 7200.0,
        "steps": 12,
        "tokens": 3456,
        "config": {"data": {"name": "embedded"}, "device_price": 3.0},
    }
    (stage / "run.json").write_text(json.dumps(manifest))
    export(tmp_path, "run=tiny", "dtype=bf16", "licence=mit")
    out = tmp_path / "exports/tiny-sft-hf"
    assert f"{out}: README.md, chat_template.jinja, config.json" in capsys.readouterr().out
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not any(info.values())
    ours = load_file(stage / "model/model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, ours[name].bfloat16())
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "## Results" in card and "| sft | embedded | 12 | 3,456 | 2.00 | $6.00 |" in card
    with pytest.raises(UserError, match="out=.*tiny-sft-hf exists; set another out="):
        export(tmp_path, "run=tiny")
    export(tmp_path, "run=tiny", "overwrite=true")
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    assert "license:" not in (out / "README.md").read_text()


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_files_are_compared_once_or_not_at_all(tok, to, tmp_path, monkeypatch):
    if to == "gguf":
        pytest.importorskip("gguf")
    finish(tmp_path / "runs/q/sft", qwen3(tok), tok)
    compare, seen = content.wrong_file, []
    monkeypatch.setattr(content, "wrong_file", lambda folder: seen.append(folder) or compare(folder))
    export(tmp_path, "run=q", f"to={to}", f"out={tmp_path}/compared")
    assert len(seen) == 1
    (tmp_path / "runs/q/sft/model/chat_template.jinja").write_text("changed")
    with pytest.raises(UserError, match="chat_template.jinja has 7 bytes"):
        export(tmp_path, "run=q", f"to={to}", f"out={tmp_path}/refused")
    export(tmp_path, "run=q", f"to={to}", f"out={tmp_path}/taken", "verify=false")
    assert len(seen) == 2 and (tmp_path / "taken").is_dir()


@pytest.mark.parametrize("out", ["runs/tiny/sft", "runs/tiny/sft/model", "notes", "notes/todo.txt"])
def test_overwrite_replaces_nothing_but_an_export(out, tmp_path):
    make_run(tmp_path / "runs", steps=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("buy milk")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"out=.*{out} is not what an export has written"):
        export(tmp_path, "run=tiny", f"out={tmp_path / out}", "overwrite=true")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", [".", "./", "../here", "{here}"])
def test_the_folder_that_a_command_runs_in_is_not_replaced(out, tmp_path, monkeypatch):
    make_run(tmp_path / "runs", steps=1)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match=r"out=.* is the folder that this command runs in"):
        export(tmp_path, "run=tiny", f"out={out.format(here=here)}", "overwrite=true")
    assert list(here.iterdir()) == []


def test_a_card_follows_the_parents(tmp_path):
    parents = {"pretrain": None, "sft": "pretrain", "dpo": "sft", "grpo": "sft"}
    for stage, parent in parents.items():
        (tmp_path / "a" / stage).mkdir(parents=True)
        manifest = {"stage": stage, "status": "finished", "parent": parent and str(tmp_path / "a" / parent / "model")}
        (tmp_path / "a" / stage / "run.json").write_text(json.dumps(manifest))
    assert list(trail_of(tmp_path / "a/grpo")) == ["pretrain", "sft", "grpo"]


def test_a_card_follows_parents_into_other_runs(tok, tmp_path, monkeypatch):
    """The runs lie elsewhere now than their run.json says, and the command runs in a stage folder."""
    runs, net, spent = tmp_path / "runs", qwen3(tok), {"device_seconds": 7200.0, "seconds": 7200.0}
    rows = {"a/tokenizer": None, "a/pretrain": "a/tokenizer", "b/sft": "a/pretrain", "c/sft": "b/sft", "c/dpo": "c/sft"}
    for name, parent in rows.items():
        config = {"device_price": 3.0, "data": {"name": name[0]}}
        finish(runs / name, net, tok, parent=parent and f"/gone/{parent}/model", config=config, **spent)
        (runs / name / "metrics.csv").write_text("step,bpb\n1,0.5\n")
    monkeypatch.chdir(runs / "a/pretrain")
    names = ["a/tokenizer", "a/pretrain", "b/sft", "sft", "dpo"]
    assert list(trail_of(runs / "c/dpo")) == names
    card = model_card(runs / "c/dpo", net, "hf", None)
    for name, letter in zip(names, "aabcc", strict=True):
        assert f"| {name} | {letter} | - | - | 2.00 | $6.00 |" in card
    assert "| benchmark | a/pretrain | b/sft | sft | dpo |" in card and "started from" not in card
    assert "| bits per byte, text | 0.5000 | - |" in card


@pytest.mark.parametrize(
    ("init_from", "parent", "name", "on_hub"),
    [
        ("hf:owner/name", "runs/.hf/0123/model", "owner/name", True),
        ("hf:/home/me/a model", "runs/.hf/0123/model", "a model", False),
        ("nanochat:~/base_checkpoints/d20", "runs/.nanochat/0123/model", "d20", False),
        (None, "/gone/a/pretrain/model", "a/pretrain", False),
    ],
)
def test_a_card_names_the_model_of_others_that_it_began_with(tok, init_from, parent, name, on_hub, tmp_path):
    net = qwen3(tok)
    finish(tmp_path / "b/sft", net, tok, parent=parent, config={"init_from": init_from, "data": {}})
    card = model_card(tmp_path / "b/sft", net, "hf", None)
    assert f"It started from {name}, whose data and cost are not in the table." in card
    assert yaml.safe_load(card.split("---")[1]).get("base_model") == (name if on_hub else None)


@pytest.mark.parametrize("licence", ["other: mine", "no", "a\n---\nlibrary_name: x", "ö" * 200, "{", "apache-2.0"])
def test_any_licence_stands_in_the_head_of_a_card(tok, licence, tmp_path):
    net = qwen3(tok)
    finish(tmp_path / "b/sft", net, tok)
    head = model_card(tmp_path / "b/sft", net, "hf", licence).partition("\n\n#")[0]
    assert head.startswith("---\n") and head.endswith(f"\ntags:\n- {TAG}\n- qwen3\n---")
    found = yaml.safe_load(head.removeprefix("---").removesuffix("---"))
    assert found["license"] == licence and found["library_name"] == "transformers"


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_holds_the_model_and_its_tokenizer(tok, tied, tmp_path):
    """transformers reads the file by code of its own, which takes heads of 128 for granted: logits and ids are ours."""
    gguf = pytest.importorskip("gguf")
    net = qwen3(tok, tied=tied)
    finish(tmp_path / "runs/q/sft", net, tok)
    export(tmp_path, "run=q", "to=gguf", f"out={tmp_path}/out")
    path = tmp_path / "out/q-sft-fp32.gguf"
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen3" and fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["qwen3.attention.key_length"] == 128 and fields["qwen3.rope.freq_base"] == 1e6
    assert fields["tokenizer.ggml.bos_token_id"] == tok.bos_id
    assert fields["tokenizer.ggml.tokens"][tok.bos_id] == "<|bos|>" and fields["tokenizer.ggml.token_type"][-1] == 3
    assert fields["tokenizer.ggml.merges"][0].count(" ") == 1 and "<|bos|>" in fields["tokenizer.chat_template"]
    names = {tensor.name for tensor in reader.tensors}
    assert len(names) == 11 * 2 + (2 if tied else 3) and ("output.weight" in names) is not tied
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=path.name).eval()
    ids = torch.randint(tok.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert torch.allclose(theirs(ids).logits, net(ids), atol=1e-5)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=path.name)
    assert found.encode(TEXT, add_special_tokens=False) == tok.encode(TEXT)


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", "BF16"), ("fp16", "F16")])
def test_matrices_of_a_gguf_file_are_rounded_and_norms_are_not(tok, dtype, kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    net = qwen3(tok)
    finish(tmp_path / "runs/q/sft", net, tok)
    export(tmp_path, "run=q", "to=gguf", f"dtype={dtype}", f"out={tmp_path}/out")
    tensors = {one.name: one for one in gguf.GGUFReader(tmp_path / f"out/q-sft-{dtype}.gguf").tensors}
    matrix, norm = tensors["blk.1.attn_q.weight"], tensors["blk.1.attn_q_norm.weight"]
    assert matrix.tensor_type.name == kind and norm.tensor_type.name == "F32"
    found = torch.from_numpy(np.array(gguf.quants.dequantize(matrix.data, matrix.tensor_type)))
    wanted = net.transformer.h[1].attn.c_q.weight.detach()
    assert torch.equal(found.view_as(wanted), wanted.to(getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[dtype])))


@pytest.mark.parametrize(("to", "name"), [("hf", "model.layers.0.mlp.up_proj.weight"), ("gguf", "h.0.mlp.c_fc.weight")])
def test_weights_that_a_format_cannot_hold_are_refused(tok, to, name, tmp_path):
    if to == "gguf":
        pytest.importorskip("gguf")
    net = qwen3(tok)
    with torch.no_grad():
        net.transformer.h[0].mlp.c_fc.weight[0, 0] = -1e5
    finish(tmp_path / "runs/q/sft", net, tok)
    with pytest.raises(UserError, match=rf"dtype=fp16: .*{name} holds numbers up to 1e\+05.*take dtype=bf16"):
        export(tmp_path, "run=q", f"to={to}", "dtype=fp16", f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()
    export(tmp_path, "run=q", f"to={to}", "dtype=bf16", f"out={tmp_path}/out")


def test_the_pattern_qwen2_cuts_as_qwen2_does():
    import regex

    theirs = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for text in (*SAMPLE_TEXTS.values(), TEXT):
        assert regex.findall(NAMED_PATTERNS["qwen2"], text) == regex.findall(theirs, text)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tok, tmp_path):
    plain = Tokenizer.train(SAMPLE_TEXTS.values(), 333)
    classic = GPT(GPTConfig(1, 1, 1, 16, 16, 32, plain.vocab_size)).init_weights(0)
    cases = {
        "a": (classic, plain, "does not know arch=classic"),
        "b": (qwen3(tok, qk_norm=False), tok, "arch.qk_norm=false"),
        "c": (qwen3(plain), plain, "stage.pattern=qwen2"),
        "d": (qwen3(tok, rope_scaling="yarn", rope_original=32), tok, "rope_scaling=yarn"),
    }
    for run, (net, tokenizer, says) in cases.items():
        finish(tmp_path / f"runs/{run}/sft", net, tokenizer)
        with pytest.raises(UserError, match=says):
            export(tmp_path, f"run={run}", "to=gguf")
    assert not (tmp_path / "exports").exists()


def test_a_push_brings_all_files_to_the_hub(tok, tmp_path, monkeypatch, capsys):
    finish(tmp_path / "runs/q/sft", qwen3(tok), tok)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no token of the hub; set HF_TOKEN"):
        export(tmp_path, "run=q", "push=me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(UserError, match="push=model: a model on the hub is called <owner>/<name>"):
        export(tmp_path, "run=q", "push=model")
    assert not (tmp_path / "exports").exists()
    with Hub({}) as hub, monkeypatch.context() as patch:
        point_to(hub, patch, tmp_path / "hf")
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        export(tmp_path, "run=q", "push=me/model", "private=false")
        out = tmp_path / "exports/q-sft-hf"
        assert hub.received == {path.name: path.read_bytes() for path in out.iterdir()}
        assert hub.made[0]["name"] == "model" and hub.made[0]["organization"] == "me"
        assert not hub.made[0].get("private") and hub.made[0].get("visibility") in (None, "public")
        assert f"pushed to {hub.url}/me/model" in capsys.readouterr().out
        hub.push_status = 403
        with pytest.raises(UserError, match="push=me/model: the hub refuses or cannot be reached .*403.* is complete"):
            export(tmp_path, "run=q", "push=me/model", "overwrite=true")


def test_a_push_without_a_network_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="push=me/model: the hub refuses or cannot be reached .*refused.* is complete"):
        push(tmp_path, "me/model", private=True)


def test_the_command_names_mistakes_and_lists_its_settings(tmp_path):
    def run(*args):
        command = [sys.executable, "-m", "llm.export", *args]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True)

    done = run("to=onnx")
    assert done.returncode == 2 and done.stderr.startswith("error: to=onnx") and "hf, gguf" in done.stderr
    done = run("--help")
    assert done.returncode == 0 and "python -m llm.export run=demo to=hf" in done.stdout and "licence" in done.stdout
