"""Writes config.json and generation_config.json of a model folder, by which transformers knows the model."""

from pathlib import Path

from llm.model.config import GPTConfig
from llm.model.fused_ops import NORM_EPS
from llm.tokenizer.bpe import Tokenizer

FORMAT_VERSION = 1
PROGRAM = Path(__file__).with_name("modeling_fathom.py")  # goes into folders of architectures that are ours alone


def hf_config(config: GPTConfig, tokenizer: Tokenizer) -> dict:
    """Return the content of config.json: what transformers' own class would default otherwise, ours in `fathom`.

    Architectures that transformers has no class for name Fathom as their type, and the class in the file PROGRAM, which
    runs only where a user trusts it.
    """
    name, kind = hf_class(config)
    content = {
        "architectures": [name],
        "model_type": kind,
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.seq_len,
        "hidden_act": "gelu_new" if config.arch == "gpt2" else "relu2",
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": rope_parameters(config),
        "final_logit_softcapping": config.softcap,
        "attention_bias": config.arch == "gpt2",
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.special_id("<|assistant_end|>"),
        "pad_token_id": tokenizer.special_id("<|assistant_end|>"),
        "fathom": {
            "format_version": FORMAT_VERSION,
            "model": config.to_dict(),
            "tokenizer": tokenizer.fingerprint,
        },
    }
    if config.arch == "qwen3":
        content |= {"hidden_act": "silu", "intermediate_size": config.inner, "rms_norm_eps": config.norm_eps}
        content |= {"use_sliding_window": False, "mlp_bias": False}
        del content["final_logit_softcapping"]
    if has_program(config):
        module = PROGRAM.stem
        content["auto_map"] = {"AutoConfig": f"{module}.FathomConfig", "AutoModelForCausalLM": f"{module}.{name}"}
    return content


def has_program(config: GPTConfig) -> bool:
    """Return whether transformers needs the file PROGRAM beside the weights: it has no class for our own forms."""
    return config.arch in ("modern", "gpt2")


def hf_class(config: GPTConfig) -> tuple[str, str]:
    """Return the class of transformers that a model is, and its model_type."""
    if config.arch == "qwen3":
        return ("Qwen3ForCausalLM", "qwen3") if config.qk_norm else ("LlamaForCausalLM", "llama")
    return ("NanoChatForCausalLM", "nanochat") if config.arch == "classic" else ("FathomForCausalLM", "fathom")


def rope_parameters(config: GPTConfig) -> dict:
    """Return `rope_parameters` of config.json: plain, or those of YaRN without its temperature, which we leave out."""
    if config.rope_factor == 1.0:
        return {"rope_type": "default", "rope_theta": config.rope_base}
    yarn = {"factor": config.rope_factor, "original_max_position_embeddings": config.rope_original}
    return {"rope_type": "yarn", "rope_theta": config.rope_base, "attention_factor": 1.0} | yarn


def generation_config(tokenizer: Tokenizer) -> dict:
    """Return the content of generation_config.json: answers end with the assistant's turn or the document."""
    end = tokenizer.special_id("<|assistant_end|>")
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": [end, tokenizer.bos_id], "pad_token_id": end}
