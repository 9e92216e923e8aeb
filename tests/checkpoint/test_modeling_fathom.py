"""Our own architectures in transformers, by the program in their model/ folders, against our network."""

import json

import pytest
import torch

from llm.checkpoint.hf_config import PROGRAM
from llm.checkpoint.model_folder import save_model_folder
from llm.inference import Engine, SamplingParams
from llm.model.config import GPTConfig
from llm.model.gpt import GPT
from llm.tokenizer.bpe import Tokenizer
from llm.tokenizer.chat_format import render_prompt
from llm.tokenizer.compression import SAMPLE_TEXTS

transformers = pytest.importorskip("transformers")
MODERN = {
    "arch": "modern", "qk_scale": 1.2, "window_pattern": "SL", "window_multiple": 4, "window_divisor": 12,
    "value_embeds": True, "residual_scalars": True, "smear": True, "backout": True, "n_kv_head": 2,
}  # fmt: skip
FEBRUARY = {"smear": False, "backout": False, "gate_channels": 32, "gate_range": 2.0, "window_multiple": None}
FORMS = {
    "modern": MODERN,
    "february": MODERN | FEBRUARY,
    "further": MODERN
    | {"exclusive_attention": True, "attention_gate": True, "activation": "leaky_relu_squared", "asymmetric_cap": True},
    "key offset": MODERN | {"key_offset": True, "window_pattern": "LS"},
    "narrow keys": MODERN | {"key_offset": True, "window_pattern": "LS", "qk_dim": 12},
    "paired heads": MODERN | {"paired_heads": "short", "qk_dim": 8},
    "all heads paired": MODERN | {"paired_heads": "all", "key_offset": True},
    "paired heads and documents": MODERN | {"paired_heads": "all", "bos_id": 324},
    "copies": MODERN | {"copy_candidate": True, "copy_bos": 324, "smear": False},
    "copies and n-grams": MODERN | {"copy_candidate": True, "copy_bos": 324, "ngrams": (2, 3), "ngram_bos": 324},
    "n-grams": MODERN | {"ngrams": (2, 3), "ngram_bos": 324},
    "n-grams in values": MODERN | {"ngrams": (3,), "ngram_bos": 324, "ngram_into": "values", "smear": False},
    "no switches": {"arch": "modern"},
    "loops": MODERN | {"loops": 2},
    "documents": MODERN | {"bos_id": 324},
    "key offset and documents": MODERN | {"key_offset": True, "bos_id": 324, "window_pattern": "L"},
    "yarn": {"arch": "modern", "rope_scaling": "yarn", "rope_original": 24, "n_kv_head": 1},
    "reward model": MODERN | {"scalar_head": True},
    "gpt2": {"arch": "gpt2", "softcap": None, "vocab_multiple": 1, "tied": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(SAMPLE_TEXTS.values(), 333)


def saved(folder, tok, form: str):
    """Our network with random weights, and what transformers makes of its folder."""
    shape = {"n_layer": 3, "n_head": 4, "n_kv_head": 4, "head_dim": 16, "n_embd": 64, "seq_len": 96}
    net = GPT(GPTConfig(**(shape | {"vocab_size": tok.vocab_size} | FORMS[form]))).init_weights(0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    save_model_folder(folder, net, tok)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    assert PROGRAM.read_bytes() == (folder / PROGRAM.name).read_bytes()
    return net, theirs.eval()


def draw(*shape) -> torch.Tensor:
    return torch.randint(320, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_logits_with_padding_on_either_side_and_with_a_cache(form, tok, tmp_path):
    net, theirs = saved(tmp_path / "model", tok, form)
    ids, close = draw(3, 60), {"atol": 1e-5, "rtol": 0}
    if form.startswith("copies"):
        ids %= 4
    if form.endswith("documents") or "n-grams" in form or form == "copies":
        ids[:, [0, 20, 21]] = tok.bos_id
    expected = net(ids)
    assert torch.allclose(theirs(ids).logits, expected, **close)
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    assert torch.allclose(theirs(ids, attention_mask=mask).logits[1, :40], expected[1, :40], **close)
    left, mask = torch.full_like(ids[:, :40], tok.bos_id), torch.zeros(3, 40, dtype=torch.long)
    for row, n in enumerate((40, 25, 1)):
        left[row, 40 - n :], mask[row, 40 - n :] = ids[row, :n], 1
    found = theirs(left, attention_mask=mask).logits
    for row, n in enumerate((40, 25, 1)):
        assert torch.allclose(found[row, 40 - n :], expected[row, :n], **close)
    if form.endswith("documents"):
        return  # with a cache a row is one conversation
    cache, parts = None, []
    for start, stop in ((0, 30), (30, 31), (31, 40)):
        output = theirs(left[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    cached = torch.cat(parts, dim=1)
    for row, n in enumerate((40, 25, 1)):
        assert torch.allclose(cached[row, 40 - n :], expected[row, :n], **close)


@pytest.mark.parametrize("form", ["modern", "copies and n-grams"])
def test_generate_pipeline_chat_template_and_a_step_of_a_trainer(form, tok, tmp_path):
    folder = tmp_path / "model"
    net, theirs = saved(folder, tok, form)
    hf_tok = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Who are you?"}]
    prompt = hf_tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert prompt == render_prompt(tok, chat)
    greedy = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    short = prompt[-3:]
    ids = torch.tensor([prompt, [tok.bos_id] * (len(prompt) - 3) + short])
    mask = torch.ones_like(ids)
    mask[1, :-3] = 0
    found = theirs.generate(ids, attention_mask=mask, **greedy)[:, len(prompt) :]
    for row, one in enumerate((prompt, short)):
        rest = torch.tensor([one])
        for _ in range(10):
            with torch.no_grad():
                rest = torch.cat((rest, net(rest)[:, -1:].argmax(-1)), dim=1)
        assert found[row].tolist() == rest[0, len(one) :].tolist()
    beams = [theirs.generate(ids[:1], num_beams=3, use_cache=use, **greedy) for use in (True, False)]
    assert torch.equal(*beams)  # rows of the cache change places
    made = Engine(net, tok).generate([prompt], SamplingParams(temperature=0.0, max_new_tokens=10))[0][0]
    assert made.ids == found[0].tolist()[: len(made.ids)]
    pipe = transformers.pipeline("text-generation", model=str(folder), trust_remote_code=True)
    assert pipe(chat, max_new_tokens=4)[0]["generated_text"][-1]["role"] == "assistant"

    rows = [{"input_ids": row, "labels": row} for row in draw(4, 20)]
    args = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=0.1
    )
    trainer = transformers.Trainer(theirs.train(), args, train_dataset=rows)
    before = theirs.resid_scalars.detach().clone()
    trainer.train()
    assert not torch.equal(before, theirs.resid_scalars)
    trainer.save_model(tmp_path / "tuned")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(draw(1, 9)).logits, theirs.eval()(draw(1, 9)).logits)


def test_gradients_are_those_of_our_network(tok, tmp_path):
    net, theirs = saved(tmp_path / "model", tok, "modern")
    ids = draw(2, 50)
    net.train()(ids[:, :-1], ids[:, 1:]).backward()
    theirs(ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(grads) == {name for name, _ in net.named_parameters()}
    for name, p in net.named_parameters():
        grad = grads[name]
        assert (p.grad[: len(grad)] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


def test_an_option_that_the_program_does_not_know_is_refused(tok, tmp_path):
    saved(tmp_path / "model", tok, "modern")
    path = tmp_path / "model/config.json"
    content = json.loads(path.read_text())
    content["fathom"]["model"]["later_switch"] = True
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not compute later_switch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)


def test_without_trust_nothing_runs(tok, tmp_path):
    saved(tmp_path / "model", tok, "modern")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=False)
