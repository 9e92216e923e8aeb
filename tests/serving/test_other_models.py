"""Models that are no run's: `model=hf:<folder>` of serve.py."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")  # of the fixtures' module

from llm.checkpoint.hf_model import load_hf_tokenizer  # noqa: E402
from llm.checkpoint.model_folder import save_model_folder  # noqa: E402
from llm.errors import UserError  # noqa: E402
from llm.inference.sampling import SamplingParams  # noqa: E402
from llm.serving.app import model_name  # noqa: E402
from llm.serving.chat import load_chat_model, stream_reply  # noqa: E402

pytest_plugins = ["judging"]  # its fixtures
QUESTION = [{"role": "user", "content": "Who?"}]


def test_a_model_of_transformers_can_be_chatted_with(gpt2):
    model = load_chat_model(f"hf:{gpt2}")
    assert model.name == gpt2.name and "context of 128 tokens" in model.summary and "no chat format" in model.notes[0]
    *_, reply = stream_reply(model.engine, QUESTION, SamplingParams(temperature=0.0, max_new_tokens=8))
    (part,) = reply.content
    assert reply.done and part["type"] == "text" and part["text"]


def test_a_folder_of_ours_is_loaded_by_our_classes(net, tokenizer, tmp_path):
    save_model_folder(tmp_path / "exported", net, tokenizer)
    model = load_chat_model(f"hf:{tmp_path / 'exported'}")
    assert model.name == "exported" and model.engine.tokenizer.fingerprint == tokenizer.fingerprint
    assert model.notes == () and model.examples == ()


def test_the_servers_tokenizer_is_the_workers(gpt2, net, tokenizer, tmp_path):
    save_model_folder(tmp_path / "exported", net, tokenizer)
    for folder in (gpt2, tmp_path / "exported"):
        server, worker = load_hf_tokenizer(str(folder)), load_chat_model(f"hf:{folder}").engine.tokenizer
        for text in ("Apples and stones", "12 é 你好"):
            assert server.encode_prompt(text) == worker.encode_prompt(text)
        assert (server.vocab_size, server.special_ids) == (worker.vocab_size, worker.special_ids)
        assert server.stop_ids == worker.stop_ids


def test_a_name_says_what_it_is_and_stands_alone():
    def name(**values):
        return model_name(SimpleNamespace(**{"run": None, "stage": None, "paths": None} | values))

    assert name(model="hf:openai-community/gpt2") == "hf:openai-community/gpt2"
    for wrong in ({"model": "gpt2"}, {"model": "hf:gpt2", "run": "demo"}, {"model": "hf:gpt2", "stage": "sft"}):
        with pytest.raises(UserError, match="model="):
            name(**wrong)


def test_a_folder_without_a_model_is_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(UserError, match="hf:"):
        load_chat_model(f"hf:{tmp_path}")
    with pytest.raises(UserError, match="hf:"):
        load_hf_tokenizer(str(tmp_path))
