"""Checkpoints of nanochat: read without running anything in them, and only in forms that are known."""

import json
import pickle

import pytest
import tiktoken
import torch
import torch.nn.functional as F

from llm.checkpoint.model_folder import load_model_folder
from llm.checkpoint.nanochat import imported_folder
from llm.checkpoint.nanochat_tokenizer import read_tokenizer
from llm.errors import UserError
from llm.tokenizer.bpe import SPECIAL_TOKENS

# nanochat's own pattern, in which contractions are case-insensitive
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
MERGES = [b"th", b"the", b" a", b"an", b"in"]
LAYERS, HEADS, WIDTH, LENGTH = 4, 2, 64, 512
VOCAB, PADDED = 256 + len(MERGES) + len(SPECIAL_TOKENS), 320


def encoding(special=SPECIAL_TOKENS) -> tiktoken.Encoding:
    ranks = {bytes([b]): b for b in range(256)} | {merge: 256 + i for i, merge in enumerate(MERGES)}
    ids = {name: len(ranks) + i for i, name in enumerate(special)}
    return tiktoken.Encoding("rustbpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=ids)


def tensors(form: str) -> dict[str, torch.Tensor]:
    """Random weights under nanochat's names: form 2025, february or july."""
    draw = torch.Generator().manual_seed(1)

    def new(*shape):
        return 0.3 * torch.randn(*shape, generator=draw)

    found = {"transformer.wte.weight": new(PADDED, WIDTH).bfloat16(), "lm_head.weight": new(PADDED, WIDTH)}
    for i in range(LAYERS):
        for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj"):
            found[f"transformer.h.{i}.{name}.weight"] = new(WIDTH, WIDTH)
        found[f"transformer.h.{i}.mlp.c_fc.weight"] = new(4 * WIDTH, WIDTH)
        found[f"transformer.h.{i}.mlp.c_proj.weight"] = new(WIDTH, 4 * WIDTH)
        if form != "2025" and i % 2 == (LAYERS - 1) % 2:
            found[f"value_embeds.{i}.weight"] = new(PADDED, WIDTH)
            found[f"transformer.h.{i}.attn.ve_gate.weight"] = new(HEADS, 32 if form == "february" else 12)
    if form != "2025":
        found |= {"resid_lambdas": 1 + new(LAYERS), "x0_lambdas": new(LAYERS)}
    if form == "july":
        found |= {"smear_gate.weight": new(1, 24), "smear_lambda": new(1), "backout_lambda": new(1)}
    return found


def checkpoint(folder, form: str, weights: dict | None = None, **changes):
    """A folder as nanochat leaves it: base_checkpoints/d4 and tokenizer/."""
    place = folder / "base_checkpoints" / "d4"
    place.mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    torch.save(tensors(form) if weights is None else weights, place / "model_000700.pt")
    model = {"sequence_len": LENGTH, "vocab_size": VOCAB, "n_layer": LAYERS, "n_head": HEADS, "n_kv_head": HEADS}
    model |= {"n_embd": WIDTH} | ({} if form == "2025" else {"window_pattern": "SL"}) | changes
    (place / "meta_000700.json").write_text(json.dumps({"step": 700, "val_bpb": 1.0, "model_config": model}))
    (folder / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding()))
    return place


def rms(x):
    return x * (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()


def logits(w: dict, ids: torch.Tensor, form: str, length: int) -> torch.Tensor:
    """nanochat's forward written down by its formulas, for one row of ids: (T, V)."""
    T, D, july = len(ids), WIDTH // HEADS, form == "july"
    base, scale, span = (100_000.0, 1.2, 128) if july else (10_000.0, 1.0, length // 2)
    freq = base ** (-torch.arange(0, D, 2) / D)
    angle = torch.outer(torch.arange(T), freq)[:, None]
    x = rms(w["transformer.wte.weight"].float()[ids])
    if july:
        gate = w["smear_lambda"] * torch.sigmoid(x[1:, :24] @ w["smear_gate.weight"].T)
        x = torch.cat((x[:1], x[1:] + gate * x[:-1]))
    outputs = []
    x0, back = x, torch.arange(T)[:, None] - torch.arange(T)[None]
    for i in range(LAYERS):
        get = lambda name, i=i: w[f"transformer.h.{i}.{name}.weight"]  # noqa: E731
        if form != "2025":
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h = rms(x)
        q, k, v = ((h @ get(f"attn.c_{n}").T).view(T, HEADS, D) for n in "qkv")
        if f"value_embeds.{i}.weight" in w:
            gates = get("attn.ve_gate")
            gate = (3 if july else 2) * torch.sigmoid(h[:, : gates.shape[1]] @ gates.T)
            v = v + gate[..., None] * w[f"value_embeds.{i}.weight"][ids].view(T, HEADS, D)
        q, k = (
            scale * rms(torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()), -1))
            for a, b in (q.chunk(2, -1), k.chunk(2, -1))
        )
        seen = (back >= 0) & ((back <= span) if form != "2025" and i % 2 == 0 else True)
        scores = torch.einsum("qhd,khd->hqk", q, k) / D**0.5
        y = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).reshape(T, WIDTH)
        x = x + y @ get("attn.c_proj").T
        x = x + F.relu(rms(x) @ get("mlp.c_fc").T).square() @ get("mlp.c_proj").T
        outputs.append(x)
    x = x - w["backout_lambda"] * outputs[LAYERS // 2] if july else x
    return 15 * torch.tanh(rms(x) @ w["lm_head.weight"][:VOCAB].T / 15)


@pytest.mark.parametrize(("form", "length"), [("2025", 512), ("february", 512), ("february", 405), ("july", 512)])
def test_logits_are_those_of_its_formulas(tmp_path, form, length):
    """A row longer than all windows, in each of the three forms; February's are half the context, whatever it is."""
    checkpoint(tmp_path, form, sequence_len=length)
    net, tokenizer = load_model_folder(imported_folder(f"nanochat:{tmp_path}/base_checkpoints/d4", tmp_path / "runs"))
    ids = torch.randint(VOCAB, (400,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = net.eval()(ids[None])[0, :, :VOCAB]
    assert torch.allclose(found, logits(tensors(form), ids, form, length), atol=2e-3)
    text = "The ant in the tin, it'LL be 1234 — où ?"
    assert tokenizer.encode(text) == encoding().encode_ordinary(text)
    assert tokenizer.bos_id == encoding().encode("<|bos|>", allowed_special="all")[0]


def test_a_compiled_checkpoint_and_the_file_itself_are_read(tmp_path):
    compiled = {f"_orig_mod.{name}": value for name, value in tensors("2025").items()}
    place = checkpoint(tmp_path, "2025", compiled)
    folder = imported_folder(f"nanochat:{place}/model_000700.pt", tmp_path / "runs")
    assert folder == imported_folder(f"nanochat:{place}", tmp_path / "runs")
    assert load_model_folder(folder)[0].config.seq_len == LENGTH


class Forged:
    def __reduce__(self):
        return (open, ("forged-was-run", "w"))


@pytest.mark.parametrize("thing", [Forged(), {"mergeable_ranks": {}}, encoding().special_tokens_set, b"x"])
def test_a_forged_tokenizer_is_refused_and_nothing_runs(tmp_path, monkeypatch, thing):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(thing))
    with pytest.raises(UserError, match="not a tokenizer of nanochat"):
        read_tokenizer(path)
    path.write_bytes(pickle.dumps(encoding())[:-50])
    with pytest.raises(UserError, match="not a tokenizer of nanochat"):
        read_tokenizer(path)
    assert not (tmp_path / "forged-was-run").exists()


def test_other_special_tokens_are_refused(tmp_path):
    (path := tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding(("<|bos|>", "<|end|>"))))
    with pytest.raises(UserError, match=r"its special tokens are <\|bos\|>, <\|end\|>"):
        read_tokenizer(path)


def without(name):
    return {key: value for key, value in tensors("july").items() if key != name}


@pytest.mark.parametrize(
    ("form", "weights", "changes", "says"),
    [
        ("july", without("transformer.h.1.mlp.c_fc.weight"), {}, "tensor transformer.h.1.mlp.c_fc.weight is missing"),
        ("july", tensors("july") | {"bigram.weight": torch.zeros(3)}, {}, "tensor bigram.weight is unknown"),
        ("july", without("smear_lambda"), {}, "form of nanochat that is not known"),
        ("2025", None, {"n_experts": 8}, "unknown keys n_experts"),
        ("2025", None, {"n_embd": 32}, "has shape"),
        ("2025", None, {"vocab_size": 260}, "has 270 tokens, the model"),
        ("2025", {"a": 1}, {}, "something else than tensors"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, form, weights, changes, says):
    place = checkpoint(tmp_path, form, weights, **changes)
    with pytest.raises(UserError, match=says):
        imported_folder(f"nanochat:{place}", tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no checkpoint there"):
        imported_folder(f"nanochat:{tmp_path}", tmp_path / "runs")
    place = checkpoint(tmp_path, "2025")
    (tmp_path / "tokenizer" / "tokenizer.pkl").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.pkl is missing"):
        imported_folder(f"nanochat:{place}", tmp_path / "runs")
